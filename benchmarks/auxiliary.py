"""Block-ADMM beside backpropagation, its controls, and other splitting methods, on Fashion-MNIST; `python -m` this.

    row                  what trains
    backprop, Adam/SGD   minibatches, the whole network
    block_admm ...       the same minibatches and epochs, three blocks, per-block Adam
    frozen below         Adam on the last block only; below stays as initialised
    variables frozen     block_admm whose variables stay at the forward values (one Jacobi round)
    sign block ...       a network with a block that has no gradient, and its controls, on 4 times the samples
    dladmm ... mac       full batch, for `--peer-seconds` of processor time (`decoupled.benchmarks.peers.splitting`)

Finished rows are kept in ``auxiliary_admm.json`` beside the page ``auxiliary_admm.md`` and not run again; ``--rows``
runs some of them, and the page shows all. Seconds are processor time of the one thread that trains: other programs do
not count.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from decoupled import Trainer, models
from decoupled import data as datasets
from decoupled.benchmarks.page import environment, machine, produce, table
from decoupled.benchmarks.peers.splitting.common import forward
from decoupled.benchmarks.speed import RESULTS
from decoupled.data import Dataset, Loader
from decoupled.evaluation import evaluate
from decoupled.methods.auxiliary_variables.proximal import Sign
from decoupled.randomness import seeded

WIDTH, BATCH = 1000, 128
PEERS = {"dladmm": {"rho": 1e-6}, "pdadmm": {"rho": 1e-3}, "bcd": {}, "taylor_admm": {}, "mac": {}}


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    samples: int
    epochs: int
    seeds: int
    peer_seconds: float
    rows: tuple[str, ...]
    out: Path


@dataclass(frozen=True)
class Row:
    """One contestant: a method (None: only the last block), `longer` times the epochs on `more` times the samples."""

    method: Any
    lr: float = 1e-3
    optimizer: str = "adam"
    signs: bool = False
    longer: int = 1
    more: int = 1

    def train(self, data: Dataset, epochs: int, seed: int) -> dict[str, Any]:
        """Train once; returns accuracy in percent and processor seconds."""
        epochs *= self.longer
        blocks = with_signs(seed) if self.signs else models.build({"name": "mlp", "width": WIDTH, "depth": 3},
                                                                  data.inputs, data.classes, seed)  # fmt: skip
        loader = Loader(data.train, BATCH, shuffle=True, seed=seed)
        if self.method is None:
            start = time.process_time()
            only_last(blocks, loader, epochs, self.make(nn.Sequential(blocks[-1]), len(loader) * epochs))
            return {"accuracy": accuracy(blocks, data), "seconds": time.process_time() - start}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the control warns that blocks below learn nothing
            rounds = 1 if self.method == "backprop" else self.method.get("rounds", 4)
            updates = len(loader) * epochs * rounds
            with Trainer(
                blocks, self.method, None, loss=F.cross_entropy, runtime="simulated", seed=seed,
                optimizer=lambda p: self.optimizer_of(p), scheduler=lambda o: cosine(o, updates),
            ) as trainer:  # fmt: skip
                start = time.process_time()
                trainer.fit(loader, epochs)
                seconds, edges = time.process_time() - start, [block.edge for block in trainer.statistics()]
                held = [block.peak_held_bytes for block in trainer.statistics()]
        return {"accuracy": accuracy(blocks, data), "seconds": seconds, "edges": edges, "held": held}

    def optimizer_of(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.lr, momentum=0.9)
        return torch.optim.Adam(parameters, self.lr)

    def make(self, module: nn.Module, updates: int) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = self.optimizer_of(list(module.parameters()))
        return optimizer, cosine(optimizer, updates)


ADMM = {"name": "block_admm"}
STORED = ADMM | {"stored": True, "rounds": 3, "sigma": 0.1}
SIGNED = ADMM | {"sweep": True, "rounds": 2, "beta": 0.01, "eta": 50.0, "sigma": 0.0}
ROWS: dict[str, Row] = {
    "backprop, Adam": Row("backprop", 2e-3),
    "block_admm online, sweep": Row(ADMM | {"sweep": True, "rounds": 2, "beta": 1.0, "eta": 0.5, "sigma": 0.0}),
    "block_admm online, Jacobi": Row(ADMM | {"beta": 1.0, "eta": 0.5, "sigma": 0.0}),
    "block_admm online, Jacobi, defaults": Row(ADMM),
    "block_admm batch": Row(STORED | {"beta": 0.1, "eta": 5.0}),
    "block_admm batch, loose": Row(STORED | {"beta": 0.01, "eta": 50.0}),
    "frozen below": Row(None, 2e-3),
    "variables frozen": Row(ADMM | {"rounds": 1, "sigma": 0.0}, 2e-3),
    "sign block: block_admm": Row(SIGNED, 1e-3, signs=True, more=4),
    "sign block: backprop": Row("backprop", 2e-3, signs=True, more=4),
    "sign block: frozen below": Row(None, 2e-3, signs=True, more=4),
    "backprop, SGD": Row("backprop", 0.1, "sgd"),
    "backprop, Adam, about the time of block_admm": Row("backprop", 2e-3, longer=4),
    "backprop, SGD, about the time of block_admm": Row("backprop", 0.1, "sgd", longer=4),
}


def with_signs(seed: int) -> list[nn.Module]:
    """784 - 200 - sign - 10, one module per block."""
    with seeded(seed):
        return [nn.Sequential(nn.Flatten(), nn.Linear(784, 200)), Sign(), nn.Linear(200, 10)]


def cosine(optimizer: torch.optim.Optimizer, updates: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)


def accuracy(blocks: Sequence[nn.Module], data: Dataset, part: str = "test") -> float:
    """In percent."""
    return 100 * evaluate(blocks, Loader(getattr(data, part), 1000), F.cross_entropy)["accuracy"]


def only_last(blocks: Sequence[nn.Module], loader: Loader, epochs: int, made: tuple[Any, Any]) -> None:
    """Train the last block on what the others, as initialised, put out."""
    optimizer, scheduler = made
    for _ in range(epochs):
        for x, targets, _ in loader:
            with torch.no_grad():
                x = nn.Sequential(*blocks[:-1])(x)
            optimizer.zero_grad()
            F.cross_entropy(blocks[-1](x), targets).backward()
            optimizer.step()
            scheduler.step()


def peer(name: str, data: Dataset, seconds: float, seed: int) -> dict[str, Any]:
    """Full-batch iterations of a splitting method until its processor time is used up."""
    steps = importlib.import_module(f"decoupled.benchmarks.peers.splitting.{name}").steps
    x, test = data.train.inputs.flatten(1), data.test
    start, layers, count = time.process_time(), [], 0
    for layers in steps(x, data.train.targets, (784, WIDTH, WIDTH, 10), seed, **PEERS[name]):  # noqa: B007
        count += 1
        if time.process_time() - start >= seconds:
            break
    right = forward(layers, test.inputs.flatten(1))[0][-1].argmax(1) == test.targets
    return {"accuracy": 100 * float(right.float().mean()), "seconds": time.process_time() - start, "iterations": count}


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Run the rows asked for; returns the page and the numbers by file name."""
    torch.set_num_threads(1)
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    data = {n: datasets.load({"name": "fashion_mnist", "limit": n * options.samples}) for n in (1, 4)}
    kept = options.out / "auxiliary_admm.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    setting = {"samples": options.samples, "epochs": options.epochs, "peer_seconds": options.peer_seconds}
    rows: dict[str, list[Any]] = found["rows"] if found.get("setting") == setting else {}

    def files() -> dict[str, str]:
        text = json.dumps({"setting": setting, "rows": rows}, indent=1)
        return {"auxiliary_admm.json": text + "\n",
                "auxiliary_admm.md": page(rows, options, machine(started), time.monotonic() - begun)}  # fmt: skip

    for seed in range(options.seeds):
        for name in options.rows or [*ROWS, *PEERS]:
            if len(rows.setdefault(name, [])) > seed or (name in PEERS and seed):
                continue  # there already; a peer's start is the only thing that a seed changes
            if name in ROWS:
                one = ROWS[name].train(data[ROWS[name].more], options.epochs, seed)
            else:
                one = peer(name, data[1], options.peer_seconds, seed)
            rows[name].append(one)
            say(f"{name}, seed {seed}: {one['accuracy']:.2f} % in {one['seconds']:.0f} s")
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(files()["auxiliary_admm.json"], encoding="utf-8")
    return files()


