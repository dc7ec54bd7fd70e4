"""Synthetic gradients: the two updates of an edge by hand, and what a guess of zero and a perfect one do (A7)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.errors import UserError
from decoupled.methods.synthetic_gradients.method import Synthesiser, Synthetic, dni, input_model
from decoupled.runtime.simulated import Simulated
from decoupled.runtime.timing import Timing
from decoupled.testing import Case, Tap, compare, flat, label, point, train

CASE = Case(widths=(4, 5, 4, 3), cuts=(1, 2), sizes=(6,) * 9 + (4,))
K, LR = CASE.K, 0.2


def by_hand(conditional, made=()):
    """Block k steps on the guess of today's synthesiser; then the synthesiser on what block k+1 has sent down.

    `made`: first weights and biases of what makes the inputs of blocks 1 and 2, which then learns what comes up.
    """
    blocks, widths = CASE.blocks(), (5, 4)
    guess = [torch.zeros(n, n + 3 * conditional, dtype=torch.float64) for n in widths]
    bias = [torch.zeros(n, dtype=torch.float64) for n in widths]
    made = [(V.clone(), c.clone()) for V, c in made]
    history = [[flat(block)] for block in blocks]
    for x, y, _ in CASE.batches():
        inputs, outputs = [x, *(x @ V.T + c for V, c in made)], []
        for k, block in enumerate(blocks):
            outputs.append(block(inputs[k]).detach())
            inputs += [outputs[-1]] if len(inputs) == k + 1 else []
        seen = [torch.cat((h, F.one_hot(y, 3)), 1) if conditional else h for h in outputs[:-1]]
        signals: Any = [h @ M.T + c for h, M, c in zip(seen, guess, bias, strict=True)]
        for k, block in enumerate(blocks):
            h = inputs[k].clone().requires_grad_()
            out = block(h)
            loss = F.cross_entropy(out, y) if k == K - 1 else (out * signals[k]).sum()
            down, *grads = torch.autograd.grad(loss, [h, *block.parameters()])
            with torch.no_grad():
                for p, g in zip(block.parameters(), grads, strict=True):
                    p.sub_(LR * g)
            history[k].append(flat(block))
            if k:
                error = 2 * (signals[k - 1] - down) / len(x)
                guess[k - 1] = guess[k - 1] - LR * error.T @ seen[k - 1]
                bias[k - 1] = bias[k - 1] - LR * error.sum(0)
            if k and made:
                error = 2 * (inputs[k] - outputs[k - 1]) / len(x)
                made[k - 1] = made[k - 1][0] - LR * error.T @ x, made[k - 1][1] - LR * error.sum(0)
    return history, guess, bias, made


def layer(module: Any):
    """Weight and bias of the only linear layer."""
    (found,) = (part for part in module.modules() if isinstance(part, nn.Linear))
    return found.weight.detach(), found.bias.detach()


@pytest.mark.parametrize("conditional", [False, True])
def test_an_edge_updates_twice_per_batch(conditional):
    found = train(CASE, {"name": "dni", "conditional": conditional, "lr": 0.0})
    history, guess, bias, _ = by_hand(conditional)
    compare(found.weights, history)
    for worker, M, c in zip(found.trainer.workers, guess, bias, strict=False):
        torch.testing.assert_close(layer(worker.lower.module), (M, c))


FULL = {"name": "dni", "inputs": True, "lr": 0.0, "input_lr": 0.0}


def test_with_synthetic_inputs_it_updates_three_times():
    still = train(CASE, FULL, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    start = [layer(worker.upper.module) for worker in still.trainer.workers[1:]]
    found = train(CASE, FULL)
    history, guess, bias, made = by_hand(False, start)
    compare(found.weights, history)
    for k, worker in enumerate(found.trainer.workers[1:]):
        torch.testing.assert_close(layer(worker.upper.module), made[k])
        torch.testing.assert_close(layer(found.trainer.workers[k].lower.module), (guess[k], bias[k]))
        assert not torch.equal(made[k][0], start[k][0])


def test_with_synthetic_inputs_no_block_waits_for_another_within_a_batch():
    """On clocks where a message takes a hundred passes, all blocks begin at once; without, one after the other."""
    for spec, waiting in ((FULL, 0), ("dni", K - 1)):
        tap = Tap()
        train(CASE, spec, runtime=Simulated(Timing(latency=100.0)), observers=[tap])
        starts = {actor: start for actor, what, start, *_ in tap.operations if what == "F0"}
        assert len(starts) == K
        assert sum(start >= 100 for start in starts.values()) == waiting
        steps = {actor: start for actor, what, start, *_ in tap.operations if what == "B0"}
        assert sum(start >= 100 for start in steps.values()) == waiting


def test_with_perfect_inputs_it_is_the_method_with_true_ones():
    """Input models that are told what the blocks below make of the batch."""
    x, y, _ = CASE.batches()[0]
    hidden = [x]
    for block in CASE.blocks():
        hidden.append(block(hidden[-1]).detach())

    class Told(nn.Module):
        def __init__(self, truth):
            super().__init__()
            self.truth, self.unused = truth, nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            return self.truth + 0 * self.unused

    class Oracle(Synthetic):
        def upper(self, place):
            half = super().upper(place)
            half.module = Told(hidden[place.k])
            return half

    method = replace(dni(), coupling=Oracle(False, 0, 0.1, 0.1, True))
    first = [(x, y)]
    compare(train(CASE, method, batches=first).weights, train(CASE, "dni", batches=first).weights, 1e-15)


@pytest.mark.parametrize("spec", [{"name": "dni"}, {"name": "dni", "inputs": True}], ids=label)
@pytest.mark.parametrize("bad", range(K - 1))
def test_a_pass_that_is_not_finite_teaches_nobody(spec, bad):
    """One output is infinite, once: weights and guesses stay finite, and at most its own pass is dropped anywhere."""

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += self.training
            return x * (torch.inf if self.training and self.calls == 3 else 1.0)

    blocks = CASE.blocks()
    blocks[bad] = nn.Sequential(*blocks[bad], Once())
    run = train(CASE, spec, blocks=blocks, on_nonfinite="skip")
    for worker in run.trainer.workers:
        for module in (worker.block.module, worker.lower.module, worker.upper.module):
            assert all(p.isfinite().all() for p in (module.parameters() if module is not None else ()))
    assert [block.updates for block in run.trainer.statistics()] == [
        len(CASE.sizes) - (k == bad or (k > bad and "inputs" not in spec)) for k in range(K)
    ]


def test_input_models_have_an_optimizer_and_a_width_of_their_own():
    for lr, kinds in ((1e-4, ["SGD", "Adam", "Adam"]), (0.0, ["SGD", "Adam", "SGD"])):
        spec = {"name": "dni", "inputs": True, "input_lr": lr, "hidden": 7}
        _, middle, _ = train(CASE, spec).trainer.workers
        assert [type(made).__name__ for made in middle.steps.optimizers] == kinds
        assert middle.steps.optimizers[2].param_groups[0]["lr"] == (lr or LR)
        module: Any = middle.upper.module
        assert [p.shape[0] for p in module.parameters()] == [7, 7, 5, 5]
    assert point(FULL).facts.locks == ("forward", *point("dni").facts.locks)


def test_images_are_averaged_to_the_size_that_is_due():
    pool = next(input_model((1, 4, 6), (2, 2, 3), 0).children())
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    torch.testing.assert_close(pool(x), F.avg_pool2d(x, 2))


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize(
    ("shape", "due"), [((5,), (3,)), ((1, 7, 7), (3, 4, 2)), ((2, 6, 6), (9,))], ids=["features", "images", "flat"]
)
def test_inputs_are_made_in_the_shape_that_is_due(shape, due, hidden):
    made = input_model(shape, due, hidden)
    assert made(torch.randn(4, *shape)).shape == (4, *due)
    assert sum(isinstance(part, nn.ReLU) for part in made.modules()) == bool(hidden)


def test_while_the_guess_is_zero_only_the_last_block_trains():
    """A7: the last layer of every synthesiser begins at zero, so the first update moves the top alone."""
    weights = train(CASE, {"name": "dni", "hidden": 7}).weights
    assert [torch.equal(versions[0], versions[1]) for versions in weights] == [True, True, False]
    assert not torch.equal(weights[1][1], weights[1][2])


def test_with_a_perfect_guess_it_is_backpropagation():
    """A7: synthesisers that are told the true gradient, batch by batch."""
    whole = CASE.blocks()
    x, y, _ = CASE.batches()[0]
    hidden = [x]
    for block in whole:
        hidden.append(block(hidden[-1]))
    truth = torch.autograd.grad(F.cross_entropy(hidden[-1], y), hidden[1:-1])

    class Told(nn.Module):
        def __init__(self, gradient):
            super().__init__()
            self.gradient, self.unused = gradient, nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, y, targets):
            return self.gradient + 0 * self.unused

    class Oracle(Synthetic):
        def lower(self, place):
            half = super().lower(place)
            if not place.top:
                half.module = Told(truth[place.k])
            return half

    method = replace(dni(), coupling=Oracle(False, 0, 0.0, 0.0, False))
    first = [CASE.batches()[0]]
    compare(train(CASE, method, batches=first).weights, train(CASE, "backprop", batches=first).weights, 1e-15)


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("conditional", [False, True])
def test_images_have_guesses_of_their_shape(conditional, hidden):
    blocks = [
        nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh()).double(),
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 3 * 3, 4)).double(),
    ]
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(5, 1, 7, 7, generator=draw, dtype=torch.float64), torch.randint(4, (5,), generator=draw))
        for _ in range(4)
    ]
    spec = {"name": "dni", "conditional": conditional, "hidden": hidden}
    run = train(CASE, spec, blocks=blocks, batches=batches)
    assert not torch.equal(run.weights[0][1], run.weights[0][-1])
    made = Synthesiser(3, True, 4 * conditional, hidden).double()
    y = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    assert torch.equal(made(y, batches[0][1]), torch.zeros_like(y))


def test_synthesisers_have_an_optimizer_of_their_own_unless_told_otherwise():
    for lr, kinds in ((1e-4, ["SGD", "Adam"]), (0.0, ["SGD", "SGD"])):
        first, _, top = train(CASE, {"name": "dni", "lr": lr}).trainer.workers
        assert [type(made).__name__ for made in first.steps.optimizers] == kinds
        assert first.steps.optimizers[1].param_groups[0]["lr"] == (lr or LR)
        assert [type(made).__name__ for made in top.steps.optimizers] == ["SGD"]


def test_a_synthesiser_ticks_with_its_own_updates():
    run = train(CASE, "dni", scheduler=lambda made: torch.optim.lr_scheduler.StepLR(made, 4, gamma=0.5))
    for worker in run.trainer.workers:
        assert [s.last_epoch for s in worker.steps.schedulers] == [len(CASE.sizes)] * (1 + (worker.k < K - 1))


def test_what_is_refused():
    for option in ("hidden", "lr", "input_lr"):
        with pytest.raises(UserError, match=r"hidden, lr and input_lr must be at least 0, got .*-1"):
            dni(**{option: -1})
    blocks = [nn.Unflatten(1, (2, 2)).double(), nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()]
    with pytest.raises(UserError, match=r"block0 puts out \(2, 2\); synthetic gradients are for features or images"):
        train(CASE, "dni", blocks=blocks)
    flat_first = [
        nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2))).double(),
        nn.Flatten(),
        nn.Linear(8, 3).double(),
    ]
    with pytest.raises(UserError, match=r"block1 takes \(2, 2, 2\), the network \(4,\); synthetic inputs are"):
        train(CASE, FULL, blocks=flat_first)
