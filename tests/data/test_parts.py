"""Laws of encoding a large source in several processes, each with rows enough for it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from lit_ft.compat.refusal import Remedy
from lit_ft.data import parts
from lit_ft.data.cache import cache_folder
from lit_ft.data.encoding import Encoder
from lit_ft.data.json_values import RepeatedKey
from lit_ft.data.parts import parts_of, work_on
from lit_ft.data.rendering import CostlyTemplate
from lit_ft.data.rows import Part
from lit_ft.data.sources import Files, open_source, parse
from lit_ft.data.tables import encode_source

CHAT = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "one or two"}]


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "ROWS_PER_PROCESS", 4)
    monkeypatch.setattr(parts, "usable_cores", lambda: 3)
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))


def written(folder: Path, num_rows: int, *, bad: dict[int, str] | None = None) -> Files:
    """Write rows as JSON lines, with blank lines between some, and `bad` in place of some."""
    file = folder / "my.jsonl"
    lines = []
    for number in range(num_rows):
        turns = CHAT * (1 + number % 7)  # of different lengths: the longer ones are split
        lines.append((bad or {}).get(number, json.dumps({"messages": turns})))
        lines += [""] * (number % 3 == 0)
    file.write_text("\n".join(lines))
    source = open_source(str(file))
    assert isinstance(source, Files)
    return source


@pytest.mark.parametrize("num_rows", [1, 7, 8, 40])
def test_parts_hold_each_row_once_and_in_order(tmp_path: Path, num_rows: int) -> None:
    source = written(tmp_path, num_rows)
    cut = parts_of(source)
    assert cut[0].first == 0 and cut[-1].last is None
    assert all(one.last == other.first for one, other in pairwise(cut))
    assert [row for part in cut for row in parse(source, part=part)] == list(parse(source))
    assert len(cut) <= 3


def test_a_part_is_held_to_the_format_of_the_first_row(tmp_path: Path) -> None:
    other = json.dumps({"prompt": "q", "completion": "a"})
    source = written(tmp_path, 12, bad=dict.fromkeys(range(6, 12), other))
    [*_, last] = parts_of(source)
    with pytest.raises(ValueError, match="PromptCompletion"):
        list(parse(source, part=last))


def test_a_source_that_must_be_read_to_be_counted_is_not_cut(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}] * 40
    (tmp_path / "my.json").write_text(json.dumps(rows))  # each process would hold all of it
    assert len(parts_of(open_source(str(tmp_path / "my.json")))) == 1


@pytest.mark.process
@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
def test_several_processes_write_the_table_that_one_writes(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    bad_rows: str,
) -> None:
    bad = {5: "{", 33: '{"messages": []}'} if bad_rows == "skip" else {}
    source = written(tmp_path, 40, bad=bad)
    encoder = Encoder(tokenizer, 64, overlong="split", bad_rows=bad_rows)  # type: ignore[arg-type]
    several = encode_source(source, None, encoder).to_list()
    assert len({row["origin"] for row in several}) == 40 < len(several)
    monkeypatch.setattr(parts, "usable_cores", lambda: 1)
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "other"))
    assert encode_source(source, None, encoder).to_list() == several


@pytest.mark.process
@pytest.mark.parametrize("place", [0, 20, 39])
def test_an_error_names_its_row_and_leaves_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, place: int
) -> None:
    source = written(tmp_path, 40, bad={place: '{"messages": [{"role": "robot"}]}'})
    row = next(row for number, row in enumerate(source.rows()) if number == place)
    with pytest.raises(ValueError, match="robot") as caught:
        encode_source(source, None, Encoder(tokenizer, 64))
    assert str(caught.value).startswith(row.origin)
    assert list(cache_folder().iterdir()) == []


def test_processes_that_cannot_start_are_named_and_leave_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", no_more)
    source = written(tmp_path, 40)
    before = psutil.Process().num_fds()
    with pytest.raises(BlockingIOError) as caught:
        encode_source(source, None, Encoder(tokenizer, 64))
    assert psutil.Process().num_fds() == before, caught
    assert list(cache_folder().iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_that_reaches_all_processes_is_handled_by_the_first_alone(
    tmp_path: Path, warning: signal.Signals
) -> None:
    """As Slurm sends one to a job; the handler queues the job again."""

    def work(part: Part) -> Iterator[int]:
        os.kill(os.getpid(), warning)
        os.kill(os.getppid(), warning)
        yield os.getpid()

    def queue(*_: object) -> None:
        with (tmp_path / "queued").open("a") as file:
            print(os.getpid(), file=file)

    before = signal.signal(warning, queue)
    try:
        workers = list(work_on([Part(0, 1), Part(1, 2)], work))
    finally:
        signal.signal(warning, before)
    assert len(set(workers)) == 2
    assert set((tmp_path / "queued").read_text().split()) == {str(os.getpid())}


@pytest.mark.process
@pytest.mark.parametrize("chosen", [signal.SIG_IGN, lambda *_: None])
def test_a_hang_up_ends_the_processes_unless_it_is_ignored(chosen: Any) -> None:
    def work(part: Part) -> Iterator[int]:
        os.kill(os.getpid(), signal.SIGHUP)
        yield 1

    before = signal.signal(signal.SIGHUP, chosen)
    try:
        with nullcontext() if chosen == signal.SIG_IGN else pytest.raises(RuntimeError, match="-1"):
            assert sum(work_on([Part(0, 1), Part(1, 2)], work)) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


class OfTwo(Exception):
    """As an error of a library may be: without the arguments that make its copy."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.process
@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (RepeatedKey("prompt"), RepeatedKey, "key 'prompt' twice"),
        (CostlyTemplate("It is long", Remedy("cut it")), CostlyTemplate, "It is long. Cut it."),
        (OfTwo("this", "that"), RuntimeError, "OfTwo: this and that"),
    ],
)
def test_an_error_says_the_same_where_the_processes_were_started(
    error: Exception, kind: type[Exception], told: str
) -> None:
    def work(part: Part) -> Iterator[int]:
        yield 0
        raise error

    with pytest.raises(kind, match=told):
        list(work_on([Part(0, 1), Part(1, 2)], work))


KILLED = """
import signal, sys
from lit_ft.data import parts
from lit_ft.data.encoding import Encoder
from lit_ft.data.sources import open_source
from lit_ft.data.tables import encode_source
from tests.support.tokenizer import byte_level_tokenizer

parts.ROWS_PER_PROCESS, parts.usable_cores = 4, lambda: 3
signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer's, which saves first
encode_source(open_source(sys.argv[1]), None, Encoder(byte_level_tokenizer(), 64))
"""


@pytest.mark.process
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    source = written(tmp_path, 30_000)
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(source.files[0])])
    until = time.monotonic() + 60
    while len(started := psutil.Process(run.pid).children()) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(started) == 3
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
