"""What local updates learn, after three analyses of Laskin et al. 2020 (arXiv 2012.03837); `python -m` this module.

    gradients   cosine between each block's local gradient and the true one, on the same batch and weights, in training
    labels      training accuracy on random labels, epoch by epoch: how much a method can memorise
    filters     the filters of the first layer after training, and how much of their energy is in low frequencies

The network is a chain of 5 blocks: four convolutions with ReLU, then mean over space and a linear layer, so that the
head of block 3 has the form of block 4 with weights of its own. Plain SGD takes steps that are the gradient times the
learning rate: so the local gradient is read off the step, whatever the method does inside. Results go to
``benchmarks/results/local_analyses.md``, with a picture each.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import itertools
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import Trainer, data
from decoupled.benchmarks.page import environment, machine, produce, table
from decoupled.benchmarks.plot import Axes, Panel, draw
from decoupled.benchmarks.speed import RESULTS
from decoupled.data import Dataset, Loader, Split
from decoupled.evaluation import evaluate
from decoupled.randomness import seeded

METHODS: dict[str, str | dict[str, Any]] = {
    "backprop": "backprop",
    "two chunks": {"name": "chunked_local", "chunks": 2},
    "three chunks": {"name": "chunked_local", "chunks": 3},
    "overlapping": "overlapping_local",
    "greedy": "greedy_local",
}
# Read off the paper's figure (5 layers, greedy, about +-0.03), at the end of its 10,000 iterations, from layer 1 on.
PAPER_COSINES = (0.22, 0.32, 0.58, 0.99, 1.00)
PAPER_LABELS = {"backprop": 0.775, "greedy": 0.285}  # read off the paper's figure, epoch 100
SIDE = 7  # of the filters that are looked at


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    only: tuple[str, ...] = ("gradients", "labels", "filters")
    data: str = "fashion_mnist"
    limit: int = 6000
    steps: int = 3000  # of the gradients
    epochs: int = 60  # on random labels
    seed: int = 0
    out: Path = RESULTS


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.analyses", description=__doc__)
    add = parser.add_argument
    add("only", nargs="*", metavar="ANALYSIS", choices=[*Options.only, []], help="gradients, labels, filters (all)")
    add("--data", default=Options.data, help="an image data set (default fashion_mnist)")
    add("--limit", type=int, default=Options.limit, help="training images (default 6000; a sixth for random labels)")
    add("--steps", type=int, default=Options.steps, help="steps while gradients are compared (default 3000)")
    add("--epochs", type=int, default=Options.epochs, help="epochs on random labels (default 60)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS, help="folder of the page and its pictures")
    given = parser.parse_args(arguments)
    if min(given.limit, given.steps, given.epochs) < 1:
        parser.error("--limit, --steps and --epochs must be at least 1")
    given.only = tuple(given.only) or Options.only
    return Options(**vars(given))


def network(inputs: Sequence[int], classes: int, seed: int, width: int = 32, side: int = 3) -> list[nn.Module]:
    """Five blocks; the filters of the first are `side` x `side`."""
    with seeded(seed):
        first = nn.Conv2d(inputs[0], width, side, stride=2, padding=side // 2)
        inner = [nn.Conv2d(width, width, 3, stride=stride, padding=1) for stride in (1, 2, 1)]
        top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return [*(nn.Sequential(convolution, nn.ReLU()) for convolution in (first, *inner)), top]


def trainer(blocks: list[nn.Module], method: str | Mapping[str, Any], seed: int, sgd: float = 0.0) -> Trainer:
    """Adam at 0.001, or plain SGD with the given learning rate."""

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=sgd) if sgd else torch.optim.Adam(parameters, lr=0.001)

    return Trainer(blocks, method, loss=F.cross_entropy, optimizer=optimizer, runtime="simulated", seed=seed)


def cosines(
    dataset: Dataset, method: str | Mapping[str, Any], steps: int, every: int, seed: int, lr: float = 0.1
) -> list[tuple[int, list[float]]]:
    """Train, and at every `every`-th (>= 2) step compare the step of each block with the true gradient.

    Returns:
        (step, cosine per block from the input on).
    """
    blocks = network(dataset.inputs, dataset.classes, seed)
    loader, found, done = Loader(dataset.train, 32, shuffle=True, seed=seed), [], 0
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    with trainer(blocks, method, seed, sgd=lr) as training:
        while done < steps:
            batch = next(batches)
            loss = F.cross_entropy(nn.Sequential(*blocks)(batch.inputs), batch.targets)
            true = [_flat(torch.autograd.grad(loss, list(b.parameters()), retain_graph=True)) for b in blocks]
            before = [_flat([p.detach().clone() for p in block.parameters()]) for block in blocks]
            training.fit([batch])
            after = [_flat([p.detach() for p in block.parameters()]) for block in blocks]
            taken = [a - b for a, b in zip(before, after, strict=True)]
            found.append((done, [float(F.cosine_similarity(t, g, dim=0)) for t, g in zip(taken, true, strict=True)]))
            training.fit(list(itertools.islice(batches, every - 1)))
            done += every
    return found


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def memorised(dataset: Dataset, method: str | Mapping[str, Any], epochs: int, seed: int) -> list[float]:
    """Training accuracy after every epoch on labels drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    inputs = dataset.train.inputs
    split = Split(inputs, torch.randint(dataset.classes, (len(inputs),), generator=draw))
    blocks, found = network(dataset.inputs, dataset.classes, seed), []
    loader = Loader(split, 50, shuffle=True, seed=seed)
    with trainer(blocks, method, seed) as training:
        for _ in range(epochs):
            training.fit(loader)
            found.append(evaluate(blocks, Loader(split, 500), F.cross_entropy)["accuracy"])
    return found


