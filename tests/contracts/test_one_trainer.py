"""Processes hold one trainer: what the user does to it in one of them holds in all, or is refused."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from decoupled.errors import PeerLost, UserError
from decoupled.runtime.contract import Runtime
from decoupled.runtime.processes import Processes
from decoupled.runtime.simulated import Simulated
from decoupled.spread import agree, described
from decoupled.testing import OPTIMIZERS, Case
from decoupled.trainer import Trainer

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(widths=(4, 5, 3, 4, 3), cuts=(1, 2), sizes=(6,) * 5)


def trainer(runtime: Runtime, method: Any = "pipedream", **more: Any) -> Trainer:
    given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "runtime": runtime, **more}
    return Trainer(CASE.blocks(), method, **given)


def test_what_was_lost_with_a_process_is_not_made_up_after_close() -> None:
    runtime = Processes(processes=2, intra_op=1)
    one = trainer(runtime)
    one.fit(CASE.batches())
    os.kill(runtime._group._children[1].pid, signal.SIGKILL)
    with pytest.raises(PeerLost):
        one.fit(CASE.batches(), epochs=1000)
    one.close()
    runtime.close()
    for ask in (one.statistics, one.state_dict, lambda: one.model):
        with pytest.raises(PeerLost, match="were lost with them"):
            ask()
    for use in (one.evaluate, one.update_bn):
        with pytest.raises(PeerLost, match="were lost with them"):
            use(CASE.batches())


@pytest.fixture(scope="module")
def two():
    runtime = Processes(processes=2, intra_op=1)
    yield runtime
    runtime.close()


def restored(runtime: Runtime, how: str) -> list[Any]:
    """Figures of a run that goes back to the weights of its first epoch, and on from there."""
    with trainer(runtime) as one:
        one.fit(CASE.batches())
        best = copy.deepcopy(one.model.state_dict())
        one.fit(CASE.batches())
        if how == "in the model":
            one.model.load_state_dict(best)
        else:
            for name, parameter in one.model.named_parameters():
                parameter.data.copy_(best[name])
        found = [
            one.evaluate(CASE.batches()),
            one.fit(CASE.batches())[0]["loss"],
            one.state_dict()["blocks"][-1]["block"],
        ]
    return [*found[:2], found[2]["module"], one.model.state_dict()]


@pytest.mark.parametrize("how", ["in the model", "in the data of parameters"])
def test_weights_that_are_changed_in_the_model_are_changed_where_they_live(how: str, two: Processes) -> None:
    apart, here = restored(two, how), restored(Simulated(), how)
    assert apart[:2] == here[:2]
    for mine, theirs in zip(apart[2:], here[2:], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_model_from_before_the_latest_training_is_not_written_to(two: Processes) -> None:
    """Blocks elsewhere have gone on; `trainer.model` has their weights again."""
    with trainer(two) as one:
        one.fit(CASE.batches())
        before = one.model
        one.fit(CASE.batches())
        with torch.no_grad():
            for parameter in before.parameters():
                parameter.mul_(1.0)
        with pytest.raises(UserError, match=r"take `trainer.model` again and change that"):
            one.evaluate(CASE.batches())
        after = one.evaluate(CASE.batches()) if one.model else None
    with trainer(Simulated()) as other:
        other.fit(CASE.batches(), epochs=2)
        assert after == other.evaluate(CASE.batches())


class Noted(torch.nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"a": 1}


def test_a_model_that_was_looked_at_is_saved_loaded_and_closed_as_ever(two: Processes) -> None:
    """Also one with other things than tensors in its state, and with a state that was cut elsewhere."""
    given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": OPTIMIZERS["momentum"], "runtime": two}

    def made() -> torch.nn.Sequential:
        layers = [torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4), torch.nn.Tanh(), Noted(4, 3)]
        return torch.nn.Sequential(*layers).double()

    with Trainer(made(), "pipedream", [4], **given) as one:
        one.fit(CASE.batches())
        state = one.state_dict()
    with Trainer(made(), "pipedream", 2, **given) as one:
        one.fit(CASE.batches())
        assert len(one.model) == 5
        one.load_state_dict(state)
        assert one.evaluate(CASE.batches())["loss"] > 0
        with torch.no_grad():
            one.model[4].weight.zero_()  # type: ignore[union-attr, operator]
            one.model[4].bias.zero_()  # type: ignore[union-attr, operator]
        assert one.evaluate(CASE.batches())["loss"] == pytest.approx(1.0986, abs=1e-4)
        one.fit(CASE.batches())
    assert one.state_dict()["position"]["epoch"] == 2


class Rank1(Simulated):
    """Hears from rank 0 what that has built."""

    rank = 1

    def __init__(self, leader: Any) -> None:
        super().__init__()
        self._leader = leader

    def agree(self, value: Any, of: str | None = None) -> Any:
        return self._leader


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"optimizer": OPTIMIZERS["sgd"]}, "optimizer"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, weight_decay=0.01)}, "optimizer"),
        ({"method": "ddg"}, "method"),
        ({"method": {"name": "pipedream", "corrections": [{"name": "clip", "limit": 0.5}]}}, "method"),
        ({"method": {"name": "overlapping_local", "reach": 3}}, "method"),
        ({"seed": 1}, "seed"),
        ({"on_nonfinite": "skip"}, "on_nonfinite"),
        ({"precision": "bf16"}, "precision"),
        ({}, None),
    ],
    ids=["optimizer", "rate", "method", "correction", "option", "seed", "policy", "precision", "nothing"],
)
def test_ranks_with_other_settings_are_refused(more: dict[str, Any], what: str | None) -> None:
    method = more.get("method", "pipedream")
    leader = "overlapping_local" if "overlapping" in str(method) else "pipedream"
    mine, theirs = trainer(Simulated(), **more), trainer(Simulated(), leader)
    for one in (mine, theirs):
        one.fit(CASE.batches())
    told = described(theirs.workers, theirs._recipe)
    if what is None:
        agree(described(mine.workers, mine._recipe), Rank1(told))
        return
    with pytest.raises(UserError, match=rf"^rank 1 has another {what}( and another optimizer)? than rank 0"):
        agree(described(mine.workers, mine._recipe), Rank1(told))


def test_a_closed_trainer_whose_processes_have_ended_takes_no_state(two: Processes) -> None:
    with trainer(two) as one:
        one.fit(CASE.batches())
        state = one.state_dict()
    with pytest.raises(UserError, match="this trainer is closed"):
        one.load_state_dict(state)


FORK = textwrap.dedent("""
    import os, sys, torch
    from torch import nn
    from decoupled import Trainer

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    with Trainer(model, "pipedream", [1], loss=nn.functional.cross_entropy, optimizer=torch.optim.SGD,
                 runtime={"name": "processes", "processes": 2}) as trainer:
        trainer.fit(batches)
        child = os.fork()
        if not child:
            try:
                trainer.evaluate(batches)
            except Exception as error:
                print(error, flush=True)
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print(trainer.evaluate(batches)["loss"] > 0)
""")


def test_a_fork_ends_by_itself_and_leaves_the_trainer_alone() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    refused, code, fine = done.stdout.splitlines()
    assert refused.startswith("this process is a fork of the one")
    assert (code, fine) == ("7", "True")


RANKS = textwrap.dedent("""
    import os, sys, torch
    from torch import nn
    from decoupled import Trainer

    rank, case = int(os.environ["RANK"]), sys.argv[1]
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    batches = [(torch.randn(8, 4), torch.randint(3, (8,)))] if rank == 0 else None
    try:
        with Trainer(model, "pipedream", [1], loss=nn.functional.cross_entropy,
                     optimizer=lambda p: torch.optim.SGD(p, lr=5.0 if rank and case == "rate" else 0.05),
                     runtime="processes") as trainer:
            trainer.fit(batches)
            if rank and case == "raise":
                raise KeyError("rank 1 is broken")
            trainer.evaluate(batches)
    except Exception as error:
        print(f"[{rank}] {type(error).__name__}: {error}", flush=True)
""")


def test_another_rank_says_who_has_the_model() -> None:
    """After `close`, where it would have answered with weights from before the training."""
    one = trainer(Rank1(None))
    one._newer = one._closed = True  # as a rank is left that trained some of the blocks
    for ask in (one.statistics, lambda: one.model, lambda: one.evaluate(CASE.batches())):
        with pytest.raises(UserError, match="only rank 0 has the whole model"):
            ask()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "heard"),
    [
        ("rate", "rank 1 has another optimizer than rank 0; every rank must be started with the same settings"),
        ("raise", "rank 1 is broken"),
    ],
)
def test_what_one_rank_does_alone_all_hear(case: str, heard: str, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "ranks.py"), case],
        capture_output=True, text=True, timeout=100, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert {line[:3] for line in lines if heard in line} == {"[0]", "[1]"}, (lines, done.stderr[-2000:])
