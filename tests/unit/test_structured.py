"""Structured datasets: generators follow their rules and depend on the seed only; readers name what is wrong."""

from __future__ import annotations

import math
import statistics
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoupled.data import structured
from decoupled.data.structured import Graph, Tree, list_reduction, listops, molecules, reduction, treebank
from decoupled.data.structured.expressions import TOKENS, binary, evaluated
from decoupled.errors import UserError

SMALL = {"train": 30, "validation": 10, "test": 10}
DIGESTS = {"list_reduction": "0a3c464269615601", "listops": "4e7b2d7f1c588ccc", "babi15": "f10fc732ec92f54f"}


@pytest.mark.parametrize("name", ["list_reduction", "listops", "babi15"])
def test_the_seed_decides_everything(name: str) -> None:
    one, same, other = (structured.load(name, **SMALL, seed=seed) for seed in (1, 1, 2))
    assert (one.train, one.validation, one.test) == (same.train, same.validation, same.test)
    assert one.description == same.description
    assert one.train != other.train and one.digest != other.digest
    assert [len(instances) for _, instances in one.parts()] == [30, 10, 10]
    assert one.description == f"{one.source}; train 30, validation 10, test 10; sha256 {one.digest}"


def test_the_generated_data_are_these() -> None:
    """A change of a generator changes what published results were measured on: it belongs into the CHANGELOG."""
    digests = {name: structured.load(name, **SMALL).digest[:16] for name in ("list_reduction", "listops", "babi15")}
    assert digests == DIGESTS


# --- list reduction -----------------------------------------------------------------------------------------------

NAMED = reduction.TOKENS.index


@pytest.mark.parametrize(
    ("operation", "digits", "result"),
    [
        ("mean", (1, 2), 2),  # 1.5 to even
        ("mean", (2, 3), 2),  # 2.5 to even
        ("mean", (9,), 9),
        ("even-odd", (1, 8), 3),  # -7
        ("even-odd", (5, 1, 6), 4),  # 5.5 - 1 = 4.5 to even
        ("even-odd", (7,), 7),
        ("max-min", (3, 9, 4), 6),
        ("len", (0, 0, 0), 3),
    ],
)
def test_lists_are_reduced(operation: str, digits: tuple[int, ...], result: int) -> None:
    assert reduction.reduced((NAMED(operation), *digits)) == result


def test_all_operations_lengths_and_labels_occur() -> None:
    data = list_reduction(train=2000, validation=1, test=1)
    assert {s.tokens[0] for s in data.train} == {10, 11, 12, 13}
    assert {len(s.tokens) for s in data.train} == set(range(2, 11))
    assert {s.label for s in data.train} == set(range(10))
    assert all(token < 10 for s in data.train for token in s.tokens[1:])


# --- ListOps ------------------------------------------------------------------------------------------------------


def test_expressions_become_left_branching_trees() -> None:
    low, high = TOKENS.index("[MIN"), TOKENS.index("[MAX")
    tree = binary((high, (2, (low, (4, 7)))))
    #   ((MAX 2) (((MIN 4) 7) ])) ])
    words = [TOKENS[word] if word >= 0 else "" for word in tree.words]
    assert words == ["[MAX", "2", "", "[MIN", "4", "", "7", "", "]", "", "", "]", ""]
    assert tree.children[-1] == (10, 11) and tree.children[10] == (2, 9)
    assert tree.labels == (*[-1] * 12, 4)
    assert tree.heights()[-1] == 5  # MIN 4, then 7, its bracket, MAX 2 with it, the bracket of MAX
    assert tree.parents()[0] == (2, 0) and tree.parents()[1] == (2, 1) and tree.parents()[-1] == (-1, 0)


@pytest.mark.parametrize(
    ("operation", "values", "result"),
    [("[MED", (1, 4, 9), 4), ("[MED", (1, 4), 2), ("[SM", (9, 9), 8), ("[MIN", (3, 5), 3), ("[MAX", (3, 5), 5)],
)
def test_operations_of_listops(operation: str, values: tuple[int, ...], result: int) -> None:
    assert evaluated((TOKENS.index(operation), values)) == result


def test_expressions_are_distinct_and_not_too_long() -> None:
    data = listops(train=1000, validation=100, test=100, longest=20)
    trees = data.train + data.validation + data.test
    assert len(set(trees)) == 1200
    leaves = [sum(word >= 0 for word in tree.words) for tree in trees]
    assert max(leaves) == 20 and min(leaves) == 4
    for tree in trees:
        assert [children == (-1, -1) for children in tree.children] == [word >= 0 for word in tree.words]
        assert all(left < node and right < node for node, (left, right) in enumerate(tree.children))


