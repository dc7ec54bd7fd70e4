"""Cutting: the dynamic programme against brute force, measuring without side effects, shared tensors, errors."""

import itertools
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from decoupled import Trainer, costs, partition, registry, unit_costs
from decoupled.config import FlopsConfig, TrainConfig
from decoupled.errors import UserError
from decoupled.experiment import Setting
from decoupled.models import build
from decoupled.partition import cuts, split
from decoupled.unit_costs import unit_parameters, unit_passes


def block_costs(costs, at):
    return [sum(costs[a:b]) for a, b in itertools.pairwise([0, *at, len(costs)])]


def linears(count, size=3):
    return [nn.Linear(size, size) for _ in range(count)]


# --- the dynamic programme ----------------------------------------------------------------------------------------

costs_and_blocks = st.lists(st.integers(0, 20), min_size=1, max_size=9).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
)


@given(costs_and_blocks)
def test_cuts_equal_brute_force(case):
    costs, blocks = case
    at = cuts(costs, blocks)
    assert len(at) == blocks - 1
    assert all(a < b for a, b in itertools.pairwise([0, *at, len(costs)]))
    every = [block_costs(costs, c) for c in itertools.combinations(range(1, len(costs)), blocks - 1)]
    mine = block_costs(costs, at)
    assert max(mine) == min(map(max, every))
    squares = [sum(c * c for c in e) for e in every if max(e) == max(mine)]
    assert sum(c * c for c in mine) == min(squares)


@given(costs_and_blocks, st.data())
def test_cuts_equal_brute_force_where_some_blocks_pay_more(case, data):
    costs, blocks = case
    again = data.draw(st.lists(st.integers(0, 9), min_size=len(costs), max_size=len(costs)))
    dearer = data.draw(st.sets(st.integers(0, blocks - 1)))

    def slowest(at):
        edges = [0, *at, len(costs)]
        return max(
            sum(costs[a:b]) + (k in dearer) * sum(again[a:b]) for k, (a, b) in enumerate(itertools.pairwise(edges))
        )

    least = min(map(slowest, itertools.combinations(range(1, len(costs)), blocks - 1)))
    if any(costs):  # else every unit counts as 1
        assert slowest(cuts(costs, blocks, again, lambda k: k in dearer)) == least


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=8), st.integers(1, 2))
def test_cuts_of_measured_seconds(costs, blocks):
    every = [max(block_costs(costs, c)) for c in itertools.combinations(range(1, len(costs)), blocks - 1)]
    assert max(block_costs(costs, cuts(costs, blocks))) == pytest.approx(min(every), rel=1e-6)


@given(costs_and_blocks, st.sampled_from([1e-9, 3.7, 1e200]))
def test_cuts_do_not_depend_on_the_unit_of_cost(case, scale):
    costs, blocks = case
    mine = block_costs(costs, cuts([c * scale for c in costs], blocks))
    assert max(mine) == max(block_costs(costs, cuts(costs, blocks)))


def test_cuts_are_even_below_the_bottleneck_too():
    assert cuts([9, 1, 1, 1, 1], 3) == [1, 3]


def test_the_bottleneck_comes_before_evenness():
    """11 | 5 | 4 has the smaller sum of squares, 1 | 10 | 9 the cheaper slowest block."""
    assert cuts([1, 10, 5, 4], 3) == [1, 2]


def test_an_activation_without_cost_stays_with_its_layer():
    assert cuts([5, 0, 5, 0, 5, 0], 3) == [2, 4]


def test_units_without_any_cost_are_counted():
    assert cuts([0, 0, 0, 0], 2) == [2]


def test_many_units_are_cut_quickly():
    assert block_costs([1] * 400, cuts([1] * 400, 40)) == [10] * 40


@pytest.mark.parametrize("costs", [[1, -1], [1, float("nan")], [float("inf"), 1]])
def test_costs_must_be_finite_and_not_negative(costs):
    with pytest.raises(UserError, match="finite and not negative"):
        cuts(costs, 2)
    with pytest.raises(UserError, match="must be finite and not negative"):
        cuts([1, 1], 2, costs, lambda k: True)