def filters(dataset: Dataset, method: str | Mapping[str, Any] | None, epochs: int, seed: int) -> tuple[Tensor, float]:
    """First-layer filters (49, channels, 7, 7) after training (None: as initialised), and the test accuracy."""
    blocks = network(dataset.inputs, dataset.classes, seed, width=SIDE * SIDE, side=SIDE)
    if method is not None:
        with trainer(blocks, method, seed) as training:
            training.fit(Loader(dataset.train, 64, shuffle=True, seed=seed), epochs=epochs)
    score = evaluate(blocks, Loader(dataset.test, 500), F.cross_entropy)["accuracy"]
    return next(blocks[0].parameters()).detach().clone(), score


def low_frequency(kernels: Tensor) -> float:
    """Share of the filters' energy at no more than one period per filter side, each filter minus its mean.

    White noise has 8 / 48 there: the 3 x 3 lowest of 7 x 7 frequencies without the mean.
    """
    power = torch.fft.fft2(kernels - kernels.mean((-2, -1), keepdim=True)).abs().square()
    rank = torch.fft.fftfreq(kernels.shape[-1]).abs() * kernels.shape[-1]
    low = (rank[:, None] < 1.5) & (rank[None, :] < 1.5)
    return float(power[..., low].sum() / power.sum())


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Do the analyses; returns the page and its pictures by file name."""
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    torch.set_num_threads(1)
    dataset = data.load(options.data, limit=options.limit)
    parts: list[str] = []
    files: dict[str, str] = {}
    for name in options.only:
        say(name)
        text, picture = ANALYSES[name](dataset, options)
        parts.append(text)
        files[f"local_{name}.svg"] = picture
    words = " ".join(["analyses", *(options.only if options.only != Options.only else [])])
    words += f" --data {options.data} --limit {options.limit} --steps {options.steps} --epochs {options.epochs}"
    head = environment(machine(started), words, time.monotonic() - begun)
    files["local_analyses.md"] = "\n\n".join(["# What local updates learn", f"{head} One seed.", *parts]) + "\n"
    return files


def _gradients(dataset: Dataset, options: Options) -> tuple[str, str]:
    every = max(2, options.steps // 60)
    panels, rows, windows = [], [], 6
    for name in ("greedy", "overlapping", "two chunks"):
        found = cosines(dataset, METHODS[name], options.steps, every, options.seed)
        size = max(1, len(found) // (2 * windows))
        means = [
            (part[len(part) // 2][0] + 1, [sum(c[k] for _, c in part) / len(part) for k in range(5)])
            for part in (found[i : i + size] for i in range(0, len(found), size))
        ]
        panels.append(Panel(name, {f"layer {k + 1}": [(x, max(0.0, c[k])) for x, c in means] for k in range(5)}))
        rows.append([f"{name}, first tenth", *(f"{value:.2f}" for value in _mean(found[: max(1, len(found) // 10)]))])
        rows.append([f"{name}, last tenth", *(f"{value:.2f}" for value in _mean(found[-max(1, len(found) // 10) :]))])
    last = [float(cell) for cell in rows[1][1:]]
    rows.append(["paper, greedy, at the end (read off)", *(f"{value:.2f}" for value in PAPER_COSINES)])
    said = {
        "the last layer's local gradient is the true one": last[4] > 0.995,
        "the one below it comes close to it (above 0.9)": last[3] > 0.9,
        "gradients are less alike the nearer to the input": all(a <= b for a, b in itertools.pairwise(last)),
        "all means stay positive": min(last) > 0,
    }
    text = (
        "## Local and true gradient\n\nCosine per layer (weights and biases together) on the same batch of 32 and the "
        f"same weights, every {every} steps of {options.steps} of plain SGD at 0.1; means over a tenth of the "
        "training. Negative means are drawn at 0.\n\n![cosines](local_gradients.svg)\n\n"
        + table(["method", *(f"layer {k}" for k in range(1, 6))], rows)
        + "\n\n"
        + _claims("greedy, at the end", said)
    )
    return text, draw(panels, Axes("step", "cosine", _ticks(options.steps), (0, 0.25, 0.5, 0.75, 1), log=False))


def _mean(found: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    return [sum(c[k] for _, c in found) / len(found) for k in range(5)]


def _labels(dataset: Dataset, options: Options) -> tuple[str, str]:
    images = max(50, options.limit // 6)
    small = data.load(options.data, limit=images)
    curves = {name: memorised(small, method, options.epochs, options.seed) for name, method in METHODS.items()}
    marks = sorted({options.epochs // 4, options.epochs // 2, options.epochs} - {0})
    rows = [[name, *(f"{curve[mark - 1]:.3f}" for mark in marks)] for name, curve in curves.items()]
    ends = {name: curve[-1] for name, curve in curves.items()}
    said = {
        f"greedy memorises less than backprop at the end (paper: {PAPER_LABELS['greedy']} against "
        f"{PAPER_LABELS['backprop']} at epoch 100, read off)": ends["greedy"] < ends["backprop"],
        "two chunks lie between them": ends["greedy"] <= ends["two chunks"] <= ends["backprop"],
    }
    text = (
        f"## Random labels\n\nTraining accuracy on {images} images of {options.data} with labels drawn at random "
        f"(chance {1 / dataset.classes:.2f}); Adam at 0.001, batch 50.\n\n![random labels](local_labels.svg)\n\n"
        + table(["method", *(f"epoch {mark}" for mark in marks)], rows)
        + "\n\n"
        + _claims("at the end", said)
    )
    lines = {name: list(enumerate(curve, 1)) for name, curve in curves.items()}
    axes = Axes("epoch", "training accuracy", _ticks(options.epochs), (0, 0.25, 0.5, 0.75, 1), log=False)
    return text, draw([Panel("random labels", lines)], axes)


def _filters(dataset: Dataset, options: Options) -> tuple[str, str]:
    found = {name: filters(dataset, method, 3, options.seed) for name, method in [("initial", None), *METHODS.items()]}
    share = {name: low_frequency(kernels) for name, (kernels, _) in found.items()}
    rows = [
        [name, f"{share[name]:.2f}", "" if name == "initial" else f"{100 * score:.1f}"]
        for name, (_, score) in found.items()
    ]
    said = {
        "greedy has more of its energy in low frequencies than backprop (paper: low-frequency patches and noisy "
        "textures instead of oriented filters)": share["greedy"] > share["backprop"],
        "training moved the filters of backprop away from the initial noise": share["backprop"]
        > share["initial"] + 0.02,
    }
    text = (
        f"## First-layer filters\n\n49 filters of 7 x 7 after 3 epochs on {len(dataset.train)} images of "
        f"{options.data} (the paper: a ResNet on ImageNet, in colour), Adam at 0.001, batch 64; each scaled to its own "
        "range.\n\n![filters](local_filters.svg)\n\n"
        + table(["method", "energy at no more than one period per side", "test accuracy, %"], rows)
        + "\n\nWhite noise has 0.17 there.\n\n"
        + _claims("", said)
    )
    return text, _grid({name: kernels for name, (kernels, _) in found.items()})


def _claims(where: str, said: Mapping[str, bool]) -> str:
    """What the paper's figures say, and whether these numbers say so too."""
    return "\n".join(
        f"- {text}{f' ({where})' if where else ''}: {'yes' if held else '**no**'}" for text, held in said.items()
    )


