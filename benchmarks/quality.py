"""How low does each method bring the held-out loss, on equal tokens at its own best rate?

    python benchmarks/quality.py                       # all runs that the results lack
    python benchmarks/quality.py --only adamw galore_subspace_r64 --seeds 0
    python benchmarks/quality.py --report              # only the table of the results
    python benchmarks/quality.py --accelerator gpu --jobs 8 --every-rate

SmolLM2-135M trains on those embedded examples that are at least a quarter answer: answers teach,
prompts cost time. For each seed every run sees the same batches in the same order. Validation takes
the same examples, of any kind, from modules that no run trains on. Every method first runs at
several rates with the first seed; then its best rate runs with all seeds.

Results: results/quality.jsonl, one line a run, added as runs end, so that the hours can be spread
over sessions. Runs with other settings (steps, accelerator, ...) do not mix.
results/quality_variants.jsonl keeps runs of variants that are no longer in the code.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.arguments import script_parser
from support.best_rate import best_rate
from support.composed import composed, module_and_data
from support.results import append_json_line, read_json_lines, this_run

from lit_ft.callbacks import ThroughputMonitor
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.run.console import quieten_libraries

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
    "scale": {"overrides": ["optim=scale"], "rates": (2e-5, 5e-5, 1e-4, 2e-4)},
    "sinkgd": {"overrides": ["optim=sinkgd"], "rates": (2e-5, 5e-5, 1e-4, 2e-4)},
    "apollo_r64": {"overrides": ["optim=apollo", "optim.rank=64"], "rates": RATES},
    "apollo_mini": {"overrides": ["optim=apollo_mini"], "rates": RATES},
    "lora_r16": {"overrides": ["adapter=lora"], "rates": (5e-4, 1e-3, 2e-3)},
    "qlora": {"overrides": ["adapter=qlora"], "rates": (5e-4, 1e-3, 2e-3)},
    "galore_subspace_r64": _galore("galore_subspace", 64),
    "galore_subspace_r128": _galore("galore_subspace", 128),
    "galore_r64": _galore("galore", 64),
    "galore_r128": _galore("galore", 128),
    # At the paper's own scale, and at the one that gives a step AdamW's size: √(576 / rank).
    "galore_torch_r64": _galore_torch(64, 0.25, (2e-4, 4e-4, 8e-4)),
    "galore_torch_r64_scale3": _galore_torch(64, 3.0, RATES),
    "galore_torch_r128": _galore_torch(128, 0.25, (2e-4, 4e-4, 8e-4)),
    "galore_torch_r128_scale2": _galore_torch(128, 2.0, RATES),
    "galore_subspace_8bit_r64": _galore("galore_subspace_8bit", 64),
    "galore_adafactor_r64": _galore("adafactor_fixed galore=iteration", 64),
    "galore_subspace_paper_r64": _galore(
        "adamw galore=paper", 64, "galore.projector.lr=0.0125", rates=(2e-4, 4e-4, 8e-4)
    ),
    # Embedding and head train whole, as with galore_torch.
    "galore_subspace_r64_blocks": _galore("galore_subspace", 64, "galore.targets=[attention,mlp]"),
    "galore_subspace_r128_blocks": _galore(
        "galore_subspace", 128, "galore.targets=[attention,mlp]"
    ),
    "galore_subspace_r256": _galore("galore_subspace", 256),
    "galore_r256": _galore("galore", 256),
    # The basis spans the shorter side of each layer, as with galore_torch.
    "galore_subspace_r64_std": _galore("galore_subspace", 64, "galore.side=std"),
    "galore_subspace_r128_std": _galore("galore_subspace", 128, "galore.side=std"),
    "galore_r128_every20": _galore("galore", 128, "galore.refresh.every=20"),
    # The defaults were chosen on these.
    "galore_subspace_r64_every1": _galore("galore_subspace", 64, "galore.refresh.every=1"),
    "galore_subspace_r64_every8": _galore("galore_subspace", 64, "galore.refresh.every=8"),
    "galore_r64_every20": _galore("galore", 64, "galore.refresh.every=20"),
    "galore_r64_random_every20": _galore("adamw galore=random", 64, "galore.refresh.every=20"),
}


def main() -> None:
    """Run all that the results lack, then print the table."""
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
                append_json_line(_results_file(options), done.result())
        finally:  # a run that nobody would record need not start
            pool.shutdown(cancel_futures=True)


def _start(jobs: int) -> None:
    quieten_libraries()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def run(method: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the record of the run."""
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
    # In memory: a file of these rows has no place in the cache.
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
    train_loss = float(trainer.callback_metrics["train_loss"])  # before validate() clears it
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
        **this_run(),
    }


def table(records: list[dict[str, Any]]) -> Table:
    """Lay out each method's best rate: mean over seeds, and its share of AdamW's fall on them."""
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
    """Return how far the loss fell at the best rate, by seed."""
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
    losses: dict[float, list[float]] = {}
    for record in records:
        if record["method"] == method:
            losses.setdefault(record["lr"], []).append(record["val_loss"])
    return best_rate(losses)


def _is_a_quarter_answer(example: dict[str, Any]) -> bool:
    labels = example["labels"]
    return 4 * sum(label != IGNORE_INDEX for label in labels) >= len(labels)


def _initial_loss(config: Any, options: argparse.Namespace) -> float:
    """Return the untrained model's loss: measured once, then read from the results."""
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
    """Return the runs with these settings."""
    records = read_json_lines(_results_file(options))
    for record in records:
        if record["val_loss"] is None:  # it was not finite
            record["val_loss"] = math.inf
    return [r for r in records if all(r["settings"][k] == getattr(options, k) for k in alike)]


def _results_file(options: argparse.Namespace) -> Path:
    return options.output / "quality.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--only", nargs="*", choices=METHODS, help="methods to run; all if not given"
    )
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[0, 1, 2], help="the first one tunes the rate"
    )
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of a run")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=7,
        help="7 have about 430 target tokens",
    )
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of an example")
    parser.add_argument("--val-examples", type=int, default=200, help="examples to validate on")
    parser.add_argument(
        "--accelerator", choices=("cpu", "gpu"), default="cpu", help="where the runs train"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--every-rate", action="store_true", help="run every rate with all seeds")
    parser.add_argument("--report", action="store_true", help="print the table and run nothing")
    return parser


if __name__ == "__main__":
    main()
