"""Fixed random matrices in the place of the transposed weights, inside of blocks, layer by layer.

    W (features out, features in, *kernel)  weight of a linear or convolutional layer, y = W x
    B (as W)                                fixed, drawn from the seed

    forward    y  = W x                          as it is
    backward   dW = d x^T                        as it is
               dx = B^T d                        not W^T d;   signs: |B| sign(W) in the place of B

Everything else in a block (norms, activations, shortcuts, attention weights) follows the chain rule. In the code: y(x
without a graph, W) + (z - z without a graph), z = B x, whose value is y to the last bit.

Sources: Lillicrap et al. 2016 (arXiv 1411.0247); signs: Liao, Leibo and Poggio 2016 (arXiv 1510.05067).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from decoupled.correction import Correction, Site, Weights, named

_LAYERS: set[Callable[..., Any]] = {F.linear, F.conv1d, F.conv2d, F.conv3d}


@named("random_feedback")
@dataclass(frozen=True)
class RandomFeedback(Correction):
    """Gradients go back through fixed random matrices; one block alone follows the true gradient.

    Attributes:
        signs: the matrices take the signs of the weights, and are random in their magnitudes only.
    """

    needs: ClassVar[str] = "gradient"
    about_delay: ClassVar[bool] = False
    records: ClassVar[bool] = True

    signs: bool = False

    def at(self, site: Site) -> Correction | None:
        return _Feedback(site, self.signs) if site.K > 1 else None


class _Feedback(Correction):
    def __init__(self, site: Site, signs: bool) -> None:
        self._matrices = [_draw(p) if p.dim() > 1 else None for p in site.parameters]
        self._signs = signs

    def recording(self, weights: Weights) -> TorchFunctionMode:
        pairs = zip(weights, self._matrices, strict=True)
        return _Replaced({id(w): self._as(w, B) for w, B in pairs if B is not None})

    def _as(self, weight: Tensor, B: Tensor) -> Tensor:
        B = B.to(weight)
        return B.abs() * weight.detach().sign() if self._signs else B


def _draw(weight: Tensor) -> Tensor:
    """Xavier uniform: neither the signal up nor the one down changes its size on average."""
    return nn.init.xavier_uniform_(torch.empty(weight.shape))


class _Replaced(TorchFunctionMode):
    """Linear and convolutional layers whose input gradient comes through other matrices, by `id` of the weight."""

    def __init__(self, feedback: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._feedback = feedback

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = kwargs or {}
        return self._layer(func, *args, **given) if func in _LAYERS else func(*args, **given)

    def _layer(
        self, run: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None,
        *rest: Any, **more: Any,
    ) -> Tensor:  # fmt: skip
        B = self._feedback.get(id(weight))
        if B is None or not input.requires_grad:
            return run(input, weight, bias, *rest, **more)
        y, z = run(input.detach(), weight, bias, *rest, **more), run(input, B, None, *rest, **more)
        return y + (z - z.detach())
