"""A causal Transformer for sequences of tokens as a list of units: the embedding, every block, and the output.

Pre-norm, as in GPT-2 (Radford et al. 2019)::

    x (N, length), numbers below classes
      -> [token embedding + position embedding, dropout]            unit 0          (N, length, width)
      -> h + dropout(attention(norm(h))), h + dropout(mlp(norm(h)))  units 1 ... d   (N, length, width)
      -> [norm, linear, classes first]                              unit d + 1      (N, classes, length)

Position i sees positions 0 ... i only, so its output may predict token i + 1. Classes stand right after the batch, as
`torch.nn.functional.cross_entropy` takes them with targets (N, length). Weights start normal with deviation 0.02, those
that add to the residual stream with 0.02 / sqrt(2 d); nothing is shared between units, so the output has weights of its
own. Dropout is left out inside the attention, where a recompute could not replay it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled.errors import UserError
from decoupled.heads import ClassesFirst
from decoupled.specs import positive


class Embedding(nn.Module):
    """Tokens and their positions as vectors: (N, length) int64 -> (N, length, width)."""

    def __init__(self, tokens: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Raise UserError for anything but token numbers, or a sequence longer than the context."""
        if x.dim() != 2 or x.is_floating_point():
            raise UserError(f"the transformer takes tokens (N, length) of type int64, got {x.dtype} {tuple(x.shape)}")
        length, context = x.shape[1], self.positions.num_embeddings
        if length > context:
            raise UserError(_too_long(length, context))
        return self.dropout(self.tokens(x) + self.positions(torch.arange(length, device=x.device)))


class CausalAttention(nn.Module):
    """Multi-head self-attention in which position i sees positions 0 ... i: (N, length, width) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Split (N, length, 3 width) into queries, keys and values (N, heads, length, width / heads)."""
        count, length, width = x.shape
        query, key, value = self.inward(x).view(count, length, 3, self.heads, width // self.heads).unbind(2)
        seen = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return self.outward(seen.transpose(1, 2).reshape(count, length, width))


class TransformerBlock(nn.Module):
    """One pre-norm block: (N, length, width) -> the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), CausalAttention(width, heads), nn.Dropout(dropout))
        inner = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        self.mlp = nn.Sequential(nn.LayerNorm(width), *inner, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the two-layer network, to the residual stream."""
        x = x + self.attention(x)
        return x + self.mlp(x)


def transformer(
    inputs: Sequence[int],
    classes: int,
    *,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    context: int | None = None,
    dropout: float = 0.0,
) -> list[nn.Module]:
    """Build a causal Transformer.

    Args:
        inputs: shape of one sample: (length,).
        classes: number of different tokens, of the input and of the output (256 for bytes).
        width: features of the residual stream; the inner layer of a block has four times as many.
        depth: number of blocks.
        heads: attention heads of a block; they divide the width.
        context: longest sequence it can take; None: the length of the inputs.
        dropout: share of features set to zero after the embedding and at the end of every branch.

    Returns:
        depth + 2 units; applied one after the other they map tokens (N, length) to logits (N, classes, length).

    Raises:
        UserError: inputs that are no sequence or longer than the context, heads that do not divide the width, a size
            below 1, or dropout outside [0, 1).

    Example:
        >>> len(transformer((32,), 256, width=16, depth=3, heads=2))
        5
    """
    if len(inputs) != 1:
        raise UserError(
            f"transformer takes sequences of tokens (length,), got inputs of shape {tuple(inputs)}; use data "
            "python_source or text, or the model resnet or mlp"
        )
    (length,) = inputs
    context = length if context is None else context
    positive("transformer", classes=classes, width=width, depth=depth, heads=heads, context=context, length=length)
    if length > context:
        raise UserError(_too_long(length, context))
    if width % heads:
        raise UserError(f"transformer: heads must divide the width, got {heads} heads for width {width}")
    if not 0 <= dropout < 1:
        raise UserError(f"transformer: dropout must be at least 0 and below 1, got {dropout}")
    output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes), ClassesFirst())
    blocks = [TransformerBlock(width, heads, dropout) for _ in range(depth)]
    units: list[nn.Module] = [Embedding(classes, context, width, dropout), *blocks, output]
    for unit in units:
        unit.apply(_initialise)
    for block in blocks:
        for name, weight in block.named_parameters():
            if name in ("attention.1.outward.weight", "mlp.3.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth))
    return units


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _too_long(length: int, context: int) -> str:
    return (
        f"a sequence of {length} tokens does not fit the transformer's context of {context}; give the model "
        f"context={length}, or the data length={context}"
    )
