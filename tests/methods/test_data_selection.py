"""Data selection: the rule followed, whose losses are whose, who waits for whom, and every chooser's equation."""

import contextlib
import copy
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer, registry
from decoupled.errors import OperationError, ProtocolError, UserError
from decoupled.messages import Data, Losses
from decoupled.method import Method, selecting
from decoupled.methods.data_selection.assistant import Assistant, Features, Tokens, Values
from decoupled.methods.data_selection.irreducible import Rho
from decoupled.methods.data_selection.scored import Ranks, Selector
from decoupled.methods.data_selection.weighted import Paced, Pruning
from decoupled.runtime.contract import Observer
from decoupled.runtime.simulated import Simulated
from decoupled.sample_losses import SampleLosses, each
from decoupled.selection import Choice, Chooser, Selection
from decoupled.selector import matching
from decoupled.testing import OPTIMIZERS, Case, Tap, compare, train

CASE = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2), sizes=(6,) * 7 + (5,))
BOSSES = ["pipedream", "greedy_local", {"name": "gpipe", "microbatches": 2}]
NAMES = [name for name in registry.methods() if registry.family(name) == "data_selection"]


def data(count, inputs=None, targets=None, start=0) -> Data:
    x = torch.zeros(count, 2) if inputs is None else inputs
    y = torch.zeros(count, dtype=torch.int64) if targets is None else targets
    return Data(0, batch=0, inputs=x, targets=y, indices=torch.arange(start, start + count))


def told(losses, threshold=0.0) -> Losses:
    losses = torch.as_tensor(losses)
    return Losses(0, batch=0, indices=torch.arange(len(losses)), losses=losses, threshold=threshold)


# --- the rule -----------------------------------------------------------------------------------------------------


class Ready(Features):
    """The assistant's probability is the input itself."""

    width, lr, l2, scale = 1, 0.0, 0.0, 0.0

    def __call__(self, samples: Any):
        return torch.logit(samples.inputs)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_samples_are_accepted_as_often_as_the_rule_says(gamma, seed):
    """Chi-square over 100,000 draws in ten classes of p; the assistant is asked about 1 - gamma of them only."""
    assistant = Assistant(Ready(), gamma, False, seed)
    assistant._weights = torch.ones(1)
    assistant.begin(1)
    p = torch.linspace(0.05, 0.95, 10).repeat(10_000)
    accepted = torch.zeros(len(p))
    for rows in torch.arange(len(p)).split(1000):
        kept = assistant.choose(data(len(rows), p[rows, None]), None).rows
        accepted[rows[kept]] = 1
    observed = accepted.view(10_000, 10).sum(0).tolist()
    expected = [10_000 * (gamma + (1 - gamma) * float(q)) for q in p[:10]]
    both = chisquare(observed + [10_000 - n for n in observed], expected + [10_000 - n for n in expected], ddof=9)
    assert both.pvalue > 0.01
    wrong = [10_000 * float(q) for q in p[:10]]  # the control: without the floor
    assert chisquare(observed, [w * sum(observed) / sum(wrong) for w in wrong]).pvalue < 1e-6
    assert assistant.consulted == pytest.approx((1 - gamma) * len(p), rel=0.02)


@pytest.mark.parametrize("gamma", [0.1, 0.6])
def test_unbiased_weights_give_the_mean_over_all(gamma):
    """Easy samples have little loss here, so the plain mean over what is kept is too high."""
    assistant = Assistant(Ready(), gamma, False, 0, unbiased=True)
    assistant._weights = torch.ones(1)
    assistant.begin(1)
    p = torch.linspace(0.05, 0.95, 10)
    losses, chance = 3 * p, gamma + (1 - gamma) * p
    weighted, plain, counts = [], [], torch.zeros(10)
    for _ in range(4000):
        choice = assistant.choose(data(10, p[:, None]), None)
        assert choice.weights is not None
        rows = torch.arange(10) if choice.rows is None else choice.rows
        torch.testing.assert_close(choice.weights, (chance.mean() / chance)[rows])
        counts[rows] += 1
        weighted.append(float((choice.weights * losses[rows]).sum()))
        plain.append(float(losses[rows].sum()))
    error = 4 * torch.tensor(weighted).std() / 4000**0.5
    expected = float(chance.sum() * losses.mean())  # as many as are kept, at the mean of all
    assert abs(sum(weighted) / 4000 - expected) < error
    assert sum(plain) / 4000 > expected + error
    torch.testing.assert_close(counts / 4000, chance, rtol=0.0, atol=0.03)
    assert assistant.consulted == 40_000


