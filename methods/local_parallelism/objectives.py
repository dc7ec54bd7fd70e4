"""Local objectives that are more than a classifier's loss; activations go up, nothing comes down.

    name       J_k on an inner block (the last block has the loss of the network)
    PredSim    (1 - beta) L(P(y_k), target) + beta mean (S(Q(y_k)) - S(onehot(target)))^2
    InfoPro    lambda1_k mean (R(y_k) - x)^2 + lambda2_k L(A(y_k), target)

    y_k (N, *features)   output of the block          x (N, *inputs)   the raw batch
    L                    loss of the network          P, Q, R, A       small networks of the block's own
    S(z)_ab              cosine of the angle between samples a and b of z, each minus its own mean, in [-1, 1];
                         of images the deviation over space of every channel is taken first
    lambda1_k, lambda2_k go from lambda1 to 0 and from lambda2 to 1, linearly from the first to the last inner block

InfoPro may contrast instead of classify: with z = A(y_k) / |A(y_k)| and temperature tau = 0.07, the second term is the
mean over all pairs a, b of one class of -log(exp(z_a z_b / tau) / sum over c != a of exp(z_a z_c / tau)).

Where a selection weighs samples, row a of the similarities, a's reconstruction and a's pairs have the weight of a.

Sources: Nokland and Eidnes 2019 (PredSim); Wang et al. 2021, Khosla et al. 2020 (InfoPro and the contrastive loss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import heads
from decoupled.coupling import Coupling, Lower, Place, Top, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.sample_losses import mean

Shape = tuple[int, ...]
TEMPERATURE, PROJECTION, DECODED = 0.07, 128, 2048


@dataclass(frozen=True)
class PredSim(Coupling):
    """Prediction and similarity matching; `beta` = 0 has only the first, 1 only the second."""

    beta: float
    down: tuple[str, ...] = field(default=(), init=False)

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else PredSimHead(place, self.beta)

    def upper(self, place: Place) -> Upper:
        return Upper()


class PredSimHead(Lower):
    """A linear classifier that starts at zero, and a linear map or 3x3 convolution whose similarities are matched."""

    has_objective = needs_data = True

    def __init__(self, place: Place, beta: float) -> None:
        shape, (self._classes, *positions) = place.shapes[place.k], place.shapes[-1]
        if positions or len(shape) not in (1, 3):
            raise UserError(
                f"similarity matching reads features (F,) or images (C, H, W) of one class each, here the block ends "
                f"in {shape} and the network in {place.shapes[-1]} per sample; use a method with a head"
            )
        self._loss, self._beta = place.loss, beta
        self._predict = _zero_classifier(shape, self._classes) if beta < 1 else None
        self._match = _same(shape) if beta > 0 else None
        self.module = nn.ModuleList(part for part in (self._predict, self._match) if part is not None)

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        assert data is not None and data.targets is not None
        terms = []
        if self._predict is not None:
            terms.append((1 - self._beta) * self._loss(self._predict(y), data.targets))
        if self._match is not None:
            wanted = similarity(F.one_hot(data.targets, self._classes).to(y.dtype))
            squares = F.mse_loss(similarity(self._match(y)), wanted, reduction="none")
            terms.append(self._beta * mean(squares, data))
        return torch.stack(terms).sum()


def similarity(z: Tensor) -> Tensor:
    """Cosines between mean-centred samples: (N, F) or (N, C, H, W) -> (N, N), in [-1, 1]."""
    if z.dim() == 4:
        z = z.flatten(2).std(2) if z.shape[2] * z.shape[3] > 1 else z.flatten(1)
    eps = max(1e-8, torch.finfo(z.dtype).tiny)  # in float16 1e-8 is 0
    z = F.normalize(z - z.mean(1, keepdim=True), dim=1, eps=eps)
    return (z @ z.T).clamp(-1, 1)


def _zero_classifier(shape: Shape, classes: int) -> nn.Sequential:
    """Pool images of more than `DECODED` features to a square of at most as many, then one linear layer from zero."""
    pool: list[nn.Module] = []
    features = math.prod(shape)
    if len(shape) == 3:
        side = max(1, min(shape[1], shape[2], math.isqrt(DECODED // shape[0])))
        size = shape[1:] if features <= DECODED else (side, side)
        pool.append(nn.AdaptiveAvgPool2d(size))
        features = shape[0] * math.prod(size)
    linear = nn.Linear(features, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(*pool, nn.Flatten(), linear)


def _same(shape: Shape) -> nn.Module:
    if len(shape) == 3:
        return nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
    return nn.Linear(shape[0], shape[0], bias=False)


@dataclass(frozen=True)
class InfoPro(Coupling):
    """Keep what tells of the input in the lower blocks, what tells of the class in the upper ones."""

    lambda1: float
    lambda2: float
    contrast: bool
    head: str
    down: tuple[str, ...] = field(default=(), init=False)

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else InfoProHead(place, self)

    def upper(self, place: Place) -> Upper:
        upper = Upper()
        upper.needs_data = not place.top  # the block that reconstructs reads the raw batch
        return upper


class InfoProHead(Lower):
    """A decoder to the raw batch, and a classifier or a projection."""

    has_objective = needs_data = True

    def __init__(self, place: Place, how: InfoPro) -> None:
        shape = place.shapes[place.k]
        height = place.k / (place.K - 2) if place.K > 2 else 0.0
        self._lambda1, self._lambda2 = how.lambda1 * (1 - height), how.lambda2 + (1 - how.lambda2) * height
        self._loss, self._contrast = place.loss, how.contrast
        self._decoder = _decoder(shape, place.inputs)
        self._aimed = heads.build(how.head, shape, (PROJECTION,) if how.contrast else place.shapes[-1])
        self.module = nn.ModuleList([self._decoder, self._aimed])

    def objective(self, y: Tensor, data: Data | None) -> Tensor:
        assert data is not None and data.targets is not None and data.inputs is not None
        x = data.inputs.to(y.device)
        if not x.is_floating_point():
            raise UserError(f"inputs of type {x.dtype} cannot be reconstructed; use a method with a head alone")
        kept = mean(F.mse_loss(self._decoder(y).view_as(x), x.to(y.dtype), reduction="none"), data)
        aimed = self._aimed(y)
        told = contrastive(aimed, data.targets, data.weights) if self._contrast else self._loss(aimed, data.targets)
        return self._lambda1 * kept + self._lambda2 * told


def contrastive(z: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The supervised contrastive loss of features (N, F) with classes (N,), a mean over pairs; 0 if there are none.

    `weights`: (N,) factors of the pairs' first samples.
    """
    if len(z) < 2:
        return 0 * z.sum()
    z = F.normalize(z, dim=1)
    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)
    pairs = (targets[:, None] == targets[None, :]) & ~alone
    scores = (z @ z.T / TEMPERATURE).masked_fill(alone, -torch.inf)
    told = (scores - scores.logsumexp(1, keepdim=True)).masked_fill(~pairs, 0)
    told = told if weights is None else told * weights.to(told)[:, None]
    return -told.sum() / pairs.sum().clamp(min=1)


def _decoder(shape: Shape, inputs: Shape) -> nn.Module:
    """From the block's output to the shape of the inputs: two 3x3 convolutions on enlarged images, else one linear."""
    if len(shape) == len(inputs) == 3:
        grow = nn.Upsample(size=inputs[1:], mode="bilinear", align_corners=False)
        return nn.Sequential(
            grow, nn.Conv2d(shape[0], 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, inputs[0], 3, padding=1)
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), math.prod(inputs)))