# --- cutting ------------------------------------------------------------------------------------------------------


def test_blocks_are_the_model_and_share_its_parameters():
    model = nn.Sequential(*build("mlp", (6,), 3, seed=1))
    blocks = split(model, 3)
    x = torch.randn(4, 6)
    assert torch.equal(nn.Sequential(*blocks)(x), model(x))
    assert [id(p) for b in blocks for p in b.parameters()] == [id(p) for p in model.parameters()]


@given(st.sets(st.integers(1, 6), max_size=6))
def test_explicit_cuts_are_followed(chosen):
    at = sorted(chosen)
    model = linears(7)
    blocks = split(model, at)
    assert [len(b) for b in blocks] == block_costs([1] * 7, at)
    assert [unit for block in blocks for unit in block] == model


def test_parameters_balance_when_there_is_no_sample():
    model = [nn.Linear(10, 100), nn.Linear(100, 10), nn.Linear(10, 10), nn.Linear(10, 10)]
    assert [len(b) for b in split(model, 2)] == [1, 3]
    assert unit_parameters(model) == [1100, 1010, 110, 110]


def test_time_balances_when_there_is_a_sample(monkeypatch):
    """The clock is read before each unit, between its forward and its backward, and after it."""
    seconds = [5.0, 1.0, 1.0, 1.0]
    ticks = itertools.chain(
        [0.0], itertools.accumulate(t for s in itertools.cycle(seconds) for t in (s / 4, 3 * s / 4, 0.0))
    )
    monkeypatch.setattr(unit_costs, "perf_counter", lambda: next(ticks))
    sample = (torch.randn(2, 3), torch.zeros(2))
    assert [len(b) for b in split(linears(4), 2, sample)] == [1, 3]
    assert [len(b) for b in split(linears(4), 2, sample, by="parameters")] == [2, 2]


def test_units_are_measured_one_at_a_time_where_they_will_be(monkeypatch):
    """Each comes, is timed and goes home again, so that a model fits that does not as a whole."""
    moves, units = [], linears(2)
    monkeypatch.setattr(nn.Linear, "to", lambda unit, where: moves.append((units.index(unit), str(where))))
    unit_costs._one_pass(units, torch.randn(2, 3), torch.device("meta"))
    assert moves == [(0, "cpu"), (0, "meta"), (1, "cpu"), (1, "meta")]


def test_the_trainer_measures_on_its_first_device(monkeypatch):
    seen = []

    def seconds(parts, sample, device):
        seen.append(device)
        return [(0.5, 1.0)] * len(parts)

    monkeypatch.setattr(partition, "unit_passes", seconds)
    given = {"loss": nn.functional.cross_entropy, "optimizer": torch.optim.SGD, "devices": ["cpu"]}
    with Trainer(nn.Sequential(*linears(4)), "backprop", blocks=2, **given) as trainer:
        trainer.fit([(torch.randn(4, 3), torch.randint(3, (4,)))])
    assert seen == [torch.device("cpu")]


@pytest.mark.parametrize(("recompute", "at"), [(False, [4]), (True, [3])])
def test_a_block_that_replays_gets_fewer_units(recompute, at, monkeypatch):
    """Seven units of 1 forward and 2 backward: 12 | 9, but with replays below the top 12 | 12 and not 16 | 9."""
    monkeypatch.setattr(partition, "unit_passes", lambda parts, sample, device: [(1.0, 3.0)] * len(parts))
    given = {"loss": nn.functional.cross_entropy, "optimizer": torch.optim.SGD, "devices": ["cpu"]}
    method = {"name": "pipedream", "recompute": recompute}
    with Trainer(nn.Sequential(*linears(7)), method, blocks=2, **given) as trainer:
        trainer.fit([(torch.randn(4, 3), torch.randint(3, (4,)))])
        assert trainer.cuts == at


