"""Claims about the order of methods, held against the results: which of them this comparison reproduces.

    claims:
      - text: quality
        measure: validation_loss             less is first
        order: [[backprop], ["chunked_local(chunks=2)"], [greedy_local, ...], ...]       labels; groups of equals
        cutoff: tightest                     only for a measure "... to reach a loss"

    measure             what is compared
    validation_loss     at the end, at the method's best point, over its seeds
    chain               FLOPs per example on the critical path, for every model of a sweep
    sequential_flops    least of all configurations that reach the cut-off; so also flops and seconds

A step of the order holds if every method of a group has less than every one of the next; it is open if the ranges over
the seeds overlap, and not checked if there is no number to compare. The cut-off is "tightest": the lowest that any
method of the claim reaches, "each", or a number. A method that was not run is left out; a claim of which nothing can be
checked stays, and says why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decoupled.errors import UserError, nearest, unknown
from decoupled.observe.charts import significant
from decoupled.observe.frontier import least
from decoupled.observe.points import Record, best, by_model, last_loss

MEASURES = ("validation_loss", "chain")
TO_REACH = ("sequential_flops", "flops", "seconds")
VERDICTS = {"yes": "reproduced", "no": "not", "open": "open", "not checked": "not checked"}  # of a step: in a sum
Records = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class Step:
    """One pair of methods: `first` is claimed to be below `second`; verdict is one of VERDICTS.

    A number is nan if it was not counted, and infinite if there is none: `infinite` says why.
    """

    first: str
    second: str
    numbers: tuple[float, float]
    verdict: str
    infinite: str = "not reached"

    def __str__(self) -> str:
        left, right = map(self._number, self.numbers)
        return f"{self.first} {left} before {self.second} {right}: {self.verdict}"

    def _number(self, number: float) -> str:
        return "not counted" if math.isnan(number) else self.infinite if math.isinf(number) else significant(number)


@dataclass(frozen=True)
class Finding:
    """One claim and its steps; `why`: it could not be checked. `absent`: methods that were not run."""

    text: str
    steps: tuple[Step, ...]
    why: str = ""
    absent: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``reproduced``, ``not reproduced``, how many of the steps hold, or why there are none."""
        if self.why:
            return f"not checked: {self.why}"
        counts = {v: sum(step.verdict == v for step in self.steps) for v in VERDICTS}
        if counts["yes"] == len(self.steps):
            return "reproduced"
        if not counts["yes"] and counts["no"]:
            return "not reproduced"
        rest = ", ".join(f"{counts[v]} {word}" for v, word in VERDICTS.items() if counts[v] and v != "yes")
        return f"{counts['yes']} of {len(self.steps)} steps reproduced, {rest}"


def check(claims: Any, cutoffs: Any, labels: Collection[str]) -> None:
    """Raise UserError unless `claims` and `cutoffs` are written as they must be, and claims speak of `labels` only."""
    if not isinstance(cutoffs, list) or not all(map(_loss, cutoffs)):
        raise UserError(f"cutoffs must be a list of validation losses above 0, got {cutoffs!r}; write cutoffs=[0.5]")
    for claim in _listed(claims):
        keys = set(claim) if isinstance(claim, Mapping) else set()
        if not {"text", "measure", "order"} <= keys <= {"text", "measure", "order", "cutoff"}:
            raise UserError(
                f"a claim has text, measure, order and perhaps cutoff, got {claim!r}; see observe/claims.py"
            )
        if not isinstance(claim["text"], str):
            raise UserError(f"the text of a claim must be words, got {claim['text']!r}; write it in quotes")
        if claim["measure"] not in (*MEASURES, *TO_REACH):
            raise unknown("measure", str(claim["measure"]), (*MEASURES, *TO_REACH))
        _check_order(claim, labels)
        _check_cutoff(claim, cutoffs)


def _check_order(claim: Mapping[str, Any], labels: Collection[str]) -> None:
    about, order = f"claim {claim['text']!r}:", claim["order"]
    groups = order if isinstance(order, list) else []
    if len(groups) < 2 or not all(isinstance(group, list) and group for group in groups):
        raise UserError(f"{about} order must be a list of two groups or more, got {order!r}; write [[a], [b, c]]")
    named = [label for group in groups for label in group]
    for label in named:
        if not isinstance(label, str):
            raise UserError(f"{about} a group must list labels, got {label!r}; write one in quotes: 'NAME(key=value)'")
        if label not in labels:
            raise UserError(
                f"{about} {label!r} is none of what is compared.{nearest(label, labels)} Add it to methods, or take it "
                f"out of the claim; known: {', '.join(sorted(labels))}"
            )
        if named.count(label) > 1:
            raise UserError(f"{about} {label!r} stands in order more than once; name it in one group")


