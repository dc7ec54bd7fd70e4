"""Fixtures for tests of methods."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def tellable():
    """256 samples of twelve numbers whose class (of three) can be told from them, and three blocks to do it."""
    torch.manual_seed(0)
    y = torch.randint(3, (256,))
    x = torch.randn(256, 12) + 2 * F.one_hot(y + 6, 12)
    blocks = [
        nn.Sequential(nn.Linear(12, 32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, 3),
    ]
    return (
        x,
        y,
        {
            "blocks": blocks,
            "batches": list(zip(x.split(32), y.split(32), strict=True)),
            "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        },
    )
