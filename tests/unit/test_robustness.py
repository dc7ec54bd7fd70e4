"""What a review found, each with its story: results that were silently wrong, input that was not refused clearly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import decoupled
from decoupled import UserError, registry
from decoupled.runtime.timing import Timing
from decoupled.simulate import simulate

METHODS = decoupled.methods()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def batches(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(1)
    return [
        (torch.randn(size, 6).double(), torch.randint(3, (size,)), torch.arange(size) + size * n) for n in range(count)
    ]


class Apply(nn.Module):
    """A layer from a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def network(first: Callable[[Tensor], Tensor], middle: Callable[[Tensor], Tensor]) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [Apply(first), nn.Linear(6, 6), nn.Tanh(), Apply(middle), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    return [layer.double() for layer in layers]


def fit(units: list[nn.Module], method: Any, runtime: str = "simulated", data: Any = None, **more: Any) -> Tensor:
    model = nn.Sequential(*units)
    with decoupled.Trainer(
        model, method, [3], loss=F.cross_entropy, optimizer=sgd, runtime=runtime, devices=["cpu"], **more
    ) as trainer:
        trainer.fit(batches() if data is None else data, epochs=2)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_blocks_that_change_their_input_in_place(method: str) -> None:
    """Functions such as x.mul_ carry no `inplace` attribute: inputs were replayed changed, batches of the user too."""
    outside = fit(network(lambda x: x.sub(0.5).mul(2), lambda x: x.mul(0.7)), method)
    data = batches()
    before = [x.clone() for x, _, _ in data]
    for runtime in ("simulated", "threads"):
        inside = fit(network(lambda x: x.sub_(0.5).mul_(2), lambda x: x.mul_(0.7)), method, runtime, data)
        if runtime == "simulated" or registry.make(method).fixed:
            assert torch.equal(inside, outside)
    assert all(torch.equal(x, old) for (x, _, _), old in zip(data, before, strict=True))


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: x + 0.1 * torch.randn_like(x),
        lambda x: x * torch.rand(x.shape[0], 1, dtype=x.dtype),
        lambda x: torch.dropout(x, 0.3, True),
        lambda x: x * torch.empty_like(x).bernoulli_(0.8),
    ],
    ids=["randn_like", "rand", "torch.dropout", "bernoulli_"],
)
def test_random_numbers_are_replayed_and_the_same_on_every_runtime(noise: Callable[[Tensor], Tensor]) -> None:
    def run(recompute: bool, runtime: str) -> Tensor:
        return fit(network(noise, noise), {"name": "pipedream", "recompute": recompute}, runtime)

    expected = run(False, "simulated")
    assert torch.equal(run(True, "simulated"), expected)
    assert torch.equal(run(False, "threads"), expected)
    assert not torch.equal(fit(network(lambda x: x, lambda x: x), "pipedream"), expected)


def test_a_state_does_not_change_when_training_goes_on() -> None:
    """It held the live tensors: a second trainer shared momentum with the first, and rolling back did nothing."""
    data = batches()
    make = lambda: decoupled.Trainer(  # noqa: E731
        nn.Sequential(*network(torch.tanh, torch.tanh)), "backprop", [3], loss=F.cross_entropy, optimizer=sgd,
        runtime="simulated", devices=["cpu"],
    )  # fmt: skip
    first, second = make(), make()
    first.fit(data)
    state = first.state_dict()
    second.load_state_dict(state)
    first.fit(data)
    second.fit(data)
    weights = lambda trainer: torch.cat([p.flatten() for p in trainer.model.parameters()])  # noqa: E731
    assert torch.equal(weights(first), weights(second))
    second.load_state_dict(state)
    second.fit(data)
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("method", ["backprop", "gpipe", "one_f_one_b", "pipedream", "chunked_local"])
def test_skipping_a_batch_equals_leaving_it_out(method: str) -> None:
    """Micro-batches with a finite loss of a dropped minibatch were still applied."""
    data = batches(1)
    x, y, i = batches(2)[1]
    broken = x.clone()
    broken[0] = float("nan")
    kept = fit(network(torch.tanh, torch.tanh), method, data=data)
    skipped = fit(network(torch.tanh, torch.tanh), method, data=[data[0], (broken, y, i)], on_nonfinite="skip")
    assert torch.equal(skipped, kept)
    assert not torch.equal(fit(network(torch.tanh, torch.tanh), method, data=[data[0], (x, y, i)]), kept)