def _ticks(most: int) -> tuple[float, ...]:
    return tuple(most * i / 4 for i in range(5))


def _grid(kernels: Mapping[str, Tensor]) -> str:
    """Filters of every method as squares of 7 x 7 filters side by side, grey, each on its own scale."""
    side, zoom, gap = SIDE * (SIDE + 1) - 1, 4, 18
    parts = []
    for i, (name, bank) in enumerate(kernels.items()):
        x = i % 3 * (side * zoom + gap)
        y = i // 3 * (side * zoom + gap + 20) + 20
        image = base64.b64encode(_png(_mosaic(bank.mean(1)))).decode()
        parts.append(f'<text x="{x}" y="{y - 6}">{escape(name)}</text>')
        parts.append(
            f'<image x="{x}" y="{y}" width="{side * zoom}" height="{side * zoom}" style="image-rendering:pixelated" '
            f'href="data:image/png;base64,{image}"/>'
        )
    width, height = 3 * (side * zoom + gap), -(-len(kernels) // 3) * (side * zoom + gap + 20)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="14" fill="#222222">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>' + "".join(parts) + "</svg>\n"
    )


def _mosaic(bank: Tensor) -> Tensor:
    """(49, 7, 7) -> (55, 55) bytes with a white line between filters."""
    low, high = bank.amin((1, 2), keepdim=True), bank.amax((1, 2), keepdim=True)
    scaled = F.pad((bank - low) / (high - low).clamp(min=1e-12), (0, 1, 0, 1), value=1.0)
    rows = scaled.view(SIDE, SIDE, SIDE + 1, SIDE + 1).permute(0, 2, 1, 3)
    return (255 * rows.reshape(SIDE * (SIDE + 1), -1)[:-1, :-1]).round().to(torch.uint8)


def _png(pixels: Tensor) -> bytes:
    """A grey picture (height, width) of bytes as a PNG file."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in pixels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


ANALYSES: dict[str, Callable[[Dataset, Options], tuple[str, str]]] = {
    "gradients": _gradients,
    "labels": _labels,
    "filters": _filters,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse, print and write."""
    options = parse(arguments)
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