def test_the_first_epoch_accepts_all_and_the_gate_follows_the_accuracy():
    assistant = Assistant(Ready(), 0.2, True, 0)
    assistant._weights = torch.ones(1)
    samples = data(1000, torch.full((1000, 1), 0.01))
    assistant.begin(0)
    assert assistant.choose(samples, None) == Choice()
    assistant.begin(1)
    assert assistant.choose(samples, None) == Choice()  # nothing is known of the assistant: 1 - c = 1
    for _ in range(10):
        assistant.hear(told(torch.zeros(1000), threshold=1.0), samples)  # it is right: all are easy
    expected = 1 - (1 - 0.95**10)
    kept = assistant.choose(samples, None).rows
    assert kept is not None
    assert len(kept) / 1000 == pytest.approx(expected + (1 - expected) * 0.01, abs=0.05)


def test_the_assistant_learns_who_has_much_loss():
    """Logistic regression as written: one step by hand, in which a class's scalar decays once per sample."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    samples = data(3, x, torch.tensor([0, 1, 1]))
    assistant = Assistant(Values(x, 2), 0.3, False, 0)
    before = assistant._weights.clone()
    assistant.hear(told([3.0, 1.0, 5.0], threshold=2.0), samples)
    z = torch.tensor([1.0, 0.0, 1.0])
    features = torch.cat([x, F.one_hot(torch.tensor([0, 1, 1])).float()], 1)
    g = torch.sigmoid(features @ before) - z
    pixels = before[:2] - 0.01 / 3 * (x.T @ g + 1e-3 * before[:2])
    classes = before[2:].clone()
    for i, c in enumerate([0, 1, 1]):
        classes[c] -= 0.01 / 3 * (g[i] + 1e-3 * before[2 + c])
    torch.testing.assert_close(assistant._weights, torch.cat([pixels, classes]))


def test_features_of_text():
    tokens = Tokens(4)
    samples = data(2, torch.tensor([[0, 0, 1], [2, 2, 2]]))
    tokens.scan(samples)
    two = float(torch.log(torch.tensor(2.0)))
    expected = [
        [0.5, 0.5, 0, 0, two * 2 / 3, two / 3, 0, 0, 0.2, 1],
        [0, 0, 1, 0, 0, 0, two, 0, 0.1, 1],
    ]
    torch.testing.assert_close(tokens(samples), torch.tensor(expected))


WORDS = torch.tensor([[7, 299, 0], [3, 256, 299]])


@pytest.mark.parametrize("name", ["autoassist", "screener_net", "rho_loss"])
def test_tokens_from_256_on_are_known_where_the_network_has_as_many_classes(name):
    """They met other tokens' weights in the assistant, and were an IndexError in the screener."""
    selection = registry.make(name).selection
    assert selection is not None
    chooser, samples = selection.chooser(WORDS, (300, 3), 0), data(2, WORDS, WORDS.flip(1))
    for epoch, losses in enumerate([None, torch.ones(2)]):
        chooser.begin(epoch)
        chooser.choose(samples, losses)
        chooser.hear(told([1.0, 2.0]), samples)
    few = selection.chooser(WORDS, (299, 3), 0)
    few.begin(0)
    with pytest.raises(UserError, match=r"tokens 0 to 298 .* the data have 0 to 299; number them so") as caught:
        few.choose(samples, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
@pytest.mark.parametrize("name", ["autoassist", "screener_net"])
def test_tokens_that_nothing_tells_the_number_of_are_refused(name, runtime):
    blocks = [nn.Sequential(nn.Embedding(300, 4), nn.Flatten()), nn.Linear(12, 3)]
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["sgd"], "runtime": runtime}
    batch = (WORDS, torch.tensor([0, 2]), torch.arange(2))
    with Trainer(blocks, name, **given) as trainer, pytest.raises(UserError, match="knows tokens 0 to 255"):
        trainer.fit([batch])


def test_whole_numbers_of_an_image_are_no_tokens():
    images, selection = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8), registry.make("screener_net").selection
    assert selection is not None
    weights = selection.chooser(images, (3,), 0).choose(data(2, images), None).weights
    assert weights is not None and weights.shape == (2,)


