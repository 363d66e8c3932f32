"""The loss on an unrelated text, before and after training, of a module that knows no lit_ft."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_ft.callbacks import Forgetting, LastCheckpoint
from lit_ft.callbacks._support import evaluating
from lit_ft.callbacks.forgetting import loss_of_text
from tests.support.letters import Plain, letters_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog".replace(" ", "")


def fit(tmp_path, *callbacks, module=None, max_steps=4, logger=False, **options):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        max_steps=max_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, LastCheckpoint) for one in callbacks),
        logger=logger,
        default_root_dir=tmp_path,
    )
    module = module or Plain()
    torch.manual_seed(2)
    trainer.fit(module, **options)
    return module


def with_text(tmp_path, text=TEXT, **options) -> Forgetting:
    file = tmp_path / "text.txt"
    file.write_text(text)
    return Forgetting(str(file), **options)


def test_the_loss_is_that_of_transformers():
    module = Plain()
    found = loss_of_text(module.model, module.tokenizer, TEXT, max_length=512)
    module.model.eval()
    ids = module.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert found == pytest.approx(module.model(input_ids=ids, labels=ids).loss.item())


def test_every_token_of_a_long_text_counts_once():
    """The mean over all tokens, though the last piece is shorter than the others."""
    module = Plain()
    ids = letters_tokenizer()(TEXT)["input_ids"]
    found = loss_of_text(module.model, module.tokenizer, TEXT, max_length=10)
    pieces = [torch.tensor([ids[at : at + 10]]) for at in range(0, len(ids), 10)]
    assert pieces[-1].numel() not in (1, 10)
    module.model.eval()
    with torch.no_grad():
        losses = [module.model(input_ids=one, labels=one).loss for one in pieces]
    counts = [one.numel() - 1 for one in pieces]
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert found == pytest.approx(float(mean))


def test_training_is_the_same_to_the_bit(tmp_path):
    plain, measured = fit(tmp_path), fit(tmp_path, with_text(tmp_path))
    assert measured.losses == plain.losses
    for ours, theirs in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    modes = [[module.training for module in each.modules()] for each in (measured, plain)]
    assert modes[0] == modes[1]


def test_what_is_logged_is_the_rise_between_the_first_and_the_last_weights(tmp_path):
    forgetting, before = with_text(tmp_path), Plain()
    module = fit(tmp_path, forgetting, logger=CSVLogger(tmp_path, name="", version=""))
    first, last = (
        loss_of_text(one.model, one.tokenizer, TEXT, max_length=512) for one in (before, module)
    )
    assert (forgetting.before, forgetting.after) == (first, last) and first != last
    assert forgetting.increase == last - first
    assert str(last - first) in (tmp_path / "metrics.csv").read_text()


def test_a_resumed_run_compares_with_the_start_of_the_first(tmp_path):
    whole = with_text(tmp_path)
    fit(tmp_path, whole, LastCheckpoint(tmp_path))
    resumed = with_text(tmp_path)
    fit(tmp_path, resumed, max_steps=6, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.before == whole.before != resumed.after


def test_a_loss_on_another_text_is_not_compared_with(tmp_path):
    fit(tmp_path, with_text(tmp_path), LastCheckpoint(tmp_path))
    resumed = with_text(tmp_path, text="another")
    with pytest.warns(UserWarning, match="the checkpoint has no loss on this text"):
        fit(tmp_path, resumed, max_steps=6, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.before is resumed.increase is None


def test_a_model_in_the_wrapper_of_a_strategy_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "_SHARDED", (SingleDeviceStrategy,))
    forgetting = with_text(tmp_path)
    with pytest.warns(UserWarning, match="sharded by SingleDeviceStrategy"):
        fit(tmp_path, forgetting)
    assert forgetting.increase is None


def test_a_second_fit_measures_again(tmp_path):
    forgetting = with_text(tmp_path)
    module = fit(tmp_path, forgetting)
    between = forgetting.after
    fit(tmp_path, forgetting, module=module)
    assert forgetting.before == between


def test_a_module_without_a_model_trains_all_the_same(tmp_path):
    forgetting = Forgetting()
    with pytest.warns(UserWarning, match="BoringModel has no `model` and `tokenizer`"):
        fit(tmp_path, forgetting, module=BoringModel())
    assert forgetting.increase is None


def test_a_text_that_cannot_be_measured_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: .*no.txt"):
        Forgetting(str(tmp_path / "no.txt"))
    module = Plain()
    with pytest.raises(ValueError, match="two tokens or more"):
        loss_of_text(module.model, module.tokenizer, "", max_length=512)


def test_the_text_that_comes_along_has_ordinary_characters():
    text = Forgetting().text
    assert text.isascii() and len(text.split()) > 700
