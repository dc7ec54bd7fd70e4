"""DeepFacto on Fashion-MNIST: what do the codes of a factorisation block know beyond its labels? `python -m` this.

    images --> [784-256 ReLU] --Z ~ S M--> [NMF, r codes] --S--> [r-classes]        trained by block_admm
                                               |
                                               +--> linear probe of the ten fine classes

    supervised          trained on the ten classes
    weakly supervised   trained on four groups only: tops, trousers, shoes, bags

Beside it, with as many features: PCA and scikit-learn's NMF of the images, the narrow hidden layer of a network trained
by backprop on the same labels, and the codes of the untrained network. The figure shows for every component the mean
image weighted by its code, less the mean image. Files: ``auxiliary_deepfacto.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import Trainer
from decoupled import data as datasets
from decoupled.benchmarks.page import environment, machine, produce, table
from decoupled.benchmarks.speed import RESULTS
from decoupled.data import Dataset, Loader
from decoupled.methods.auxiliary_variables.nmf import NMF
from decoupled.randomness import seeded

GROUPS = torch.tensor([0, 1, 0, 0, 0, 2, 0, 2, 3, 2])  # of T-shirt .. ankle boot: tops, trousers, shoes, bags
WIDTH, BATCH, LR = 256, 128, 1e-3
METHOD: dict[str, Any] = {"name": "block_admm", "beta": 0.1, "eta": 5.0, "sigma": 0.0, "rounds": 4}
LABELS = {"ten classes": torch.arange(10), "four groups": GROUPS}


@dataclass(frozen=True)
class Options:
    """The command line; see `--help`."""

    samples: int
    epochs: int
    rank: int
    seeds: int
    out: Path


class Relabelled:
    """Batches of a loader with other labels."""

    def __init__(self, loader: Loader, labels: Tensor) -> None:
        self._loader, self._labels = loader, labels

    def set_epoch(self, epoch: int) -> None:
        self._loader.set_epoch(epoch)

    def __iter__(self) -> Any:
        return ((x, self._labels[targets], indices) for x, targets, indices in self._loader)


def network(seed: int, rank: int, classes: int, factorise: bool) -> list[nn.Module]:
    """Blocks; the second one's output are the features."""
    with seeded(seed):
        below = nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU())
        narrow = NMF(WIDTH, rank, seed=seed) if factorise else nn.Sequential(nn.Linear(WIDTH, rank), nn.ReLU())
        return [below, narrow, nn.Linear(rank, classes)]


def train(blocks: list[nn.Module], data: Dataset, labels: Tensor, method: Any, epochs: int, seed: int) -> float:
    """Train, and say how well the network knows its own labels on the test split, in percent."""
    loader = Loader(data.train, BATCH, shuffle=True, seed=seed)
    test = Relabelled(Loader(data.test, 1000), labels)
    with Trainer(
        blocks, method, None, loss=F.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, LR), runtime="simulated"
    ) as trainer:
        trainer.fit(Relabelled(loader, labels), epochs)
        return 100 * trainer.evaluate(test)["accuracy"]


