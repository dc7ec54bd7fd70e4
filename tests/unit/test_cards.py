"""Cards and documents: complete, linked, and every example in them runs."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import decoupled
from decoupled import cli, registry
from decoupled.card import HEADINGS, Card
from decoupled.config import CompareConfig, TrainConfig
from decoupled.config import read as read_config
from decoupled.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
METHODS = registry.methods(object)
FAMILIES = sorted({registry.family(name) for name in METHODS})
DOCUMENTS = [
    "README.md",
    "benchmarks/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"methods/{family}/README.md" for family in FAMILIES),
]
FENCED = re.MULTILINE | re.DOTALL
PAPERS_NOT_READ = "the paper's equations could not be read"


def card_path(name: str) -> str:
    return f"methods/{registry.family(name)}/{name}.md"


EVERYTHING = [*DOCUMENTS, *map(card_path, METHODS)]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=FENCED)


def command_lines(text: str) -> list[str]:
    """Lines of code blocks, and inline code, that start with the command."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, flags=FENCED)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines + re.findall(r"`([^`\n]+)`", text) if re.match(r"decoupled [a-z]", line)]


def outside_code(text: str) -> str:
    return re.sub(r"^(`{3,4}).*?^\1$", "", text, flags=FENCED)


def table(text: str) -> list[str]:
    """The rows of the table of methods."""
    lines = text.split("| method | in one sentence |\n|---|---|\n", 1)[1].splitlines()
    return sorted(itertools.takewhile(lambda line: line.startswith("|"), lines))


def row(name: str, path: str) -> str:
    return f"| [{name}]({path}) | {registry.card(name).summary} |"


def run(code: str, where: str) -> None:
    exec(compile(code, where, "exec"), {"__name__": "example"})


def check_card(card: Card) -> None:
    """What every card must be, whoever wrote it."""
    text = card.text
    assert text.startswith(f"# {card.name}\n"), "the first line is the method's name"
    assert tuple(re.findall(r"^## (.+)$", text, flags=re.MULTILINE)) == HEADINGS
    empty = [heading for heading, body in card.sections.items() if not body]
    assert not empty, f"nothing under {empty}"
    assert re.fullmatch(r"[A-Z][^\n]*[^\s.!?]\.", card.summary), "one line that ends with a full stop"
    assert not re.search(r"[.!?]\s", card.summary), "one sentence only"
    differences = card.sections["Differences from the paper"]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", differences, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) != [], "differences are numbered from 1"
    assert examples(text), "a card has at least one example in python"


@pytest.mark.parametrize("name", METHODS)
def test_card_is_complete(name: str) -> None:
    check_card(registry.card(name))


@pytest.mark.parametrize("name", METHODS)
def test_card_names_every_option(name: str) -> None:
    text = registry.card(name).text
    assert not [option for option in registry.options(name) if not re.search(rf"\b{option}\b", text)]


@pytest.mark.parametrize("K", [0, -1])
def test_facts_are_of_at_least_one_block(K: int) -> None:
    with pytest.raises(UserError, match=f"facts: K must be an integer of at least 1, got {K}"):
        registry.card("pipedream").facts(K)


def test_card_checks_can_fail() -> None:
    good = registry.card("ddg")
    summary = good.summary
    broken = {
        "a heading is missing": good.text.replace("## Staleness\n", ""),
        "two headings are swapped": good.text.replace("## Memory", "## X").replace("## Bytes", "## Memory"),
        "a section is empty": good.text[: good.text.index("## Results")] + "## Results\n",
        "two sentences": good.text.replace(summary, f"{summary} And more."),
        "another name": good.text.replace("# ddg", "# dgd", 1),
        "no example": good.text.replace("```python", "```"),
    }
    for what, text in broken.items():
        assert text != good.text, what
        with pytest.raises(AssertionError):
            check_card(Card(good.name, good.family, text, good.method, good.options))


@pytest.mark.parametrize("name", METHODS)
def test_card_examples_run(name: str) -> None:
    for number, code in enumerate(examples(registry.card(name).text)):
        assert "Trainer(" in code
        assert f'"{name}"' in code, "the example uses the method it stands under"
        run(code, f"{card_path(name)}, example {number}")


@pytest.mark.parametrize("name", registry.methods())
@pytest.mark.parametrize("K", [1, 3])
def test_rendered_card_holds_the_facts(name: str, K: int) -> None:
    card = decoupled.card(name)
    text, facts = card.render(K), registry.make(name).facts
    assert text.startswith(card.text.rstrip())
    generated = dict(re.findall(r"^- ([^:]+): (.*)$", text.split("## Generated from the code", 1)[1], re.MULTILINE))
    assert generated["family"] == registry.family(name)
    assert generated["options"] == str(registry.options(name))
    assert generated["exact"] == str(facts.exact)
    assert generated["updates between forward and backward"] == str([facts.delay(k, K) for k in range(K)])
    assert generated["passes in flight"] == str([facts.in_flight(k, K) for k in range(K)])
    assert generated["locks removed"] == str(list(facts.locks))
    assert generated["objectives that reach block k"] == str({k: list(facts.reach(k, K)) for k in range(K)})


