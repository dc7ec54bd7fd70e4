"""SAC, TD3 and OFENet: one update against plain references, and who may change what."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoupled import registry
from decoupled.errors import UserError
from decoupled.methods.larger_rl.base import ActorCritic, Shape
from decoupled.methods.larger_rl.networks import CONNECTIONS, Network
from decoupled.methods.larger_rl.ofenet import NORMS, OFENet
from decoupled.methods.larger_rl.sac import SAC
from decoupled.methods.larger_rl.td3 import CLIP, SMOOTH, TD3
from decoupled.rl import Batch, Roles, Spaces
from decoupled.rl.agent import packed, unpack

SPACES = Spaces(5, 2, 4)
OFE = {"ofe_units": 12, "ofe_layers": 3}
TAU, LR = 0.005, 1e-3


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, LR)


def batch(size: int = 6, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    obs, after = (torch.randn(size, 5, generator=draw) for _ in range(2))
    action, reward = torch.rand(size, 2, generator=draw) * 2 - 1, torch.randn(size, 1, generator=draw)
    discount = torch.tensor([0.99, 0.0] * (size // 2))[:, None]
    return Batch(obs, action, reward, discount, after, after)


def agent(kind: type[ActorCritic], norm: str = "batch", **more: Any) -> Any:
    shape = Shape("densenet", 8, 2, "swish", norm, **OFE)
    return kind(SPACES, sgd, 0, shape, **more)  # type: ignore[call-arg]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def critic(network: Network, i: int, x: Tensor) -> Tensor:
    """One of the copies, layer by layer in the plainest words (MLP)."""
    for layer in network.layers:
        x = torch.relu(x @ layer.weight[i] + layer.bias[i, 0])  # type: ignore[index]
    return x @ network.head.weight[i] + network.head.bias[i, 0]


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_connections_are_what_they_are_called(connection: str) -> None:
    net, x = Network(3, 2, 2, 4, 3, connection, "swish", torch.Generator().manual_seed(0)), torch.randn(5, 3)
    for i in range(2):
        y = x
        for number, layer in enumerate(net.layers):
            read = torch.cat([y, x], -1) if connection == "d2rl" and number else y
            h = F.silu(read @ layer.weight[i] + layer.bias[i, 0])  # type: ignore[index]
            if connection == "densenet":
                h = torch.cat([h, y], -1)
            y = y + h if connection == "resnet" and number else h
        torch.testing.assert_close(net.hidden(x)[i], y)
        torch.testing.assert_close(net(x)[i], y @ net.head.weight[i] + net.head.bias[i, 0])


def test_densenet_reads_the_input_at_its_head() -> None:
    net = Network(3, 1, 1, 4, 2, "densenet", "swish", torch.Generator())
    assert [layer.weight.shape[1] for layer in net.layers] == [3, 7]  # type: ignore[union-attr]
    assert net.head.weight.shape[1] == 11


@pytest.mark.parametrize("norm", NORMS)
def test_ofenet_has_the_papers_dimensions(norm: str) -> None:
    """Hopper: z_s 251, z_sa 494 with 240 units in 6 layers."""
    net = OFENet(11, 3, 11, 240, 6, norm, torch.Generator())
    z = net.state(torch.randn(4, 11))
    assert (z.shape[1], net.pair(z, torch.randn(4, 3)).shape[1]) == (251, 494) == (net.state_width, net.pair_width)
    assert net.head.out_features == 11
    assert [block.linear.out_features for block in net.state_blocks] == [40] * 6  # type: ignore[union-attr]


def test_batchnorm_is_that_of_keras() -> None:
    norm = OFENet(5, 2, 5, 8, 2, "batch", torch.Generator()).state_blocks[0].norm
    assert isinstance(norm, nn.BatchNorm1d) and (norm.momentum, norm.eps) == (0.01, 1e-3)


def test_the_auxiliary_loss_predicts_the_leading_part_of_the_next_observation() -> None:
    net = OFENet(5, 2, 4, 8, 2, "none", torch.Generator().manual_seed(0))
    one = batch()
    predicted = net.head(net.pair(net.state(one.obs), one.action))
    wanted = ((predicted - one.after[:, :4]) ** 2).mean()
    torch.testing.assert_close(net.loss(one.obs, one.action, one.after), wanted)


# --- who changes what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [SAC, TD3])
def test_losses_of_actor_and_critic_never_change_the_features(kind: type[ActorCritic], norm: str) -> None:
    one = agent(kind, norm)
    one.auxiliary(batch(seed=3))
    features = state(one.features_net)
    rest = state(one.networks)
    for step in range(4):
        one.learn(batch(seed=step), torch.ones(6))
        one.act(batch().obs, torch.Generator())
        one.errors(batch(), torch.Generator())
        one.features(batch())
    assert not changed(features, one.features_net)  # weights and running statistics, bit for bit
    assert any(name.startswith("shared.actor") for name in changed(rest, one.networks))
    assert not misplaced(one)


def misplaced(one: ActorCritic) -> list[str]:
    """Optimizers of the policy that list weights of the features, or the reverse."""
    features = {id(p) for p in one.features_net.parameters()}
    return [
        name
        for name, optimizer in one.optimizers.items()
        for group in optimizer.param_groups
        for p in group["params"]
        if (id(p) in features) != (name == "features")
    ]


@pytest.mark.parametrize("kind", [SAC, TD3])
def test_statistics_of_batchnorm_move_in_the_auxiliary_step_only(kind: type[ActorCritic]) -> None:
    one = agent(kind)
    assert not one.features_net.training
    before, rest = state(one.features_net), state(one.networks)
    loss = one.auxiliary(batch())
    moved = changed(before, one.features_net)
    assert loss > 0 and not one.features_net.training
    assert {name for name in before if "running" in name} <= moved
    assert {name for name in before if name.endswith("linear.weight")} <= moved
    assert all(name.startswith("shared.features") for name in changed(rest, one.networks))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [SAC, TD3])
def test_the_critics_gradient_reaches_the_actor_through_the_frozen_features(kind: type[ActorCritic], norm: str) -> None:
    """With the direct way of the action into the critic cut, what is left is dz_sa/da: it must not be zero."""
    one = agent(kind, norm)
    z = one.features_net.state(batch().obs).detach()
    action = batch().action.clone().requires_grad_()
    zsa = one.features_net.pair(z, action)
    (through,) = torch.autograd.grad(zsa[:, : OFE["ofe_units"]].sum(), action)  # new features only, not the copy of a
    assert through.abs().min() > 0
    before = state(one.actor)
    for step in range(2):
        one.learn(batch(seed=step), None)
    assert {name for name in before if "weight" in name} <= changed(before, one.actor)


def test_actors_take_over_weights_and_statistics() -> None:
    one, other = agent(SAC), SAC(SPACES, sgd, 9, Shape("densenet", 8, 2, "swish", "batch", **OFE))
    one.auxiliary(batch())
    vector = packed(one.shared)
    unpack(other.shared, vector)
    torch.testing.assert_close(other.act(batch().obs, None), one.act(batch().obs, None), rtol=0, atol=0)
    torch.testing.assert_close(other.errors(batch(), torch.Generator().manual_seed(1)),
                               one.errors(batch(), torch.Generator().manual_seed(1)), rtol=0, atol=0)  # fmt: skip
    before = vector.clone()
    one.auxiliary(batch())
    assert torch.equal(vector, before)  # a copy: what is learned later does not change what was sent


# --- one update, written out --------------------------------------------------------------------------------------


def plain(kind: type[ActorCritic], **more: Any) -> Any:
    return kind(SPACES, sgd, 0, Shape("mlp", 7, 2), **more)  # type: ignore[call-arg]


def gaussian(one: Any, obs: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    x = obs
    for layer in one.actor.layers:
        x = torch.relu(x @ layer.weight[0] + layer.bias[0, 0])
    mean, log_std = (x @ one.actor.head.weight[0] + one.actor.head.bias[0, 0]).chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    u = mean + log_std.clamp(-20, 2).exp() * torch.empty_like(mean).normal_(generator=random)
    a = torch.tanh(u)
    return a, (normal.log_prob(u) - torch.log(1 - a**2 + 1e-6)).sum(1, keepdim=True)


def stepped(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return {n: (p - LR * g).detach() for n, p, g in zip(names, parameters, gradients, strict=True)}


def same(module: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, value in module.named_parameters():
        torch.testing.assert_close(value.detach(), wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_sac_by_hand(temperature: float, weighted: bool) -> None:
    one, b = plain(SAC, temperature=temperature, scale=5.0), batch()
    w = torch.linspace(0.2, 1, 6)[:, None] if weighted else torch.ones(6, 1)
    alpha, random = temperature or 1.0, torch.Generator().manual_seed(0)
    one.random.manual_seed(0)
    a2, log2 = gaussian(one, b.next_obs, random)
    x2 = torch.cat([b.next_obs, a2], 1)
    y = 5 * b.reward + b.discount * (torch.min(critic(one.targets, 0, x2), critic(one.targets, 1, x2)) - alpha * log2)
    x = torch.cat([b.obs, b.action], 1)
    q1, q2 = critic(one.critics, 0, x), critic(one.critics, 1, x)
    td = (q1 - y.detach()).detach()[:, 0]
    loss = (w * (q1 - y.detach()) ** 2).mean() + (w * (q2 - y.detach()) ** 2).mean()
    critics = stepped(one.critics, loss)
    old = {n: p.clone() for n, p in one.targets.named_parameters()}
    later = plain(SAC)
    later.critics.load_state_dict(critics)
    a, log = gaussian(one, b.obs, random)
    x = torch.cat([b.obs, a], 1)
    actor_loss = (w * (alpha * log - torch.min(critic(later.critics, 0, x), critic(later.critics, 1, x)))).mean()
    actor = stepped(one.actor, actor_loss)
    errors = one.learn(b, w[:, 0] if weighted else None)
    torch.testing.assert_close(errors, td, rtol=1e-4, atol=1e-5)
    same(one.critics, critics)
    same(one.actor, actor)
    same(one.targets, {n: old[n] + TAU * (critics[n] - old[n]) for n in old})
    drift = 0.0 if temperature else LR * (log.detach() - 2).mean().item()
    assert one.log_alpha.item() == pytest.approx(math.log(alpha) + drift, abs=1e-6)


def test_sac_with_values_by_hand() -> None:
    one, b = plain(SAC, form="v", temperature=0.5), batch()
    random = torch.Generator().manual_seed(0)
    one.random.manual_seed(0)
    y = b.reward + b.discount * critic(one.targets, 0, b.next_obs)
    x = torch.cat([b.obs, b.action], 1)
    loss = sum(((critic(one.critics, i, x) - y.detach()) ** 2).mean() for i in range(2))
    assert isinstance(loss, Tensor)
    critics = stepped(one.critics, loss)
    later = plain(SAC)
    later.critics.load_state_dict(critics)
    a, log = gaussian(one, b.obs, random)
    x = torch.cat([b.obs, a], 1)
    q1, q2 = critic(later.critics, 0, x), critic(later.critics, 1, x)
    actor = stepped(one.actor, (0.5 * log - q1).mean())
    soft = (torch.min(q1, q2) - 0.5 * log).detach()
    value = stepped(one.value, ((critic(one.value, 0, b.obs) - soft) ** 2).mean())
    one.learn(b, None)
    same(one.critics, critics)
    same(one.actor, actor)
    same(one.value, value)


def test_td3_by_hand() -> None:
    one, b, w = plain(TD3), batch(), torch.linspace(0.2, 1, 6)[:, None]

    def mu(network: Network, obs: Tensor) -> Tensor:
        return torch.tanh(critic(network, 0, obs))

    for update in (1, 2):
        random = torch.Generator().manual_seed(update)
        one.random.manual_seed(update)
        noise = (SMOOTH * torch.empty(6, 2).normal_(generator=random)).clamp(-CLIP, CLIP)
        x2 = torch.cat([b.next_obs, (mu(one.target_actor, b.next_obs) + noise).clamp(-1, 1)], 1)
        y = (b.reward + b.discount * torch.min(critic(one.targets, 0, x2), critic(one.targets, 1, x2))).detach()
        x = torch.cat([b.obs, b.action], 1)
        loss = (w * (critic(one.critics, 0, x) - y) ** 2).mean() + (w * (critic(one.critics, 1, x) - y) ** 2).mean()
        critics = stepped(one.critics, loss)
        later = plain(TD3)
        later.critics.load_state_dict(critics)
        q = critic(later.critics, 0, torch.cat([b.obs, mu(one.actor, b.obs)], 1))
        actor, before = stepped(one.actor, -(w * q).mean()), state(one.actor)
        targets = {n: p.clone() for n, p in one.target_actor.named_parameters()}
        one.learn(b, w[:, 0])
        same(one.critics, critics)
        if update == 1:
            assert not changed(before, one.actor)
        else:
            same(one.actor, actor)
            same(one.target_actor, {n: targets[n] + TAU * (actor[n] - targets[n]) for n in targets})


def stack(blocks: nn.Module, x: Tensor) -> Tensor:
    """A stack of OFENet with the running statistics of its norms."""
    for block in blocks.children():
        linear, norm = block.linear, block.norm
        h = (x @ linear.weight.T + linear.bias - norm.running_mean) / (norm.running_var + 1e-3).sqrt()  # type: ignore
        x = torch.cat([F.silu(h * norm.weight + norm.bias), x], 1)  # type: ignore[operator]
    return x


@pytest.mark.parametrize("kind", [SAC, TD3])
def test_the_actors_step_through_ofenet_by_hand(kind: type[ActorCritic]) -> None:
    one: Any = kind(SPACES, sgd, 0, Shape("mlp", 7, 2, ofenet="batch", **OFE))  # type: ignore[call-arg]
    b, w = batch(), torch.linspace(0.2, 1, 6)[:, None]
    for seed in range(3):
        one.auxiliary(batch(seed=seed))
    one.learn(b, None)  # TD3 moves its actor every second time
    before, random, alpha = (
        copy.deepcopy(one),
        torch.Generator().manual_seed(0),
        one.log_alpha.exp() if kind is SAC else 0,
    )
    one.random.manual_seed(0)
    one.learn(b, w[:, 0])
    z = stack(before.features_net.state_blocks, b.obs).detach()
    if kind is SAC:
        torch.empty(6, 2).normal_(generator=random)  # went into the next action
        a, log = gaussian(before, z, random)
    else:
        a, log = torch.tanh(critic(before.actor, 0, z)), 0
    zsa = stack(before.features_net.pair_blocks, torch.cat([z, a], 1))
    q = [critic(one.critics, i, zsa) for i in range(2)]  # the actor's step comes after theirs
    loss = alpha * log - (torch.min(*q) if kind is SAC else q[0])
    same(one.actor, stepped(before.actor, (w * loss).mean()))


@pytest.mark.parametrize("kind", [SAC, TD3])
def test_errors_are_per_sample(kind: type[ActorCritic]) -> None:
    one, b = plain(kind), batch()
    whole = one.learn(b, None)
    assert whole.shape == (6,)
    assert len(set(whole.tolist())) == 6
    assert one.errors(b, torch.Generator()).shape == (6,)


def test_the_best_action_has_no_noise() -> None:
    for one in (plain(SAC), plain(TD3)):
        obs = batch().obs
        assert torch.equal(one.act(obs, None), one.act(obs, None))
        assert not torch.equal(one.act(obs, torch.Generator().manual_seed(1)), one.act(obs, None))
        assert one.act(obs, torch.Generator()).abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ofenet": "btach"}, "unknown norm of ofenet: 'btach'. Did you mean 'batch'"),
        ({"ofe_units": 10}, "10 units cannot be spread over 8 layers"),
        ({"connection": "dense"}, "unknown connection 'dense'"),
        ({"algorithm": "ppo"}, "unknown algorithm 'ppo'"),
        ({"form": "w"}, "unknown form of SAC"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.inf}, "temperature must be positive"),
        ({"reward_scale": math.inf}, "reward_scale must be a positive number, got inf"),
        ({"reward_scale": -1.0, "algorithm": "td3"}, "reward_scale must be a positive number"),
        ({"gamma": 0.0}, "gamma must lie in (0, 1]"),
        ({"gamma": 1.5}, "gamma must lie in (0, 1]"),
        ({"ratio": 0.0}, "ratio must be a positive number"),
        ({"beta": 2.0}, "beta in [0, 1]"),
        ({"units": 0}, "units must be an integer of at least 1"),
        ({"capacity": 100}, "a replay of 100 transitions is smaller than a batch of 256"),
        ({"warmup": 200}, "may hold fewer transitions than a batch of 256"),
    ],
)
def test_impossible_options_are_one_clear_line(options: dict[str, Any], text: str) -> None:
    def build() -> None:
        roles = registry.make({"name": "larger_rl", **options}, Roles)
        roles.check(256)
        roles.agent(SPACES, sgd, 0)

    with pytest.raises(UserError) as caught:
        build()
    assert text in str(caught.value) and "\n" not in str(caught.value)