def test_when_no_expressions_are_left_it_says_so() -> None:
    with pytest.raises(UserError, match="only 400 instances, but 1200 are asked for; make the splits smaller"):
        listops(train=1000, validation=100, test=100, arguments=2, longest=4)


# --- bAbI ---------------------------------------------------------------------------------------------------------


@given(st.integers(3, 6), st.integers(0, 100))
def test_the_answer_is_what_the_asked_persons_animal_fears(people: int, seed: int) -> None:
    data = structured.babi15(train=3, validation=1, test=1, seed=seed, people=people)
    for graph in data.train + data.validation + data.test:
        assert len(graph) == 2 * people and sum(graph.kinds) == 1
        step = {(u, kind): v for u, kind, v in graph.edges if kind < 2}
        assert len(step) == 2 * people
        assert graph.target == step[step[graph.kinds.index(1), 0], 1]
        assert {(v, kind + 2, u) for u, kind, v in graph.edges if kind < 2} == {e for e in graph.edges if e[1] >= 2}
        assert all(u != v for u, _, v in graph.edges)


def test_no_story_is_in_two_splits() -> None:
    """Without the order of the nodes, every one of the 4! 3^4 4 questions occurs at most once; one more is refused."""
    sizes = {"validation": 2000, "test": 2000}
    assert len(structured.babi15(train=7776 - 4000, **sizes).train) == 3776
    with pytest.raises(UserError, match="only 7776 instances, but 7777"):
        structured.babi15(train=7777 - 4000, **sizes)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text("(3 (2 It) (4 (2 's) (4 good)))\n(1 (2 It) (0 fails))\n")
    (tmp_path / "dev.txt").write_text("\n(4 (2 so) (4 good))\n")
    (tmp_path / "test.txt").write_text("(2 good)\n")
    return tmp_path


def test_treebank(bank: Path) -> None:
    data = structured.load({"name": "treebank", "path": str(bank)})
    assert data.tokens == ("", "It", "'s", "good", "fails")
    assert data.train[0] == Tree((1, 2, 3, -1, -1), ((-1, -1),) * 3 + ((1, 2), (0, 3)), (2, 2, 4, 4, 3))
    assert data.validation == [Tree((0, 3, -1), ((-1, -1), (-1, -1), (0, 1)), (2, 4, 4))]
    assert data.classes == 5 and len(data.test[0]) == 1
    assert structured.load({"name": "treebank", "path": str(bank)}, limit=1).tokens == ("", "It", "'s", "good")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("(3 (2 It)", "1 brackets are not closed"),
        ("(3 (2 a) (2 b)) (1 c)", "'\\(' after the end of the tree"),
        ("x (2 a)", "'x' outside brackets"),
        ("(7 a)", "'7' is no class of 0 ... 4"),
        ("(3 (2 a) (2 b) (2 c))", "a node has 4 parts"),
        ("(3 (2 a))", "a node has 2 parts"),
        (")", "'\\)' outside brackets"),
    ],
)
def test_a_damaged_tree_is_named_with_its_line(bank: Path, line: str, what: str) -> None:
    (bank / "dev.txt").write_text(f"(2 fine)\n{line}\n")
    with pytest.raises(UserError, match=rf"dev.txt, line 2: {what}.*write one binary tree"):
        treebank(path=bank)


def test_missing_treebank_files_are_named(bank: Path) -> None:
    (bank / "test.txt").unlink()
    with pytest.raises(UserError, match=r"test.txt does not exist; give the folder with train.txt, dev.txt, test.txt"):
        treebank(path=bank)
    with pytest.raises(UserError, match="needs its folder"):
        treebank()


WATER = """3
gdb 3\t799.58812\t437.90386\t282.94545\t1.8511\t6.31\t-0.2928\t0.0687\t0.3615\t19.0\t0.0213\t-76\t-76\t-76\t-76\t6.0
O\t-0.0343604951\t 0.9775395708\t 0.0076015923\t-0.589706
H\t 0.0647664923\t 0.0205721989\t 0.0015346341\t 0.294853
H\t 0.8717903737\t 1.3007924048\t 6.9313*^-4\t 0.294853
1671.4222\t3803.6305\t3907.698
O\tO
"""