@pytest.mark.parametrize("family", FAMILIES)
def test_family_readme_lists_its_methods(family: str) -> None:
    names = [name for name in METHODS if registry.family(name) == family]
    assert table(read(f"methods/{family}/README.md")) == sorted(row(name, f"{name}.md") for name in names)


def test_readme_lists_exactly_the_registered_methods() -> None:
    assert table(read("README.md")) == sorted(row(name, card_path(name)) for name in METHODS)


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = examples(read("README.md"))
    assert "decoupled.Trainer(" in blocks[0]
    run("\n".join(blocks), "README.md")
    assert "{0: 60}" in capsys.readouterr().out  # the staleness of the last block


def test_commands_of_the_documents_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `decoupled COMMAND` in a document exists with its options and keys; those that train nothing run."""
    commands = [shlex.split(line, comments=True)[1:] for path in EVERYTHING for line in command_lines(read(path))]
    others = {"report", "trace", "doctor"}  # they need a directory, or a machine without fault
    assert {words[0] for words in commands} == {"compare", "train", "simulate", "flops", "list", "info", *others}
    configs = {"compare": CompareConfig, "train": TrainConfig}
    for words in commands:
        options = cli._parser().parse_args(words)
        if words[0] in configs:
            read_config(configs[words[0]], options.words)
        elif words[0] not in others and "clipped_pipeline" not in words:  # that method exists in CONTRIBUTING.md only
            assert cli.main(words) == 0, words
            assert capsys.readouterr().out


@pytest.mark.parametrize("path", EVERYTHING)
def test_links_lead_somewhere(path: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", outside_code(read(path))):
        if not link.startswith("https://"):
            assert (ROOT / path).parent.joinpath(link).exists(), f"{path} links {link}, which does not exist"


@pytest.mark.parametrize("name", [name for name in METHODS if registry.family(name) == "auxiliary_variables"])
def test_cards_from_descriptions_say_so(name: str) -> None:
    paper = " ".join(registry.card(name).sections["Paper"].split())
    assert f"reproduced from the description; {PAPERS_NOT_READ}" in paper


def test_contributing_example_is_a_working_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module, card and table of the five steps, put into a folder that is not the zoo's."""
    others = {name: entry for name, entry in registry._registry.items() if name != "clipped_pipeline"}
    monkeypatch.setattr(registry, "_registry", others)
    text = read("CONTRIBUTING.md")
    card, readme = re.findall(r"^````markdown\n(.*?)^````$", text, flags=FENCED)
    (module,) = examples(re.sub(r"^````.*?^````$", "", text, flags=FENCED))
    path = tmp_path / "clipped" / "method.py"
    path.parent.mkdir()
    path.write_text(module, encoding="utf-8")
    path.with_name("clipped_pipeline.md").write_text(card, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("clipped_method", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "clipped_method", example)
    spec.loader.exec_module(example)

    check_card(registry.card("clipped_pipeline"))
    assert table(readme) == [row("clipped_pipeline", "clipped_pipeline.md")]
    for code in examples(card):
        run(code, "CONTRIBUTING.md, card")
    steps = {}

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    clipped = [{"name": "clipped_pipeline", "limit": limit} for limit in (1e9, 1e-9)]
    for method in ("pipedream", *clipped):
        torch.manual_seed(0)
        lower, upper = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)
        batches = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(4)]
        before = nn.utils.parameters_to_vector(lower.parameters()).detach()
        loss = nn.functional.cross_entropy
        with decoupled.Trainer([lower, upper], method, loss=loss, optimizer=sgd, devices=["cpu"]) as trainer:
            trainer.fit(batches)
        steps[str(method)] = nn.utils.parameters_to_vector(lower.parameters()).detach() - before
    plain, loose, tight = steps.values()
    torch.testing.assert_close(loose, plain)
    assert plain.abs().max() > 1e-4
    assert tight.abs().max() < 1e-7


def results(name: str) -> str:
    return read(card_path(name)).partition("<!-- results -->")[2].partition("<!-- /results -->")[0]


def rows(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(rf"\| {name}\b", line)]


PUBLISHED = [name for name in METHODS if rows(results(name), name)]


def test_most_cards_have_results() -> None:
    assert len(PUBLISHED) > 0.7 * len(METHODS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_results_of_a_card_are_those_of_the_page_it_names(name: str) -> None:
    pages = re.findall(r"\]\(\.\./\.\./(benchmarks/results/\w+\.md)\)", results(name))
    there = {line for page in pages for line in read(page).splitlines()}
    assert [row for row in rows(results(name), name) if row not in there] == []
