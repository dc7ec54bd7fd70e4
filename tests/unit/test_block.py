"""Blocks: frozen weights, replayed randomness, running statistics, and layers that must not be trusted."""

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from decoupled import block as block_module
from decoupled.block import Block
from decoupled.errors import OperationError, UserError
from decoupled.randomness import _draws, seeded
from decoupled.testing import flat
from decoupled.trainer import Trainer

X = torch.linspace(-2, 2, 60).reshape(10, 6)


def block(*layers, seed=0) -> Any:
    torch.manual_seed(3)
    return Block(nn.Sequential(*layers), "block7", seed=seed)


class Functional(nn.Module):
    """Calls a function instead of being a layer of its kind."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_block_is_its_module():
    one = block(nn.Linear(6, 4), nn.Tanh())
    assert torch.equal(one.run(X), one.module(X))
    assert [tuple(p.shape) for p in one.parameters] == [(4, 6), (4,)]
    assert all(mine is theirs for mine, theirs in zip(one.weights, one.module.parameters(), strict=True))
    assert one.version == 0


def test_frozen_weights_are_copies_that_the_module_does_not_touch():
    one = block(nn.Linear(6, 4), nn.Tanh())
    frozen, before = one.freeze(), one.run(X)
    with torch.no_grad():
        for p in one.module.parameters():
            p.add_(1.0)
    assert torch.equal(one.run(X, frozen), before)
    assert not torch.equal(one.run(X), before)
    assert all(w.is_leaf and w.requires_grad for w in frozen)
    grads = torch.autograd.grad(one.run(X, frozen).sum(), frozen)
    assert all(p.grad is None for p in one.module.parameters())
    assert [g.shape for g in grads] == [p.shape for p in one.parameters]


def test_parameters_that_are_not_trained_stay_so_when_frozen():
    one = block(nn.Linear(6, 4), nn.Linear(4, 2))
    one.module[0].weight.requires_grad_(False)
    assert [w.requires_grad for w in one.freeze()] == [False, True, True, True]


def test_a_parameter_used_twice_in_a_block_is_one_weight():
    shared = nn.Linear(6, 6)
    one = block(shared, nn.Tanh(), shared)
    assert len(one.parameters) == 2
    frozen = one.freeze()
    before = one.run(X)
    with torch.no_grad():
        shared.weight.mul_(2.0)
    assert torch.equal(one.run(X, frozen), before)


# --- running statistics -------------------------------------------------------------------------------------------


def test_running_statistics_move_in_the_forward_only():
    one = block(nn.BatchNorm1d(6))
    fresh = [b.clone() for b in one.module.buffers()]
    first = one.run(X)
    moved = [b.clone() for b in one.module.buffers()]
    assert not any(torch.equal(a, b) for a, b in zip(fresh, moved, strict=True))
    again = one.run(X, one.freeze(), again=True)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(moved, one.module.buffers(), strict=True))
    one.run(X, one.freeze())  # other weights, but a new pass: counts
    assert one.module[0].num_batches_tracked == 2


# --- randomness ---------------------------------------------------------------------------------------------------

RANDOM = {
    "Dropout": (nn.Dropout(0.5), X),
    "Dropout1d": (nn.Dropout1d(0.5), X.reshape(5, 6, 2)),
    "Dropout2d": (nn.Dropout2d(0.5), X.reshape(5, 6, 2, 1)),
    "Dropout3d": (nn.Dropout3d(0.5), X.reshape(5, 6, 2, 1, 1)),
    "F.dropout": (Functional(lambda x: F.dropout(x, 0.5)), X),
    "F.dropout, in a deeper module": (nn.Sequential(nn.Identity(), Functional(lambda x: F.dropout(x, p=0.5))), X),
    "torch.nn.functional.dropout2d": (Functional(lambda x: F.dropout2d(x, training=True)), X.reshape(5, 6, 2, 1)),
}
random_layers = pytest.mark.parametrize(("layer", "x"), RANDOM.values(), ids=RANDOM)


@random_layers
def test_a_replay_draws_the_same_numbers_and_loses_none(layer, x):
    one, plain = block(layer), block(layer)
    state = one.random_state()
    first = one.run(x)
    later = one.random_state()
    assert torch.equal(one.run(x, replay=state, again=True), first)
    assert torch.equal(one.random_state(), later)  # the replay has not moved the generator
    assert torch.equal(plain.run(x), first)
    assert torch.equal(plain.run(x), one.run(x))
    assert not torch.equal(one.run(x), one.run(x))


@random_layers
def test_random_numbers_come_from_the_seed_of_the_block(layer, x):
    def drawn(seed, noise):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        one = Block(nn.Sequential(layer), "b", seed=seed)
        outputs = torch.stack([one.run(x) for _ in range(5)])
        assert torch.equal(torch.get_rng_state(), before)  # the generator shared by all threads is not used
        return outputs

    assert torch.equal(drawn(1, 0), drawn(1, 5))
    assert not torch.equal(drawn(1, 0), drawn(2, 0))


@random_layers
def test_dropout_is_distributed_as_in_torch(layer, x):
    """Kept values are scaled by 1/(1-p); channels fall together exactly where torch drops channels."""
    one = block(layer)
    x = torch.ones_like(x)
    outputs = torch.stack([one.run(x) for _ in range(200)])
    assert set(outputs.unique().tolist()) == {0.0, 2.0}
    assert abs(float(outputs.mean()) - 1) < 0.1
    whole_channels = "ropout1d" in str(layer) or x.dim() > 2
    if whole_channels:
        assert torch.equal(outputs.flatten(3).amin(-1), outputs.flatten(3).amax(-1))


@pytest.mark.parametrize("name", [name for name in RANDOM if name.startswith("Dropout")])
def test_dropout_layers_are_off_in_evaluation(name):
    layer, x = RANDOM[name]
    one = block(layer)
    one.module.eval()
    assert torch.equal(one.run(x), x)


def test_threads_do_not_disturb_each_other():
    """The mode that redirects dropout is local to its thread."""
    expected = [Block(nn.Dropout(0.5), "b", seed=s).run(X) for s in range(4)]
    blocks = [Block(nn.Dropout(0.5), "b", seed=s) for s in range(4)]
    found, ready = [X] * 4, threading.Barrier(4)

    def work(s):
        ready.wait(30)
        found[s] = blocks[s].run(X)

    workers = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.AlphaDropout(0.5), X),
        (nn.FeatureAlphaDropout(0.5), X.reshape(5, 6, 2)),
        (nn.RReLU(), X),
        (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True), X.reshape(5, 2, 6)),
        (Functional(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)), X.reshape(5, 2, 6)),
        (Functional(lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.1)), X.reshape(5, 2, 6)),
    ],
    ids=["AlphaDropout", "FeatureAlphaDropout", "RReLU", "attention", "sdpa", "sdpa, positional"],
)
def test_randomness_that_cannot_be_replayed_is_refused(layer, x):
    with pytest.raises(UserError, match=r"block7: .* cannot be replayed"):
        block(layer).run(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.AlphaDropout(0.0),
        nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        Functional(lambda x: F.scaled_dot_product_attention(x, x, x)),
    ],
    ids=["AlphaDropout(0)", "attention", "sdpa"],
)
def test_and_accepted_where_it_draws_nothing(layer):
    assert block(layer).run(X.reshape(5, 2, 6)).shape == (5, 2, 6)


# --- in place -----------------------------------------------------------------------------------------------------

IN_PLACE = {
    "first": [nn.ReLU(inplace=True)],
    "nested": [nn.Sequential(nn.Sequential(nn.ReLU(inplace=True)))],
    "behind a view": [nn.Flatten(), nn.ReLU(inplace=True)],
    "behind an identity": [nn.Identity(), nn.ReLU(inplace=True)],
    "behind a dropout of 0": [nn.Dropout(0.0), nn.Hardtanh(inplace=True)],
}


@pytest.mark.parametrize("layers", IN_PLACE.values(), ids=IN_PLACE)
def test_a_block_never_overwrites_its_input(layers):
    """The input is somebody else's: the user's data, or the output that the block below still needs."""
    x = X.clone()
    block(*layers).run(x)
    assert torch.equal(x, X)


# --- state --------------------------------------------------------------------------------------------------------


def test_state_is_weights_buffers_version_and_generator():
    one, other = (block(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), seed=s) for s in (1, 2))
    one.run(X)
    one.version = 5
    other.load_state_dict(one.state_dict())
    assert other.version == 5
    assert torch.equal(one.run(X), other.run(X))
    assert all(torch.equal(a, b) for a, b in zip(one.module.buffers(), other.module.buffers(), strict=True))


def test_random_numbers_of_another_kind_of_device_begin_anew() -> None:
    """The state of a generator on a GPU has 16 bytes."""
    block = Block(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), "block0", seed=1)
    state = block.state_dict() | {"generator": torch.zeros(16, dtype=torch.uint8), "version": 7}
    before = block.generator.get_state()
    block.load_state_dict(state)
    assert block.version == 7
    assert torch.equal(block.state_dict()["generator"], state["generator"])  # it may go home with it
    with pytest.warns(UserWarning, match=r"block0: .* another kind of device"):
        block.run(torch.randn(4, 2))
    assert not torch.equal(block.generator.get_state(), before)
    assert torch.equal(block.state_dict()["generator"], block.generator.get_state())


class Scheduled(nn.Module):
    """Dropout as a function, beside an unused layer of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.unused, self.linear = 0.0, nn.Dropout(0.0), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.linear(x), self.p, self.training)


