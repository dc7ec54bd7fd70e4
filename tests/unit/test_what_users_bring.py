"""What users bring: modules in evaluation mode, losses, optimizers and schedulers that are not what they seem."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.errors import OperationError, UserError
from decoupled.evaluation import evaluate
from decoupled.randomness import seeded
from decoupled.sample_losses import mass
from decoupled.testing import flat
from decoupled.trainer import Trainer

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def model() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)
        )


def batches(count: int = 4) -> Batches:
    with seeded(1):
        return [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(count)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def trainer(given: nn.Module | list[nn.Module], method: Any = "backprop", **options: Any) -> Trainer:
    more: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": sgd, "runtime": "simulated", "blocks": [3], **options}
    return Trainer(given, method, **more)  # type: ignore[arg-type]


# --- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
def test_a_module_in_evaluation_mode_stays_in_it(runtime: str) -> None:
    """Frozen BatchNorm: as in a loop of plain PyTorch, also after an evaluation."""
    ours, theirs = model(), model()
    for net in (ours, theirs):
        net.train()
        net[1].eval()
    statistics = ours[1].running_mean.clone()  # type: ignore[union-attr, operator]
    with trainer(ours, runtime=runtime, blocks=[2]) as one:
        one.fit(batches())
        one.evaluate(batches(1))
        one.fit(batches())
    assert torch.equal(ours[1].running_mean, statistics)  # type: ignore[arg-type]
    assert [unit.training for unit in ours] == [True, False, True, True, True, True]


def test_frozen_statistics_give_the_weights_of_a_plain_loop() -> None:
    ours, theirs = model(), model()
    for net in (ours, theirs):
        net[1].eval()
        net[4] = nn.Identity()
    with trainer(ours) as one:
        one.fit(batches())
    optimizer = sgd(theirs.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


@pytest.mark.parametrize("method", ["backprop", "forward_forward"])
def test_a_model_that_was_tested_by_its_user_is_trained_again_and_frozen_modules_stay_so(method: str) -> None:
    net = model()
    net[4].eval()
    with trainer(net, method) as one:
        one.fit(batches())
        net.eval()
        before = net[1].running_mean.clone()  # type: ignore[union-attr, operator]
        one.fit(batches())
    assert [unit.training for unit in net] == [True, True, True, True, False, True]
    assert not torch.equal(net[1].running_mean, before)  # type: ignore[arg-type]


def test_a_module_that_freezes_itself_in_train_stays_frozen() -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    net = nn.Sequential(nn.Linear(4, 6), Frozen(6), nn.Linear(6, 3))
    with trainer(net, blocks=[2]) as one:
        one.fit(batches())
    assert not net[1].training and not net[1].running_mean.any()  # type: ignore[union-attr, operator]


def test_a_model_that_is_in_evaluation_mode_as_a_whole_is_trained() -> None:
    net = model().eval()
    with trainer(net) as one:
        one.fit(batches())
    assert all(unit.training for unit in net)


def test_the_trained_network_has_the_names_of_the_given_one() -> None:
    net = nn.Sequential(OrderedDict(below=nn.Linear(4, 6), tanh=nn.Tanh(), above=nn.Linear(6, 3)))
    with trainer(net, blocks=[2]) as one:
        one.fit(batches())
        assert one.model.state_dict().keys() == net.state_dict().keys()
    relu, ends = nn.ReLU(), (nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    twice = nn.Sequential(OrderedDict(a=ends[0], b=relu, c=ends[1], d=relu, e=ends[2]))
    with trainer(twice, blocks=[2]) as one:
        assert one.evaluate(batches()) == pytest.approx(evaluate([twice], batches(), F.cross_entropy))
        one.fit(batches())
        assert len(one.model) == 5 and one.model.state_dict().keys() == twice.state_dict().keys()
    with trainer(net, "forward_forward", blocks=[2]) as one:  # with layers of its own between
        assert list(one.model.state_dict()) != list(net.state_dict()) and len(one.model) > len(net)


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, targets: None, "got None (is a return missing?)"),
        (lambda output, targets: F.cross_entropy(output, targets).item(), "got a float"),
        (lambda output, targets: (F.cross_entropy(output, targets), output), "got a tuple"),
        (lambda output, targets: F.cross_entropy(output.detach(), targets), "does not depend on the output"),
    ],
    ids=["none", "float", "tuple", "detached"],
)
@pytest.mark.parametrize("method", ["backprop", "pipedream", "greedy_local"])
def test_a_loss_that_is_no_loss_is_refused(method: str, loss: Callable[..., Any], message: str) -> None:
    with trainer(model(), method, loss=loss) as one, pytest.raises(OperationError) as failed:
        one.fit(batches())
    assert isinstance(failed.value.__cause__, UserError) and message in str(failed.value)


def test_parameters_of_a_loss_would_never_be_trained() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(output / self.temperature, targets)

    with pytest.raises(UserError, match="the loss has parameters, which nobody would train"):
        trainer(model(), loss=Tempered())
    with trainer(model(), loss=Tempered().requires_grad_(False)) as one:
        one.fit(batches(1))


LOSSES = {
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)),
    "ignored": nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1),
    "usual": F.cross_entropy,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("ignored", [1, 2])
@pytest.mark.parametrize("method", ["gpipe", "one_f_one_b", "zero_bubble"])
def test_micro_batches_count_what_the_loss_divides_by(method: str, ignored: int, loss: Any) -> None:
    """Their gradients add up to the minibatch's, also where a micro-batch (of two) has no label that counts.

    So do the losses that are told; such a micro-batch is left out when they are averaged over the epoch.
    """
    given = [(x.double(), y.clone()) for x, y in batches()]
    for _, y in given:
        y[:] = torch.arange(8) % 2
    given[0][1][:ignored] = getattr(loss, "ignore_index", -100)
    given.append((given[1][0][3:], given[1][1][3:]))  # a short one
    found, losses = [], []
    for name in ("backprop", method):
        net = nn.Sequential(*(unit for unit in model() if isinstance(unit, nn.Linear | nn.Tanh))).double()
        with trainer(net, name, loss=loss, blocks=[2]) as one:
            losses.append([epoch["loss"] for epoch in one.fit(given, epochs=2)])
        found.append(flat(net))
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)
    assert losses[1] == pytest.approx(losses[0], abs=1e-13 if ignored == 1 else 1e-2)


def test_a_selection_hands_on_what_counts() -> None:
    given = [(x, y, torch.arange(len(x))) for x, y in batches()]
    given[0][1][:4] = -100
    with trainer(model()[:4], {"name": "self_paced", "boss": "gpipe"}, blocks=[2]) as one:
        assert one.fit(given)[0]["loss"] > 0


@pytest.mark.parametrize("label", [255, -1])
def test_any_label_may_stand_for_none(label: int) -> None:
    given = [(x, y.clone()) for x, y in batches()]
    given[0][1][:2] = label
    with trainer(model(), loss=nn.CrossEntropyLoss(ignore_index=label)) as one:
        one.fit(given)
        assert 0 <= one.evaluate(given)["accuracy"] <= 1
    with trainer(model()) as one, pytest.raises(UserError, match="labels must be 0 to 2"):
        one.fit(given)


def test_labels_of_bytes_are_numbers() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    assert mass(loss, torch.tensor([0, 1, 2], dtype=torch.uint8)) == 6
    given = [(x, y.byte()) for x, y in batches()]
    with trainer(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), "gpipe", blocks=[2], loss=loss) as one:
        one.fit(given)
        assert 0 <= one.evaluate(given)["accuracy"] <= 1


def test_one_number_per_sample_has_no_classes() -> None:
    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(output, targets.to(output.dtype))

    found = evaluate([nn.Linear(4, 1), nn.Flatten(0)], [(x, y % 2) for x, y in batches()], loss)
    assert found["accuracy"] != found["accuracy"]


def test_a_sum_over_micro_batches_is_refused() -> None:
    with pytest.raises(UserError, match="gpipe takes means over micro-batches, and the loss is a sum; use a mean"):
        trainer(model(), "gpipe", loss=nn.CrossEntropyLoss(reduction="sum"))
    trainer(model(), "backprop", loss=nn.CrossEntropyLoss(reduction="sum")).close()


# --- optimizers and schedulers --------------------------------------------------------------------------------------


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    net = model()
    everything, shared = (lambda _: sgd(net.parameters())), sgd(net.parameters())
    for wrong in (everything, lambda _: shared, lambda _: sgd(model().parameters())):
        with (
            trainer(net, optimizer=wrong) as one,
            pytest.raises(UserError, match="that are not the block's"),
        ):
            one.fit(batches())
    with trainer(net, optimizer=lambda parameters: sgd(parameters[:1])) as one:  # some may be left out
        one.fit(batches())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, "LBFGS calls the loss again"),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o)},
            "ReduceLROnPlateau waits",
        ),
        ({"scheduler": lambda o: None}, "scheduler must return a torch LRScheduler for the optimizer, got NoneType"),
    ],
    ids=["lbfgs", "plateau", "none"],
)
def test_what_cannot_step_is_refused_before_the_first_pass(given: dict[str, Any], message: str) -> None:
    with trainer(model(), **given) as one, pytest.raises(UserError, match=message):
        one.fit(batches())


def test_other_wrong_arguments() -> None:
    for seed in ("a", 2**70):
        with pytest.raises(UserError, match=rf"seed must be an integer between -2\*\*32 and 2\*\*32, got {seed!r}"):
            trainer(model(), seed=seed)
    with pytest.raises(UserError, match="option 'patience' must be float, got 'x'"):
        trainer(model(), runtime={"name": "threads", "patience": "x"})
    with trainer(model()) as one, pytest.raises(UserError, match="a NoneType is none; pass a list or a DataLoader"):
        one.fit(None)  # type: ignore[arg-type]
    net = model()
    net.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks of the model as a whole are not called"):
        trainer(net)


def test_a_state_is_not_put_into_a_trainer_that_is_cut_elsewhere() -> None:
    with trainer(model(), blocks=[2]) as one:
        one.fit(batches())
        state = one.state_dict()
    with (
        trainer(model(), blocks=[3]) as one,
        pytest.raises(UserError, match=r"cut at \[2\], this trainer at \[3\]"),
    ):
        one.load_state_dict(state)
    with trainer(model(), blocks=2) as one:
        one.load_state_dict(state)
        assert one.cuts == [2]
    wider = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 7), nn.Identity(), nn.Linear(7, 3)
    )
    with trainer(wider, blocks=[2]) as one, pytest.raises(UserError, match=r"block1 \(size mismatch for 1\.weight"):
        one.load_state_dict(state)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_what_a_loss_ignores_is_not_decided_wrongly() -> None:
    x, y = batches(1)[0]
    net = model().eval()
    right = net(x).argmax(1)
    y = right.clone()
    y[:3], y[3] = -100, (right[3] + 1) % 3
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)):
        assert evaluate([net], [(x, y)], loss)["accuracy"] == 4 / 5
    y[:3] = (right[:3] + 1) % 3
    assert evaluate([net], [(x, y)], nn.CrossEntropyLoss(ignore_index=int(y[0])))["accuracy"] == pytest.approx(
        float((right == y)[y != y[0]].float().mean())
    )


def test_the_loss_of_a_test_is_the_mean_over_what_counts() -> None:
    net, (x, y) = model().eval(), batches(1)[0]
    y[:3] = -100
    parts = [(x[:4], y[:4]), (x[4:], y[4:]), (x[:2], y[:2])]  # the last has none
    assert evaluate([net], parts, F.cross_entropy)["loss"] == pytest.approx(F.cross_entropy(net(x), y).item())


def test_classes_last_are_not_counted() -> None:
    """(batch, length, classes): no accuracy rather than a wrong one."""
    net, x, y = nn.Linear(4, 11), torch.randn(2, 7, 4), torch.randint(11, (2, 7))
    found = evaluate([net], [(x, y)], lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()))
    assert found["accuracy"] != found["accuracy"] and found["loss"] > 0


@pytest.mark.parametrize("precision", ["bf16", ["float32", "bf16"]])
def test_the_loss_of_an_evaluation_is_added_up_in_full(precision: Any) -> None:
    """Of outputs in bf16 it would have two digits."""
    net = model()
    with trainer(net, precision=precision) as one:
        one.fit(batches())
        found = one.evaluate(batches())["loss"]
        outputs = []
        for x, _ in batches():
            net.eval()
            for worker in one.workers:
                x = worker.block.infer(x)
            outputs.append(x)
    assert outputs[0].dtype == torch.bfloat16
    expected = sum(float(F.cross_entropy(o.float(), y)) for o, (_, y) in zip(outputs, batches(), strict=True)) / 4
    assert found == pytest.approx(expected, abs=1e-7)


# --- sequences ------------------------------------------------------------------------------------------------------


class Spread(nn.Module):
    """(N, length, features) -> (N, classes, length)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["function", "module"]
)
@pytest.mark.parametrize("soft", [False, True])
def test_sequences_may_change_their_length_from_batch_to_batch(loss: Any, soft: bool) -> None:
    with seeded(0):
        nets = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), Spread()).double() for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        given = []
        for length in (5, 5, 8, 2):
            targets = torch.rand(4, 3, length).double().softmax(1) if soft else torch.randint(3, (4, length))
            given.append((torch.randn(4, length, 4).double(), targets))
    with trainer(nets[0], blocks=[2], loss=loss) as one:
        one.fit(given)
        assert 0 < one.evaluate(given)["loss"] < 3
    optimizer = sgd(nets[1].parameters())
    for x, y in given:
        optimizer.zero_grad()
        loss(nets[1](x), y).backward()
        optimizer.step()
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]), rtol=0, atol=1e-14)
