"""What blocks are trained on: the data and the outputs of the forward network, unless the coupling `substitutes` them.

With a learning rate of zero every forward of a block is one of the forward network, whatever the delay: an input that
no forward of the block below has made (up to rounding, for those that are reconstructed) was put in its place.
"""

import pytest
import torch

from decoupled.testing import Case, label, point, train, variants

CASE = Case(widths=(3, 4, 3, 4, 2), cuts=(1, 2, 3), sizes=(5,) * 4)


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def own_inputs(spec):
    """Blocks that were given something that neither the data nor the block below has put out."""
    given, made, blocks = [[] for _ in range(CASE.K)], [[] for _ in range(CASE.K)], CASE.blocks()

    def note(k):
        def hook(module, inputs, output):
            if module.training:
                given[k].append(inputs[0].detach().clone())
                made[k].append(output.detach().clone())

        return hook

    for k, block in enumerate(blocks):
        block.register_forward_hook(note(k))
    train(CASE, spec, blocks=blocks, optimizer=still, epochs=3)
    made.insert(0, [x for x, *_ in CASE.batches()])
    return {k for k in range(CASE.K) if not known(torch.cat(given[k]), torch.cat(made[k]))}


def known(rows, others):
    """Whether every row (one sample) is one of the others."""
    return bool(((rows[:, None] - others[None]).abs().amax(2).amin(1) < 1e-5).all())


@pytest.mark.parametrize("spec", variants(), ids=label)
def test_blocks_train_on_what_the_network_gives_them_unless_the_coupling_says_otherwise(spec):
    assert point(spec).coupling.substitutes or not own_inputs(spec)


SAY_SO = {point(spec).name for spec in variants() if point(spec).coupling.substitutes}


# those with phases begin each with what the blocks put out, so that three epochs may not show it
@pytest.mark.parametrize("name", sorted(name for name in SAY_SO if point(name).epochs == 1))
def test_methods_that_say_so_do_it(name):
    assert any(own_inputs(spec) for spec in variants() if point(spec).name == name)
