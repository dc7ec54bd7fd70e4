"""Models are lists of units: shapes for every image size, structure as published, seeded without side effects."""

import pytest
import torch
from torch import nn

from decoupled import models
from decoupled.errors import UserError
from decoupled.models import build, mlp, resnet, wide_resnet

SIZES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]


@pytest.mark.parametrize("inputs", SIZES)
@pytest.mark.parametrize(
    "name", ["mlp", "resnet8", "resnet20", {"name": "wide_resnet", "depth": 10, "widen": 2}], ids=str
)
def test_logits_have_one_column_per_class(name, inputs):
    units = build(name, inputs, classes=7)
    assert nn.Sequential(*units)(torch.randn(2, *inputs)).shape == (2, 7)


@pytest.mark.parametrize("inputs", SIZES)
@pytest.mark.parametrize("name", ["mlp", "resnet8", {"name": "wide_resnet", "depth": 10, "widen": 2}], ids=str)
def test_units_take_and_return_one_tensor_and_change_neither_in_place(name, inputs):
    x = torch.randn(2, *inputs)
    for unit in build(name, inputs, classes=5):
        # A block receives a leaf: an in-place first operation would raise here.
        x = x.detach().requires_grad_()
        before = x.detach().clone()
        y = unit(x)
        assert isinstance(y, torch.Tensor)
        assert torch.equal(x.detach(), before)
        x = y
    assert not any(m.inplace for u in build(name, inputs, 5) for m in u.modules() if isinstance(m, nn.ReLU))


def test_mlp_depth_counts_linear_layers():
    units = mlp((1, 8, 8), 10, width=32, depth=3)
    linear = [m for unit in units for m in unit.modules() if isinstance(m, nn.Linear)]
    assert len(units) == 3
    assert [(m.in_features, m.out_features) for m in linear] == [(64, 32), (32, 32), (32, 10)]
    assert not isinstance(units[-1][-1], nn.ReLU)  # type: ignore[index]


def test_mlp_of_depth_one_is_a_linear_classifier():
    (unit,) = mlp((5,), 3, depth=1)
    assert unit(torch.randn(2, 5)).shape == (2, 3)


def test_mlp_batch_norm_before_every_hidden_activation():
    modules = [m for unit in mlp((4,), 2, depth=3, batch_norm=True) for m in unit.modules()]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in modules) == 2


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27e6), (32, 0.46e6), (56, 0.85e6)])
def test_resnet_has_the_published_number_of_parameters(depth, published):
    """Table 6 of He et al. 2016 (three-channel images, 10 classes, option A)."""
    units = resnet((3, 32, 32), 10, depth=depth)
    assert len(units) == (depth - 2) // 2 + 2
    assert sum(p.numel() for u in units for p in u.parameters()) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(("depth", "widen", "published"), [(16, 8, 11.0e6), (40, 4, 8.9e6), (28, 10, 36.5e6)])
def test_wide_resnet_has_the_published_number_of_parameters(depth, widen, published):
    """As Zagoruyko and Komodakis 2016 name and count them (three-channel images, 10 classes)."""
    with torch.device("meta"):
        units = wide_resnet((3, 32, 32), 10, depth=depth, widen=widen)
    assert len(units) == (depth - 4) // 2 + 2
    assert sum(p.numel() for u in units for p in u.parameters()) == pytest.approx(published, rel=0.01)


def test_resnet_stages_halve_the_image_and_double_the_channels():
    x, shapes = torch.randn(1, 1, 28, 28), []
    for unit in resnet((1, 28, 28), 10, depth=14, width=4):
        x = unit(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 28, 28)] * 3 + [(8, 14, 14)] * 2 + [(16, 7, 7)] * 2 + [(10,)]


def test_shortcut_keeps_every_second_pixel_and_appends_zeros():
    block = resnet((1, 7, 7), 2, depth=8, width=3)[2]
    x = torch.randn(2, 3, 7, 7)
    y = block.shortcut(x)  # type: ignore[operator]
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()
    assert y.shape == block.residual(x).shape  # type: ignore[operator]


def test_same_seed_same_bits_and_no_global_state_touched():
    state = torch.get_rng_state()
    first, again, other = (build("resnet8", (1, 8, 8), 10, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)

    def weights(units):
        return torch.cat([p.detach().flatten() for u in units for p in u.parameters()])

    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_options_come_from_a_mapping():
    assert len(build({"name": "mlp", "width": 16, "depth": 6}, (4,), 2)) == 6
    assert len(build({"name": "resnet", "depth": 14}, (1, 8, 8), 2)) == 8
    assert build({"name": "resnet8", "width": 5}, (1, 8, 8), 2)[0][0].out_channels == 5  # type: ignore[index]


def test_every_listed_name_is_built():
    for name in models.names():
        assert build(name, (8,) if name == "transformer" else (1, 8, 8), 2)


@pytest.mark.parametrize(
    ("spec", "inputs", "message"),
    [
        ("resnt20", (1, 8, 8), r"unknown model 'resnt20'. Did you mean 'resnet20'\?"),
        ("mpl", (1, 8, 8), r"Did you mean 'mlp'\?"),
        ({"name": "mlp", "widht": 3}, (4,), r"'widht'. Did you mean 'width'\?"),
        ({"width": 3}, (4,), "has no name"),
        ({"name:mlp": None}, (4,), "with a space after each colon"),
        (7, (4,), "must be a name or a mapping"),
        ({"name": "mlp", "width": 0}, (4,), "width must be an integer of at least 1, got 0"),
        ({"name": "mlp", "depth": True}, (4,), "option 'depth' must be int, got True"),
        ("resnet18", (1, 8, 8), r"6n \+ 2 .* got 18; the nearest is 20"),
        ("resnet2", (1, 8, 8), "got 2; the nearest is 8"),
        ({"name": "resnet20", "depth": 8}, (1, 8, 8), "already says the depth"),
        ({"name": "wide_resnet", "depth": 20}, (1, 8, 8), r"6n \+ 4 .* got 20; the nearest is 22"),
        ({"name": "wide_resnet", "dropout": 1.0}, (1, 8, 8), r"dropout must lie in \[0, 1\)"),
        ({"name": "wide_resnet"}, (64,), r"wide_resnet takes images \(C, H, W\)"),
        ("resnet8", (64,), r"takes images \(C, H, W\), got inputs of shape \(64,\)"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(spec, inputs, message):
    with pytest.raises(UserError, match=message) as caught:
        build(spec, inputs, 10)
    assert "\n" not in str(caught.value)
