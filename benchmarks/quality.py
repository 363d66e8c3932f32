"""Held-out loss of the methods at equal tokens, each at its own tuned learning rate.

    python benchmarks/quality.py                       # whatever is missing from the results
    python benchmarks/quality.py --only adamw galore_subspace_r64 --seeds 0
    python benchmarks/quality.py --report              # the table of what is there
    python benchmarks/quality.py --accelerator gpu --jobs 8 --every-rate

SmolLM2-135M on those of the embedded examples that are at least a quarter answer (answers are what
teaches and prompts what costs). Every run sees the same batches in the same order (per seed), and
is validated on the same examples, of any kind, of modules that it never trained on. First every
method runs at several rates with the first seed; the best rate then runs with all seeds. Results
are appended to results/quality.jsonl as they come, so that the hours can be spread over sessions,
and runs of other settings (steps, accelerator, ...) are apart from each other;
results/quality_variants.jsonl keeps runs of what was tried on the way and is not in the code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
from composed import composed, module_and_data
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lit_ft.callbacks import ThroughputMonitor
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.run.console import quieten_libraries
from lit_ft.run.summary import hardware, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.jsonl"
SETTINGS = ("steps", "batch_size", "max_length", "val_examples", "accelerator")
RATES = (5e-5, 1e-4, 1.4e-4, 2e-4)


def _galore(optim: str, rank: int, *more: str, rates: tuple[float, ...] = RATES) -> dict[str, Any]:
    return {"overrides": [*f"optim={optim}".split(), f"galore.rank={rank}", *more], "rates": rates}


def _galore_torch(rank: int, scale: float, rates: tuple[float, ...]) -> dict[str, Any]:
    overrides = ["optim=galore_torch", f"optim.rank={rank}", f"optim.scale={scale}"]
    return {"overrides": overrides, "rates": rates}


METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"overrides": ["optim=adamw"], "rates": RATES},
    "adamw_8bit": {"overrides": ["optim=adamw_8bit"], "rates": RATES},
    "adafactor_fixed": {"overrides": ["optim=adafactor_fixed"], "rates": RATES},
    "lora_r16": {"overrides": ["adapter=lora"], "rates": (5e-4, 1e-3, 2e-3)},
    "galore_subspace_r64": _galore("galore_subspace", 64),
    "galore_subspace_r128": _galore("galore_subspace", 128),
    "galore_r64": _galore("galore", 64),
    "galore_r128": _galore("galore", 128),
    # The papers' own scale, and the one that gives a step AdamW's size: sqrt(576 / rank).
    "galore_torch_r64": _galore_torch(64, 0.25, (2e-4, 4e-4, 8e-4)),
    "galore_torch_r64_scale3": _galore_torch(64, 3.0, RATES),
    "galore_torch_r128": _galore_torch(128, 0.25, (2e-4, 4e-4, 8e-4)),
    "galore_torch_r128_scale2": _galore_torch(128, 2.0, RATES),
    "galore_subspace_8bit_r64": _galore("galore_subspace_8bit", 64),
    "galore_adafactor_r64": _galore("adafactor_fixed galore=iteration", 64),
    "galore_subspace_paper_r64": _galore(
        "adamw galore=paper", 64, "galore.projector.lr=0.0125", rates=(2e-4, 4e-4, 8e-4)
    ),
    # As galore_torch, which trains embedding and head whole.
    "galore_subspace_r64_blocks": _galore("galore_subspace", 64, "galore.targets=[attention,mlp]"),
    "galore_subspace_r128_blocks": _galore(
        "galore_subspace", 128, "galore.targets=[attention,mlp]"
    ),
    "galore_subspace_r256": _galore("galore_subspace", 256),
    "galore_r256": _galore("galore", 256),
    # The shorter side of each layer, as galore_torch.
    "galore_subspace_r64_std": _galore("galore_subspace", 64, "galore.side=std"),
    "galore_subspace_r128_std": _galore("galore_subspace", 128, "galore.side=std"),
    "galore_r128_every20": _galore("galore", 128, "galore.refresh.every=20"),
    # What the defaults were chosen on.
    "galore_subspace_r64_every1": _galore("galore_subspace", 64, "galore.refresh.every=1"),
    "galore_subspace_r64_every8": _galore("galore_subspace", 64, "galore.refresh.every=8"),
    "galore_r64_every20": _galore("galore", 64, "galore.refresh.every=20"),
    "galore_r64_random_every20": _galore("adamw galore=random", 64, "galore.refresh.every=20"),
}


def main() -> None:
    """Run what is missing, then print the table."""
    options = _parser().parse_args()
    if not options.report:
        wanted = [name for name in METHODS if not options.only or name in options.only]
        wanted.sort(key=(options.only or list(METHODS)).index)
        for missing in (_missing_rates, _missing_seeds):
            _run_all(list(missing(wanted, options)), options)
    shown = table(_results(options))
    shown.title = f"{options.steps} steps on the {options.accelerator.upper()}"
    Console().print(shown)


def _run_all(runs: list[tuple[str, float, int]], options: argparse.Namespace) -> None:
    context = get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, _start, (options.jobs,)) as pool:
        running = [pool.submit(run, *each, options) for each in runs]
        try:
            for done in track(as_completed(running), "runs", total=len(runs)):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(done.result()) + "\n")
        finally:  # what nobody would record need not run
            pool.shutdown(cancel_futures=True)


def _start(jobs: int) -> None:
    quieten_libraries()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def run(method: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the record."""
    overrides = [
        *METHODS[method]["overrides"],
        f"optim.lr={rate}",
        f"seed={seed}",
        "callbacks=none",
    ]
    overrides += [f"trainer.max_steps={options.steps}", f"data.batch_size={options.batch_size}"]
    overrides += [f"data.max_length={options.max_length}", "run_dir=runs/quality", "strategy=cpu"]
    overrides += [f"data.max_val_examples={options.val_examples}", "data.val_batch_size=8"]
    config = composed(*overrides)
    L.seed_everything(seed, verbose=False)
    module, data = module_and_data(config)
    # In memory: the file that it would write does not belong into the cache.
    data.train_examples = data.train_examples.filter(_is_a_quarter_answer, keep_in_memory=True)
    throughput = ThroughputMonitor()
    galore = [instantiate(node, _convert_="all") for node in config["callbacks"].values()]
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_steps=options.steps,
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
        callbacks=[throughput, *galore],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    began = time.monotonic()
    trainer.fit(module, data)
    train_loss = float(trainer.callback_metrics["train_loss"])  # validate() forgets it
    trainer.limit_val_batches = 1.0
    [metrics] = trainer.validate(module, data, verbose=False)
    return {
        "method": method,
        "lr": rate,
        "seed": seed,
        "val_loss": metrics["val_loss"],
        "initial_val_loss": _initial_loss(config, options),
        "train_loss": train_loss,
        "tokens": throughput.tokens,
        "tokens_per_second": throughput.tokens_per_second,
        "seconds": time.monotonic() - began,
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "overrides": overrides,
        "commit": subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=HERE, text=True
        ).strip(),
        "hardware": hardware(),
        "versions": versions(),
    }


