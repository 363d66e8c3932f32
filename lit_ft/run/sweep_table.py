"""What a sweep says at its end: a table of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table

from lit_ft.run.files import read_summary
from lit_ft.run.record import FOLDER, OVERRIDES
from lit_ft.terminal.console import console, format_bytes, format_duration

_swept: list[Path] = []


class SweepTable(Callback):
    """Hydra's callback that notes the folder of a sweep for `ends_with_sweep_table`."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder."""
        _swept.append(Path(config.hydra.sweep.dir))


@contextmanager
def ends_with_sweep_table() -> Iterator[None]:
    """Print the runs of a sweep that Hydra starts in this block, also if one of them has failed.

    Hydra calls no callback at the end of such a sweep.
    """
    _swept.clear()
    try:
        yield
    finally:
        for folder in _swept:
            if (table := sweep_table(folder)) is not None:
                console().print(table)


def sweep_table(folder: Path) -> Table | None:
    """Return a table of the runs of a sweep in the order of their numbers; None without any.

    Args:
        folder: The folder of the sweep, which holds that of each run.
    """
    runs = sorted(
        (run for run in folder.glob("*") if run.name.isdigit()), key=lambda r: int(r.name)
    )
    found = [(run, _summary(run), _arguments(run)) for run in runs]
    if not found:
        return None
    common = set.intersection(*(set(arguments) for _, _, arguments in found))
    table = Table(title=escape(str(folder)), title_justify="left", box=None, header_style="dim")
    for heading in ("run", "settings", "status", "val loss", "steps", "time", "tok/s", "peak"):
        table.add_column(heading, justify="left" if heading in ("settings", "status") else "right")
    for run, summary, arguments in found:
        own = [one for one in arguments if one not in common]
        table.add_row(run.name, escape(" ".join(own)), *_cells(summary))
    return table


def _cells(summary: Mapping[str, Any]) -> list[str]:
    seconds, peak = summary.get("seconds") or {}, summary.get("peak_bytes") or {}
    forms = (
        (summary.get("val_loss"), "{:.4f}".format),
        (summary.get("steps"), "{:,}".format),
        (seconds.get("total"), format_duration),
        (summary.get("tokens_per_second"), "{:,.0f}".format),
        (peak.get("value"), format_bytes),
    )
    status = str(summary.get("status") or "did not start")
    return [status, *("" if value is None else form(value) for value, form in forms)]


def _summary(run: Path) -> Mapping[str, Any]:
    try:
        return read_summary(run) or {}
    except ValueError:
        return {"status": "summary.json is damaged"}


def _arguments(run: Path) -> Sequence[str]:
    try:
        listed: Any = OmegaConf.to_container(OmegaConf.load(run / FOLDER / OVERRIDES))
    except (OSError, ValueError):
        return []
    return [str(one) for one in listed] if isinstance(listed, list) else []
