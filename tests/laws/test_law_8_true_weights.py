"""Law 8: whoever looks at the model, at any moment, sees its true weights."""

import pytest
import torch

from lit_ft.subspace.projectors import Oja
from tests.support.subspace_run import Run, batches
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_delta_is_zero_in_every_forward_and_the_saved_weights_compute_the_same(side, micro_batches):
    run = Run(Oja(every=1), side=side)
    forwards = []

    def look(layer, _):
        forwards.append(not layer.delta.any())

    for layer in run.steps.layers.values():
        layer.register_forward_pre_hook(look)
    plain = tiny_model("llama", tie_word_embeddings=True).double().eval()
    for ids, labels in batches(3):
        run.step(ids, labels, micro_batches=micro_batches)
        before = plain.model.layers[0].mlp.up_proj.weight.clone()
        plain.load_state_dict(
            {name: weight.detach() for name, weight in run.weights.items()}, strict=False
        )
        assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, before)
        with torch.no_grad():
            torch.testing.assert_close(run.model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert len(forwards) >= 3 * len(run.steps.layers) and all(forwards)
