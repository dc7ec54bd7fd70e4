"""The page of trade-offs: the simulator and the closed forms agree, and the pictures show every line."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from decoupled.benchmarks import tradeoff


@pytest.mark.parametrize("method", tradeoff.LATE.values(), ids=str)
@pytest.mark.parametrize("latency", [0.5, 2.0])
def test_utilisation_is_what_the_closed_form_says(method: object, latency: float) -> None:
    expected = tradeoff.expected(method, 4, latency)
    assert tradeoff.utilisation(method, 4, latency) == pytest.approx(expected, abs=0.01)


def test_twice_the_delay_hides_twice_the_latency() -> None:
    """The table of the notes (0.6), K = 4, latency 2: 0.50 against 0.87."""
    found = [round(tradeoff.expected(method, 4, 2.0), 3) for method in tradeoff.LATE.values()]
    assert found == [0.5, 0.875]


@pytest.mark.parametrize("name", tradeoff.FLUSHED)
def test_idle_shares_are_what_their_methods_claim(name: str) -> None:
    found, form = tradeoff.bubble(name, 4, 8)
    assert form is not None and found == pytest.approx(form, abs=1e-9)


@pytest.mark.slow
def test_the_kept_page_is_what_the_command_writes(tmp_path: Path) -> None:
    assert tradeoff.main(["--out", str(tmp_path)]) == 0
    for file in sorted(tmp_path.iterdir()):
        assert file.read_text() == (tradeoff.RESULTS / file.name).read_text(), file.name
        if file.suffix == ".svg":
            assert len(ElementTree.parse(file).findall(".//{*}polyline")) >= 4
