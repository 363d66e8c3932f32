"""A fuzzer: `make fuzz` feeds generated configurations and damaged files to the real code.

Each case has a number, and with the seed it gives the same case again. What fails is a bare
exception, a hang, a wrong exit code, or damage that is taken as if nothing had happened.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.data.encoding import Encoder
from lit_ft.data.sources import open_source, parse
from lit_ft.storage.checkpoint_io import load_rest
from lit_ft.storage.damage import CHECKSUMS, damage, write_checksums
from tests.support import commands, settings
from tests.support.checkpoints import trained, write_checkpoint
from tests.support.damaging import damaged
from tests.support.data_files import write
from tests.support.tokenizer import byte_level_tokenizer

SECONDS = 180  # after which a case hangs
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".jsonl.zst")
CHECKED = (".jsonl.gz",)  # the formats with a checksum of their content
ROWS = [{"prompt": f"What is {n}?", "completion": f"{n}, é\u2028 \U0001f600!"} for n in range(30)]


class Hang(BaseException):
    """No `Exception`, because code under test catches those."""


def configurations(random: Random, folder: Path) -> None:
    """The check agrees with what is sound, and a run trains or says what is wrong."""
    drawn = settings.configuration(random)
    settings.agrees(drawn)
    if not set(drawn[0]) & settings.ELSEWHERE:
        status = settings.run(drawn, folder / "run", f"data.path={rows_file(folder)}")
        wrong = settings.unsound(settings.quick(drawn))
        assert status == ("refused" if wrong else status), f"{status} in spite of {wrong}"


def programs(random: Random, folder: Path) -> None:
    """The program exits with 0 or 1, and shows no traceback."""
    drawn = settings.configuration(random)
    if set(drawn[0]) & settings.ELSEWHERE:
        return
    own = [f"run_dir={folder / 'run'}", "~local", f"data.path={rows_file(folder)}"]
    status, output = commands.run(*own, *settings.arguments_of(drawn))
    wrong = settings.unsound(settings.quick(drawn))
    assert "Traceback" not in output, output
    assert status in ((1,) if wrong else (0, 1)), (status, output)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["status"] == ("failed" if status else "completed"), (status, summary["status"])


def data(random: Random, folder: Path) -> None:
    """A damaged file of data is read, or refused by name; a file with checksums is never wrong."""
    suffix = random.choice(SUFFIXES)
    path = folder / f"rows{suffix}"
    if suffix == ".txt":
        path.write_text("".join(f"{row['prompt']} {row['completion']}\n" for row in ROWS))
    else:
        write(path, ROWS)
    whole = encoded(path)
    path.write_bytes(damaged(path.read_bytes(), random))
    try:
        read = encoded(path)
    except ValueError as error:
        assert path.name in str(error) or str(folder) in str(error), f"unnamed: {error!r}"
        return
    assert suffix not in CHECKED or read == whole, "damage was taken for data"


def checkpoints(random: Random, folder: Path) -> None:
    """A damaged checkpoint is found to be so, or it loads as it was written."""
    path = folder / "last.ckpt"
    is_folder = random.random() < 0.5
    write_checkpoint_folder(path) if is_folder else write_checkpoint_file(path)
    whole = AtomicCheckpointIO().load_checkpoint(path)
    victim = random.choice(sorted(path.iterdir())) if is_folder else path
    if is_folder and victim.name != CHECKSUMS and random.random() < 0.1:
        victim.unlink()
    else:
        victim.write_bytes(damaged(victim.read_bytes(), random))
    if damage(path) is None:
        with suppress(ValueError):  # it refuses what is no tensor and no plain value
            assert same(AtomicCheckpointIO().load_checkpoint(path), whole), "damage was loaded"
            assert load_rest(path).keys() <= whole.keys()


TARGETS: dict[str, tuple[float, Callable[[Random, Path], None]]] = {
    "configurations": (0.5, configurations),
    "data": (0.2, data),
    "checkpoints": (0.1, checkpoints),
    "programs": (0.2, programs),
}
"""What is fuzzed, with its share of the time."""


def rows_file(folder: Path) -> Path:
    return write(folder / "rows.jsonl", ROWS)


@cache
def encoder() -> Encoder:
    return Encoder(byte_level_tokenizer(), 64)


def encoded(path: Path) -> list[Any]:
    return [(row.input_ids, row.labels) for row in encoder()(parse(open_source(str(path))))]


def write_checkpoint_folder(path: Path) -> None:
    with redirect_stderr(io.StringIO()):
        write_checksums(write_checkpoint(path))


def write_checkpoint_file(path: Path) -> None:
    model, optimizer = trained()
    state = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    AtomicCheckpointIO().save_checkpoint({**state, "callbacks": {"a": [1, None, "x" * 99]}}, path)


def same(one: Any, other: Any) -> bool:
    (ours, structure), (theirs, other_structure) = tree_flatten(one), tree_flatten(other)
    return structure == other_structure and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `Hang` when the time is up; what does not hear signals ends the process later."""

    def end(*_: Any) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def failure_of(target: str, case: int, seed: int) -> str | None:
    """Run a case and return its traceback; None if it passes."""
    random = Random(f"{seed}/{target}/{case}")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    said = io.StringIO()
    try:
        with time_limit(SECONDS), redirect_stdout(said), redirect_stderr(said):
            TARGETS[target][1](random, folder)
    except (Exception, Hang, SystemExit):
        return f"{traceback.format_exc()}{said.getvalue()[-2000:]}"
    finally:
        shutil.rmtree(folder)
    return None


def fuzz(seconds: float, seed: int, targets: list[str]) -> list[str]:
    """Run cases of each target for its share of the time, and return what failed."""
    spent, cases = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0)
    failed: list[str] = []
    while sum(spent.values()) < seconds:
        target = min(targets, key=lambda name: spent[name] / TARGETS[name][0])
        started = time.monotonic()
        if (told := failure_of(target, cases[target], seed)) is not None:
            again = f"make fuzz SEED={seed} CASE={target}:{cases[target]}"
            failed.append(f"{again}\n{told}")
            print(failed[-1], flush=True)
        spent[target] += time.monotonic() - started
        cases[target] += 1
    print(f"seed {seed}: {cases}, {len(failed)} failed", flush=True)
    return failed


def main() -> None:
    """Fuzz for some minutes, or repeat a case."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=None, help="the time, if it is not given")
    parser.add_argument("--case", default=None, help="one case, such as data:17")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    if options.case is None:
        sys.exit(bool(fuzz(60 * options.minutes, seed, list(TARGETS))))
    target, _, case = options.case.partition(":")
    if (told := failure_of(target, int(case), seed)) is not None:
        sys.exit(told)


if __name__ == "__main__":
    main()