@pytest.mark.parametrize(("method", "at"), [("pipedream", 4), ("features_replay", 3)])
def test_commands_cut_for_the_method_they_are_given(method, at, monkeypatch):
    monkeypatch.setattr(partition, "unit_passes", lambda parts, sample, device: [(1.0, 3.0)] * len(parts))
    model = {"name": "mlp", "width": 8, "depth": 7}
    assert Setting.prepare(TrainConfig(method=method, model=model), registry.make(method)).cuts == [at]
    found, due = (costs.count(FlopsConfig(method, model, inputs=[4], blocks=blocks)) for blocks in (2, [at]))
    assert found == due


@pytest.mark.parametrize("when", ["to", "forward"])
def test_a_unit_too_large_for_the_device_is_said_to_be(monkeypatch, when):
    def fails(unit, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nn.Linear, when, fails)
    with pytest.raises(UserError, match=r"unit 0 \(Linear\) and a batch of 2 do not fit on cpu"):
        unit_passes(linears(1), torch.randn(2, 3))


def test_median_ignores_warm_up_and_one_interruption(monkeypatch):
    both = iter([[70.0, 70.0], [70.0, 70.0], [1.0, 2.0], [90.0, 2.0], [1.0, 80.0]])
    monkeypatch.setattr(unit_costs, "_one_pass", lambda units, x, home: [(s / 4, s) for s in next(both)])
    assert unit_passes(linears(2), torch.randn(2, 3), repeats=3, warmup=2) == [(0.25, 1.0), (0.5, 2.0)]


def test_a_wide_layer_measures_longer_than_a_narrow_one():
    units = [nn.Linear(4, 512), nn.Linear(512, 512), nn.Linear(512, 4)]
    seconds = [both for _, both in unit_passes(units, torch.randn(64, 4))]
    assert seconds[1] == max(seconds)
    assert min(seconds) > 0


def test_measuring_has_no_side_effects():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5))
    model.eval()
    model[1].weight.grad = torch.ones(6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample, state = torch.randn(8, 2, 3), torch.get_rng_state()
    copy_of_sample = sample.clone()
    with torch.no_grad():
        split(model, 2, sample)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample, copy_of_sample)
    assert sample.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[1].weight.grad, torch.ones(6, 6))
    assert model[2].weight.grad is None


def test_measuring_a_unit_that_works_in_place_leaves_the_sample_alone():
    sample = torch.full((2, 3), -1.0)
    unit_passes([nn.ReLU(inplace=True), nn.ReLU(inplace=True)], sample, repeats=1)
    assert sample.eq(-1).all()


@pytest.mark.parametrize("modes", [(True, True), (False, True), (False, False)])
def test_measuring_runs_forward_and_backward_in_the_mode_of_training(modes):
    """What is in evaluation mode stays so in training, unless all is."""
    events = []

    class Spy(nn.Module):
        def forward(self, x):
            events.append(("forward", self.training, x.requires_grad))
            y = x * 2
            if y.requires_grad:
                y.register_hook(lambda g: events.append(("backward", tuple(g.shape))))
            return y

    with torch.no_grad():
        unit_passes([Spy().train(mode) for mode in modes], torch.randn(2, 3), repeats=1, warmup=0)
    # The first unit's input is data and gets no gradient; the second one's is an activation.
    first, second = modes if any(modes) else (True, True)
    assert events == [("forward", first, False), ("forward", second, True), ("backward", (2, 3))]


