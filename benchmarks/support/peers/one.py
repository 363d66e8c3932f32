"""What the process of one row does."""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from lit_ft.measure.environment import versions
from lit_ft.run.console import quieten_libraries
from support.peers.job import Job, Trained
from support.peers.meter import Meter
from support.peers.rows import ROWS
from support.peers.work import data_module, held_out_loss
from support.results import ROOT, write_json

_STYLES = re.compile(r"\x1b\[[0-9;]*m")  # of terminals
_NOT_LOADED = re.compile(r"Unsupported global: GLOBAL \S+")
_PEERS = ("trl", "accelerate", "apollo-torch")


def do(row: str, file: Path) -> None:
    """Train the row as the job in `file` says, and write its figures or its error."""
    quieten_libraries()
    job = Job.read(file)
    torch.set_num_threads(job.threads)
    meter = Meter(job)
    try:
        found = _figures(ROWS[row].way.train(job, meter), job, meter)
    except Exception as error:
        traceback.print_exc()
        found = {"error": in_short(error)}
    write_json(job.result, {**found, "versions": _versions()})


def _figures(trained: Trained, job: Job, meter: Meter) -> dict[str, Any]:
    found = {**meter.figures(), "rate_at_end": trained.rate, "note": trained.note}
    if job.weights:
        weights = trained.model.state_dict()
        torch.save({name: each.detach() for name, each in weights.items()}, job.last_weights)
    elif job.stop_after is None and job.turns is None:
        batches = data_module(job).val_dataloader()
        found["held_out_loss"] = held_out_loss(trained.model, batches)
    return found


def in_short(error: Exception) -> str:
    """Return an error in a line: its kind, its first line, and what torch would not load.

    Folders of this machine are left out.
    """
    line = _STYLES.sub("", str(error).strip().partition("\n")[0])
    told = _NOT_LOADED.search(str(error))
    if told is not None:  # torch's advice in between is long
        line = f"{line.partition('. ')[0]}. {told.group()}"
    text = f"{type(error).__name__}: {line}"
    for folder in (str(ROOT), tempfile.gettempdir(), str(Path.home())):
        text = text.replace(folder, "")
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _versions() -> dict[str, str]:
    found = versions()
    for package in _PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
