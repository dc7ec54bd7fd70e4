"""The box: whoever wakes a sleeper has done what it sleeps for, and wakes nobody else."""

from decoupled.messages import Message
from decoupled.runtime.box import Box, Sleeper
from decoupled.runtime.contract import Want


def box(**ports):
    owner = Sleeper("owner")
    return owner, Box(owner, ports or {"a": 1, "b": 1})


def test_a_message_that_does_not_meet_the_want_wakes_nobody():
    owner, it = box()
    assert it.take([Want(("a", "b"))]) is None
    it.put("a", Message(0))
    assert owner.what is not None and not owner.sleep(0)
    it.put("b", Message(0))
    assert owner.what is None and owner.sleep(0)
    assert it.found == (Want(("a", "b")), (Message(0), Message(0)))


def test_a_message_left_at_a_full_port_is_put_in_by_who_makes_room():
    owner, it = box()
    first, second = Sleeper("first"), Sleeper("second")
    it.put("a", Message(0))
    assert not it.room("a") and it.room("b")
    for n, sender in enumerate((first, second), 1):
        it.leave("a", Message(n), sender, lambda: "room")
    assert it.take([Want(("a",))]) == (Want(("a",)), (Message(0),))
    assert first.sleep(0) and not second.sleep(0) and not it.room("a")
    assert [it.take([Want(("a",))])[1][0].key for _ in range(2)] == [1, 2]  # type: ignore[index]
    assert second.sleep(0) and owner.what is None


def test_everybody_can_be_woken_at_once_and_a_sleeper_says_what_for():
    owner, it = box()
    sender = Sleeper("sender")
    it.take([Want(("a",), 3)])
    it.put("a", Message(0))
    it.leave("a", Message(1), sender, lambda: "room")
    assert owner.what is not None and owner.what() == "[(('a',), 3)]; waiting there: {'a': [0]}"
    it.wake_all()
    assert owner.sleep(0) and sender.sleep(0) and it.found is None
    it.wake_all()  # nobody sleeps
