"""Random numbers: from a seed, from a block's own generator, and none that nobody could draw again.

seeded           what is drawn on the CPU inside follows from a seed; everybody else's numbers stay as they were
OwnRandomness    dropout, and functions that take a generator, draw from a given one; others are refused
Recompute        finds out whether a backward runs anything again, and refuses that it draws
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from decoupled.errors import UserError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, e.g. initial weights on the CPU; afterwards from where the caller was.

    ``torch.manual_seed`` would reseed the accelerators, too, and not give them back.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(3)
        >>> with seeded(0):
        ...     bool((torch.rand(3) == first).all())
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class OwnRandomness(TorchFunctionMode):
    """Draws dropout masks and other random tensors from one generator (the mode is local to the thread)."""

    def __init__(self, generator: torch.Generator, block: str) -> None:
        super().__init__()
        self._generator, self._block, self.drawn, self.drew_elsewhere = generator, block, False, False
        self._calls = 0  # of dropout functions, less those of layers

    @contextmanager
    def counting(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Within: find out whether anything else draws than `layers` of dropout (which blocks may share)."""
        thread = threading.get_ident()

        def called(*_: Any) -> None:
            self._calls -= threading.get_ident() == thread

        hooks = [layer.register_forward_pre_hook(called) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.drew_elsewhere = self.drew_elsewhere or self._calls > 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _SHARED_DIMENSIONS:
            self.drawn, self._calls = True, self._calls + 1
            return self._dropout(_SHARED_DIMENSIONS[func], *args, **(kwargs or {}))
        if func in _DRAWING:
            self.drawn = self.drew_elsewhere = True
            kwargs = {"generator": self._generator} | (kwargs or {})
        if func in _SILENT and _SILENT[func](*args, **(kwargs or {})):
            self.drawn = self.drew_elsewhere = True
        if func in _REFUSED and _REFUSED[func](*args, **(kwargs or {})):
            raise UserError(f"{self._block}: {getattr(func, '__name__', func)} {UNREPLAYABLE}")
        return func(*args, **(kwargs or {}))

    def _dropout(self, spatial: int, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        shape = x.shape[: x.dim() - spatial] + (1,) * spatial
        keep = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=self._generator)
        return x * keep.div_(1 - p) if p < 1 else x * keep


class Recompute(TorchDispatchMode):
    """Watches a backward, where only what is run again makes a graph, and refuses to draw for one (in all its threads).

    Attributes:
        called: whether anything has run. recomputed: whether something has run again.
    """

    def __init__(self, block: str) -> None:
        super().__init__()
        self._block, self.called, self.recomputed = block, False, False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        again, self.called = torch.is_grad_enabled(), True
        self.recomputed = self.recomputed or again
        if again and _draws(func, args, kwargs or {}):
            raise UserError(
                f"{self._block}: torch.utils.checkpoint draws random numbers (dropout) again in the backward, others "
                "than in the forward; keep them out of what is checkpointed, or let the method run whole blocks again "
                "instead (recompute=true, where it has that)"
            )
        return func(*args, **(kwargs or {}))


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call of an operator takes random numbers; attention and others do only where they drop something."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    declared = func._schema.arguments
    given = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in declared), args, strict=False)) | dict(kwargs)
    dropped = [given[name] for name in ("dropout_p", "dropout", "p") if isinstance(given.get(name), int | float)]
    return (not dropped or any(dropped)) and given.get("train") is not False


UNREPLAYABLE = "draws random numbers that cannot be replayed in a recompute; use nn.Dropout outside of it instead"
# dropout function -> number of last dimensions that share a mask
_SHARED_DIMENSIONS: dict[Callable[..., Any], int] = {
    F.dropout: 0,
    torch.dropout: 0,
    F.dropout1d: 1,
    F.dropout2d: 2,
    F.dropout3d: 3,
}
LAYERS = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}  # each of which calls one of them
# functions that take a generator
_DRAWING: set[Callable[..., Any]] = {
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like,
    torch.bernoulli, torch.normal, torch.multinomial, torch.poisson, Tensor.bernoulli, Tensor.bernoulli_,
    Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.random_, Tensor.multinomial,
}  # fmt: skip
# function -> whether it could begin to draw: it was given a p; that of MultiheadAttention is watched at the layer
_SILENT: dict[Callable[..., Any], Callable[..., bool]] = {
    F.alpha_dropout: lambda *a, **rest: True,
    F.feature_alpha_dropout: lambda *a, **rest: True,
    F.scaled_dot_product_attention: lambda *a, **rest: len(a) > 4 or "dropout_p" in rest,
}
# function -> whether this call draws from the shared generator
_REFUSED: dict[Callable[..., Any], Callable[..., bool]] = {
    F.alpha_dropout: lambda x, p=0.5, training=False, inplace=False: training and p > 0,
    F.feature_alpha_dropout: lambda x, p=0.5, training=False, inplace=False: training and p > 0,
    F.rrelu: lambda x, lower=0.125, upper=1 / 3, training=False, inplace=False: training,
    F.multi_head_attention_forward: lambda *a, **rest: (
        rest.get("dropout_p", a[10] if len(a) > 10 else 0.0) > 0
        and rest.get("training", a[13] if len(a) > 13 else True)
    ),
    F.scaled_dot_product_attention: lambda q, k, v, attn_mask=None, dropout_p=0.0, *more, **rest: dropout_p > 0,
}