def table(records: list[dict[str, Any]]) -> Table:
    """Best rate of each method, mean over seeds, and its share of AdamW's fall on these seeds."""
    shown = Table("method", "lr", "seeds", "val loss", "± seeds", "fall", "of adamw's")
    falls = {method: _falls(records, method) for method in METHODS}
    for method, by_seed in falls.items():
        if not by_seed:
            continue
        runs = _best_runs(records, method)
        losses = [run["val_loss"] for run in runs]
        paired = [seed for seed in by_seed if seed in falls["adamw"]]
        own, adamw = (sum(of[seed] for seed in paired) for of in (by_seed, falls["adamw"]))
        shown.add_row(
            method,
            f"{runs[0]['lr']:.1e}",
            ", ".join(map(str, sorted(by_seed))),
            f"{statistics.mean(losses):.4f}",
            f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-",
            f"{statistics.mean(by_seed.values()):.4f}",
            f"{own / adamw:.1%}" if paired else "-",
        )
    return shown


def _best_runs(records: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    rate = _best_rate(records, method)
    return [r for r in records if (r["method"], r["lr"]) == (method, rate)]


def _falls(records: list[dict[str, Any]], method: str) -> dict[int, float]:
    """How far the loss fell at the best rate, by seed."""
    runs = _best_runs(records, method)
    return {run["seed"]: run["initial_val_loss"] - run["val_loss"] for run in runs}


def _missing_rates(
    methods: list[str], options: argparse.Namespace
) -> Iterator[tuple[str, float, int]]:
    seeds = options.seeds if options.every_rate else options.seeds[:1]
    done = _done(options)
    for method in methods:
        for seed in seeds:
            for rate in METHODS[method]["rates"]:
                if (method, rate, seed) not in done:
                    yield method, rate, seed


def _missing_seeds(
    methods: list[str], options: argparse.Namespace
) -> Iterator[tuple[str, float, int]]:
    done = _done(options)
    for method in methods:
        rate = _best_rate(_results(options), method)
        for seed in options.seeds[1:]:
            if rate is not None and (method, rate, seed) not in done:
                yield method, rate, seed


def _done(options: argparse.Namespace) -> set[tuple[str, float, int]]:
    return {(r["method"], r["lr"], r["seed"]) for r in _results(options)}


def _best_rate(records: list[dict[str, Any]], method: str) -> float | None:
    """The rate with the lowest mean loss, among those that ran with the most seeds."""
    losses: dict[float, list[float]] = {}
    for record in records:
        if record["method"] == method:
            losses.setdefault(record["lr"], []).append(record["val_loss"])
    most = max(map(len, losses.values()), default=0)
    means = {lr: statistics.mean(found) for lr, found in losses.items() if len(found) == most}
    return min(means, key=lambda lr: means[lr], default=None)


def _is_a_quarter_answer(example: dict[str, Any]) -> bool:
    labels = example["labels"]
    return 4 * sum(label != IGNORE_INDEX for label in labels) >= len(labels)


def _initial_loss(config: Any, options: argparse.Namespace) -> float:
    """The untrained model's loss: measured once, then taken from the results."""
    alike = ("max_length", "val_examples", "accelerator")
    for record in _results(options, alike):
        return float(record["initial_val_loss"])
    module, data = module_and_data(config)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    [metrics] = trainer.validate(module, data, verbose=False)
    return float(metrics["val_loss"])


def _results(
    options: argparse.Namespace, alike: tuple[str, ...] = SETTINGS
) -> list[dict[str, Any]]:
    """What ran with these settings."""
    if not RESULTS.is_file():
        return []
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return [r for r in records if all(r["settings"][k] == getattr(options, k) for k in alike)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", choices=METHODS, help="these methods; all if not given"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=7, help="about 430 target tokens")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--val-examples", type=int, default=200)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--every-rate", action="store_true", help="with all seeds, not the first")
    parser.add_argument("--report", action="store_true", help="print the table only")
    return parser


if __name__ == "__main__":
    main()
