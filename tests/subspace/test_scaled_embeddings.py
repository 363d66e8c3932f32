"""Embeddings that scale their rows train exactly, and what cannot be proven to fit is left out."""

import copy

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lit_ft import CausalLMModule
from lit_ft.callbacks import GaLore
from lit_ft.loss import ChunkedCrossEntropy, ModelLoss
from lit_ft.models import FromConfig
from lit_ft.subspace import inject, layer_group
from lit_ft.subspace.projectors import SubspaceIteration
from tests.support.subspace_run import batches
from tests.support.tiny_model import tiny_model
from tests.support.tiny_module import TINY, batch_of, loader, quiet_trainer

SCALED = [
    Gemma3TextScaledWordEmbedding,
    Gemma2TextScaledWordEmbedding,
    BartScaledWordEmbedding,  # its scale is a number, not a tensor
]
TOKENS = "model.embed_tokens"


class Direct(nn.Embedding):
    def forward(self, input):
        return 2 * F.embedding(input, self.weight)


class ByNorm(nn.Embedding):
    def forward(self, input):
        return super().forward(input) / self.weight.norm()


class OneIdApart(nn.Embedding):
    def forward(self, input):
        rows = super().forward(input)
        return rows if (input != 3).all() else rows + self.weight[4]


class Soft(nn.Embedding):
    """Takes token ids, or a distribution over them."""

    def forward(self, input):
        return input @ self.weight if input.is_floating_point() else super().forward(input)


class Constant(nn.Embedding):
    def forward(self, input):
        return torch.ones(*input.shape, self.embedding_dim)


class InTraining(nn.Embedding):
    def forward(self, input):
        rows = super().forward(input)
        return rows + self.weight.mean() if self.training else rows


class Twice(nn.Embedding):
    """Registers its weight under a second name."""

    def __init__(self, *args):
        super().__init__(*args)
        self.table = self.weight

    def forward(self, input):
        return super().forward(input) + self.table[0]


@pytest.mark.parametrize("kind", SCALED)
def test_the_scale_enters_the_gradient_once_and_the_sketch_and_the_energies_twice(kind):
    embedding = kind(9, 6, padding_idx=0, embed_scale=3.0).double()
    plain = nn.Embedding(9, 6, padding_idx=0).double()
    ids, grad = torch.randint(9, (4, 5)), torch.randn(4, 5, 6).double()
    found = []
    for module in (embedding, plain):
        plain.weight.data.copy_(embedding.weight)
        [layer] = inject(module, rank=2).values()
        layer.basis.requires_grad_(True)
        layer.energy.requires_grad_(True)
        out = module(ids)
        out.backward(grad)
        found.append((out, layer.delta.grad, layer.basis.grad, layer.energy.grad))
    for ours, theirs, factor in zip(*found, (3, 3, 9, 9), strict=True):
        torch.testing.assert_close(ours, factor * theirs)
    assert isinstance(embedding, kind)  # for transformers' initialisation
    assert layer_group(TOKENS, embedding) == "embeddings"


@pytest.mark.parametrize(
    ("model_type", "loss"),
    [("gemma3_text", ChunkedCrossEntropy()), ("gemma", ModelLoss()), ("gemma2", ModelLoss())],
)
def test_a_tied_head_and_a_scaled_embedding_add_up(model_type, loss):
    """The plain model's two copies of the weight show the gradients of its two uses."""
    plain = tiny_model(model_type, head_dim=16, tie_word_embeddings=False).double().eval()
    plain.lm_head.weight.data.copy_(plain.get_input_embeddings().weight)
    model = copy.deepcopy(plain)
    model.lm_head.weight = model.get_input_embeddings().weight
    layers = inject(model, rank=4)
    layer = layers[TOKENS]
    assert "lm_head" not in layers
    layer.basis.requires_grad_(True)
    layer.energy.requires_grad_(True)
    basis = layer.basis.detach()
    [(ids, labels)] = batches(1)
    gradient, sketch, energy = 0, 0, torch.zeros(2).double()
    for row in range(len(ids)):
        plain.zero_grad()
        loss(plain, {"input_ids": ids[[row]]}, labels[[row]]).backward()
        for use in (plain.get_input_embeddings(), plain.lm_head):
            whole = use.weight.grad
            part = whole @ basis.T
            gradient, sketch = gradient + part, sketch + part.T @ whole
            energy += torch.stack([part.square().sum(), whole.square().sum()])
    loss(model, {"input_ids": ids}, labels).backward()
    torch.testing.assert_close(layer.delta.grad, gradient, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(layer.basis.grad, sketch, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(layer.energy.grad, energy, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [Direct, ByNorm, OneIdApart, Soft, Constant, InTraining, Twice])
def test_an_embedding_that_may_use_its_weight_otherwise_is_an_ordinary_parameter(kind, caplog):
    model = nn.ModuleDict({"tokens": kind(9, 6), "up": nn.Linear(6, 6)}).eval()
    assert list(inject(model, rank=2)) == ["up"]
    assert type(model["tokens"]) is kind
    assert model["tokens"].weight.requires_grad
    assert f"tokens ({kind.__name__})" in caplog.text


def test_such_an_embedding_is_refused_with_a_remedy_if_the_head_shares_its_weight():
    model = tiny_model("gemma3_text", head_dim=16)
    model.model.embed_tokens.__class__ = Direct
    with pytest.raises(ValueError, match=r"embed_tokens \(Direct\) shares .* attention and mlp"):
        inject(model, rank=4)
    assert inject(model, rank=4, targets=["attention", "mlp"])


def test_a_tiny_gemma_learns_its_batch_and_exports_what_it_has_learnt(tmp_path):
    seed_everything(0)
    source = FromConfig("gemma3_text", {**TINY, "num_key_value_heads": 1, "head_dim": 16})
    module = CausalLMModule(source, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    galore = GaLore(rank=8, projector=SubspaceIteration(every=4))
    trainer = quiet_trainer(max_steps=12, callbacks=[galore])
    batch = batch_of([12, 12, 9, 7])
    losses = []
    galore.on_train_batch_end = lambda *args: losses.append(args[2]["loss"].item())
    trainer.fit(module, loader(*[batch] * 12))
    assert losses[-1] < losses[0] - 0.5
    module.model.save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "Subspace" not in str(exported)
    with torch.no_grad():
        logits = [model.eval()(batch["input_ids"]).logits for model in (module.model, exported)]
    torch.testing.assert_close(*logits)