# --- losses, sample by sample -------------------------------------------------------------------------------------


WEIGHT = torch.tensor([1.0, 2.0, 0.5])


@pytest.mark.parametrize("shape", [(7,), (7, 4)])
@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(WEIGHT), nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), lambda y, t: F.nll_loss(y.log_softmax(1), t),
    ],
    ids=["function", "module", "weight", "ignored", "smoothing", "other"],
)  # fmt: skip
def test_the_mean_of_the_losses_is_the_loss(loss, shape):
    torch.manual_seed(0)
    output, targets = torch.randn(7, 3, *shape[1:], dtype=torch.float64), torch.randint(3, shape)
    if isinstance(loss, nn.CrossEntropyLoss):
        loss = loss.double()
    losses = each(loss, output, targets)
    assert losses.shape == (7,)
    torch.testing.assert_close(losses.mean(), loss(output, targets))
    if loss is F.cross_entropy:
        alone = torch.stack([loss(output[i : i + 1], targets[i : i + 1]) for i in range(7)])
        torch.testing.assert_close(losses, alone)


def test_probabilities_as_targets_and_losses_of_numbers():
    output = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.softmax(output.flip(0), 1)
    torch.testing.assert_close(each(F.cross_entropy, output, targets).mean(), F.cross_entropy(output, targets))
    torch.testing.assert_close(each(F.mse_loss, output, targets), ((output - targets) ** 2).mean(1))


def test_weights_go_into_the_mean_and_without_them_the_loss_is_untouched():
    losses, output, targets = SampleLosses(F.cross_entropy), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    plain = replace(data(4), targets=targets)
    with losses.of(plain):
        assert losses(output, targets).equal(F.cross_entropy(output, targets))
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5])
    with losses.of(replace(plain, weights=weights)):
        by_hand = (F.cross_entropy(output, targets, reduction="none") * weights).sum() / 4
        torch.testing.assert_close(losses(output, targets), by_hand)


@pytest.mark.parametrize(
    "boss", ["greedy_local", "predsim", "infopro", {"name": "infopro", "contrast": True}, "drtp"], ids=str
)
def test_every_sample_has_its_weight_in_every_term(boss):
    """An objective is linear in the weights, and the plain one where all are 1."""
    worker: Any = train(CASE, {"name": "screener_net", "boss": boss}).trainer.workers[0]
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(6, *worker.place.shapes[0], generator=draw, dtype=torch.float64)
    x, targets = torch.randn(6, 4, generator=draw, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 2, 2])

    def objective(weights):
        given = replace(data(6, x, targets), weights=weights)
        with worker.losses.of(given):
            return float(worker.lower.objective(y, given).detach())

    terms = torch.tensor([objective(one) for one in torch.eye(6)])
    assert len(set(terms.tolist())) == 6
    assert objective(torch.ones(6)) == pytest.approx(objective(None), rel=1e-5)
    weights = torch.rand(6, generator=draw)
    assert objective(weights) == pytest.approx(float(weights @ terms), rel=1e-5)


def test_the_threshold_is_a_moving_average_of_the_batches_until_now():
    tap = Tap()
    train(CASE, {"name": "autoassist", "lag": 2}, observers=[tap])
    packets: list[Any] = [m for _, m in tap.messages if isinstance(m, Losses)]
    assert len(packets) == len(CASE.sizes)
    total = count = 0.0
    for packet in packets:
        total, count = 0.75 * total + 0.25 * float(packet.losses.sum()), 0.75 * count + 0.25 * len(packet.losses)
        assert packet.threshold == pytest.approx(total / count, rel=1e-5)


# --- whose losses are whose ---------------------------------------------------------------------------------------


class Spy(Chooser):
    """Keeps a random half, and looks at what it hears."""

    def __init__(self, heard):
        self.heard = heard

    def begin(self, epoch):
        self._draws = torch.Generator().manual_seed(epoch)

    def choose(self, samples: Any, losses):
        return Choice((torch.rand(len(samples.indices), generator=self._draws) < 0.6).nonzero()[:, 0])

    def hear(self, told, samples):
        self.heard.append((told, samples))


@dataclass(frozen=True, kw_only=True)
class Spying(Selection):
    heard: Any = None

    def chooser(self, inputs, outputs, seed):
        return Spy(self.heard)


