"""Samples of a tiny model in a module that knows nothing of lit_ft, and what they leave alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_ft.callbacks import LastCheckpoint, SampleGenerations, samples
from lit_ft.callbacks._support import evaluating
from lit_ft.callbacks.samples import as_markdown, generate
from tests.support.letters import CHAT, Plain, letters_tokenizer


def fit(tmp_path, callback, module=None, logger=False, max_steps=4, others=(), **options):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[*([] if callback is None else [callback]), *others],
        max_steps=max_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(others),
        logger=logger,
        default_root_dir=tmp_path,
    )
    module = module or Plain()
    torch.manual_seed(2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(module, **options)
    return module, [str(w.message) for w in seen if "amples" in str(w.message)]


def test_training_is_the_same_to_the_bit(tmp_path):
    plain, _ = fit(tmp_path, None)
    sampled, warned = fit(tmp_path, SampleGenerations(["abc"], every_n_steps=1, max_new_tokens=4))
    assert not warned
    assert sampled.losses == plain.losses
    for ours, theirs in zip(sampled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    modes = [[module.training for module in each.modules()] for each in (sampled, plain)]
    assert modes[0] == modes[1]


def test_samples_come_before_during_and_after(tmp_path):
    callback = SampleGenerations(["abc", "d"], every_n_steps=2, max_new_tokens=4)
    fit(tmp_path, callback)
    assert [g["step"] for g in callback.generations] == [0, 0, 2, 2, 4, 4]
    assert [g["prompt"] for g in callback.generations[:2]] == ["abc", "d"]
    before_and_after = SampleGenerations(["abc"], max_new_tokens=4)
    fit(tmp_path, before_and_after)
    assert [g["step"] for g in before_and_after.generations] == [0, 4]


@pytest.mark.parametrize(("prompts", "first_step"), [(["abc", "d"], 0), (["abc", "e"], 4)])
def test_a_resumed_run_has_the_answers_from_before_training(tmp_path, prompts, first_step):
    """It generates its own at its first step only if it asks something else."""
    saved = SampleGenerations(["abc", "d"], every_n_steps=3, max_new_tokens=4)
    fit(tmp_path, saved, others=[LastCheckpoint(tmp_path)])
    resumed = SampleGenerations(prompts, max_new_tokens=4)
    fit(tmp_path, resumed, max_steps=6, ckpt_path=tmp_path / "last.ckpt")
    first, last = resumed.generations[:2], resumed.generations[2:]
    assert [g["step"] for g in first] == [first_step] * 2
    assert [g["step"] for g in last] == [6, 6]
    assert [g["prompt"] for g in first] == [g["prompt"] for g in last] == prompts
    if first_step == 0:
        assert first == saved.generations[:2]


def test_a_batch_of_prompts_answers_as_one_by_one():
    module = Plain()
    prompts = ["a", "abcdefgh", [{"role": "user", "content": "xyz"}]]
    together = generate(module.model, module.tokenizer, prompts, max_new_tokens=8)
    alone = [
        generate(module.model, module.tokenizer, [prompt], max_new_tokens=8)[0]
        for prompt in prompts
    ]
    assert together == alone
    assert len(set(together)) == 3


def test_generation_is_the_argmax_of_the_plain_forward():
    module = Plain()
    module.model.eval()
    ids = module.tokenizer("uabca", add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = ""
    for _ in range(5):
        token = module.model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        if token.item() == 0:
            break
        ids = torch.cat([ids, token], 1)
        expected += module.tokenizer.decode(token[0])
    assert generate(module.model, module.tokenizer, ["abc"], max_new_tokens=5) == [expected]


def test_the_answer_ends_at_the_end_of_sequence():
    module = Plain()
    torch.nn.init.zeros_(module.model.lm_head.weight)  # every logit 0: argmax is token 0, the end
    seen = []
    forward = module.model.forward
    module.model.forward = lambda *a, **k: seen.append(1) or forward(*a, **k)
    assert generate(module.model, module.tokenizer, ["abc"], max_new_tokens=50) == [""]
    assert len(seen) == 1


def test_samples_stop_where_the_export_does(tmp_path):
    from transformers import GenerationConfig

    from lit_ft.callbacks import ExportHF

    tokenizer = letters_tokenizer(CHAT.replace("{% endfor %}", "{{ '</s>' }}{% endfor %}"))
    tokenizer.eos_token = "e"
    module = Plain(tokenizer)
    module.model.generation_config.eos_token_id = 7
    stops = []
    generates = module.model.generate

    def stopping_at(**options):
        stops.append({*options["eos_token_id"]})
        return generates(**options)

    module.model.generate = stopping_at
    generate(module.model, tokenizer, ["abc"], max_new_tokens=2)
    fit(tmp_path, ExportHF(tmp_path / "out"), module)
    assert stops == [{7, 0, tokenizer.eos_token_id}]
    assert {*GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id} == stops[0]


def test_a_chat_has_the_special_tokens_of_its_template_alone():
    assert samples._encoded(letters_tokenizer(), "abc") == [21, 1, 2, 3, 1]  # u, abc, a


def test_without_a_chat_template_a_text_is_continued():
    module = Plain(letters_tokenizer(chat_template=None))
    assert samples._encoded(module.tokenizer, "abc") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="chat_template"):
        generate(
            module.model, module.tokenizer, [[{"role": "user", "content": "a"}]], max_new_tokens=2
        )


def test_samples_are_text_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callback = SampleGenerations(["abc"], max_new_tokens=4)
    fit(tmp_path, callback, logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    written = events.Tensors("samples/0/text_summary")
    assert [event.step for event in written] == [0, 4]
    text = written[1].tensor_proto.string_val[0].decode()
    assert text == as_markdown("abc", callback.generations[1]["text"])


def test_code_stays_literal_in_markdown():
    text = as_markdown("```python\nx\n```", "y")
    assert "````\n```python\nx\n```\n````" in text


def test_prompts_come_from_the_datamodule(tmp_path):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return Plain.train_dataloader(self)

        def sample_prompts(self, count):
            return [[{"role": "user", "content": letter}] for letter in "pqr"[:count]]

    callback = SampleGenerations(num_prompts=2, max_new_tokens=2)
    fit(tmp_path, callback, datamodule=Data())
    assert [g["prompt"] for g in callback.generations] == ["p", "q", "p", "q"]


def test_a_failing_generation_warns_once_and_the_run_goes_on(tmp_path):
    module = Plain()

    def fails(**_):
        raise RuntimeError("no kernel for this")

    module.model.generate = fails
    callback = SampleGenerations(["abc"], every_n_steps=1)
    module, warned = fit(tmp_path, callback, module)
    assert len(module.losses) == 4
    assert len(warned) == 1 and "no kernel for this" in warned[0]
    assert not callback.generations
    assert all(layer.training for layer in module.model.model.layers)


def test_a_module_that_cannot_generate_gets_a_warning(tmp_path):
    class Boring(BoringModel):
        def val_dataloader(self):
            return []

    _, warned = fit(tmp_path, SampleGenerations(["abc"]), Boring())
    assert warned == ["No samples: Boring.model has no generate()."]


def test_a_sharded_model_is_skipped_with_the_reason(tmp_path, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(evaluating, "_SHARDED", (SingleDeviceStrategy,))
    callback = SampleGenerations(["abc"], every_n_steps=1)
    _, warned = fit(tmp_path, callback)
    assert warned == ["No samples: the model is sharded by SingleDeviceStrategy."]
    assert not callback.generations
