"""The linear SVM: the alias table draws what it should, every solver comes down, shrinking follows its rule."""

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