def test_qm9(tmp_path: Path) -> None:
    for number, moment in enumerate((1.0, 2.0, 3.0, 4.0)):
        (tmp_path / f"dsgdb9nsd_{number:06}.xyz").write_text(WATER.replace("1.8511", str(moment)))
    data = structured.load({"name": "qm9", "path": str(tmp_path)}, validation=1, test=1)
    assert data.tokens == ("H", "O")
    assert all(graph.kinds == (1, 0, 0) for graph in data.train)
    assert data.train[0].edges == ((0, 2, 1), (1, 2, 0), (0, 2, 2), (2, 2, 0))
    assert statistics.fmean(g.target for g in data.train) == pytest.approx(0)
    assert statistics.pstdev(g.target for g in data.train) == pytest.approx(1)
    assert data.unit is not None and data.unit[1] == "D"


@pytest.mark.parametrize("damage", ["3\n", "4\n" + WATER[2:], WATER.replace("1.8511", "much"), ""])
def test_a_damaged_molecule_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "one.xyz").write_text(damage)
    with pytest.raises(UserError, match=r"one.xyz is no file of QM9 .*; replace it by a fresh copy"):
        structured.qm9(path=tmp_path)


@pytest.mark.parametrize(
    ("damage", "text"), [(("1.8511", "nan"), r"line 2: \[nan\]"), (("0.0205721989", "inf"), r"line 4: \[.*inf.*\]")]
)
def test_numbers_of_a_molecule_that_are_not_finite_are_named(
    tmp_path: Path, damage: tuple[str, str], text: str
) -> None:
    (tmp_path / "one.xyz").write_text(WATER.replace(*damage))
    with pytest.raises(UserError, match=rf"one.xyz is no file of QM9 \({text} is not finite\)"):
        structured.qm9(path=tmp_path)
    with pytest.raises(UserError, match=r"atom 1 \(H\) is at \(0.0, 0.0, nan\); give finite positions"):
        molecules.bonds(["C", "H"], [(0, 0, 0), (0, 0, math.nan)])


@pytest.mark.parametrize(
    ("positions", "kind"),
    [(1.54, "single"), (1.40, "double or aromatic"), (1.34, "double or aromatic"), (1.20, "triple"), (2.5, None)],
)
def test_bonds_between_two_carbons_by_their_length(positions: float, kind: str | None) -> None:
    edges = molecules.bonds(["C", "C"], [(0, 0, 0), (0, 0, positions)])
    assert edges == (() if kind is None else ((0, (k := molecules.BONDS.index(kind)), 1), (1, k, 0)))


def test_g2_from_what_ase_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the two names that are used of the package."""
    ase, data, table = types.ModuleType("ase"), types.ModuleType("ase.data"), types.ModuleType("ase.data.g2")

    class Atoms:
        def __init__(self, symbols: str) -> None:
            self.symbols = symbols

        def get_chemical_symbols(self) -> list[str]:
            return list(self.symbols)

    entry = {"symbols": "OH", "positions": [[0, 0, 0.108], [0, 0, -0.865]], "ZPE": 5.2}
    molecule = {name: entry | {"enthalpy": value} for name, value in {"a": 9.4, "b": 1.0, "c": 2.0, "atom": 7}.items()}
    vars(ase)["Atoms"], vars(table)["data"], vars(table)["molecule_names"] = Atoms, molecule, ["c", "a", "b"]
    for name, module in (("ase", ase), ("ase.data", data), ("ase.data.g2", table)):
        monkeypatch.setitem(sys.modules, name, module)
    loaded = structured.g2(validation=1, test=1)
    assert loaded.train == [Graph((1, 0), ((0, 2, 1), (1, 2, 0)), 0.0)]
    with pytest.raises(UserError, match=r"Did you mean 'enthalpy'\?"):
        structured.g2(target="entalpy")


def test_missing_ase_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ase", None)
    with pytest.raises(UserError, match=r"pip install 'decoupled-training\[molecules\]'"):
        structured.g2()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "list_reductions"}, r"Did you mean 'list_reduction'\?"),
        ({"spec": "listops", "dept": 3}, r"Did you mean 'depth'\?"),
        ({"spec": "listops", "operation": 1.0}, "operation must be a probability"),
        ({"spec": "listops", "train": 0}, "train must be an integer of at least 1"),
        ({"spec": "babi15", "people": 1}, "people must be at least 2, got 1; the published number is 4"),
        ({"spec": "babi15", "seed": -1}, "a seed must be an integer of at least 0, got -1"),
        ({"spec": "qm9"}, "needs its folder"),
        ({"spec": {"name": "qm9", "path": "."}, "target": "Mu"}, r"Did you mean 'mu'\?"),
        ({"spec": {"name": "qm9", "path": "/nowhere"}}, "there are no .xyz files in /nowhere"),
    ],
)
def test_wrong_names_and_options_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        structured.load(**arguments)