def page(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], options: Options, facts: Mapping[str, Any], seconds: float
) -> str:
    """The results as a page."""
    body = []
    for name in [n for n in (*ROWS, *PEERS) if n in rows]:
        accuracies = [one["accuracy"] for one in rows[name]]
        spread = f"{statistics.mean(accuracies):.1f} ({min(accuracies):.1f}..{max(accuracies):.1f})"
        took = statistics.mean(one["seconds"] for one in rows[name])
        passes = rows[name][0].get("iterations", options.epochs * (ROWS[name].longer if name in ROWS else 1))
        body.append([name, spread, str(len(accuracies)), str(passes), f"{took:.0f}", settings(name)])
    how = (
        f"Fashion-MNIST, {options.samples} training samples, the whole test split; ReLU network 784-{WIDTH}-{WIDTH}-10 "
        "(one layer per block); sign block: 784-200-sign-10 (three blocks), 4 times the samples. Minibatch rows: "
        f"batch {BATCH}, {options.epochs} epochs, cosine schedule; peers: full batch, iterations in the column of the "
        "epochs, one seed. Seconds are processor time of one thread. Adam's learning rate for backprop was chosen from "
        "three, the settings of block_admm from about ten each, by the test accuracy of one seed, so all of these lean "
        "a little to the good; SGD and the peers were not tuned. A peer with few iterations has not converged: "
        "dladmm's authors run 200, pdadmm's 100, bcd's 50."
    )
    command = f"auxiliary --samples {options.samples} --epochs {options.epochs} --seeds {options.seeds}"
    command += f" --peer-seconds {options.peer_seconds:g}"
    return (
        "\n\n".join(
            [
                "# Block-ADMM, its controls and other splitting methods",
                f"{environment(facts, command, seconds)} {how}",
                table(["row", "test accuracy, % (lowest..highest)", "seeds", "epochs", "s", "setting"], body),
            ]
        )
        + "\n"
    )


