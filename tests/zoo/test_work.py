"""Work: a block runs forward once per pass, and once more where `Method.replays` says so, which costs use."""

from collections import Counter

import pytest

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