def spying(boss, **options) -> tuple[Method, list[tuple[Losses, Data]]]:
    heard: list[tuple[Losses, Data]] = []
    return selecting(registry.make(boss), Spying(heard=heard, **options)), heard


def uneven(seed, slow):
    """Any durations and delays; `slow` times as long for what the selector learns."""
    draw = random.Random(seed)
    return Simulated(
        cost=lambda actor, operation: draw.random() * (slow if operation.startswith("L") else 1),
        latency=lambda edge, message: 0.0 if edge.drops else draw.choice([0.0, 0.1, 3.0]) * draw.random(),
    )


@settings(max_examples=25)
@given(
    boss=st.sampled_from(BOSSES), seed=st.integers(0, 10**6), slow=st.sampled_from([0, 1, 30]),
    packets=st.integers(1, 3), ready=st.integers(1, 4), lag=st.sampled_from([0, 0, 1, 3]), pool=st.integers(1, 2),
)  # fmt: skip
def test_losses_name_exactly_the_samples_of_their_batch(boss, seed, slow, packets, ready, lag, pool):
    """Whatever is late or dropped: indices, inputs, targets and losses that are heard belong together."""
    method, heard = spying(boss, lag=lag, packets=packets, ready=ready, pool=pool)
    tap = Tap()
    run = train(CASE, method, runtime=uneven(seed, slow), observers=[tap], epochs=2)
    x, y = (torch.cat(part) for part in list(zip(*CASE.batches(), strict=True))[:2])
    sent: dict[Any, Any] = {m.key: m for e, m in tap.messages if e.source == "feeder" and e.target == "block0"}
    for packet, samples in heard:
        mine = sent[packet.key]
        assert packet.batch == mine.batch == samples.batch
        assert packet.indices is not None and samples.inputs is not None and samples.targets is not None
        assert packet.indices.tolist() == mine.indices.tolist()
        assert samples.indices is not None and samples.indices.tolist() == packet.indices.tolist()
        assert samples.inputs.equal(x[packet.indices]) and samples.targets.equal(y[packet.indices])
    counted = run.trainer.selected()
    assert counted is not None
    assert counted.dropped == 0 or lag == 0
    passes = sum(isinstance(m, Data) for m in sent.values())
    assert counted.packets + counted.dropped == passes


@pytest.mark.parametrize("boss", ["gpipe", "zero_bubble"])
def test_losses_of_a_pass_that_was_dropped_are_forgotten(boss):
    """A loss that is not finite under "skip", and a run that broke off."""
    method, heard = spying(boss, lag=1)
    bad = CASE.batches()
    bad[1][0].fill_(float("nan"))
    run = train(CASE, method, batches=bad, on_nonfinite="skip")
    assert len(heard) > 4
    losses: Any = run.trainer.workers[-1].losses
    assert not losses._found
    losses._found[0] = torch.zeros(1)
    run.trainer.workers[-1].begin(0)
    assert not losses._found


def test_losses_are_matched_by_index_and_never_by_position():
    samples = data(4, torch.arange(8.0).view(4, 2), start=10)
    some = replace(told([1.0, 2.0]), indices=torch.tensor([13, 11]))
    found = matching(samples, some)
    assert found.inputs is not None and found.inputs.tolist() == [[6.0, 7.0], [2.0, 3.0]]
    with pytest.raises(ProtocolError, match=r"losses of samples \[13, 9\]"):
        matching(samples, replace(some, indices=torch.tensor([13, 9])))


# --- who waits for whom -------------------------------------------------------------------------------------------


class Waits(Observer):
    """Time that each actor has waited for room."""

    def __init__(self):
        self.room: dict[str, float] = {}

    def wait(self, actor, what, start, end):
        if what == "room":
            self.room[actor] = self.room.get(actor, 0.0) + end - start


def test_a_long_lag_hears_every_loss():
    case = replace(CASE, sizes=(4,) * 60)
    counted = train(case, {"name": "autoassist", "lag": 50}).trainer.selected()
    assert counted is not None
    assert (counted.dropped, counted.packets) == (0, counted.batches)


def slow_learner(lag):
    """A selector that takes 50 times as long to learn as a block for a pass."""
    seconds = {"F": 1.0, "B": 2.0, "L": 150.0}
    waits, runtime = Waits(), Simulated(cost=lambda actor, operation: seconds.get(operation[0], 0.0))
    method, _ = spying("backprop", lag=lag, packets=2)
    case = replace(CASE, sizes=(6,) * 40)
    return train(case, method, runtime=runtime, observers=[waits]), waits


