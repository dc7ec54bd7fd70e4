"""Sum tree, replay and n-step transitions, against what they stand for written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoupled.errors import UserError
from decoupled.rl import Replay, Spaces, SumTree
from decoupled.rl.replay import EPS
from decoupled.rl.steps import Window, batch_of, width

weights = st.floats(0, 100, allow_subnormal=False).map(lambda x: round(x, 3))


@given(st.integers(1, 40), st.data())
def test_sum_tree_is_a_list_of_weights(capacity: int, data: st.DataObject) -> None:
    tree, plain = SumTree(capacity), np.zeros(capacity)
    changes = st.lists(st.tuples(st.integers(0, capacity - 1), weights), min_size=1, max_size=12)
    for change in data.draw(st.lists(changes, max_size=5)):
        items, values = np.array([i for i, _ in change]), np.array([w for _, w in change])
        tree.set(items, values)
        plain[items] = values
        assert tree.total == pytest.approx(plain.sum())
        np.testing.assert_array_equal(tree.get(np.arange(capacity)), plain)
    if plain.sum() > 0:
        masses = np.array(data.draw(st.lists(st.floats(0, 0.999999), min_size=1, max_size=20))) * tree.total
        found = tree.find(masses)
        ends = plain.cumsum()
        for item, mass in zip(found, masses, strict=True):
            assert plain[item] > 0
            assert ends[item] - plain[item] - 1e-6 <= mass <= ends[item] + 1e-6


def rows(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def filled(errors: list[float], capacity: int = 8, beta: float = 0.5, alpha: float = 1.0) -> Replay:
    replay = Replay(capacity, 1, True, alpha, beta, seed=3)
    replay.add(rows(*range(len(errors))), np.array(errors, np.float32), 0)
    return replay


def test_rows_are_drawn_in_proportion_to_their_priority() -> None:
    errors = [1.0, 0.0, 3.0, 6.0]
    replay = filled(errors)
    counts = np.zeros(4)
    for _ in range(500):
        counts += np.bincount(replay.draw(4).rows[:, 0].long().numpy(), minlength=4)
    shares = (np.array(errors) + EPS) / (sum(errors) + 4 * EPS)
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=0.02)


def test_importance_weights_undo_the_priorities() -> None:
    replay = filled([1.0, 2.0, 4.0], beta=1.0)
    draw = replay.draw(3)
    assert draw.weights is not None
    shares = np.array([1.0, 2.0, 4.0])[draw.rows[:, 0].long().numpy()] / 7
    wanted = 1 / (3 * shares)
    np.testing.assert_allclose(draw.weights.numpy(), wanted / wanted.max(), rtol=1e-4)


def test_new_priorities_are_per_row_and_late_ones_are_dropped() -> None:
    replay = filled([1.0] * 4, capacity=4)
    draw = replay.draw(4)
    fresh = np.array([10.0 + place for place in draw.places], np.float32)
    replay.add(rows(9.0), np.array([5.0], np.float32), 0)  # overwrites place 0
    replay.judge(draw, fresh)
    kept = replay.state_dict()["priorities"].numpy()
    assert kept[0] == pytest.approx(5.0, abs=1e-4)
    for place in set(draw.places.tolist()) - {0}:
        assert kept[place] == pytest.approx(10.0 + place, abs=1e-4)


def test_age_counts_rows_and_lag_counts_updates() -> None:
    replay = Replay(8, 1)
    replay.add(rows(0, 1), None, version=3)
    draw = replay.draw(2)
    replay.add(rows(2, 3, 4), None, version=7)
    assert replay.age(draw) == pytest.approx(4 - draw.births.mean())
    assert replay.lag(draw, 10) == 7


def test_uniform_draws_have_no_weights_and_too_few_rows_are_refused() -> None:
    replay = filled([1.0, 2.0])
    assert replay.draw(2, uniform=True).weights is None
    with pytest.raises(UserError, match="holds 2 transitions, fewer than a batch of 3"):
        replay.draw(3)


@pytest.mark.parametrize("prioritized", [False, True])
def test_a_replay_goes_on_where_it_was_saved(prioritized: bool) -> None:
    first, second = (Replay(6, 1, prioritized, seed=seed) for seed in (1, 2))
    for start in (0, 4):
        first.add(rows(*range(start, start + 4)), np.arange(4, dtype=np.float32) + 1, start)
    first.draw(2)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        a, b = first.draw(4), second.draw(4)
        assert torch.equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.births, b.births)


@pytest.mark.parametrize(
    ("capacity", "prioritized"), [(8, True), (3, True), (4, False)], ids=["more", "less", "uniform"]
)
def test_a_replay_does_not_take_the_rows_of_another_kind(capacity: int, prioritized: bool) -> None:
    """Rows of more capacity would be memory that nobody has written, and without priorities weights are nan."""
    first, second = filled([1.0] * 6, capacity=4), Replay(capacity, 1, prioritized)
    for one, other in ((first, second), (second, first)):
        if one is second:
            one.add(rows(*range(8)), np.ones(8, np.float32), 0)
        with pytest.raises(UserError, match=r"use the environment and options of the run that was saved"):
            other.load_state_dict(one.state_dict())


@given(st.integers(1, 4), st.lists(st.sampled_from(["go", "go", "over", "cut"]), min_size=1, max_size=25))
def test_n_step_transitions_are_those_written_out(n: int, events: list[str]) -> None:
    """Every step becomes one row, with the rewards that follow it within n steps and its episode."""
    gamma, window, found = 0.9, Window(n, 0.9), []
    steps = [(np.array([t], np.float32), float(t + 1), event) for t, event in enumerate(events)]
    for t, (obs, reward, event) in enumerate(steps):
        after = np.array([t + 0.5 if event != "go" else t + 1], np.float32)
        found += window.push(obs, obs, reward, after, event == "over", event == "cut")
    wanted = []
    for t in range(len(steps)):
        total, end = 0.0, t
        for m in range(n):
            if t + m >= len(steps):
                break
            total, end = total + gamma**m * steps[t + m][1], t + m
            if steps[end][2] != "go":
                break
        if end - t + 1 < n and steps[end][2] == "go":
            continue  # not complete yet
        discount = 0.0 if steps[end][2] == "over" else gamma ** (end - t + 1)
        last = [end + 0.5 if steps[end][2] != "go" else end + 1]
        one = [t + 0.5 if steps[t][2] != "go" else t + 1] if n > 1 else []
        wanted.append([t, t, total, discount, *last, *one])
    np.testing.assert_allclose(np.array(found), np.array(wanted, np.float32), rtol=1e-5) if wanted else None
    assert len(found) == len(wanted)


def test_a_row_is_a_transition() -> None:
    spaces = Spaces(3, 2, 3)
    row = torch.arange(float(width(spaces, 3)))[None]
    batch = batch_of(row, spaces, 3)
    assert [x.shape[1] for x in batch] == [3, 2, 1, 1, 3, 3]
    assert torch.equal(torch.cat(batch, 1), row)
    assert width(spaces, 1) == width(spaces, 3) - 3
