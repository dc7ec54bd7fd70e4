"""Claims about the order of methods, held against the results: which of them this comparison reproduces.

    claims:
      - text: quality
        measure: validation_loss             less is first
        order: [[backprop], ["chunked_local(chunks=2)"], [greedy_local, ...], ...]       labels; groups of equals
        cutoff: tightest                     only for a measure "... to reach a loss"

    measure             what is compared
    validation_loss     at the end, at the method's best point, over its seeds
    chain               FLOPs per example on the critical path
    sequential_flops    least of all configurations that reach the cut-off; so also flops and seconds

A step of the order holds if every method of a group has less than every one of the next; it is open if the ranges over
the seeds overlap. The cut-off is "tightest": the lowest that any method of the claim reaches, "each", or a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decoupled.errors import UserError, unknown
from decoupled.observe.charts import significant
from decoupled.observe.frontier import least
from decoupled.observe.points import Record, best, last_loss

MEASURES = ("validation_loss", "chain")
TO_REACH = ("sequential_flops", "flops", "seconds")


@dataclass(frozen=True)
class Step:
    """One pair of methods: `first` is claimed to be below `second`; verdict is "yes", "no" or "open"."""

    first: str
    second: str
    numbers: tuple[float, float]
    verdict: str

    def __str__(self) -> str:
        left, right = (significant(n) if math.isfinite(n) else "not reached" for n in self.numbers)
        return f"{self.first} {left} before {self.second} {right}: {self.verdict}"


@dataclass(frozen=True)
class Finding:
    """One claim and its steps."""

    text: str
    steps: tuple[Step, ...]

    @property
    def verdict(self) -> str:
        """``reproduced``, ``not reproduced``, or how many of the steps hold."""
        counts = {v: sum(step.verdict == v for step in self.steps) for v in ("yes", "no", "open")}
        if counts["yes"] == len(self.steps):
            return "reproduced"
        if not counts["yes"] and counts["no"]:
            return "not reproduced"
        rest = ", ".join(f"{counts[v]} {word}" for v, word in (("no", "not"), ("open", "open")) if counts[v])
        return f"{counts['yes']} of {len(self.steps)} steps reproduced, {rest}"


def check(claims: Any, cutoffs: Any) -> None:
    """Raise UserError unless `claims` and `cutoffs` are written as they must be."""
    if not isinstance(cutoffs, list) or not all(isinstance(c, int | float) and c > 0 for c in cutoffs):
        raise UserError(f"cutoffs must be a list of validation losses above 0, got {cutoffs!r}; write cutoffs=[0.5]")
    for claim in claims if isinstance(claims, list) else [claims]:
        keys = set(claim) if isinstance(claim, Mapping) else set()
        if not {"text", "measure", "order"} <= keys <= {"text", "measure", "order", "cutoff"}:
            raise UserError(
                f"a claim has text, measure, order and perhaps cutoff, got {claim!r}; see observe/claims.py"
            )
        if claim["measure"] not in (*MEASURES, *TO_REACH):
            raise unknown("measure", str(claim["measure"]), (*MEASURES, *TO_REACH))
        if (claim["measure"] in TO_REACH) != ("cutoff" in claim):
            raise UserError(f"claim {claim['text']!r}: a cutoff goes with {', '.join(TO_REACH)} and with nothing else")


def findings(results: Mapping[str, Any]) -> list[Finding]:
    """Every claim of the comparison's config about methods that were run."""
    config = results.get("config") or {}
    records: dict[str, list[Record]] = {}
    for record in results.get("records") or []:
        records.setdefault(record.get("label") or record["method"], []).append(record)
    found = []
    for claim in config.get("claims") or []:
        groups = [[label for label in group if label in records] for group in claim["order"]]
        groups = [group for group in groups if group]
        for where, cutoff in _cutoffs(claim, config.get("cutoffs") or [], [records[x] for g in groups for x in g]):
            numbers = {x: _range(claim["measure"], records[x], cutoff) for group in groups for x in group}
            steps = tuple(
                _step(a, b, numbers)
                for one, other in itertools.pairwise(groups)
                for a, b in itertools.product(one, other)
                if math.isfinite(min(numbers[a][0], numbers[b][0]))  # else nothing can be said
            )
            if steps:
                found.append(Finding(claim["text"] + where, steps))
    return found


def _cutoffs(
    claim: Mapping[str, Any], cutoffs: Sequence[float], records: Sequence[Sequence[Record]]
) -> list[tuple[str, float]]:
    wanted = claim.get("cutoff")
    if wanted is None:
        return [("", math.nan)]
    if wanted == "tightest":
        reached = [c for c in cutoffs if any(math.isfinite(least(own, c, claim["measure"])) for own in records)]
        return [(f" (loss {min(reached):g})", min(reached))] if reached else []
    return [(f" (loss {c:g})", c) for c in (cutoffs if wanted == "each" else [wanted])]


def _range(measure: str, records: Sequence[Record], cutoff: float) -> tuple[float, float, float]:
    """Mean, least and greatest over the seeds; where seeds make no difference, three times the same."""
    if measure == "validation_loss":
        losses = [last_loss(record) for record in best(records)]
        return sum(losses) / len(losses), min(losses), max(losses)
    priced = [record["flops"] for record in records if record.get("flops")]
    number = (priced[0]["chain"] if priced else math.inf) if measure == "chain" else least(records, cutoff, measure)
    return number, number, number


def _step(first: str, second: str, numbers: Mapping[str, tuple[float, float, float]]) -> Step:
    (a, a_low, a_high), (b, b_low, b_high) = numbers[first], numbers[second]
    overlap = a_low <= b_high and b_low <= a_high
    verdict = "open" if overlap else "yes" if a < b else "no"
    return Step(first, second, (a, b), verdict)
