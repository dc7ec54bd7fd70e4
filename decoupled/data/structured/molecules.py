"""Molecules as graphs: atoms are nodes, bonds are edges in both directions, the target is one property.

::

    distance of two atoms / sum of their covalent radii:  < 0.83 triple   < 0.95 double or aromatic   < 1.3 single

The files have coordinates but no bonds, so bonds are read off the distances. `g2` is the G2/97 set of 148 small
molecules (Raghavachari, Redfern and Pople 1997) with measured enthalpies, which comes with the package ase; `qm9` reads
the files of QM9 (Ramakrishnan et al. 2014). Targets are in standard deviations of the training split around its mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from decoupled.data.dataset import take_apart
from decoupled.data.structured.instances import Graph, Structured, in_order
from decoupled.errors import UserError, unknown

BONDS = ("triple", "double or aromatic", "single")
_BOUNDS = (0.83, 0.95, 1.3)  # in sums of covalent radii; measured bonds of C, N, O lie around 0.78, 0.88 and 1.0
# Single-bond covalent radii in angstrom: Cordero et al. 2008.
_RADII = {
    "H": 0.31, "Li": 1.28, "Be": 0.96, "B": 0.84, "C": 0.76, "N": 0.71, "O": 0.66, "F": 0.57, "Na": 1.66, "Mg": 1.41,
    "Al": 1.21, "Si": 1.11, "P": 1.07, "S": 1.05, "Cl": 1.02,
}  # fmt: skip
# Properties in the second line of a QM9 file, after the tag and the number, and their units.
_QM9 = {
    "A": "GHz", "B": "GHz", "C": "GHz", "mu": "D", "alpha": "a0^3", "homo": "Ha", "lumo": "Ha", "gap": "Ha",
    "r2": "a0^2", "zpve": "Ha", "U0": "Ha", "U": "Ha", "H": "Ha", "G": "Ha", "Cv": "cal/mol/K",
}  # fmt: skip
_G2 = {"enthalpy": "kcal/mol", "ZPE": "kcal/mol"}

Molecule = tuple[Sequence[str], Sequence[Sequence[float]], float]  # symbols, positions, property


def g2(
    *, target: str = "enthalpy", validation: int = 15, test: int = 15, split_seed: int = 0, limit: int | None = None
) -> Structured[Graph]:
    """Load the 148 molecules of G2/97 that come with the package ase.

    Args:
        target: ``enthalpy`` of formation at 298 K, or ``ZPE``, the zero-point energy; both in kcal/mol.
        validation, test: molecules of these splits; the others train.
        split_seed: decides which.
        limit: train on at most so many.

    Raises:
        UserError: ase is missing, an unknown target, or splits that do not fit.
    """
    try:
        from ase import Atoms  # pyright: ignore[reportMissingImports]
        from ase.data.g2 import data, molecule_names  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"dataset 'g2' comes with ase, which cannot be imported ({error}); "
            "pip install 'decoupled-training[molecules]'"
        ) from error
    if target not in _G2:
        raise unknown("target of dataset 'g2':", target, _G2)
    molecules: list[Molecule] = [
        (Atoms(entry["symbols"]).get_chemical_symbols(), entry["positions"], float(entry[target]))
        for entry in (data[name] for name in sorted(molecule_names))
    ]
    sizes = {"validation": validation, "test": test}
    return _dataset("g2", molecules, sizes, split_seed, limit, _G2[target], f"G2/97 of ase, {target}")


def qm9(
    *,
    path: str | Path | None = None,
    target: str = "mu",
    validation: int = 10_000,
    test: int = 10_000,
    split_seed: int = 0,
    limit: int | None = None,
) -> Structured[Graph]:
    """Load QM9 from its folder of extended XYZ files, ``dsgdb9nsd_000001.xyz`` and so on.

    Args:
        path: the folder.
        target: property to predict; ``mu`` is the dipole moment in debye.
        validation, test, split_seed, limit: as in `g2`.

    Raises:
        UserError: no path, no files, a damaged file, an unknown target, or splits that do not fit.
    """
    if path is None:
        raise UserError("dataset 'qm9' needs its folder; write {name: qm9, path: DIR} with dsgdb9nsd_*.xyz in DIR")
    if target not in _QM9:
        raise unknown("target of dataset 'qm9':", target, _QM9)
    files = sorted(Path(path).glob("*.xyz"))
    if not files:
        raise UserError(f"there are no .xyz files in {path}; unpack QM9's dsgdb9nsd.xyz.tar.bz2 there")
    column = 2 + list(_QM9).index(target)
    molecules = [read_xyz(file, column) for file in files]
    sizes = {"validation": validation, "test": test}
    return _dataset("qm9", molecules, sizes, split_seed, limit, _QM9[target], f"QM9, {len(files)} files, {target}")


def read_xyz(path: Path, column: int) -> Molecule:
    """Read symbols, positions and the word `column` of the second line of an XYZ file.

    Raises:
        UserError: the file is damaged, or a number is not finite; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        atoms = [line.split() for line in lines[2 : 2 + int(lines[0])]]
        if len(atoms) != int(lines[0]):
            raise ValueError(f"{len(atoms)} of {lines[0].strip()} atoms")
        if strange := [words[0] for words in atoms if not words[0].isalpha()]:
            raise ValueError(f"{strange[0]!r} is no element")
        # Mathematica wrote small numbers as 1.2*^-6.
        positions = [[float(word.replace("*^", "e")) for word in words[1:4]] for words in atoms]
        wanted = float(lines[1].split()[column])
        for number, values in enumerate([[wanted], *positions], start=2):
            if not all(map(math.isfinite, values)):
                raise ValueError(f"line {number}: {values} is not finite")
        return [words[0] for words in atoms], positions, wanted
    except (ValueError, IndexError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no file of QM9 ({error}); replace it by a fresh copy") from None


def bonds(symbols: Sequence[str], positions: Sequence[Sequence[float]]) -> tuple[tuple[int, int, int], ...]:
    """Return (atom, kind of bond, atom) of every bonded pair, in both directions.

    Raises:
        UserError: an element without a radius, or a position that is not finite.
    """
    for number, place in enumerate(positions):
        if not all(map(math.isfinite, place)):
            where = tuple(map(float, place))
            raise UserError(f"atom {number} ({symbols[number]}) is at {where}; give finite positions")
    for symbol in symbols:
        if symbol not in _RADII:
            raise UserError(f"no covalent radius is known for {symbol!r}; known: {', '.join(_RADII)}")
    edges = []
    for v in range(len(symbols)):
        for u in range(v):
            ratio = math.dist(positions[u], positions[v]) / (_RADII[symbols[u]] + _RADII[symbols[v]])
            kind = sum(ratio >= bound for bound in _BOUNDS)
            if kind < len(BONDS):
                edges += [(u, kind, v), (v, kind, u)]
    return tuple(edges)


def _dataset(
    name: str,
    molecules: Sequence[Molecule],
    sizes: dict[str, int],
    seed: int,
    limit: int | None,
    unit: str,
    source: str,
) -> Structured[Graph]:
    places = take_apart(len(molecules), sizes, seed, limit)
    values = [molecules[i][2] for i in places["train"]]
    mean, deviation = statistics.fmean(values), statistics.pstdev(values) or 1.0
    elements = tuple(sorted({symbol for symbols, _, _ in molecules for symbol in symbols}, key=list(_RADII).index))

    def graphs(which: Iterable[Any]) -> list[Graph]:
        chosen = (molecules[i] for i in which)
        return [
            Graph(tuple(map(elements.index, symbols)), bonds(symbols, positions), (value - mean) / deviation)
            for symbols, positions, value in chosen
        ]

    parts = {part: graphs(places[part]) for part in ("train", "validation", "test")}
    return Structured(
        name, *in_order(parts), classes=0, tokens=elements, relations=BONDS, unit=(deviation, unit), source=source
    )
