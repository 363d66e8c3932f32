"""CausalLMModule in a trainer: losses, precision, schedule, checkpoints, validation."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig

from lit_ft import CausalLMModule
from lit_ft.loss import ChunkedCrossEntropy, ModelLoss
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.optim import GroupRule, WarmupSchedule
from tests.support.tiny_module import (
    batch_of,
    float16,
    inputs_of,
    loader,
    module_of,
    rows,
    trainer_of,
    weights_after,
)


def test_the_logged_loss_is_the_token_mean_of_the_global_batch(tmp_path):
    batch = batch_of([12, 3, 7])
    module = module_of()
    trainer = trainer_of(tmp_path, max_steps=1, accumulate_grad_batches=3)
    trainer.fit(module, loader(*(rows(batch, i, i + 1) for i in range(3))))
    reference = module_of()
    reference.configure_model()
    expected = reference.model(**batch).loss
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], expected.detach())


def test_validation_weighs_tokens_not_batches(tmp_path):
    batches = [batch_of([12, 12, 12], seed=1), batch_of([3], seed=2)]
    module = module_of()
    [metrics] = trainer_of(tmp_path).validate(module, loader(*batches), verbose=False)
    sums = [
        ModelLoss()(module.model, {k: b[k] for k in ("input_ids", "attention_mask")}, b["labels"])
        for b in batches
    ]
    targets = sum((b["labels"][:, 1:] != IGNORE_INDEX).sum() for b in batches)
    expected = (sum(sums) / targets).item()
    assert metrics["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_bfloat16_weights_do_not_round_the_validation_loss(tmp_path):
    """bfloat16 sums stand still at 256, and a single bfloat16 number has three digits."""
    batches = [batch_of([12] * 8, seed=seed) for seed in range(40)]
    module = module_of()
    trainer = trainer_of(tmp_path, precision="bf16-true")
    [metrics] = trainer.validate(module, loader(*batches), verbose=False)
    with torch.no_grad():
        sums = [ChunkedCrossEntropy()(module.model, inputs_of(b), b["labels"]) for b in batches]
    targets = sum(int((b["labels"][:, 1:] != IGNORE_INDEX).sum()) for b in batches)
    expected = float(sum(s.double() for s in sums)) / targets
    assert metrics["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_model_with_a_loss_of_its_own_is_trained_on_it(tmp_path):
    module = module_of("granite")
    module.source.config = {**module.source.config, "logits_scaling": 4.0}
    trainer_of(tmp_path).fit(module, loader(batch_of([12, 5])))
    assert isinstance(module.loss, ModelLoss)


def test_a_model_that_lets_packed_examples_leak_is_refused(tmp_path):
    module = module_of()
    module.configure_model()
    forward = module.model.model.forward
    module.model.model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    packed = rows(batch_of([12]), 0, 1)
    del packed["attention_mask"]
    packed["position_ids"] = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.raises(MisconfigurationException, match=r"Set packing=False"):
        trainer_of(tmp_path).fit(module, loader(packed))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(tmp_path):
    module = module_of()
    module.configure_model()
    with torch.no_grad():
        module.model.model.norm.weight.fill_(torch.nan)
    before = module.model.model.embed_tokens.weight.clone()
    with pytest.raises(FloatingPointError, match="loss is not finite at step 1"):
        trainer_of(tmp_path).fit(module, loader(batch_of([12])))
    assert torch.equal(module.model.model.embed_tokens.weight, before)


def test_float16_weights_are_refused_before_the_model_loads(tmp_path):
    module = module_of()
    with pytest.raises(MisconfigurationException, match="bf16-true"):
        trainer_of(tmp_path, precision="16-true").fit(module, loader(batch_of([12])))
    assert module.model is None


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_trains(tmp_path, precision):
    module = module_of(optimizer=partial(torch.optim.AdamW, lr=1e-3))
    trainer_of(tmp_path, precision=precision).fit(module, loader(*[batch_of([12, 5])] * 2))
    weights = dict(module.model.named_parameters())
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    untrained = module_of()
    untrained.configure_model()
    for name, weight in untrained.model.named_parameters():
        assert weights[name].dtype == dtype
        # Norms at 1.0 move too: round-to-nearest would leave every one where it is.
        assert not torch.equal(weights[name].float(), weight), name


@pytest.mark.parametrize(
    "option",
    # A C++ compiler runs.
    ["activation_checkpointing", pytest.param("compile", marks=pytest.mark.slow)],
)
def test_checkpointing_and_compilation_change_nothing_but_the_cost(tmp_path, option):
    modules = []
    for options in ({}, {option: True}):
        modules.append(module_of(**options))
        trainer_of(tmp_path).fit(modules[-1], loader(batch_of([12, 5])))
    plain, changed = modules
    for ours, reference in zip(changed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_the_schedule_reaches_the_weights(tmp_path):
    """A rate of zero after the first step must leave the weights where that step took them."""
    from transformers import get_constant_schedule_with_warmup

    def once(optimizer, num_training_steps):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))

    batches = [batch_of([12, 5])] * 3
    one = weights_after(tmp_path, batches, max_steps=1)
    three = weights_after(tmp_path, batches, max_steps=3, schedule=once)
    constant = WarmupSchedule(get_constant_schedule_with_warmup, warmup=0)
    moved = weights_after(tmp_path, batches, max_steps=3, schedule=constant)
    for name, weight in one.items():
        assert torch.equal(three[name], weight)
        assert not torch.equal(moved[name], weight)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_under_a_loss_scaler_a_fused_optimizer_clips_the_gradient_itself(tmp_path, algorithm):
    weights = []
    for fused in (False, True):
        module = module_of(optimizer=partial(torch.optim.SGD, lr=0.1, fused=fused))
        trainer_of(
            tmp_path,
            plugins=[float16(2.0**12)],
            gradient_clip_val=0.01,
            gradient_clip_algorithm=algorithm,
        ).fit(module, loader(*[batch_of([12, 5])] * 2))
        weights.append(module.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)


LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def test_a_fused_optimizer_clips_by_value_in_bfloat16_too(tmp_path):
    fused = partial(torch.optim.SGD, lr=1.0, fused=True)
    module = module_of(optimizer=fused, groups=[GroupRule("all")])
    module.configure_model()
    before = [p.detach().clone() for p in module.parameters()]
    clipping = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    trainer = trainer_of(tmp_path, max_steps=1, precision="bf16-mixed", **clipping)
    trainer.fit(module, loader(batch_of([12, 5])))
    moved = [(p.detach() - q).abs().max() for p, q in zip(module.parameters(), before, strict=True)]
    assert max(moved) == pytest.approx(1e-3, rel=1e-2)


def test_an_adapters_checkpoint_holds_the_adapter_and_resumes(tmp_path):
    batches = loader(*[batch_of([12, 5])] * 4)
    straight = module_of(adapter=LORA)
    trainer_of(tmp_path, max_steps=4).fit(straight, batches)

    first = module_of(adapter=LORA)
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.fit(first, batches)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved if name.startswith("model."))

    resumed = module_of(adapter=LORA)
    trainer_of(tmp_path, max_steps=4).fit(resumed, batches, ckpt_path=tmp_path / "two.ckpt")
    for ours, reference in zip(
        resumed.model.parameters(), straight.model.parameters(), strict=True
    ):
        assert torch.equal(ours, reference)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.fit(module_of(adapter=LORA), loader(batch_of([12])))
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    other = module_of(adapter=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError, match="another model or adapter"):
        trainer_of(tmp_path).fit(other, loader(batch_of([12])), ckpt_path=tmp_path / "lora.ckpt")


def test_validation_inside_fit_follows_validation_before_it(tmp_path):
    module, batches = module_of(), loader(batch_of([12, 5]))
    trainer = trainer_of(tmp_path, max_steps=1, val_check_interval=1)
    [before] = trainer.validate(module, batches, verbose=False)
    trainer.fit(module, batches, batches)
    assert trainer.callback_metrics["val_loss"].item() < before["val_loss"]


def test_one_validation_batch_that_is_not_a_number_is_not_left_out(tmp_path):
    class Diverges(ChunkedCrossEntropy):
        def __call__(self, model, inputs, labels):
            loss = super().__call__(model, inputs, labels)
            return loss * torch.nan if len(labels) == 2 else loss

    module = module_of(loss=Diverges())
    batches = loader(batch_of([12, 5]), batch_of([7]))
    [metrics] = trainer_of(tmp_path).validate(module, batches, verbose=False)
    assert math.isnan(metrics["val_loss"])


def test_dropout_repeats_for_the_same_batch_and_differs_for_another(monkeypatch):
    def draw(batch, seed=0, rank=0):
        trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=batch))
        monkeypatch.setattr(CausalLMModule, "trainer", trainer)
        monkeypatch.setattr(CausalLMModule, "global_rank", rank)
        CausalLMModule(None, optimizer=None, seed=seed).on_train_batch_start({}, 0)
        return torch.rand(()).item()

    assert draw(3) == draw(3)
    drawn = [draw(0), draw(1), draw(0, seed=1), draw(0, rank=1)]
    assert len(set(drawn)) == len(drawn)