def features(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Output of the second block, (n, r)."""
    with torch.no_grad():
        return torch.cat([blocks[1](blocks[0](part)) for part in x.split(1000)])


def probe(train_codes: Tensor, test_codes: Tensor, data: Dataset) -> float:
    """Test accuracy in percent of logistic regression on standardised features, ten classes."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train_codes.mean(0), train_codes.std(0).clamp_min(1e-6)
    model = LogisticRegression(max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stopped at max_iter
        model.fit(((train_codes - mean) / deviation).numpy(), data.train.targets.numpy())
    return 100 * float(model.score(((test_codes - mean) / deviation).numpy(), data.test.targets.numpy()))


def purity(codes: Tensor, targets: Tensor) -> float:
    """Mean over live components of the largest share that one class has in the component's total; 0.1 is chance."""
    mass = torch.stack([codes[targets == c].sum(0) for c in range(10)])
    live = mass.sum(0) > 0
    return float((mass.amax(0) / mass.sum(0))[live].mean())


def decompositions(data: Dataset, rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of the images by PCA and by scikit-learn's NMF: training, test."""
    from sklearn.decomposition import NMF as ImageNMF
    from sklearn.decomposition import PCA

    low = float(data.train.inputs.min())
    x, test = ((part.inputs.flatten(1) - low).clamp_min(0).numpy() for part in (data.train, data.test))
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stopped at max_iter
        for name, model in (
            ("PCA of the images", PCA(rank, random_state=seed)),
            (
                "NMF of the images (scikit-learn)",
                # pyright takes the parameter's default, "auto", for its type
                ImageNMF(rank, init="nndsvda", max_iter=200, random_state=seed),  # pyright: ignore[reportArgumentType]
            ),
        ):
            found[name] = tuple(
                torch.from_numpy(codes).float() for codes in (model.fit_transform(x), model.transform(test))
            )
    return found  # type: ignore[return-value]


def run(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Measure; returns the page by its file name, and writes the figure."""
    torch.set_num_threads(1)
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    data = datasets.load({"name": "fashion_mnist", "limit": options.samples})
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}

    def note(name: str, labels: str, own: float, codes: tuple[Tensor, Tensor]) -> None:
        pure = purity(codes[1], data.test.targets) if float(codes[1].min()) >= 0 else float("nan")
        zero = 100 * float((codes[1] <= 1e-6).float().mean())
        rows.setdefault((name, labels), []).append((own, probe(*codes, data), pure, zero))
        say(f"{name}, {labels}: own {own:.1f} %, probe {rows[name, labels][-1][1]:.1f} %")

    for seed in range(options.seeds):
        for name, codes in decompositions(data, options.rank, seed).items() if seed == 0 else ():
            note(name, "none", float("nan"), codes)
        for labels, mapping in LABELS.items():
            for name, method, epochs in (
                ("DeepFacto codes", METHOD, options.epochs),
                ("hidden layer, backprop", "backprop", options.epochs),
            ):
                blocks = network(seed, options.rank, int(mapping.max()) + 1, name.startswith("Deep"))
                if labels == "ten classes" and name.startswith("Deep"):
                    untrained = tuple(features(blocks, part.inputs) for part in (data.train, data.test))
                    note("codes, untrained", "none", float("nan"), untrained)  # type: ignore[arg-type]
                own = train(blocks, data, mapping, method, epochs, seed)
                codes = tuple(features(blocks, part.inputs) for part in (data.train, data.test))
                note(name, labels, own, codes)  # type: ignore[arg-type]
                if seed == 0 and name.startswith("Deep"):
                    draw(codes[1], data, options.out / f"auxiliary_deepfacto_{labels.split()[1]}.png")
    return {"auxiliary_deepfacto.md": page(rows, options, machine(started), time.monotonic() - begun)}


def draw(codes: Tensor, data: Dataset, path: Path) -> None:
    """Mean test image weighted by each component's code, less the mean image (grey: the same), ten in a row."""
    x = data.test.inputs.flatten(1)
    shares = codes / codes.sum(0, keepdim=True).clamp_min(1e-9)
    images = (shares.T @ x - x.mean(0)).view(-1, 28, 28)
    images = F.pad(images / images.abs().amax((1, 2), keepdim=True).clamp_min(1e-9), (1, 1, 1, 1), value=1.0)
    grid = F.pad(images, (0, 0, 0, 0, 0, -len(images) % 10), value=1.0).view(-1, 10, 30, 30).transpose(1, 2)
    grid = grid.reshape(-1, 300).repeat_interleave(2, 0).repeat_interleave(2, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(grey_png(((grid + 1) * 127.5).round().to(torch.uint8)))


def grey_png(pixels: Tensor) -> bytes:
    """A PNG file of grey levels (height, width), uint8."""
    height, width = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = F.pad(pixels, (1, 0)).contiguous().numpy().tobytes()  # every row begins with its filter, none
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def page(
    rows: Mapping[tuple[str, str], Sequence[tuple[float, ...]]],
    options: Options,
    facts: Mapping[str, Any],
    seconds: float,
) -> str:
    """The results as a page."""
    body = []
    for (name, labels), found in sorted(rows.items(), key=lambda item: -statistics.mean(one[1] for one in item[1])):
        own, fine, pure, zero = zip(*found, strict=True)
        cells = [
            ""
            if any(v != v for v in values)
            else f"{statistics.mean(values):{form}} ({min(values):{form}}..{max(values):{form}})"
            for values, form in ((own, ".1f"), (fine, ".1f"), (pure, ".2f"), (zero, ".0f"))
        ]
        body.append([name, labels, str(len(found)), *cells])
    method = ", ".join(f"{key} {value}" for key, value in METHOD.items() if key != "name")
    how = (
        f"Fashion-MNIST, {options.samples} training samples, the whole test split; {options.rank} features in every "
        f"row; {options.epochs} epochs, batch {BATCH}, Adam {LR:g}; block_admm with {method}. Own labels: test "
        "accuracy of the network on what it was trained on. Probe: logistic regression on the features, trained with "
        "the ten fine classes of the same training samples. Purity: share of a component's total that its first class "
        "has, mean over components (chance 0.10; only for features that are not negative). Zeros: share of codes that "
        "are 0. Mean (lowest..highest) over seeds."
    )
    command = (
        f"deepfacto --samples {options.samples} --epochs {options.epochs} --rank {options.rank} --seeds {options.seeds}"
    )
    header = ["features", "trained on", "seeds", "own labels, %", "probe of ten classes, %", "purity", "zeros, %"]
    figures = [
        f"![mean image of each code, trained on the {labels}](auxiliary_deepfacto_{labels.split()[1]}.png)"
        for labels in LABELS
    ]
    parts = [
        "# DeepFacto: what the codes know",
        f"{environment(facts, command, seconds)} {how}",
        table(header, body),
        *figures,
    ]
    return "\n\n".join(parts) + "\n"


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m decoupled.benchmarks.deepfacto", description=__doc__)
    add = parser.add_argument
    add("--samples", type=int, default=6000, help="training samples (default 6000)")
    add("--epochs", type=int, default=6, help="default 6")
    add("--rank", type=int, default=20, help="features (default 20)")
    add("--seeds", type=int, default=3, help="default 3")
    add("--out", type=Path, default=RESULTS, help="folder of auxiliary_deepfacto.md")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parse(arguments)
    return produce(lambda say: run(options, say), options.out)


if __name__ == "__main__":
    sys.exit(main())
