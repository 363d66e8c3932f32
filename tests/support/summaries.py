"""Folders of runs that are made up: their summaries, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_ft.storage.json_file import write_json

GIB = 2**30


def made_summary(
    *arguments: str, loss: float | None = 2.5, seed: int = 0, lr: float = 1e-3, **fields: Any
) -> dict[str, Any]:
    """Return the summary of a run of 40 steps.

    Args:
        arguments: The arguments of its command, which are also its settings.
        loss: The held-out loss at its end.
        seed: Its seed.
        lr: Its learning rate.
        fields: Further entries of the summary, in place of those made up.
    """
    config: dict[str, Any] = {
        "seed": seed,
        "data": {"path": "rows.jsonl", "seed": seed},
        "optim": {"lr": lr},
        "module": {"optimizer": {"lr": lr}, "seed": seed},
    }
    for argument in arguments:
        name, _, value = argument.partition("=")
        *above, last = name.split(".") if "." in name else (name, "_target_")
        node = config
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return {
        "status": "completed",
        "ended": "max_steps=40 reached",
        "starts": [{"arguments": [*arguments, f"optim.lr={lr}", f"seed={seed}"]}],
        "config": config,
        "versions": {"torch": "2.13.0", "lit_ft": "0.1.0"},
        "hardware": {"cpu": "A processor", "cpu_cores": 2, "memory_bytes": 8 * GIB, "gpus": []},
        "seed": seed,
        "steps": 40,
        "model": {"name": "a model"},
        "data": {"train": {"examples": 9}, "val": {"examples": 2}, "rows_per_step": 4},
        "initial_val_loss": 3.5,
        "val_loss": loss,
        "val_perplexity": None if loss is None else 2.718281828**loss,
        "tokens_per_second": 1000.0,
        "step_seconds": {"median": 0.25},
        "peak_bytes": {"value": 2 * GIB, "source": "process_rss"},
        "optimizer_state_bytes": 1 << 20,
        "history": {
            "train": [
                {"step": n, "tokens": 100 * n, "seconds": n / 4, "train_loss": 3.5 - n / 40}
                for n in range(5, 41, 5)
            ],
            "val": [
                {"step": n, "tokens": 100 * n, "seconds": n / 4, "val_loss": 3.5 - n / 40}
                for n in (0, 20, 40)
            ],
        },
        **fields,
    }


def write_run(folder: Path, *arguments: str, **options: Any) -> Path:
    """Write a made-up summary to a folder, which is returned; for the rest see `made_summary`."""
    summary = made_summary(*arguments, **options)
    summary["config"]["run_dir"] = str(folder)
    write_json(folder / "summary.json", summary)
    return folder


def write_many(folder: Path, methods: int = 14, seeds: int = 3) -> Path:
    """Write the runs of many methods with long names; some have no result."""
    for number in range(methods):
        name = f"galore.projector=lit_ft.subspace.projectors.VeryLongNameNumber{number}"
        state = (1 + number % 5) * GIB // 8
        uses = {"weights": GIB // 2, "optimizer": state, "activations": GIB // (2 + number)}
        for seed in range(seeds):
            loss = 2.4 + 0.03 * ((number * 5) % methods) + 0.002 * ((seed * 7 + number) % 3)
            bent = [(n, 3.5 - (3.5 - loss) * (n / 40) ** (0.3 + number / 20)) for n in range(41)]
            points = [{"step": n, "tokens": 1000 * n, "seconds": n / 4, "loss": y} for n, y in bent]
            history = {
                "train": [{**one, "train_loss": one["loss"] + 0.05} for one in points[1:]],
                "val": [{**one, "val_loss": one["loss"]} for one in points[::10]],
            }
            write_run(
                folder / f"{number}-{seed}",
                "model=tiny",
                name,
                "galore.refresh.every=50",
                f"data.batch_size={1 + number % 2}",
                loss=loss,
                seed=seed,
                history=history,
                optimizer_state_bytes=state,
                peak_bytes={"value": sum(uses.values()) + GIB // 4, "source": "process_rss"},
                planned_peak_bytes={"value": sum(uses.values()), "by_category": uses},
            )
    died = {"loss": None, "status": "out_of_memory", "ended": "out of memory at step 3"}
    write_run(folder / "died", "model=tiny", "optim=adamw", **died)
    write_run(folder / "killed", "optim=sgd", loss=None, status="interrupted", ended=None)
    (folder / "broken").mkdir()
    (folder / "broken" / "summary.json").write_text("{")
    return folder