def test_the_boss_never_waits_until_its_losses_are_heard():
    run, waits = slow_learner(lag=0)
    assert waits.room.get("block2", 0.0) == 0.0
    counted = run.trainer.selected()
    assert counted is not None
    assert counted.dropped > 0 and counted.packets > 0
    patient, _ = slow_learner(lag=2)  # the control: then every one is heard, and all have to wait for it
    assert patient.trainer.statistics()[-1].wait_seconds > 1.5 * run.trainer.statistics()[-1].wait_seconds


def test_the_boss_is_served_before_the_selector_learns():
    """With a boss that is always hungry nothing is learnt while there are candidates."""
    runtime = Simulated(cost=lambda actor, operation: 1.0 if operation[0] == "L" else 0.0)
    order: list[str] = []

    class Order(Observer):
        def operation(self, actor, operation, start, end):
            if actor == "selector":
                order.append(operation[0])

    method, _ = spying("backprop", lag=0)
    train(CASE, method, runtime=runtime, observers=[Order()])
    assert order.count("C") == len(CASE.sizes)
    assert "L" not in order[: order.count("C")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("runtime", ["simulated", "threads"])
def test_a_failure_in_the_data_ends_everything_and_the_trainer_goes_on(name, runtime):
    def breaking():
        yield from CASE.batches()[:3]
        raise KeyError("no more data")

    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["sgd"], "runtime": runtime}
    with Trainer(CASE.blocks(), {"name": name, "boss": "pipedream"}, **given) as trainer:
        with pytest.raises(KeyError, match="no more data"):
            trainer.fit(breaking())
        assert len(trainer.fit(CASE.batches(), epochs=3)) == 3


# --- composition and runtimes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("boss", BOSSES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_method_can_be_the_boss_and_threads_equal_the_simulator(name, boss):
    spec = {"name": name, "boss": boss} | ({"lag": 2} if name == "autoassist" else {})
    runs = [train(CASE, spec, runtime=runtime, epochs=3) for runtime in ("simulated", "threads")]
    compare(runs[0].weights, runs[1].weights, tolerance=0.0)
    mine, theirs = (run.trainer.selected() for run in runs)
    assert mine is not None and theirs is not None
    assert replace(mine, busy_seconds=0.0, wait_seconds=0.0) == replace(theirs, busy_seconds=0.0, wait_seconds=0.0)
    names = {worker.lower.__class__.__name__ for worker in runs[0].trainer.workers}
    plain = train(CASE, boss, epochs=1).trainer.workers
    assert names == {worker.lower.__class__.__name__ for worker in plain}


@pytest.fixture
def float64():
    """Double precision by default, for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


RULES: list[dict[str, Any]] = [{"name": name} | ({"lag": 2} if name == "autoassist" else {}) for name in NAMES]
RULES.append({"name": "autoassist", "lag": 2, "unbiased": True, "gate": False})


@pytest.mark.parametrize("spec", RULES, ids=str)
def test_the_default_type_of_numbers_decides_nothing(spec, float64):
    """In float64 five rules of eight ended in torch's own errors about types."""
    blocks = CASE.blocks()
    runs = [train(CASE, spec, blocks=copy.deepcopy(blocks), epochs=3)]
    torch.set_default_dtype(torch.float32)
    runs.append(train(CASE, spec, blocks=copy.deepcopy(blocks), epochs=3))
    compare(runs[0].weights, runs[1].weights, tolerance=0.0)
    assert runs[0].trainer.selected() == runs[1].trainer.selected()


