"""What `python train.py` takes on one GPU for a model of 1, 3 or 7 billion weights, by method.

    python benchmarks/one_gpu.py                       # seven billion weights, all methods
    python benchmarks/one_gpu.py --model 1b --only galore_subspace_8bit adamw_8bit

Peak memory (what torch has allocated on the GPU, weights and activations included) and tokens a
second of the real command with the defaults of a GPU: bfloat16, layerwise updates. The weights are
random, of a Llama's shapes under SmolLM2's tokenizer: memory and time do not depend on their
values, and losses say nothing here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lit_ft.run.summary import read_summary

_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "one_gpu.json"
SHAPES = {  # as `_NAMES` has them
    "1b": (2048, 8192, 16, 32, 8),  # Llama 3.2
    "3b": (3072, 8192, 28, 24, 8),
    "7b": (4096, 11008, 32, 32, 32),  # Llama 2
}
METHODS: dict[str, list[str]] = {
    "galore_subspace_8bit": ["optim=galore_subspace_8bit"],
    "galore_subspace": ["optim=galore_subspace"],
    "adamw_8bit": ["optim=adamw_8bit"],
    "adafactor": ["optim=adafactor_fixed"],
    "lora": ["adapter=lora"],
    "adamw": ["optim=adamw"],
}


def main() -> None:
    """Run what is wanted; add it to the results of this model."""
    parser = _parser()
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps: at least 3, of which the first two are not timed")
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    of_model = found.setdefault(options.model, {})
    for method in track(options.only, options.model):
        of_model[method] = run(method, options)
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    Console().print(table(options.model, of_model))


def run(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one run, or how it failed."""
    shape = dict(zip(_NAMES, SHAPES[options.model], strict=True))
    settings = {
        **{f"model.config.{name}": value for name, value in shape.items()},
        "model.config.tie_word_embeddings": "false",
        "module.activation_checkpointing": "true",
        "trainer.max_steps": options.steps,
        "data.batch_size": options.batch_size,
        "data.max_length": 512,
        "data.max_val_examples": 4,
        "callbacks": "none",
        "+callbacks.throughput._target_": "lit_ft.callbacks.ThroughputMonitor",
        "logger": "none",
    }
    with tempfile.TemporaryDirectory() as run_dir:
        arguments = [f"{name}={value}" for name, value in settings.items()]
        command = ["model=tiny", *METHODS[method], *arguments, f"run_dir={run_dir}"]
        subprocess.run([sys.executable, "train.py", *command], cwd=ROOT, check=False)
        summary = read_summary(run_dir) or {}
    kept = ("status", "model", "peak_bytes", "optimizer_state_bytes", "tokens_per_second")
    figures = {name: summary.get(name) for name in (*kept, "step_seconds", "hardware", "versions")}
    return {**figures, "command": command[:-1]}


def table(model: str, of_model: dict[str, Any]) -> Table:
    """Lay the figures out, in GiB."""
    columns = ("method", "peak GiB", "weights", "optimizer state", "tokens/s", "s a step")
    shown = Table(*columns, title=f"{model}, one GPU")
    for method, row in of_model.items():
        if row["status"] != "completed":
            shown.add_row(method, str(row["status"]))
            continue
        sizes = (row["peak_bytes"]["value"], row["model"]["weight_bytes"])
        sizes += (row["optimizer_state_bytes"],)
        gib = [f"{size / 2**30:.2f}" for size in sizes]
        shown.add_row(
            method,
            *gib,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_seconds']['median']:.3f}",
        )
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    return parser


if __name__ == "__main__":
    main()
