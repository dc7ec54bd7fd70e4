"""Oracle 6, resume: save, load into a fresh trainer, go on - bit for bit as if nothing had happened.

The network has BatchNorm and dropout, the optimizer momentum and a schedule, the loader shuffles with the global
generator. All of it must be in the state.
"""

import hashlib
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from decoupled import Trainer
from decoupled.errors import UserError
from decoupled.testing import Case, label, point, variants

DEFAULTS = [spec for spec in variants() if set(spec) == {"name"}]
SAMPLES = Case(widths=(4, 3), cuts=(), sizes=(12, 12, 12, 10))


class Shuffled:
    """The batches in an order drawn from the global generator, as a DataLoader does."""

    def __iter__(self):
        batches = SAMPLES.batches()
        return (batches[i] for i in torch.randperm(len(batches)))


def fresh(spec, runtime="simulated", seed=0):
    torch.manual_seed(5)
    blocks = [
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh()).double(),
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)).double(),
        nn.Sequential(nn.Linear(6, 3)).double(),
    ]
    return Trainer(
        blocks,
        spec,
        loss=nn.functional.cross_entropy,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=5, gamma=0.5),
        runtime=runtime,
        seed=seed,
    )


def saved(trainer):
    """The state as bytes, as `torch.load(weights_only=True)` will read it."""
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    return file.getvalue()


def load(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def digest(state):
    """A fingerprint of a state: every tensor by its bits, everything else by what it prints."""
    found = hashlib.sha256()

    def walk(thing):
        if isinstance(thing, dict):
            for key in thing:
                found.update(repr(key).encode())
                walk(thing[key])
        elif isinstance(thing, list | tuple):
            for one in thing:
                walk(one)
        elif isinstance(thing, torch.Tensor):
            found.update(repr((thing.dtype, tuple(thing.shape))).encode())
            found.update(thing.contiguous().numpy().tobytes())
        else:
            found.update(repr(thing).encode())

    walk(state)
    return found.hexdigest()


def interrupted(spec, runtime="simulated", epochs=1):
    """The state after `epochs` as bytes, and what twice as many in one go end in."""
    with fresh(spec, runtime) as trainer:
        torch.manual_seed(9)
        trainer.fit(Shuffled(), epochs)
        data = saved(trainer)
        trainer.fit(Shuffled(), epochs)
        return data, digest(trainer.state_dict())


RUNS = [(s, r) for s in variants() for r in ("simulated", "threads") if r == "simulated" or point(s).fixed]


@pytest.mark.costly
@pytest.mark.parametrize(("spec", "runtime"), RUNS, ids=lambda value: value if isinstance(value, str) else label(value))
def test_a_fresh_trainer_goes_on_bit_for_bit(spec, runtime):
    data, expected = interrupted(spec, runtime)
    with fresh(spec, runtime, seed=7) as trainer:  # what is drawn once, as feedback matrices, is drawn as it was
        trainer.load_state_dict(load(data))
        assert digest(trainer.state_dict()) == digest(load(data))
        torch.manual_seed(1234)
        history = trainer.fit(Shuffled())
        assert digest(trainer.state_dict()) == expected
    assert [row["epoch"] for row in history] == [2]


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_a_used_trainer_can_be_set_back(spec):
    """Loading replaces everything, also in a trainer that has run further."""
    with fresh(spec) as trainer:
        torch.manual_seed(9)
        trainer.fit(Shuffled(), epochs=1)
        data = saved(trainer)
        trainer.fit(Shuffled(), epochs=1)
        expected = digest(trainer.state_dict())
        trainer.load_state_dict(load(data))
        trainer.fit(Shuffled(), epochs=1)
        assert digest(trainer.state_dict()) == expected


@pytest.mark.parametrize("spec", DEFAULTS, ids=label)
def test_every_part_of_the_state_matters(spec):
    """The control: with one part as it was an epoch earlier, the run ends elsewhere."""
    data, expected = interrupted(spec, epochs=2)
    with fresh(spec) as trainer:
        torch.manual_seed(9)
        trainer.fit(Shuffled())
        before = saved(trainer)
    for part in ("steps", "block", "rng"):
        state, early = load(data), load(before)
        owners = [(state, early)] if part in state else zip(state["blocks"], early["blocks"], strict=True)
        for now, then in owners:
            now[part] = then[part]
        with fresh(spec) as trainer:
            trainer.load_state_dict(state)
            trainer.fit(Shuffled(), epochs=2)
            assert digest(trainer.state_dict()) != expected, part


SCRIPT = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("resume", sys.argv[1])
resume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resume)
for line, variant in enumerate(resume.variants()):
    with resume.fresh(variant) as trainer:
        trainer.load_state_dict(torch.load(f"{sys.argv[2]}/{line}.pt", weights_only=True))
        trainer.fit(resume.Shuffled(), epochs=2)
        print(resume.digest(trainer.state_dict()))
"""


@pytest.mark.slow
def test_a_fresh_process_goes_on_bit_for_bit(tmp_path):
    expected = []
    for line, spec in enumerate(variants()):
        data, end = interrupted(spec, epochs=2)
        (tmp_path / f"{line}.pt").write_bytes(data)
        expected.append(end)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


def test_a_state_of_another_method_or_cut_is_refused():
    first, second = DEFAULTS[:2]
    state = load(interrupted(first)[0])
    with fresh(second) as trainer, pytest.raises(UserError, match="the state is of method"):
        trainer.load_state_dict(state)
    with fresh(first) as trainer, pytest.raises(UserError, match=r"the state has 2 blocks, this trainer 3"):
        trainer.load_state_dict(state | {"blocks": state["blocks"][:2]})
    with fresh(first) as trainer, pytest.raises(UserError, match="no state yet"):
        trainer.state_dict()
