"""The loss of a router is trained on as transformers does it, and told apart."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_ft.loss import ModelLoss
from lit_ft.loss.targets import IGNORE_INDEX
from tests.support.tiny_module import TINY, batch_of, loader, module_of, rows, trainer_of

EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
KINDS = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "olmoe": {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
}


def experts(kind, **options):
    module = module_of(kind, **options)
    module.source.config = {
        **TINY,
        **EXPERTS,
        **KINDS[kind],
        **({"head_dim": 16} if kind != "olmoe" else {}),
    }
    return module


def plain_loss(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:].flatten()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE_INDEX)
    return loss, int((targets != IGNORE_INDEX).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_validation_loss_is_the_cross_entropy_alone(tmp_path, kind):
    module = experts(kind)
    batches = [batch_of([12, 12, 12], seed=1), batch_of([3], seed=2)]
    [metrics] = trainer_of(tmp_path).validate(module, loader(*batches), verbose=False)
    with torch.no_grad():
        model = module.model.eval()
        pairs = [plain_loss(model, batch) for batch in batches]
        router = [0.5 * float(model(**batch).aux_loss) for batch in batches]
    targets = sum(count for _, count in pairs)
    expected = float(sum(loss * count for loss, count in pairs)) / targets
    assert metrics["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    of_router = sum(r * count for r, (_, count) in zip(router, pairs, strict=True)) / targets
    assert of_router > 0.1
    assert metrics["val_router_loss"] == pytest.approx(of_router, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_follows_the_gradient_that_transformers_own_loss_has(tmp_path, kind):
    module = experts(kind)
    module.configure_model()
    before = copy.deepcopy(module.model)
    batch = batch_of([12, 5])
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, loader(batch))
    own = before(**batch)
    own.loss.backward()
    for (name, ours), theirs in zip(
        module.model.named_parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, msg=name)
    without, _ = plain_loss(before, batch)
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["train_loss"], without.detach())
    torch.testing.assert_close(metrics["train_router_loss"], 0.5 * own.aux_loss.detach())


def test_over_micro_batches_each_target_weighs_the_same(tmp_path):
    batch = batch_of([12, 3, 7])
    parts = [rows(batch, i, i + 1) for i in range(3)]
    module = experts("mixtral")
    module.configure_model()
    before = copy.deepcopy(module.model)
    trainer = trainer_of(tmp_path, max_steps=1, accumulate_grad_batches=3)
    trainer.fit(module, loader(*parts))
    counts = [plain_loss(before, part)[1] for part in parts]
    for part, count in zip(parts, counts, strict=True):
        (before(**part).loss * count / sum(counts)).backward()
    for ours, theirs in zip(module.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        router = [
            float(before(**part).aux_loss) * 0.5 * n for part, n in zip(parts, counts, strict=True)
        ]
    expected = sum(router) / sum(counts)
    assert float(trainer.callback_metrics["train_router_loss"]) == pytest.approx(expected, rel=1e-5)


def test_a_model_without_a_router_tells_of_none(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module_of(loss=ModelLoss()), loader(batch_of([12])), loader(batch_of([12])))
    assert not [name for name in trainer.callback_metrics if "router" in name]
