"""Work: a block runs forward once per pass, and once more where `Method.replays` says so, which costs use; and the
matrix products of a run are those that `decoupled.flops` counts without running anything."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from decoupled.flops import COUNTED, cost
from decoupled.messages import Data
from decoupled.testing import Case, label, point, train, variants

CASE = Case(widths=(3, 4, 3, 4, 2), cuts=(1, 2, 3), sizes=(10,) * 8)
SPECS = [spec for spec in variants() if point(spec).retention.recomputes]


def test_there_is_something_to_count():
    assert len(SPECS) > 10
    assert any(point(spec).replays(CASE.K - 1, CASE.K) for spec in SPECS)
    assert not all(point(spec).replays(CASE.K - 1, CASE.K) for spec in SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_a_pass_is_replayed_where_the_method_says_so_and_nowhere_else(spec):
    method, counts = point(spec), []
    for size in (4, 8):  # building runs blocks, too, whatever the number of batches
        blocks, runs = CASE.blocks(), Counter[int]()
        for k, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, k=k, runs=runs: runs.update([k]))
        train(CASE, spec, blocks=blocks, batches=CASE.batches()[:size])
        counts.append(runs)
    x, y, _ = CASE.batches()[0]
    passes = 4 * len(list(method.feed.passes(Data(0, batch=0, inputs=x, targets=y))))
    for k in range(CASE.K):
        assert counts[1][k] - counts[0][k] == passes * (1 + method.replays(k, CASE.K))


DEEP = Case(widths=(4, 5, 3, 6, 4, 5, 3, 4, 3), cuts=(2, 4, 6), sizes=(2,) * 8)  # two layers in every block
# without those that choose samples, and those with parts that learn from answers: both are said not to be counted
KNOWN = [
    s for s in variants() if {*point(s).coupling.up, *point(s).coupling.down} <= COUNTED and not point(s).selection
]
GRADIENTS = [s for s in KNOWN if set(s) == {"name"} and point(s).coupling.down == ("gradient",)]
CORRECTED = [{**s, "corrections": ["random_feedback"]} for s in GRADIENTS if not point(s).corrections]


class Executed(TorchDispatchMode):
    """FLOPs of all matrix products that are run."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found, kind = func(*args, **(kwargs or {})), func._overloadpacket
        if kind in flop_registry:
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=found)
        return found


@pytest.mark.parametrize("spec", [*KNOWN, *CORRECTED], ids=label)
def test_the_products_of_a_run_are_those_that_are_counted(spec):
    """Batches of two, as the count has them: some objectives compare every sample with every other."""
    executed = []
    for size in (4, 8):  # building runs blocks, too
        with Executed() as mode:
            trainer = train(DEEP, spec, batches=DEEP.batches()[:size]).trainer
        executed.append(mode.flops)
    if any(half.learns_from_answers for worker in trainer.workers for half in (worker.lower, worker.upper)):
        return
    counted = cost([nn.Sequential(block) for block in DEEP.blocks()], (4,), spec, dtype=torch.float64)
    assert executed[1] - executed[0] == 4 * 2 * counted.total