def test_units_may_hand_over_tuples():
    class Fork(nn.Module):
        def forward(self, x):
            return x, 2 * x

    class Join(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    assert len(unit_passes([Fork(), Join()], torch.randn(2, 3), repeats=1)) == 2


# --- shared tensors -----------------------------------------------------------------------------------------------


def tied(how):
    model = linears(4)
    if how == "parameter":
        model[3].weight = model[1].weight
    elif how == "module":
        model[3] = model[1]
    else:
        model[3].weight = nn.Parameter(model[1].weight.data)
    return model


@pytest.mark.parametrize("how", ["parameter", "module", "memory"])
def test_shared_parameters_are_refused_with_both_places(how):
    message = r"'weight' of unit 1 \(Linear\) in block 0 .* 'weight' of unit 3 \(Linear\) in block 1; .* tie='copy'"
    with pytest.raises(UserError, match=message):
        split(tied(how), 2)
    assert len(split(tied(how), [1])) == 2


def test_named_units_and_buffers_are_named():
    norm = nn.BatchNorm1d(3, affine=False)
    model = nn.Sequential(OrderedDict(stem=nn.Linear(3, 3), norm=norm, again=norm))
    with pytest.raises(
        UserError, match=r"'running_mean' of unit 1 \('norm', BatchNorm1d\) .* unit 2 \('again', BatchN"
    ):
        split(model, [2])


@pytest.mark.parametrize("how", ["parameter", "module", "memory"])
def test_tie_copy_gives_each_later_block_its_own_copy(how):
    model = tied(how)
    x = torch.randn(2, 3)
    expected = nn.Sequential(*model)(x)
    first, second = split(model, 2, tie="copy")
    assert torch.equal(second(first(x)), expected)
    assert first[1] is model[1]
    assert second[0] is model[2]
    with torch.no_grad():
        first[1].weight.zero_()  # type: ignore[union-attr, operator]
    assert second[1].weight.any()  # type: ignore[union-attr, operator]
    if how != "module":
        assert second[1].bias is model[3].bias


def test_tie_copy_keeps_ties_inside_a_block():
    model = linears(4)
    model[2].weight = model[3].weight = model[0].weight
    _, second = split(model, [2], tie="copy")
    assert second[0].weight is second[1].weight
    assert second[0].weight is not model[0].weight


def test_modules_without_tensors_may_be_shared():
    relu = nn.ReLU()
    assert len(split([nn.Linear(2, 2), relu, nn.Linear(2, 2), relu], [2])) == 2


# --- mistakes -----------------------------------------------------------------------------------------------------


class OwnForward(nn.Sequential):
    def forward(self, input):
        return super().forward(input) + input


@pytest.mark.parametrize(
    ("model", "blocks", "error", "message"),
    [
        (linears(3), 0, UserError, "blocks=0: a model has at least one block"),
        (linears(3), 4, UserError, "blocks=4 but the model has only 3 units"),
        (linears(3), [3], UserError, "cut 3 lies outside the model of 3 units; cuts go from 1 to 2"),
        (linears(3), [0], UserError, "cut 0 lies outside"),
        (linears(3), [2, 1], UserError, r"cuts \[2, 1\] are not strictly increasing; use \[1, 2\]"),
        (linears(3), [1, 1], UserError, "not strictly increasing"),
        (linears(3), [1.5], TypeError, r"cut indices must be integers, got \[1.5\]"),
        (linears(3), True, TypeError, "integer or a list of cut indices, got True"),
        (linears(3), "2", TypeError, "integer or a list of cut indices, got '2'"),
        (nn.Linear(3, 3), 2, TypeError, "cannot cut a Linear; give an nn.Sequential or a list"),
        ([nn.Linear(3, 3), torch.relu], 2, TypeError, "unit 1 of the model is a builtin_function_or_method"),
        ([], 1, UserError, "blocks=1 but the model has only 0 units"),
        (OwnForward(*linears(3)), 2, UserError, "OwnForward is an nn.Sequential with its own forward"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(model, blocks, error, message):
    with pytest.raises(error, match=message) as caught:
        split(model, blocks)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_parameters_are_refused():
    with pytest.raises(UserError, match="unit 1 has lazy parameters"):
        split([nn.Linear(3, 3), nn.LazyLinear(3)], 2)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"device='foo' cannot be used .*; name one that is there"):
        split(linears(4), 2, torch.zeros(1, 3), device="foo")


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match="by='memory' is unknown"):
        split(linears(2), 2, by="memory")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tie='first': independent blocks cannot keep a parameter tied"):
        split(linears(2), 2, tie="first")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the sample must be a tensor"):
        split(linears(2), 2, sample={"x": 1})


def test_units_that_cannot_be_measured_are_named():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    class Silent(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(UserError, match=r"unit 1 \(Stubborn\) cannot be copied .*not me.*; use by='parameters'"):
        unit_passes([nn.Linear(3, 3), Stubborn(3, 3)], torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"unit 0 \(Silent\) returned NoneType"):
        unit_passes([Silent()], torch.randn(2, 3))
