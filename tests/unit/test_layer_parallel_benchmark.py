"""The speed-up model of layer-parallel training: its algebra, its limits, and a page from a very small run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoupled.benchmarks import layer_parallel
from decoupled.benchmarks.layer_parallel import CONTESTANTS, Costs, Job, edge_costs, page, serial_costs

WITH = ("1 iteration, with", "2 iterations, with")
times = st.floats(1e-3, 10)


@given(st.builds(Costs, times, times, times, times, times, times), st.floats(1, 100), st.floats(1.01, 10))
def test_the_model_is_monotone_has_its_limit_and_breaks_even_where_it_says(costs, K, more):
    assert costs.speedup(K) < costs.speedup(K * more) < costs.speedup(float("inf"))
    extra = costs.t_psi + costs.t_f + costs.t_b
    limit = (costs.T_d + costs.T_f + costs.T_b) / (costs.T_d + extra)
    assert costs.speedup(float("inf")) == pytest.approx(limit)
    least = costs.least_stages()
    assert (least < float("inf")) == (costs.T_f + costs.T_b > extra)
    if least < 1e6:
        assert costs.speedup(least) == pytest.approx(1.0)


def test_without_extra_work_K_stages_are_K_times_as_fast():
    assert Costs(0.0, 1.0, 2.0).speedup(4) == pytest.approx(4.0)


def test_costs_are_measured_for_every_contestant_and_the_page_names_them():
    job = Job(cut=3, batches=1, model="resnet8", image=(1, 8, 8), batch_size=4)
    serial = serial_costs(job)
    costs = {name: edge_costs(job, serial, m) for name, m in CONTESTANTS.items() if name != "backprop"}
    assert all(min(c.T_f, c.t_psi) > 0 for c in costs.values())
    assert {name for name, c in costs.items() if c.t_f and c.t_b} == {"auxnet"}
    held = layer_parallel.measure(job, 1, 0.0, lambda line: None)
    grid = layer_parallel.multigrid(job, layers=4, channels=2, coarsening=2)
    assert [row[0] for row in grid] == ["1 iteration, no relaxation", *(f"{m} relaxation" for m in WITH)]
    text = page(job, costs, held, grid, "Head.")
    assert all(f"| {name} |" in text for name in CONTESTANTS)
    assert ">= 1.70" in text


def test_the_command_counts_from_one(capsys):
    with pytest.raises(SystemExit):
        layer_parallel.main(["--rounds", "0"])
    assert "must be at least 1" in capsys.readouterr().err
