"""Law 7: no step allocates a tensor of a gradient's size, and little is kept."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.measure import optimizer_state_bytes
from lit_ft.measure.memory import state_tensors
from lit_ft.measure.storage_bytes import storage_bytes
from lit_ft.models import FromConfig
from lit_ft.optim import build_optimizer
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.projectors import Oja
from tests.support.allocations import NewTensors
from tests.support.subspace_run import NEVER, Run, batches
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("projector", [Oja(every=1), NEVER])
def test_no_tensor_of_a_gradients_size_is_allocated(projector, watched):
    """Law 7: embedding and head included, on steps that track, that are logged, and others."""
    shapes = {(300, 64), (64, 300), (128, 64), (64, 128), (64, 64), (32, 64), (64, 32)}
    run = Run(projector, rank=4, model=tiny_model("llama", tie_word_embeddings=True))
    data = batches(4, rows=3)
    run.train(data[:2])
    run.steps.stats.await_snapshot(2 if watched else None)
    with NewTensors(shapes, known=run.model.parameters()) as new:
        run.train(data[2:])
        seen = run.steps.stats.snapshot(None)
    assert not new.found
    assert bool(seen.energies) == watched


SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}

ADAMW_BYTES_A_WEIGHT = 12  # two moments and the gradient, in float32


@pytest.fixture(scope="module")
def trained():
    """A model that has taken two steps, with the gradients and sketches of a third."""
    model = FromConfig("llama", SMOLLM2_135M).load_model(torch.float32)
    weights = list(model.parameters())
    layers = inject(model, rank=64)
    optimizer = build_optimizer(bnb.optim.AdamW8bit, model.named_parameters())
    steps = SubspaceUpdater(layers, Oja(every=1))
    steps.attach(optimizer)
    ids = torch.randint(0, 4000, (3, 10))
    full = {shape for w in weights if w.ndim == 2 for shape in (w.shape, w.shape[::-1])}
    new = NewTensors(full, known=weights)
    with new:
        for step in range(3):
            loss = ChunkedCrossEntropy()(model, {"input_ids": ids}, ids)
            (loss / ids.numel()).backward()
            if step < 2:
                optimizer.step()
                optimizer.zero_grad()
    return model, weights, steps, optimizer, new


def test_no_tensor_of_a_weights_shape_is_allocated(trained):
    assert not trained[-1].found


def test_what_is_kept_beside_the_weights_is_at_most_an_eighth_of_adamws(trained):
    model, weights, steps, optimizer, _ = trained
    owned = [*model.parameters(), *model.buffers()]
    gradients = [tensor.grad for tensor in owned if tensor.is_leaf and tensor.grad is not None]
    assert len(gradients) == 2 * len(steps.layers) + sum(w.ndim == 1 for w in weights)
    small = [tensor for layer in steps.layers.values() for tensor in (layer.delta, layer.basis)]
    remembered = state_tensors(steps.state_dict())
    kept = storage_bytes([*gradients, *small, *remembered]) + optimizer_state_bytes(optimizer)
    adamw = ADAMW_BYTES_A_WEIGHT * sum(weight.numel() for weight in weights)
    assert kept <= 0.13 * adamw, f"{kept:,} bytes, AdamW {adamw:,}: {kept / adamw:.4f}"
