"""How much memory and time does a model of 1, 3 or 7 billion weights take on one GPU?

    python benchmarks/one_gpu.py                       # 7 billion weights, all methods
    python benchmarks/one_gpu.py --model 1b --only galore_subspace_8bit adamw_8bit

Each method runs the real command with a GPU's defaults: bfloat16, layerwise updates. The figures
are the peak of torch's memory on the GPU, weights and activations included, and tokens a second.
The weights are random, in the shapes of a Llama with SmolLM2's tokenizer. Memory and time do not
depend on their values; the losses mean nothing here.

Results: results/one_gpu.json; a run adds its methods to those that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.arguments import script_parser
from support.results import ROOT, this_run, write_json

from lit_ft.run.files import read_summary

_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SHAPES = {  # in the order of `_NAMES`
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
    """Run the wanted methods and add them to the results of this model."""
    parser = _parser()
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps: at least 3, of which the first two are not timed")
    results = options.output / "one_gpu.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    of_model = found.setdefault(options.model, {})
    for method in track(options.only, options.model):
        of_model[method] = run(method, options)
        write_json(results, found)
    Console().print(table(options.model, of_model))


def run(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one run; `status` says how a failed one ended."""
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
    run = this_run()
    return {"date": run["date"], "commit": run["commit"], **figures, "command": command[:-1]}


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
    parser = script_parser(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="7b", help="weights of the model")
    parser.add_argument(
        "--only", nargs="*", choices=METHODS, default=list(METHODS), help="methods to run"
    )
    parser.add_argument("--steps", type=int, default=12, help="the first two are not timed")
    parser.add_argument("--batch-size", type=int, default=4, help="examples in a batch")
    return parser


if __name__ == "__main__":
    main()
