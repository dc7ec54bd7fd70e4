"""Steps: the optimizers of one block and of its coupling halves, and whether a step is owed.

No gradient, no step: before the first gradient (or when a pass was dropped) nothing decays and no scheduler ticks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from decoupled.correction import Acting
from decoupled.errors import UserError

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


def _check_optimizer(made: Any, given: Sequence[Tensor]) -> None:
    if not isinstance(made, Optimizer):
        raise UserError(f"optimizer must return a torch Optimizer for the parameters, got {type(made).__name__}")
    if isinstance(made, LBFGS):
        raise UserError("LBFGS calls the loss again within a step, which blocks cannot; use another optimizer")
    mine = {id(parameter) for parameter in given}
    if others := sum(id(p) not in mine for group in made.param_groups for p in group["params"]):
        raise UserError(
            f"the optimizer of a block holds {others} parameters that are not the block's; make it of what it is "
            "given, e.g. optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )


def _check_scheduler(made: Any) -> None:
    if not all(callable(getattr(made, name, None)) for name in ("step", "state_dict", "load_state_dict")):
        raise UserError(f"scheduler must return a torch LRScheduler for the optimizer, got {type(made).__name__}")
    if isinstance(made, ReduceLROnPlateau):
        raise UserError("ReduceLROnPlateau waits for a metric, and schedulers here tick once per step; use another one")


class Steps:
    """Optimizers of a block, its lower and its upper half; those without parameters have none.

    Args:
        groups: parameters of the block, of the lower half and of the upper half.
        optimizer: parameters -> Optimizer, called once per non-empty group.
        halves: the same for the lower and the upper half where they have one of their own (None: they have not).
        scheduler: optimizer -> LRScheduler, ticks once per step of its own block; or None.

    Attributes:
        owed: whether gradients have been accumulated since the last step.
        corrections: those at work at this block; the worker sets them.
    """

    def __init__(
        self,
        groups: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        halves: tuple[MakeOptimizer | None, MakeOptimizer | None] = (None, None),
    ) -> None:
        trainable = [[p for p in group if isinstance(p, nn.Parameter) and p.requires_grad] for group in groups]
        self.block_parameters, self.lower_parameters, self.upper_parameters = trainable
        self._parameters = [parameter for group in trainable for parameter in group]
        makers = (optimizer, *(own or optimizer for own in halves))
        self.optimizers = [make(group) for make, group in zip(makers, trainable, strict=True) if group]
        for made, group in zip(self.optimizers, filter(None, trainable), strict=True):
            _check_optimizer(made, group)
        self.schedulers = [scheduler(o) for o in self.optimizers] if scheduler else []
        for tick in self.schedulers:
            _check_scheduler(tick)
        self.owed = False
        self.corrections = Acting()

    @property
    def block_optimizer(self) -> Optimizer | None:
        """The optimizer of the block itself; None if it has nothing to train."""
        return self.optimizers[0] if self.block_parameters else None

    def accumulate(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients (in the order of the trainable ones among `parameters`) to `.grad`."""
        self.owed = True
        trainable = (p for p in parameters if p.requires_grad)
        for parameter, gradient in zip(trainable, gradients, strict=False):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def step(self) -> None:
        """One step of every optimizer that has gradients, then forget them."""
        self.corrections.before_step()
        stepped = [self._advance(optimizer) for optimizer in self.optimizers]
        self.corrections.after_step()
        for scheduler, moved in zip(self.schedulers, stepped, strict=False):  # there may be none
            if moved:
                scheduler.step()
        self.clear()

    def step_half(self, upper: bool) -> None:
        """One step of the optimizer of the upper (or lower) half alone, if it has gradients."""
        at = bool(self.block_parameters) + (upper and bool(self.lower_parameters))  # its place among the optimizers
        if (self.upper_parameters if upper else self.lower_parameters) and self._advance(self.optimizers[at]):
            if self.schedulers:
                self.schedulers[at].step()
            self.optimizers[at].zero_grad(set_to_none=True)

    @staticmethod
    def _advance(optimizer: Optimizer) -> bool:
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return False
        optimizer.step()
        return True

    def clear(self) -> None:
        """Forget accumulated gradients."""
        self.owed = False
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "kinds": [type(o).__name__ for o in self.optimizers],
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [s.state_dict() for s in self.schedulers],
            "corrections": self.corrections.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], block_only: bool = False) -> None:
        """Put `state` back; `block_only`: that of the block's own optimizer and scheduler alone."""
        some = slice(int(bool(self.block_parameters)) if block_only else None)
        if (kinds := [type(o).__name__ for o in self.optimizers][some]) != state["kinds"][some]:
            raise ValueError(f"optimizers {kinds}, saved were {state['kinds']}")
        for optimizer, saved in zip(self.optimizers[some], state["optimizers"][some], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers[some], state["schedulers"][some], strict=True):
            scheduler.load_state_dict(saved)
        if not block_only:
            self.corrections.load_state_dict(state["corrections"])