@pytest.mark.parametrize("name", ["autoassist", "screener_net", "rho_loss"])
def test_tokens_are_read_whatever_the_default_type_is(name, float64):
    selection, samples = registry.make(name).selection, data(2, WORDS, WORDS.flip(1))
    assert selection is not None
    chooser = selection.chooser(WORDS, (300, 3), 0)
    for epoch, losses in enumerate([None, torch.ones(2, dtype=torch.float32)]):
        chooser.begin(epoch)
        chooser.choose(samples, losses)
        chooser.hear(replace(told([1.0, 2.0]), losses=torch.ones(2, dtype=torch.float32)), samples)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_the_assistant_in_a_process_of_its_own_and_what_comes_home():
    spec = {"name": "autoassist", "boss": "pipedream", "lag": 2}
    given = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"]}
    states = []
    for runtime in ("simulated", {"name": "processes", "processes": 2}):
        with Trainer(CASE.blocks(), spec, runtime=runtime, **given) as trainer:
            trainer.fit(CASE.batches(), epochs=3)
            counted = trainer.selected()
            assert counted is not None
            states.append(([p.detach().clone() for p in trainer.model.parameters()], counted.trained, counted.packets))
    assert states[0][1:] == states[1][1:]
    assert all(a.equal(b) for a, b in zip(states[0][0], states[1][0], strict=True))
    with Trainer([nn.Linear(4, 3).double()], "autoassist", runtime={"name": "processes", "processes": 2}, **given) as t:
        t.fit(CASE.batches(), epochs=2)  # one block, and the assistant beside it
        assert t.runtime.places["selector"] != t.runtime.places["block0"] == t.runtime.places["relay"]


# --- the choosers -------------------------------------------------------------------------------------------------


def test_selective_backprop_keeps_by_the_share_of_losses_below():
    chooser = Selector(beta=2.0, stale=2, seed=0)
    chooser.begin(0)
    chooser.hear(told(torch.linspace(0, 1, 1024)), data(1024))
    chooser.begin(1)
    assert chooser.scores
    kept = 0
    for _ in range(40):
        kept += len(chooser.choose(data(1024), torch.linspace(0, 1, 1024)).rows)  # type: ignore[arg-type]
    assert kept / (40 * 1024) == pytest.approx(1 / 3, abs=0.01)  # 1 / (beta + 1)
    chooser.begin(2)
    assert not chooser.scores  # stale: the losses of epoch 1 once more
    rows = chooser.choose(data(1024), None).rows
    assert rows is not None and rows.float().mean() > 600


def test_online_batch_selection_draws_without_replacement_by_rank():
    chooser, counts = Ranks(0.25, 100.0, 0), torch.zeros(8)
    chooser.begin(1)
    for _ in range(4000):
        rows = chooser.choose(data(8), torch.arange(8.0)).rows
        assert rows is not None and len(set(rows.tolist())) == 2
        counts[rows] += 1
    assert (counts[1:] >= counts[:-1]).all()
    one = Ranks(0.125, 100.0, 0)
    one.begin(1)
    first = torch.zeros(8)
    for _ in range(8000):
        first[one.choose(data(8), torch.arange(8.0)).rows] += 1
    p = 100.0 ** (-torch.arange(7.0, -1, -1) / 8)
    assert chisquare(first.tolist(), (8000 * p / p.sum()).double().tolist(), sum_check=False).pvalue > 0.01


def test_rho_takes_what_can_still_be_learnt_and_never_the_held_out():
    chooser = Rho(0.5, 0.1, (0.0, 5.0, 0.0, 1.0), 2, 0)
    chooser.begin(1)
    rows = chooser.choose(data(4), torch.tensor([1.0, 5.5, 0.2, 4.0])).rows
    assert rows is not None and rows.tolist() == [0, 3]
    with pytest.raises(UserError, match="4 irreducible losses"):
        chooser.choose(data(5), torch.zeros(5))
    own = Rho(0.5, 0.3, None, 2, 0)
    own.begin(0)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    samples = data(200, x, (x[:, 0] > 0).long())
    first = own.choose(samples, None).rows
    assert first is not None and 40 < 200 - len(first) < 80
    own.begin(1)
    later = own.choose(samples, torch.ones(200)).rows
    assert later is not None and set(later.tolist()) <= set(first.tolist())
    assert samples.inputs is not None and float(own._irreducible(samples).mean()) < 0.4  # it has learnt the rule


def test_infobatch_keeps_the_mean():
    """What is left out is made up for by weights: the expected sum of weights is the number of samples."""
    chooser = Pruning(0.5, 3, 0)
    chooser.begin(0)
    assert chooser.choose(data(10), None) == Choice()
    chooser.hear(told([0.0] * 6 + [1.0] * 4), data(10))
    chooser.begin(1)
    rows, weights = chooser.choose(data(10), None)
    assert rows is not None and weights is not None
    assert len(rows) == 7 and {6, 7, 8, 9} <= set(rows.tolist())
    assert weights.tolist() == [2.0] * 3 + [1.0] * 4
    chooser.begin(3)
    assert chooser.choose(data(10), None) == Choice()  # annealing


