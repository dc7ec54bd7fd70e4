"""The linear SVM: the alias table draws what it should, every solver comes down, and all follow their rules."""

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from decoupled.benchmarks.svm import BASE, SOLVERS, Alias, Problem, main, problems, solve
from decoupled.errors import UserError


def easy(n=60):
    draw = np.random.default_rng(0)
    y = draw.choice([-1.0, 1.0], n)
    x = draw.normal(size=(n, 3)) + 2 * y[:, None] * np.array([1.0, 0, 0])
    return Problem(x / np.linalg.norm(x, axis=1, keepdims=True), y, 1 / n, 0.1)


def test_the_alias_table_draws_in_proportion():
    scores = np.array([0.1, 3.0, 0.0, 1.0, 0.9])
    drawn = np.bincount(Alias(scores, np.random.default_rng(0)).many(100_000), minlength=5)
    assert drawn[2] == 0
    kept = np.delete(drawn, 2), np.delete(100_000 * scores / scores.sum(), 2)
    assert chisquare(*kept).pvalue > 0.01
    assert chisquare(kept[0], np.roll(kept[1], 1)).pvalue < 1e-6  # the control


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_comes_down_from_the_start(solver):
    trace = solve(easy(), solver, 0, 20)
    assert trace.excess[-1] < 0.3 * trace.excess[0]
    assert trace.seconds == sorted(trace.seconds)
    assert trace.updates[-1] == 20 * 60 if solver != "shrinking" else trace.updates[-1] < 20 * 60


def test_shrinking_updates_on_a_sample_with_a_margin_as_often_as_the_base_probability():
    """Far outside the margin only the first test is passed; w stays there because the decay is slight."""
    x = np.ones((50, 1))
    trace = solve(Problem(x, np.ones(50), 1e-4, 1.0), "shrinking", 0, 200)
    assert trace.updates[-1] / (50 * 200) == pytest.approx(BASE, abs=0.05)


def test_shrinking_updates_on_an_active_sample_the_more_often_the_more_it_has_seen():
    """The k-th one is left out only where both draws fail: P(update) = 1 - 0.7 / (k + 1), while the threshold falls."""
    x, y, runs, passes = np.array([[1.0], [1.0], [-1.0], [-1.0]]), np.array([1.0, -1.0, 1.0, -1.0]), 2000, 2
    problem = Problem(x, y, 4.0, 1.0)  # |w| is at most 1/2, so that no margin gets to 1
    counts = np.zeros(4 * passes)
    for seed in range(runs):
        counts += np.diff(solve(problem, "shrinking", seed, passes).updates)  # there is a point per sample seen
    rule = 1 - (1 - BASE) / (np.arange(1, 4 * passes + 1) + 1)

    def fits(p):
        return chisquare([*counts, *(runs - counts)], runs * np.array([*p, *(1 - p)]), ddof=4 * passes - 1).pvalue

    assert fits(rule) > 0.01
    assert fits(np.full(4 * passes, counts.mean() / runs)) < 1e-6  # the control: a threshold that stays


def test_importance_sampling_draws_by_the_score_and_divides_by_it():
    """L w + gradient is (1/2, 0) where the hinge is not active, (1/2, -1) where it is."""
    problem, w = Problem(np.eye(2), np.ones(2), 0.25, 1.0), np.array([2.0, 0.0])
    scores = np.array([0.5, np.sqrt(1.25)])
    drawn = list(SOLVERS["importance"](problem, w, np.random.default_rng(0), 2000))
    assert chisquare(np.bincount([i for i, *_ in drawn]), 4000 * scores / scores.sum()).pvalue > 0.01
    for k, (i, factor, step, may_leave) in enumerate(drawn[:20], 1):
        assert factor == pytest.approx(scores.mean() / scores[i])
        assert step == pytest.approx(1 / (0.25 * (k + 100)))
        assert not may_leave
    assert {i for i, *_ in drawn[:20]} == {0, 1}


def test_steps_with_factors_by_hand(monkeypatch):
    """A factor multiplies the whole gradient, the penalty's included, and w stays in the ball of radius 2."""
    seen = []

    class Watched(Problem):
        def objective(self, w):
            seen.append(w.tolist())
            return 1.0

    steps = [(1, 0.5, 0.1, False), (0, 2.0, 0.1, False), (0, 1.0, 40.0, False)]
    monkeypatch.setitem(SOLVERS, "importance", lambda problem, w, draw, passes: iter(steps))
    solve(Watched(np.eye(2), np.ones(2), 0.25, 1.0), "importance", 0, 1)
    first, second, third = [0.0, 0.05], [0.2, 0.05 * (1 - 0.2 * 0.25)], [0.2 * -9 + 40, 0.0475 * -9]
    length = np.hypot(third[0], third[1])
    expected = [[0.0, 0.0], first, second, [2 * z / length for z in third]]
    assert seen == [pytest.approx(w) for w in expected]


@pytest.mark.parametrize("solver", SOLVERS)
def test_step_sizes_fall_with_the_samples_drawn(solver):
    drawn = itertools.islice(SOLVERS[solver](easy(), np.zeros(3), np.random.default_rng(0), 3), 150)
    assert [step for _, _, step, _ in drawn] == pytest.approx([60 / (k + 100) for k in range(1, 151)])


def test_the_best_objective_is_a_lower_bound(tmp_path):
    (problem,) = problems("breast_cancer", None)
    draw = np.random.default_rng(0)
    assert all(problem.objective(draw.normal(size=31)) > problem.best for _ in range(5))
    assert solve(problem, "sgd", 0, 5).excess[-1] > 0


def test_files_and_bad_input(tmp_path, capsys):
    good, bad = tmp_path / "two.txt", tmp_path / "bad.txt"
    good.write_text("+1 1:0.5 2:1\n-1 1:-1\n+1 2:0.3\n-1 1:-0.2 2:-1\n")
    bad.write_text("hello\n")
    assert main(["--data", str(good), "--passes", "2", "--seeds", "1", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "svm.md").is_file() and (tmp_path / "out" / "svm_two_updates.svg").is_file()
    capsys.readouterr()
    for name, message in ((str(bad), "is not in LIBSVM's format"), ("nowhere", "neither breast_cancer nor digits")):
        assert main(["--data", name, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="give the path of a LIBSVM file"):
        problems("nowhere", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1:0.5\n1 1:0.2\n", "has 1 class(es) in 2 sample(s)"),
        ("", "has 0 class(es) in 0 sample(s)"),
        ("0.1 1:1\n0.7 1:2\n0.3 1:3\n", "has the label 0.1, which is no class"),
        ("nan 1:1\n1 1:2\n", "has the label nan, which is no class"),
        ("1 1:nan\n-1 1:2\n", "values that are not finite"),
    ],
)
def test_a_file_without_classes_is_one_clear_line(tmp_path, capsys, text, message):
    """They were tracebacks, and numbers to be predicted were taken as one class each."""
    (tmp_path / "file").write_text(text)
    assert main(["--data", str(tmp_path / "file"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