@pytest.mark.parametrize("function", [False, True])
def test_dropout_that_sets_in_later_is_drawn_from_the_blocks_generator(function: bool) -> None:
    """Nothing watches a network whose layers drop nothing; as soon as one does, or a function does, somebody must."""
    late: Any = Scheduled() if function else nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))
    block, x = Block(late, "block0", seed=1), torch.randn(4, 8)
    block.run(x)
    block.run(x)
    (late if function else late[1]).p = 0.5
    state = block.random_state()
    first = block.run(x)
    torch.manual_seed(9)
    assert torch.equal(block.run(x, replay=state, again=True), first)
    assert not torch.equal(block.run(x), first)


class Attending(nn.Module):
    """Attention whose dropout, at first 0, is a layer's or a function's."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2) if layer else None
        self.linear, self.dropout, self.p = nn.Linear(8, 8), nn.Dropout(0.0), 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.linear(x))
        if self.attention is not None:
            return self.attention(x, x, x, need_weights=False)[0]
        return F.scaled_dot_product_attention(x, x, x, dropout_p=self.p)


@pytest.mark.parametrize("layer", [False, True])
def test_dropout_of_attention_that_sets_in_later_is_refused(layer: bool) -> None:
    module: Any = Attending(layer)
    block, x = Block(module, "block0"), torch.randn(4, 3, 8)
    block.run(x)
    block.run(x)
    module.p = 0.5
    if layer:
        module.attention.dropout = 0.5
    with pytest.raises(UserError, match=r"block0: .* cannot be replayed"):
        block.run(x)


def test_dropout_of_recurrent_layers_is_refused() -> None:
    class Last(nn.Module):
        def __init__(self, dropout: float) -> None:
            super().__init__()
            self.layers = nn.GRU(4, 4, num_layers=2, dropout=dropout, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)[0]

    Block(Last(0.0), "block0").run(torch.randn(2, 3, 4))
    with pytest.raises(UserError, match="block0: dropout inside a recurrent layer"):
        Block(Last(0.5), "block0").run(torch.randn(2, 3, 4))


def test_a_layer_that_does_something_of_its_own_is_watched() -> None:
    """It calls no function, so it cannot stand for a call of one."""
    module: Any = Scheduled()
    module.unused.forward = lambda x: x
    module.linear = nn.Sequential(nn.Linear(8, 8), module.unused)
    block, x = Block(module, "block0"), torch.randn(4, 8)
    block.run(x)
    module.p = 0.5
    state = block.random_state()
    first = block.run(x)
    torch.manual_seed(9)
    assert torch.equal(block.run(x, replay=state, again=True), first)


def test_layers_that_drop_nothing_cost_no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    enter = block_module.OwnRandomness.__enter__
    monkeypatch.setattr(block_module.OwnRandomness, "__enter__", lambda mode: entered.append(mode) or enter(mode))
    shared = nn.Dropout(0.0)
    block, x = Block(nn.Sequential(nn.Linear(8, 8), shared, nn.ReLU(), shared), "block0"), torch.randn(4, 8)
    for _ in range(3):
        block.run(x)
    assert len(entered) == 1
    assert not shared._forward_pre_hooks
    shared.p = 0.5
    block.run(x)
    assert len(entered) == 2


def test_a_layer_that_blocks_share_counts_for_the_one_that_runs_it() -> None:
    """In their first runs, at the same time."""
    shared, met = nn.Dropout(0.0), threading.Barrier(2, timeout=20)

    class Meeting(nn.Module):
        def __init__(self, draws: bool) -> None:
            super().__init__()
            self.draws, self.layer, self.linear = draws, shared, nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            met.wait()
            y = F.dropout(self.linear(x), 0.0, True) if self.draws else self.layer(self.linear(x))
            met.wait()
            return y

    blocks = [Block(Meeting(draws), "block0") for draws in (True, False)]
    threads = [threading.Thread(target=block.run, args=(torch.randn(4, 8),)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [block._draws_elsewhere for block in blocks] == [True, False]


class Rechecked(nn.Module):
    """Runs `again` again in the backward, as nets do that save memory by themselves."""

    def __init__(self, again: nn.Module, once: nn.Module, on: bool) -> None:
        super().__init__()
        self.again, self.once, self.on = again, once, on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.once(checkpoint(self.again, x, use_reentrant=False) if self.on else self.again(x))


def rechecked(method: str, runtime: str, dropout: str, on: bool) -> torch.Tensor:
    with seeded(0):
        again, once = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Sequential(nn.Linear(8, 4))
        {"inside": again, "outside": once}[dropout].append(nn.Dropout(0.5))
        blocks = [Rechecked(again, once, on), nn.Linear(4, 3)]
        batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    with Trainer(blocks, method, loss=F.cross_entropy, optimizer=sgd, runtime=runtime) as trainer:  # type: ignore[arg-type]
        trainer.fit(batches)
    return torch.cat([flat(blocks[0]), *(buffer.flatten() for buffer in blocks[0].buffers())])


@pytest.mark.parametrize("runtime", ["simulated", "threads"])
@pytest.mark.parametrize("method", ["backprop", "pipedream", "features_replay", "greedy_local", "zero_bubble"])
def test_what_the_module_itself_recomputes_may_not_draw(method: str, runtime: str) -> None:
    """Its masks would be others than in the forward; weights and statistics are those of the pass."""
    with pytest.raises(
        OperationError, match=r"block0: torch\.utils\.checkpoint draws random numbers .*again"
    ) as failed:
        rechecked(method, runtime, dropout="inside", on=True)
    assert isinstance(failed.value.__cause__, UserError)
    plain, again = (rechecked(method, runtime, dropout="outside", on=on) for on in (False, True))
    assert torch.equal(plain, again)
    rechecked(method, runtime, dropout="inside", on=False)


class Attention(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.linear = p, nn.Linear(4, 4)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        q = self.linear(x).view(len(x), 1, 2, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=self.p).reshape(len(x), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._run, x, use_reentrant=False)  # type: ignore[return-value]


def test_attention_that_drops_nothing_may_be_run_again() -> None:
    """Its operators may draw, and do only where they are told to."""
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(3)]
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    for mid in (Attention(0.0), nn.Sequential(Attention(0.0), nn.Dropout(0.5))):
        blocks = [mid, nn.Linear(4, 3)]
        with Trainer(blocks, "pipedream", loss=F.cross_entropy, optimizer=sgd, runtime="simulated") as trainer:
            trainer.fit(batches)
    draws = [torch.ops.aten.native_dropout.default, torch.ops.aten.bernoulli_.float, torch.ops.aten.rand.default]
    x = torch.ones(2)
    given: list[tuple[Any, ...]] = [(x, 0.5, True), (x, 0.5), ([2],)]
    assert all(_draws(func, args, {}) for func, args in zip(draws, given, strict=True))
    assert not _draws(draws[0], (x, 0.0, True), {}) and not _draws(draws[0], (x, 0.5, False), {})
    assert not _draws(torch.ops.aten.add.Tensor, (x, x), {})
