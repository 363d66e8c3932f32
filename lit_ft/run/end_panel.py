"""What a run says at its end: its results in a box, and the commands that come next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from lit_ft.evaluation.scores import metrics_of, stderr_of
from lit_ft.run.summary import RunSummary
from lit_ft.storage.disk import disk_bytes
from lit_ft.storage.json_file import read_json
from lit_ft.terminal.console import console, format_bytes, format_duration
from lit_ft.terminal.pairs import pairs

WIDTH = 100
"""The largest width of the box in columns."""


@contextmanager
def ends_with_panel(summary: RunSummary) -> Iterator[None]:
    """Print a run's results after the block, unless the run has failed: then its error is printed.

    Args:
        summary: The summary of the run, which is complete once the block ends.
    """
    try:
        yield
    finally:
        if summary.fields["status"] in ("completed", "interrupted") and summary.fields["ended"]:
            _print(summary)


@rank_zero_only
def _print(summary: RunSummary) -> None:
    fields = {**summary.fields, "samples": summary.samples}
    fields |= {name: _near(fields[name]) for name in ("checkpoint_path", "export_path")}
    print_end(fields, _near(str(summary.run_dir)) or ".")


def _near(path: str | None) -> str | None:
    """Return a path as it is seen from the current folder, if it lies in it."""
    if path is None or not Path(path).is_relative_to(Path.cwd()):
        return path
    return str(Path(path).relative_to(Path.cwd()))


def print_end(summary: Mapping[str, Any], run_dir: str | Path) -> None:
    """Print the box of a run, and below it the commands to go on with.

    Args:
        summary: The contents of summary.json, as for `end_panel`.
        run_dir: The folder of the run.
    """
    console().print(end_panel(summary, run_dir))
    for line in next_commands(summary, Path(run_dir)):
        # No box around what is to be copied, and no line break that would be copied too.
        console().print(Text(line), soft_wrap=True)


def end_panel(summary: Mapping[str, Any], run_dir: str | Path) -> Panel:
    """Return the box to show at the end of a run.

    Args:
        summary: The contents of summary.json, in which any entry may be null or absent. It may also
            have a list `samples` of `{"step", "prompt", "text"}`, from which the box shows the
            first and the last answer to the first prompt.
        run_dir: The folder of the run.
    """
    run_dir = Path(run_dir)
    title = str(summary.get("status") or "finished")
    if title == "completed" and not summary.get("steps"):
        title = "validated"
    return Panel(
        pairs(_results(summary, run_dir)),
        title=escape(title),
        border_style="yellow" if title == "interrupted" else "green",
        width=min(WIDTH, console().width),
    )


def next_commands(summary: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Return lines with the commands that a user may want next, each after what it does."""
    folder = shlex.quote(str(run_dir))
    steps, checkpoint = summary.get("steps") or 0, summary.get("checkpoint_path")
    config = summary.get("config") or {}
    saving = config.get("checkpoint") or {}
    goes_on = checkpoint is not None and saving.get("save_optimizer", True)
    export, resume = f"python -m lit_ft.export {folder}", f"python train.py run_dir={folder}"
    commands = {}
    if summary.get("status") == "interrupted":
        if goes_on:
            commands["go on"] = f"{resume} resume=auto"
        if checkpoint is not None:
            commands["export"] = export
    elif steps:
        if summary.get("export_path") is not None and not _is_adapter_alone(config):
            commands["chat"] = f"python -m lit_ft.chat {folder}"
        if goes_on:
            commands["train on"] = f"{resume} resume=auto {_twice_as_long(summary, steps)}"
        if checkpoint is not None:
            commands["export"] = export
        if _holds_others(run_dir / "checkpoints" / "best.ckpt", checkpoint):
            commands["export"] = f"{export} --checkpoint best"
    return [f"  {what:<9} {command}" for what, command in commands.items()]


def _is_adapter_alone(config: Mapping[str, Any]) -> bool:
    """Whether what the run exports is an adapter, with which nobody can chat."""
    export = (config.get("callbacks") or {}).get("export") or {}
    return bool(config.get("adapter")) and not export.get("merge", True)


def _holds_others(best: Path, last: str | None) -> bool:
    """Whether there are best weights, and they are not those of the last state."""
    return best.exists() and not (last and Path(last).exists() and best.samefile(last))


