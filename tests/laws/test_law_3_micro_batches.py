"""Law 3, in one process: micro-batches are one batch of the same rows."""

import pytest
import torch

from tests.support.subspace_run import NEVER, PROJECTORS, Run, assert_equal, batches


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_micro_batches_equal_one_batch(projector, side):
    """Law 3, in one process: over several moves of the basis."""
    data = batches(8)
    options = {"side": side, "eps": 1e-30}
    whole = Run(PROJECTORS[projector], **options).train(data)
    cut = Run(PROJECTORS[projector], **options).train(data, micro_batches=3)
    assert_equal(whole, cut, rtol=1e-6, atol=1e-7)
    moved = Run(NEVER, **options).train(data)
    assert any(
        not torch.allclose(la.basis, moved.steps.layers[n].basis)
        for n, la in whole.steps.layers.items()
    )
