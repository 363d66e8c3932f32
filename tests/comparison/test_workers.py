"""Runs that train at the same time."""

from __future__ import annotations

import time

from lit_ft.comparison.cells import Cell
from lit_ft.comparison.workers import Workers
from lit_ft.storage.json_file import write_json


def test_a_run_that_two_ask_for_at_once_trains_once(tmp_path):
    cell, trained = Cell((), tmp_path, "run"), []

    def train(cell, environment, stopped):
        trained.append(cell)
        time.sleep(0.3)  # the other one asks meanwhile
        summary = {"status": "completed", "config": {}, "val_loss": 1.0}
        write_json(cell.folder / "summary.json", summary)
        return summary

    found = []
    workers = Workers(train, [{}, {}])
    workers.each(lambda _: found.append(workers.summary(cell, {})["val_loss"]), range(2))
    assert (found, trained) == ([1.0, 1.0], [cell])
