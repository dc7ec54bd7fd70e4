"""Running statistics estimated again: the same numbers as torch's update_bn, wherever the blocks live."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from decoupled import Trainer
from decoupled.config import CompareConfig, read
from decoupled.errors import OperationError, UserError
from decoupled.experiment import Setting

SUBSTITUTES = {"name": "auxnet", "width": 4}


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 8),
        nn.BatchNorm1d(8, momentum=0.3), nn.Linear(8, 3),
    )  # fmt: skip


def batches(count=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 6, generator=draw), torch.randint(3, (16,), generator=draw)) for _ in range(count)]


def trained(runtime="threads", dropout=0.0, method=SUBSTITUTES):
    trainer = Trainer(
        network(dropout), method, [4, 6], loss=F.cross_entropy, runtime=runtime,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    trainer.fit(batches(), 2)
    return trainer


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def expected(model, data):
    reference = copy.deepcopy(model).train()
    update_bn(data, reference)
    return statistics(reference)


def agree(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("runtime", ["threads", "simulated", {"name": "processes", "processes": 2}], ids=str)
def test_the_statistics_are_those_of_torch_and_training_goes_on_as_before(runtime):
    more = batches(3, seed=1)
    with trained(runtime) as trainer:
        before = statistics(trainer.model)
        wanted = expected(trainer.model, more)
        trainer.update_bn(more)
        found = statistics(trainer.model)
        agree(found, wanted)
        assert not torch.equal(found["1.running_mean"], before["1.running_mean"])
        assert [layer.momentum for layer in trainer.model if isinstance(layer, nn.BatchNorm1d)] == [0.1, 0.3]
        assert all(module.training for module in trainer.model.modules())
        trainer.fit(batches(), 1)
        weights = copy.deepcopy(trainer.model.state_dict())
    with trained(runtime) as trainer:
        trainer.fit(batches(), 1)
        for name, value in trainer.model.state_dict().items():
            if "running" not in name and "tracked" not in name:
                assert torch.equal(value, weights[name])


def test_a_closed_trainer_does_it_in_the_caller():
    with trained() as trainer:
        pass
    wanted = expected(trainer.model, batches(2))
    trainer.update_bn(batches(2))
    agree(statistics(trainer.model), wanted)


def test_dropout_is_off():
    with trained(dropout=0.5) as trainer:
        quiet = copy.deepcopy(trainer.model)
        quiet[3] = nn.Identity()
        wanted = expected(quiet, batches(2))
        trainer.update_bn(batches(2))
        agree(statistics(trainer.model), wanted)


def test_after_a_failure_the_statistics_are_the_former_ones():
    with trained("simulated") as trainer:
        before = statistics(trainer.model)
        with pytest.raises(OperationError, match=r"block0.*update_bn with batch 1"):
            trainer.update_bn([*batches(1), (torch.randn(16, 5), torch.zeros(16, dtype=torch.long))])
        found = statistics(trainer.model)
        assert all(torch.equal(found[name], value) for name, value in before.items())


def test_no_batches_are_refused():
    with trained() as trainer, pytest.raises(UserError, match="update_bn has no batches"):
        trainer.update_bn([])


@pytest.mark.parametrize(
    ("method", "model", "again"),
    [
        ({"name": "auxnet", "width": 4}, "{name: mlp, width: 16, batch_norm: true}", True),
        ({"name": "auxnet", "width": 4}, "{name: mlp, width: 16}", False),
        ("backprop", "{name: mlp, width: 16, batch_norm: true}", False),
    ],
    ids=str,
)
def test_scores_estimate_again_only_where_the_method_substitutes_and_the_model_normalises(method, model, again):
    words = [f"model={model}", "data={name: digits, limit: 128}", "blocks=2", "epochs=1", "batch_size=32"]
    setting = Setting.prepare(read(CompareConfig, words))
    record, _ = setting.run_method(method, 0, lambda count: None)
    assert (record["test_accuracy_as_trained"] is not None) == again


def test_the_record_has_both_accuracies():
    """What is reported is measured after the estimate, and `as trained` before it."""
    words = ["model={name: mlp, width: 16, batch_norm: true}", "data={name: digits, limit: 512}", "blocks=[2]",
             "epochs=3", "batch_size=32", "lr=0.05"]  # fmt: skip
    setting = Setting.prepare(read(CompareConfig, words))
    record, _ = setting.run_method({"name": "auxnet", "width": 16}, 0, lambda count: None)
    assert record["test_accuracy_as_trained"] != record["test_accuracy"]
