"""A block: a module that runs with the weights it is given, draws its randomness from its own generator, and counts.

    run(x)                      live weights, running statistics move (once per pass, in the forward)
    run(x, weights=frozen)      other weights, same module: nothing is mutated under a live graph
    run(x, again=state)         a recompute: same random numbers, running statistics stay as they are

The default CPU generator is shared between threads, so dropout inside a block is drawn from the block's own one: the
same numbers on every runtime, whatever other blocks do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.errors import UserError
from decoupled.randomness import LAYERS, UNREPLAYABLE, OwnRandomness, Recompute

Weights = list[Tensor]
Slots = dict[str, Any]  # a module's parameters or buffers by name
Place = tuple[Slots, str]  # where a module looks a tensor up


class Block:
    """One block of the network with its weight version and random generator.

    Args:
        module: maps one tensor (batch, *features) to one tensor (batch, *features).
        name: what errors call it.
        seed: seed of the generator its dropout draws from.
        device: where the module lives and its inputs are moved to.
        overwrites_input: whether it changes its input in place, so that it must be given a copy; None: if any layer
            says `inplace`.
        autocast: run it, and its objective, under `torch.autocast` to this type; None: as it is.

    Attributes:
        version: number of optimizer steps so far.

    Raises:
        UserError: in `run`, if the module draws random numbers that cannot be replayed (alpha dropout, dropout inside
            scaled_dot_product_attention, randomised ReLU).

    Whether a block draws at all is decided in its first run: a module that begins to call random functions later is not
    noticed. Dropout is, even with p = 0: as a function, or as a layer, also of attention, whose p changes between runs;
    not a p that changes within one, and no layer that was not there in the beginning. A recompute of the module's own
    (torch.utils.checkpoint) in the backward may not draw, see `walking`.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        seed: int = 0,
        device: torch.device | str = "cpu",
        overwrites_input: bool | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.module, self.name, self.version = module.to(device), name, 0
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self._foreign: Tensor | None = None  # state of a generator on another kind of device, where this block lived
        self.parameters = list(module.parameters())
        self.weights: Weights = [*self.parameters]
        self._parts = list(module.modules())
        self._slots = _slots((m._parameters for m in self._parts), self.parameters)
        self._dropouts = [layer for layer in self._parts if isinstance(layer, nn.modules.dropout._DropoutNd)]
        self._attention = [layer for layer in self._parts if isinstance(layer, nn.MultiheadAttention)]
        self._recurrent = [layer for layer in self._parts if isinstance(layer, nn.RNNBase)]
        self._random = True if self._dropouts or self._attention else None  # None: not known before the first run
        # Whether something else draws than the layers of dropout, likewise; what an unknown kind of layer does is.
        known = all(type(layer) in LAYERS and "forward" not in layer.__dict__ for layer in self._dropouts)
        self._draws_elsewhere = None if known else True
        self._recomputes: bool | None = None  # in the backward, by itself; None: not known before the first one
        if overwrites_input is None:  # a layer may reach the input through views and identities, not only as the first
            overwrites_input = any(getattr(layer, "inplace", False) for layer in module.modules())
        self._overwrites_input = overwrites_input
        self._autocast = autocast

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast that the block runs under."""
        return torch.autocast(self.device.type, self._autocast) if self._autocast is not None else nullcontext()

    def freeze(self) -> Weights:
        """Copies of the current weights as new leaves, in the order of `parameters`."""
        return [p.detach().clone().requires_grad_(p.requires_grad) for p in self.parameters]

    def random_state(self) -> Tensor | None:
        """State of the generator before a pass, or None when the block draws nothing."""
        return None if self._random is False else self.generator.get_state()

    def run(
        self, x: Tensor, weights: Weights | None = None, replay: Tensor | None = None, again: bool = False
    ) -> Tensor:
        """Run the block.

        Args:
            x: (batch, *features).
            weights: leaves to use instead of the module's parameters.
            replay: generator state to draw from (a recompute); the generator goes on from where it was afterwards.
            again: this input was run before, so running statistics must not move.
        """
        x = self._given(x)
        swapped = self._swap(weights, again)
        try:
            if self._random is False and self._autocast is None:
                return self.module(x)
            with self._randomness(replay), self.precision():
                return self.module(x)
        finally:
            for slots, name, own in swapped:
                slots[name] = own

    def _swap(self, weights: Weights | None, again: bool) -> list[tuple[Slots, str, Tensor]]:
        """Put other tensors into the module's places (as `functional_call` does); the places and what was there."""
        others: list[tuple[list[Place], Tensor]] = []
        if weights is not None:
            others += zip(self._slots, weights, strict=True)
        if again and (buffers := list(self.module.buffers())):
            places = _slots((m._buffers for m in self._parts), buffers)
            others += zip(places, [buffer.clone() for buffer in buffers], strict=True)
        swapped = []
        for places, other in others:
            for slots, name in places:
                swapped.append((slots, name, slots[name]))
                slots[name] = other
        return swapped

    def walking(self, weights: Weights) -> AbstractContextManager[None]:
        """Around a backward on `weights`: what the module itself runs again there (torch.utils.checkpoint) meets these.

        Whether it does so is found out in the first backward. Running statistics stay as they are, and it may not draw
        (UserError): that would be from the generator that all blocks share, with other masks than in the forward.
        """
        return nullcontext() if self._recomputes is False else self._watched(weights)

    @contextmanager
    def _watched(self, weights: Weights) -> Iterator[None]:
        swapped = self._swap(None if weights is self.weights else weights, again=True)
        try:
            with torch.no_grad(), Recompute(self.name) as mode:
                yield
            if mode.called:
                self._recomputes = mode.recomputed
        finally:
            for slots, name, own in swapped:
                slots[name] = own

    def infer(self, x: Tensor) -> Tensor:
        """Output for `x` without a graph; for evaluation mode, in which nothing is drawn."""
        with torch.no_grad(), self.precision():
            return self.module(self._given(x))

    def _given(self, x: Tensor) -> Tensor:
        """The input as the module may have it: its own, and of its own type where a neighbour computes in another."""
        if self._autocast is None and x.dtype in (torch.bfloat16, torch.float16):
            own = next((p.dtype for p in self.parameters if p.is_floating_point()), x.dtype)
            x = x.to(own) if own != x.dtype else x
        return x.clone() if self._overwrites_input else x

    @contextmanager
    def _randomness(self, replay: Tensor | None) -> Iterator[None]:
        if self._random is False:
            yield
            return
        if any(layer.dropout and layer.num_layers > 1 and layer.training for layer in self._recurrent):
            raise UserError(f"{self.name}: dropout inside a recurrent layer {UNREPLAYABLE}")
        if self._foreign is not None and self._random:
            self._foreign = None
            warnings.warn(
                f"{self.name}: its state was saved on another kind of device, whose random numbers cannot go on on "
                f"{self.device.type}; what the block draws begins anew",
                stacklevel=2,
            )
        after = self.generator.get_state() if replay is not None else None
        if replay is not None:
            self.generator.set_state(replay)
        if self._draws_elsewhere is False and not self._drops():
            yield  # without the mode, which takes a small network a tenth of its time
        else:
            unknown = self._draws_elsewhere is None
            with OwnRandomness(self.generator, self.name) as mode, mode.counting(self._dropouts if unknown else ()):
                yield
            self._random = self._random or mode.drawn
            if unknown:
                self._draws_elsewhere = mode.drew_elsewhere
        if after is not None:
            self.generator.set_state(after)

    def _drops(self) -> bool:
        """Whether a layer that can drop something does at present."""
        return any(layer.p for layer in self._dropouts) or any(layer.dropout for layer in self._attention)

    def state_dict(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "version": self.version,
            "generator": self.generator.get_state() if self._foreign is None else self._foreign,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.version = int(state["version"])
        saved = state["generator"].cpu()
        if saved.shape != self.generator.get_state().shape:
            self._foreign = saved
            return
        self._foreign = None
        self.generator.set_state(saved)


def _slots(tables: Iterable[Slots], tensors: Sequence[Tensor]) -> list[list[Place]]:
    """All places of each of these tensors (several where a module is used twice or weights are tied)."""
    places: dict[int, list[Place]] = {id(tensor): [] for tensor in tensors}
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None:
                places[id(tensor)].append((table, name))
    return [places[id(tensor)] for tensor in tensors]
