"""AuxNet: the variable of every edge is generated from the raw batch by a small network, so nothing is stored.

    y ---- a_k(y; theta) = lambda_k ----> block k+1      sent before block k has run
    y --> ... block k --> X_k

    J_k     = (beta/2) sum_i ||X_k[i] - lambda_k[i]||^2 / B
    g_k     = p_k - beta (X_k - lambda_k)                what moves a stored variable (p - g in the code)
    theta  <- optimizer(theta, gradient of  <eta g_k, a_k(y; theta)> / (B x positions))

One gradient step on ||a_k(y) - (lambda_k - eta g_k)||^2 / 2 is this: the generator follows the updated variable. Its
loss is a mean over the positions of an image, so that the same learning rate suits it and the blocks.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from decoupled.coupling import Coupling, Lower, Place, Top, Upper
from decoupled.errors import UserError
from decoupled.messages import Data
from decoupled.method import ALL_LOCKS, Facts, Method, own
from decoupled.methods.auxiliary_variables.rule import Rule
from decoupled.order import rounds
from decoupled.registry import register
from decoupled.retention import KeepNothing


@register("auxnet")
def auxnet(beta: float = 0.1, eta: float = 5.0, width: int = 16) -> Method:
    """Layer-parallel penalty method whose variables small networks generate from the raw batch."""
    facts = Facts(exact=False, reach=own, locks=ALL_LOCKS)
    return Method(Generated(Rule(beta, eta), width), rounds(), facts, KeepNothing)


class Generated(Coupling):
    """lambda up, made of the raw batch; the gradient for it down."""

    up = ("auxiliary variable",)
    down = ("gradient",)
    substitutes = True

    def __init__(self, rule: Rule, width: int) -> None:
        self.rule, self.width = rule, width

    def lower(self, place: Place) -> Lower:
        return Top(place) if place.top else Generator(place, self.rule, self.width)

    def upper(self, place: Place) -> Upper:
        upper = Upper()
        upper.replies = True
        return upper


class Generator(Lower):
    """Lower half that owns the network a_k."""

    awaits, replies = "A", 1
    has_objective = needs_data = needs_inputs = learns_from_answers = True

    def __init__(self, place: Place, rule: Rule, width: int) -> None:
        shape = place.shapes[place.k]
        self.module = self._network = generator(place.inputs, shape, width)
        self._rule, self._positions = rule, math.prod(shape[1:])
        self._lam: Tensor | None = None  # with its graph
        self._g: Tensor | None = None
        self.remedy = f"edge block{place.k} -> block{place.k + 1}: {rule.remedy}"

    def offer(self, data: Data) -> tuple[Tensor, ...] | None:
        assert data.inputs is not None
        reference = next(self._network.parameters())
        if not data.inputs.is_floating_point():
            raise UserError("auxnet generates variables from images or numbers, not from tokens; use another method")
        self._lam = lam = self._network(data.inputs.to(reference.device, reference.dtype))
        return (lam.detach(),)

    def emit(self, y: Tensor, data: Data | None) -> tuple[Tensor, ...]:
        assert self._lam is not None
        self._g = self._rule.gradient(y.detach(), self._lam.detach(), None)
        return (self._lam.detach(),)

    def objective(self, y: Tensor, data: Data | None) -> Tensor | None:
        assert self._lam is not None and self._g is not None
        return self._rule.objective(y, self._lam.detach(), None, self._g)

    def answer(self, payload: tuple[Tensor, ...] | None) -> None:
        lam, g = self._lam, self._g
        self.clear()
        if payload is not None:
            assert lam is not None and g is not None
            p = payload[0].to(g.device) * len(g)
            lam.backward((p - g) * (self._rule.eta / (len(g) * self._positions)))

    def clear(self) -> None:
        self._lam = self._g = None


def generator(inputs: tuple[int, ...], shape: tuple[int, ...], width: int) -> nn.Module:
    """A small network from a sample of shape `inputs` to one of `shape`.

    Images to images: 3x3 convolutions that halve the sides until they fit, at most `width` channels, then one 3x3
    convolution to the channels wanted. Anything else: flattened, one hidden layer of `width` units.
    """
    if width < 1:
        raise UserError(f"width of the generators must be at least 1, got {width}")
    if len(inputs) != 3 or len(shape) != 3:
        layers = [nn.Flatten(), nn.Linear(math.prod(inputs), width), nn.ReLU(), nn.Linear(width, math.prod(shape))]
        return nn.Sequential(*layers, nn.Unflatten(1, shape))
    sides, convolutions, channels = inputs[1:], [], inputs[0]
    while not convolutions or sides != shape[1:]:
        stride = 2 if max(sides) > max(shape[1:]) else 1
        sides = tuple(-(side // -stride) for side in sides)
        if stride == 1 and sides != shape[1:]:
            raise UserError(
                f"no generator for images {inputs} and an edge of shape {shape}; cut where sides are halved"
            )
        convolutions += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*convolutions, nn.Conv2d(channels, shape[0], 3, padding=1))