def test_self_paced_weights():
    chooser = Paced(5, 0)
    chooser.begin(0)
    chooser.hear(told([0.0, 1.0, 2.0, 3.0]), data(4))
    chooser.begin(1)
    weights = chooser.choose(data(4), None).weights
    limit = float(torch.tensor([0.0, 1.0, 2.0, 3.0]).quantile(0.4375)) + 1e-6
    raw = (1 - torch.tensor([0.0, 1.0, 2.0, 3.0]) / limit).clamp(min=0) ** (1 / 3) + 0.01
    assert weights is not None
    torch.testing.assert_close(weights, raw * 4 / raw.sum())


@pytest.mark.parametrize("pace", [1, 2, 5])
def test_self_paced_takes_all_in_after_its_pace(pace):
    """With a pace of 1 the share stayed at 0.25 for ever."""
    chooser = Paced(pace, 0)
    chooser.begin(0)
    chooser.hear(told([0.0, 1.0, 2.0, 3.0]), data(4))
    for epoch, share in enumerate([*torch.linspace(0.25, 1, pace).tolist(), 1.0, 1.0]):
        chooser.begin(epoch)
        assert chooser._limit == pytest.approx(3 * share + 1e-6)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "autoassist", "gamma": 0.0}, "gamma above 0 and at most 1, got 0.0"),
        ({"name": "autoassist", "gamma": 1.5}, "gamma above 0 and at most 1, got 1.5"),
        ({"name": "autoassist", "boss": "pipedreem"}, "boss: unknown method 'pipedreem'. Did you mean 'pipedream'"),
        ({"name": "autoassist", "boss": "ampnet"}, "boss: method 'ampnet' trains"),
        ({"name": "autoassist", "boss": "uniform"}, "boss: boss 'uniform' selects samples itself"),
        ({"name": "autoassist", "lag": -1}, "lag of at least 0"),
        ({"name": "uniform", "fraction": 0.0}, "fraction above 0"),
        ({"name": "rho_loss", "irreducible": "nowhere.npy"}, "cannot read irreducible='nowhere.npy'"),
        ({"name": "infobatch", "ratio": 1.0}, "ratio between 0 and 1"),
    ],
)
def test_bad_options_are_one_clear_line(spec, message):
    with pytest.raises(UserError) as caught:
        registry.make(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
@pytest.mark.parametrize("name", NAMES)
def test_a_loader_without_sample_indices_is_refused(name, runtime):
    without = [(x, y) for x, y, _ in CASE.batches()]
    with pytest.raises(UserError, match=r"has no sample indices.*let the loader give"):
        train(CASE, name, batches=without, runtime=runtime)


def test_weights_do_not_reach_a_boss_whose_labels_travel_with_the_activation():
    with pytest.raises(UserError, match=r"'infobatch' weighs samples, and block1 gets no data of its own"):
        train(CASE, {"name": "infobatch", "boss": "dgl_async"})
    assert train(CASE, {"name": "uniform", "boss": "dgl_async"}).trainer.selected() is not None


@pytest.mark.parametrize("name", ["autoassist", "selective_backprop", "online_batch_selection", "rho_loss"])
def test_losses_are_not_wanted_from_a_boss_that_drops_batches(name):
    with pytest.raises(UserError, match=rf"'{name}' needs the losses of batches, and .*; use another boss"):
        train(CASE, {"name": name, "boss": "dgl_async"})


def test_a_loss_that_is_not_finite_is_told_as_nothing():
    """Policy skip: the pass is dropped, its losses are void, and the selector goes on."""
    bad = [(x.clone(), y, i) for x, y, i in CASE.batches()]
    bad[2][0].fill_(float("nan"))
    run = train(CASE, {"name": "autoassist", "lag": 1}, batches=bad, on_nonfinite="skip")
    counted = run.trainer.selected()
    assert counted is not None and counted.packets == len(CASE.sizes)
    assert all(w[-1].isfinite().all() for w in run.weights)
    with pytest.raises(OperationError, match="NonFiniteError"), contextlib.suppress(UserError):
        train(CASE, {"name": "autoassist", "lag": 1}, batches=bad)