def _twice_as_long(summary: Mapping[str, Any], steps: int) -> str:
    trainer = (summary.get("config") or {}).get("trainer") or {}
    if trainer.get("max_steps") == -1 and trainer.get("max_epochs"):
        return f"trainer.max_epochs={2 * trainer['max_epochs']}"
    return f"trainer.max_steps={2 * steps}"


def _results(summary: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    peak = summary.get("peak_bytes") or {}
    steps = summary.get("step_seconds") or {}
    by_source = summary.get("val_loss_by_source") or {}
    state = summary.get("optimizer_state_bytes")
    before = summary.get("initial_val_loss") if summary.get("steps") else None
    rows = {
        "val loss": _before_after(before, summary.get("val_loss")),
        **{f"  of {name}": _number(loss, ".4f") for name, loss in by_source.items()},
        "val perplexity": _number(summary.get("val_perplexity"), ".2f"),
        "best": _best(run_dir) if summary.get("steps") else None,
        **_scores(summary.get("scores") or {}),
        "train loss": _number(summary.get("train_loss"), ".4f"),
        "steps": _number(summary.get("steps") or None, ","),
        "ended": summary.get("ended"),
        "time": _time(summary.get("seconds") or {}, starts=len(summary.get("starts") or [])),
        "tokens/s": _number(summary.get("tokens_per_second"), ",.0f"),
        "step": _number(steps.get("median"), ".3f", " s (median)"),
        "peak memory": _peak(peak, summary.get("planned_peak_bytes")),
        "optimizer state": None if state is None else format_bytes(state),
        "checkpoint": _place(summary.get("checkpoint_path"), whole_folder=True),
        "model": _place(summary.get("export_path")),
        **_samples(summary.get("samples") or []),
    }
    return {name: str(value) for name, value in rows.items() if value is not None}


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Return each task's first metric, with its standard error if that is known."""
    rows = {}
    for task, values in scores.items():
        for metric in metrics_of(values)[:1]:
            error = _number(values.get(stderr_of(metric)), ".3f", " (standard error)")
            shown = [_number(values[metric], ".3f"), error]
            rows[f"{task} {metric}"] = " ± ".join(filter(None, shown)) or None
    return rows


def _best(run_dir: Path) -> str | None:
    try:
        best = read_json(run_dir / "checkpoints" / "best.json")
    except (OSError, ValueError):
        return None
    step = best.pop("step", None)
    return ", ".join(f"{name} {value:.4f} at step {step}" for name, value in best.items())


def _time(seconds: Mapping[str, float | None], *, starts: int) -> str | None:
    total = seconds.get("total")
    if total is None:
        return None
    of_all = " of all starts" if starts > 1 else ""  # the total is that of the last one
    parts = {f"training steps{of_all}": seconds.get("train"), "loading": seconds.get("load")}
    told = [f"{format_duration(value)} {name}" for name, value in parts.items() if value]
    whole = format_duration(total)
    return f"{whole} ({', '.join(told)})" if told else whole


def _peak(peak: Mapping[str, Any], planned: Mapping[str, Any] | None) -> str | None:
    """Return the measured peak, and what was planned of the same kind of memory."""
    if (value := peak.get("value")) is None:
        return None
    measured = f"{format_bytes(value)} ({peak.get('source')})"
    if planned is None:
        return measured
    tensors = planned["value"]
    if peak.get("source") == "cuda_allocated":
        return f"{measured}, planned {format_bytes(tensors)}"
    low, high = (tensors + planned[name] for name in ("outside_low", "outside_high"))
    return f"{measured}, planned {format_bytes(low)} to {format_bytes(high)}"


def _place(path: str | None, *, whole_folder: bool = False) -> str | None:
    """Return a path with its size on disk, or with that of the folder in which it is."""
    if path is None:
        return None
    place = Path(path).parent if whole_folder else Path(path)
    size = format_bytes(disk_bytes(place))  # checkpoints may share a file
    return f"{path} ({size} in {place.name}/)" if whole_folder else f"{path} ({size})"


def _before_after(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return _number(after, ".4f")
    return f"{before:.4f} → {after:.4f}"


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{form}}{unit}"


def _samples(samples: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    same = list(samples)
    same = [one for one in same if one["prompt"] == same[0]["prompt"]]
    if not same:
        return {}
    # The checkpoint of a resumed run may lack the answer from before training.
    step = same[0]["step"]
    first = f"answer at step {step:,}" if step else "answer before"
    rows = {"prompt": same[0]["prompt"], first: same[0]["text"]}
    return rows if len(same) == 1 else {**rows, "answer after": same[-1]["text"]}