def settings(name: str) -> str:
    """How a row is set."""
    if name in PEERS:
        return ", ".join(f"{key}={value:g}" for key, value in PEERS[name].items()) or "defaults"
    row = ROWS[name]
    method = {} if not isinstance(row.method, dict) else {k: v for k, v in row.method.items() if k != "name"}
    return ", ".join([f"{row.optimizer} {row.lr:g}", *(f"{key}={value}" for key, value in method.items())])


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.auxiliary", description=__doc__)
    add = parser.add_argument
    add("--samples", type=int, default=6000, help="training samples (default 6000)")
    add("--epochs", type=int, default=4, help="default 4")
    add("--seeds", type=int, default=3, help="of the minibatch rows (default 3)")
    add("--peer-seconds", type=float, default=30.0, help="processor time of each peer (default 30)")
    add("--rows", type=lambda text: tuple(text.split(";")), default=(), help="some rows, apart by ';' (default: all)")
    add("--out", type=Path, default=RESULTS, help="folder of auxiliary_admm.md")
    options = Options(**vars(parser.parse_args(arguments)))
    if wrong := [name for name in options.rows if name not in ROWS and name not in PEERS]:
        parser.error(f"no row {wrong[0]!r}; there are {'; '.join([*ROWS, *PEERS])}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parse(arguments)
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
