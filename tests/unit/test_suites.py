"""Suites: what they compare with is among what they compare."""

from __future__ import annotations

import pytest

from decoupled import registry, sweep
from decoupled.benchmarks.publish import ROOT
from decoupled.config import CompareConfig, baseline, read
from decoupled.specs import label

SUITES = sorted(path.stem for path in (ROOT / "benchmarks" / "suites").glob("*.yaml"))


@pytest.mark.parametrize("suite", SUITES)
def test_the_baseline_is_one_of_the_methods(suite: str) -> None:
    config = read(CompareConfig, [f"suite={suite}"])
    if sweep.kind(config).baseline is None and config.methods:  # no methods: all there are
        assert config.baseline in map(label, config.methods)


@pytest.mark.parametrize("suite", SUITES)
def test_the_baseline_can_be_made_where_other_methods_are_asked_for(suite: str) -> None:
    config = read(CompareConfig, [f"suite={suite}", "methods=[anything]"])
    if (kind := sweep.kind(config)).baseline is None:
        assert label(baseline(config)) == config.baseline
        registry.make(baseline(config), kind.trains)
