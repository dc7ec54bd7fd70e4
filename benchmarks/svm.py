"""Linear SVM: does leaving out easy samples help? Objective against updates and against time, on small real data.

    python -m decoupled.benchmarks.svm [--data breast_cancer digits FILE] [--passes 30] [--seeds 3]

    P(w) = L/2 ||w||^2 + (1/n) sum_i max(0, 1 - y_i w.x_i),  ||x_i|| = 1, a constant feature for the bias
    update    w <- (1 - h L) w + h s y_i x_i [y_i w.x_i < 1],  h = 1 / (L (k + 100)),  then onto the ball 1/sqrt(L)

    sgd         a random order in every pass; k counts updates; s = 1
    importance  i drawn in proportion to score_i = ||L w + gradient_i|| at the start of the pass (alias table),
                s = mean score / score_i on the whole gradient, L w included
    shrinking   a random order; i is used if u < 0.3 or u' < g_i - r / (k + 1), g_i = ||x_i|| if y_i w.x_i < 1, else 0;
                k counts the samples seen, r = 1; s = 1

One-vs-rest where there are more than two classes: objectives are means over the classes. Time is what the solver takes,
orders, tables and draws included, and what is left out is looked at, too; evaluating P is not counted. The solvers are
numpy in Python, one sample at a time, as in Zhang et al. 2019 (arXiv 1905.03381).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from decoupled.benchmarks.page import environment, machine, produce, table
from decoupled.benchmarks.pareto import alone
from decoupled.benchmarks.speed import RESULTS
from decoupled.errors import UserError
from decoupled.observe.plane import Curve, Scale, plane

Array = NDArray[np.float64]
BASE, OFFSET = 0.3, 100
STYLES = {"sgd": "kb", "importance": "k1", "shrinking": "k0"}


@dataclass(frozen=True)
class Problem:
    """One binary problem: rows of unit length, labels -1 and 1, the weight of the penalty, and the best objective."""

    x: Array
    y: Array
    penalty: float
    best: float

    def objective(self, w: Array) -> float:
        return float(self.penalty / 2 * w @ w + np.maximum(0.0, 1 - self.y * (self.x @ w)).mean())


class Alias:
    """Draws i with probability in proportion to its score in constant time (Vose's table)."""

    def __init__(self, scores: Array, draw: np.random.Generator) -> None:
        n = len(scores)
        self._share, self._other, self._draw = scores * (n / scores.sum()), np.arange(n), draw
        small = [i for i in range(n) if self._share[i] < 1]
        large = [i for i in range(n) if self._share[i] >= 1]
        while small and large:
            low, high = small.pop(), large[-1]
            self._other[low] = high
            self._share[high] -= 1 - self._share[low]
            if self._share[high] < 1:
                small.append(large.pop())
        self._share[small + large] = 1.0  # what rounding has left

    def many(self, count: int) -> NDArray[np.int64]:
        at = self._draw.integers(len(self._share), size=count)
        return np.where(self._draw.random(count) < self._share[at], at, self._other[at])


Draws = Iterator[
    tuple[int, float, float, bool]
]  # sample, factor of its gradient, step size, whether it may be left out


def sgd(problem: Problem, w: Array, draw: np.random.Generator, passes: int) -> Draws:
    steps = itertools.count(1)
    for _ in range(passes):
        for i in draw.permutation(len(problem.y)):
            yield i, 1.0, 1 / (problem.penalty * (next(steps) + OFFSET)), False


def importance(problem: Problem, w: Array, draw: np.random.Generator, passes: int) -> Draws:
    steps, n = itertools.count(1), len(problem.y)
    for _ in range(passes):
        active = problem.y * (problem.x @ w) < 1
        gradients = problem.penalty * w - np.where(active, problem.y, 0.0)[:, None] * problem.x
        scores = np.linalg.norm(gradients, axis=1) + 1e-12
        factors = scores.mean() / scores
        for i in Alias(scores, draw).many(n):
            yield i, factors[i], 1 / (problem.penalty * (next(steps) + OFFSET)), False


def shrinking(problem: Problem, w: Array, draw: np.random.Generator, passes: int) -> Draws:
    steps = itertools.count(1)
    for _ in range(passes):
        for i in draw.permutation(len(problem.y)):
            yield i, 1.0, 1 / (problem.penalty * (next(steps) + OFFSET)), True


SOLVERS: dict[str, Callable[[Problem, Array, np.random.Generator, int], Draws]] = {
    "sgd": sgd, "importance": importance, "shrinking": shrinking,
}  # fmt: skip


@dataclass
class Trace:
    """Objectives on the way: updates made, seconds, and how far above the best one, relative to it."""

    updates: list[int]
    seconds: list[float]
    excess: list[float]

    def at(self, axis: Sequence[float], x: float) -> float:
        """The excess at `x` of one of the axes, linear between points."""
        return float(np.interp(x, axis, self.excess))


def solve(problem: Problem, solver: str, seed: int, passes: int) -> Trace:
    """Run one solver from w = 0; P is evaluated four times a pass."""
    n, draw = len(problem.y), np.random.default_rng([seed, 5])
    w, trace = np.zeros(problem.x.shape[1]), Trace([0], [0.0], [problem.objective(np.zeros(problem.x.shape[1]))])
    radius, updates, seconds, start = 1 / np.sqrt(problem.penalty), 0, 0.0, time.perf_counter()
    for seen, (i, factor, step, may_leave) in enumerate(SOLVERS[solver](problem, w, draw, passes), 1):
        x, y = problem.x[i], problem.y[i]
        active = y * (w @ x) < 1
        # rows have length 1, so g_i is whether the hinge is active
        if not may_leave or draw.random() < BASE or draw.random() < active - 1 / (seen + 1):
            w *= 1 - step * factor * problem.penalty
            if active:
                w += (step * factor * y) * x
            if (length := np.sqrt(w @ w)) > radius:
                w *= radius / length
            updates += 1
        if seen % max(1, n // 4) == 0:
            seconds += time.perf_counter() - start
            trace.updates.append(updates)
            trace.seconds.append(seconds)
            trace.excess.append(problem.objective(w))
            start = time.perf_counter()
    trace.excess = [max(value / problem.best - 1, 1e-6) for value in trace.excess]
    return trace


def problems(name: str, penalty: float | None) -> list[Problem]:
    """One problem per class (one, if there are two); `penalty`: default 1/n.

    Raises:
        UserError: an unknown name that is no file either, or a file without classes in LIBSVM's format.
    """
    from sklearn import datasets

    if name in ("breast_cancer", "digits"):
        x, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    elif Path(name).is_file():
        x, labels = _file(name)
    else:
        raise UserError(f"data {name!r} is neither breast_cancer nor digits nor a file; give the path of a LIBSVM file")
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1.0)
    x = np.hstack([x, np.ones((len(x), 1))])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    classes = np.unique(labels)
    positive = classes[1:] if len(classes) == 2 else classes
    strength = penalty or 1 / len(x)
    return [_problem(x, np.where(labels == c, 1.0, -1.0), strength) for c in positive]


def _file(name: str) -> tuple[Array, Array]:
    """Samples and labels of a file in LIBSVM's format, with two classes or more."""
    from sklearn.datasets import load_svmlight_file

    try:
        x, labels = load_svmlight_file(name)
    except ValueError as error:
        raise UserError(f"{name} is not in LIBSVM's format ({error}); lines are: label index:value ...") from None
    if (wrong := labels[labels != np.round(labels)]).size:  # nan, too
        raise UserError(f"{name} has the label {wrong[0]:g}, which is no class; labels must be whole numbers")
    if len(found := np.unique(labels)) < 2:
        raise UserError(f"{name} has {len(found)} class(es) in {len(labels)} sample(s); give samples of at least two")
    if not np.isfinite(x.data).all():
        raise UserError(f"{name} has values that are not finite; replace them")
    return x.toarray(), labels


def _problem(x: Array, y: Array, penalty: float) -> Problem:
    from sklearn.svm import LinearSVC

    exact = LinearSVC(loss="hinge", C=1 / (penalty * len(y)), fit_intercept=False, tol=1e-6, max_iter=1_000_000)
    exact.fit(x, y)
    problem = Problem(x, y, penalty, 1.0)
    return Problem(x, y, penalty, problem.objective(exact.coef_[0]))


def compare(
    name: str, passes: int, seeds: int, penalty: float | None, axes: Mapping[str, str], say: Callable[[str], None]
) -> dict[str, str]:
    """The section of one data set, under the key "", and its pictures by file name."""
    found = problems(name, penalty)
    runs: dict[str, list[list[Trace]]] = {solver: [] for solver in SOLVERS}
    for seed, solver in itertools.product(range(seeds), SOLVERS):  # in turn, so that noise is shared
        runs[solver].append([solve(problem, solver, seed, passes) for problem in found])
    say(f"{name}: {len(found)} problem(s), {len(found[0].y)} samples")
    n, stem = len(found[0].y), Path(name).stem
    least = {axis: min(getattr(t, axis)[-1] for rs in runs.values() for r in rs for t in r) for axis in axes}
    header = ["excess over the best objective, %", *(f"{share:.0%} of the least" for share in SHARES)]
    parts = [
        f"## {stem}",
        f"{n} samples, {found[0].x.shape[1]} features, {len(found)} problem(s), L = {found[0].penalty:.3g}.",
    ]
    pictures: dict[str, str] = {}
    for axis, what in axes.items():
        points = [least[axis] * share for share in SHARES]
        rows = [[solver, *(_cell(runs[solver], axis, x) for x in points)] for solver in SOLVERS]
        ends = ", ".join(f"{x:,.0f}" if axis == "updates" else f"{x:.3f} s" for x in points)
        parts += [f"At equal {what} ({ends}):", table(header, rows), f"![{what}](svm_{stem}_{axis}.svg)"]
        pictures[f"svm_{stem}_{axis}.svg"] = _picture(runs, axis, least[axis], f"{stem}: excess against {what}")
    used = fmean(t.updates[-1] for r in runs["shrinking"] for t in r) / (passes * n)
    parts.append(f"Shrinking used {used:.0%} of the samples it saw.")
    return {"": "\n\n".join(parts), **pictures}


_AXES = {"updates": "updates", "seconds": "time"}
SHARES = (0.1, 0.3, 1.0)


def _cell(runs: Sequence[Sequence[Trace]], axis: str, x: float) -> str:
    values = [100 * fmean(t.at(getattr(t, axis), x) for t in run) for run in runs]
    return f"{fmean(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def _picture(runs: dict[str, list[list[Trace]]], axis: str, end: float, title: str) -> str:
    grid = np.geomspace(end / 100, end, 40)
    curves = []
    for solver, style in STYLES.items():
        mean = [(x, fmean(t.at(getattr(t, axis), x) for run in runs[solver] for t in run)) for x in grid]
        curves.append(Curve(solver, style, mean))
    return alone(str(plane(curves, title, Scale(_AXES[axis], True), Scale("P / best - 1", True))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the solvers and write the page."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.svm", description=__doc__)
    parser.add_argument("--data", nargs="+", default=["breast_cancer", "digits"], help="names, or LIBSVM files")
    parser.add_argument("--passes", type=int, default=30, help="of every solver over the samples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--penalty", type=float, default=None, help="L; default: 1 / samples")
    parser.add_argument("--without-times", action="store_true", help="for a machine that has other work to do")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page and its pictures")
    given = parser.parse_args(arguments)
    if given.passes < 1 or given.seeds < 1 or (given.penalty is not None and given.penalty <= 0):
        parser.error("passes and seeds must be at least 1, penalty positive")
    began, start = datetime.now(UTC), time.monotonic()
    axes = {axis: what for axis, what in _AXES.items() if axis != "seconds" or not given.without_times}

    def make(say: Callable[[str], None]) -> dict[str, str]:
        files: dict[str, str] = {}
        sections = []
        for name in given.data:
            found = compare(name, given.passes, given.seeds, given.penalty, axes, say)
            sections.append(found.pop(""))
            files |= found
        words = f"svm --data {' '.join(Path(d).name for d in given.data)} --passes {given.passes} --seeds {given.seeds}"
        words += " --without-times" if given.without_times else ""
        head = environment(machine(began), words, time.monotonic() - start)
        title = "# Linear SVM: shrinking, importance sampling, plain SGD"
        note = (
            f"{given.seeds} seed(s): mean (least .. most). A sample that is left out is looked at all the same: fewer "
            "updates need not be less time."
        )
        if given.without_times:
            note += " Times are left out: the machine was busy with other work."
        return {"svm.md": "\n\n".join([title, head, note, *sections]) + "\n", **files}

    try:
        return produce(make, given.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