def _check_cutoff(claim: Mapping[str, Any], cutoffs: Sequence[float]) -> None:
    about = f"claim {claim['text']!r}:"
    if (claim["measure"] in TO_REACH) != ("cutoff" in claim):
        raise UserError(f"{about} a cutoff goes with {', '.join(TO_REACH)} and with nothing else")
    if "cutoff" not in claim or _loss(claim["cutoff"]):
        return
    if claim["cutoff"] not in ("tightest", "each"):
        raise UserError(f"{about} cutoff must be tightest, each, or a validation loss above 0, got {claim['cutoff']!r}")
    if not cutoffs:
        raise UserError(f"{about} cutoff {claim['cutoff']} is one of cutoffs, and there are none; write cutoffs=[0.5]")


def _loss(value: Any) -> bool:
    """Whether this can be a validation loss to be reached."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _listed(claims: Any) -> list[Any]:
    """Claims as a list; one of them may stand alone."""
    return claims if isinstance(claims, list) else [claims]


def findings(results: Mapping[str, Any]) -> list[Finding]:
    """Every claim of the comparison's config; those about a loss once for each, those about FLOPs for each model."""
    config = results.get("config") or {}
    records: dict[str, list[Record]] = {}
    for record in results.get("records") or []:
        records.setdefault(record.get("label") or record["method"], []).append(record)
    found = []
    for claim in _listed(config.get("claims") or []):
        named = [label for group in claim["order"] for label in group]
        absent = tuple(label for label in named if label not in records)
        groups = [group for one in claim["order"] if (group := [label for label in one if label in records])]
        if len(groups) < 2:
            found.append(Finding(claim["text"], (), f"not run: {', '.join(absent)}"))
            continue
        own = {label: records[label] for group in groups for label in group}
        for where, cutoff, runs in _cases(claim, config.get("cutoffs") or [], own):
            steps, why = _steps(claim["measure"], groups, runs, cutoff)
            found.append(Finding(claim["text"] + where, steps, why, absent))
    return found


def _cases(
    claim: Mapping[str, Any], cutoffs: Sequence[float], records: Records
) -> Iterator[tuple[str, float, Records]]:
    """What a claim is checked for: words for it, the cut-off (or nan), and the records it is about."""
    wanted = claim.get("cutoff")
    if wanted is not None:
        if wanted == "tightest":  # where none is reached: the loosest, which none reached either
            reached = [
                c for c in cutoffs if any(math.isfinite(least(r, c, claim["measure"])) for r in records.values())
            ]
            losses = [min(reached or [max(cutoffs, default=math.nan)])]
        else:
            losses = cutoffs if wanted == "each" else [wanted]
        yield from ((f" (loss {loss:g})", loss, records) for loss in losses)
    elif claim["measure"] == "chain":
        models = {label: by_model(runs) for label, runs in records.items()}
        every = list(dict.fromkeys(model for own in models.values() for model in own))
        for model in every:
            runs = {label: own.get(model, []) for label, own in models.items()}
            yield (f" ({model})" if len(every) > 1 else ""), math.nan, runs
    else:
        yield "", math.nan, records


def _steps(
    measure: str, groups: Sequence[Sequence[str]], records: Records, cutoff: float
) -> tuple[tuple[Step, ...], str]:
    """The steps, or why there are none."""
    numbers = {x: _range(measure, records[x], cutoff) for group in groups for x in group}
    infinite = "failed or diverged" if measure == "validation_loss" else "not reached"
    steps = tuple(
        _step(a, b, numbers, infinite)
        for one, other in itertools.pairwise(groups)
        for a, b in itertools.product(one, other)
    )
    if any(step.verdict != "not checked" for step in steps):
        return steps, ""
    if any(math.isnan(number) for step in steps for number in step.numbers):
        return (), "FLOPs were not counted"
    return (
        (),
        "no run ended with a loss" if measure == "validation_loss" else "not reached by all seeds of any configuration",
    )


def _range(measure: str, records: Sequence[Record], cutoff: float) -> tuple[float, float, float]:
    """Mean, least and greatest over the seeds; where seeds make no difference, three times the same."""
    if measure == "validation_loss":
        losses = [last_loss(record) for record in best(records)]
        return sum(losses) / len(losses), min(losses), max(losses)
    priced = [record["flops"] for record in records if record.get("flops")]
    if measure == "chain":
        number = priced[0]["chain"] if priced else math.nan
    else:
        number = least(records, cutoff, measure)
        curves = [point for record in records for point in record.get("curve") or []]
        if curves and not any(measure in point for point in curves):
            number = math.nan
    return number, number, number


def _step(first: str, second: str, numbers: Mapping[str, tuple[float, float, float]], infinite: str) -> Step:
    (a, a_low, a_high), (b, b_low, b_high) = numbers[first], numbers[second]
    overlap = a_low <= b_high and b_low <= a_high
    verdict = "open" if overlap else "yes" if a < b else "no"
    if math.isnan(a) or math.isnan(b) or (math.isinf(a) and math.isinf(b)):
        verdict = "not checked"
    return Step(first, second, (a, b), verdict, infinite)
