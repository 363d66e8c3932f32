"""Export at the end of fit, from a module that knows nothing of lit_ft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.utils import filter_repo_objects
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_ft.callbacks import ExportHF, export


class Plain(LightningModule):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        self.model = LlamaForCausalLM(config)
        self.fails = fails

    def training_step(self, batch, batch_idx):
        if self.fails:
            raise ValueError("a bad batch")
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return DataLoader(torch.arange(16).view(2, 8))


def fit(tmp_path, callback, module):
    Trainer(
        accelerator="cpu",
        callbacks=[callback],
        max_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=tmp_path,
    ).fit(module)
    return module


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_folder_holds_the_trained_model(tmp_path, dtype):
    callback = ExportHF(str(tmp_path / "model"), dtype=dtype)
    module = fit(tmp_path, callback, Plain())
    assert callback.export_path == tmp_path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(callback.export_path)
    expected = torch.float32 if dtype is None else torch.bfloat16
    assert loaded.dtype == expected
    for ours, theirs in zip(loaded.parameters(), module.model.parameters(), strict=True):
        assert torch.equal(ours.to(expected), theirs.to(expected))


def test_a_failed_run_exports_nothing(tmp_path):
    callback = ExportHF(tmp_path / "model")
    with pytest.raises(ValueError, match="a bad batch"):
        fit(tmp_path, callback, Plain(fails=True))
    assert callback.export_path is None
    assert not (tmp_path / "model").exists()


def test_a_model_that_cannot_be_written_is_refused_before_training(tmp_path):
    module = BoringModel()
    before = module.layer.weight.clone()
    with pytest.raises(
        MisconfigurationException, match=r"BoringModel\.model has no save_pretrained"
    ):
        fit(tmp_path, ExportHF(tmp_path / "model"), module)
    assert torch.equal(module.layer.weight, before)


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    calls: list
    error: Exception | None = None

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns):
        if self.error is not None:
            raise self.error
        names = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*.*")]
        files = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))
        self.calls.append(("upload", repo_id, files))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(export, "get_token", lambda: "hf_secret")
    return Hub


def test_the_folder_is_uploaded_to_a_private_repository(tmp_path, hub):
    fit(tmp_path, ExportHF(tmp_path / "model", push_to_hub="me/tuned"), Plain())
    create, (verb, repository, files) = hub.calls
    assert create == ("create", "me/tuned", {"private": True, "exist_ok": True})
    assert (verb, repository) == ("upload", "me/tuned")
    assert {"config.json", "model.safetensors", "README.md"} <= set(files)


def test_cards_that_say_more_are_uploaded_after_the_model_is(tmp_path, hub, monkeypatch):
    callback = ExportHF(tmp_path / "model", push_to_hub="me/tuned")
    fit(tmp_path, callback, Plain())
    (tmp_path / "model" / "adapter").mkdir()
    (tmp_path / "model" / "adapter" / "README.md").touch()
    callback.upload_cards()
    assert hub.calls[-1] == ("upload", "me/tuned", ["README.md", "adapter/README.md"])
    monkeypatch.setattr(hub, "error", ConnectionError("no route"))
    with pytest.warns(UserWarning, match="no route"):
        fit(tmp_path, callback, Plain())
    sent = len(hub.calls)
    callback.upload_cards()  # what is not there needs no card
    assert len(hub.calls) == sent


def test_a_failed_upload_is_a_warning_and_the_folder_stays(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(hub, "error", ConnectionError("no route"))
    callback = ExportHF(tmp_path / "model", push_to_hub="me/tuned")
    with pytest.warns(UserWarning, match="Not uploaded to me/tuned.*no route.*hf upload"):
        fit(tmp_path, callback, Plain())
    assert (callback.export_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("repository", "token", "said"),
    [("me/tuned", None, "hf auth login"), ("me/ tuned", "hf_secret", "me/ tuned")],
)
def test_an_upload_that_cannot_work_is_refused_before_training(
    tmp_path, hub, monkeypatch, repository, token, said
):
    monkeypatch.setattr(export, "get_token", lambda: token)
    module = Plain()
    before = module.model.lm_head.weight.clone()
    with pytest.raises(MisconfigurationException, match=said):
        fit(tmp_path, ExportHF(tmp_path / "model", push_to_hub=repository), module)
    assert torch.equal(module.model.lm_head.weight, before)
    assert not hub.calls