def test_a_step_costs_the_same_whatever_the_micro_batch() -> None:
    assert simulate("gpipe", 1, 50, Timing(1, 2, step=4)).speedup == pytest.approx(1.0)


def test_integers_may_cross_an_edge() -> None:
    torch.manual_seed(0)
    tokens = [(torch.randint(9, (8, 4)), torch.randint(3, (8,)), torch.arange(8)) for _ in range(3)]
    for method in ("backprop", "pipedream", "features_replay"):
        units = [nn.Flatten(), nn.Embedding(9, 5), nn.Flatten(), nn.Linear(20, 3)]
        before = units[1].weight.detach().clone()
        with decoupled.Trainer(
            nn.Sequential(*units), method, [1], loss=F.cross_entropy, optimizer=sgd, devices=["cpu"]
        ) as trainer:
            trainer.fit(tokens)
        assert not torch.equal(units[1].weight, before)
    with pytest.raises(UserError, match=r"block0 ends in torch.int64, which no objective can train"):
        decoupled.Trainer(nn.Sequential(*units), "greedy_local", [1], loss=F.cross_entropy, optimizer=sgd).fit(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "the loss must be one number"),
        ({"loss": 3.0}, "loss must be a function, got float"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, "optimizer must be a function, got SGD"),
        ({"optimizer": lambda parameters: None}, "optimizer must return a torch Optimizer"),
        ({"devices": ["gpu"]}, "devices=['gpu'] cannot be used"),
        ({"model": []}, "the list is empty"),
        ({"data": [((1, "a"), 2)]}, "must each be one tensor"),
        ({"data": [(torch.randn(4, 7).double(), torch.zeros(4).long())]}, "does not take an input of shape"),
        ({"data": [(torch.randn(4, 6).double(), torch.tensor([0, 1, 2, 3]))]}, "labels must be 0 to 2"),
        ({"method": "greedy_local", "tail": nn.Unflatten(1, (3, 1))}, "head 'sequence' reads (length, features)"),
        ({"epochs": -1}, "epochs must be an integer of at least 0"),
        ({"epochs": 1.5}, "epochs must be an integer of at least 0"),
    ],
)
def test_wrong_input_is_one_clear_line(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "model": nn.Sequential(*network(torch.tanh, torch.tanh), *([change["tail"]] if "tail" in change else [])),
        "method": "backprop", "blocks": [3], "loss": F.cross_entropy, "optimizer": sgd, "devices": ["cpu"],
        "data": batches(), "epochs": 1,
    } | {key: value for key, value in change.items() if key != "tail"}  # fmt: skip
    if given["model"] == []:
        given["blocks"] = None
    data, epochs = given.pop("data"), given.pop("epochs")
    with pytest.raises((UserError, decoupled.OperationError)) as caught:
        decoupled.Trainer(given.pop("model"), **given).fit(data, epochs)
    error = caught.value if isinstance(caught.value, UserError) else caught.value.__cause__
    assert isinstance(error, UserError)
    assert message in str(error)
    assert "\n" not in str(error)


def test_a_state_that_does_not_fit_says_where() -> None:
    def make(width: int, optimizer: Any = sgd) -> decoupled.Trainer:
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()
        return decoupled.Trainer(model, "backprop", [2], loss=F.cross_entropy, optimizer=optimizer, devices=["cpu"])

    with make(6) as trainer:
        trainer.fit(batches())
        state = trainer.state_dict()
    with make(7) as other, pytest.raises(UserError, match="does not fit block0"):
        other.load_state_dict(state)
    with make(6, torch.optim.Adam) as other, pytest.raises(UserError, match=r"optimizers \['Adam'\], saved"):
        other.load_state_dict(state)
    with make(6) as other, pytest.raises(UserError, match="not the state of a trainer"):
        other.load_state_dict({})


def test_fit_under_no_grad_trains_all_the_same() -> None:
    """Grad mode is local to a thread: the simulator failed where threads trained."""
    with torch.no_grad():
        inside = fit(network(torch.tanh, torch.tanh), "pipedream")
    assert torch.equal(inside, fit(network(torch.tanh, torch.tanh), "pipedream", "threads"))


def test_too_few_rounds_are_said_aloud() -> None:
    """Blocks that no answer reaches within a minibatch stayed as they were, silently."""
    data = batches()
    units = network(torch.tanh, torch.tanh)
    before = units[1].weight.detach().clone()  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="1 rounds reach the upper 1 of 2 blocks"):
        fit(units, {"name": "block_admm", "rounds": 1}, data=data)
    assert torch.equal(units[1].weight, before)  # type: ignore[arg-type]
