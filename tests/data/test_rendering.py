"""A chat template that would hang or fill the memory is refused by name, within seconds."""

from __future__ import annotations

import resource
import runpy
import signal
import sys
import threading
import time
from typing import Any

import pytest

from lit_ft.data import rendering
from lit_ft.data.encoding import Encoder
from lit_ft.data.rendering import CostlyTemplate, bounded_rendering
from lit_ft.data.rows import ParsedRow
from lit_ft.data.turns import ChatTemplate, end_tokens

LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LARGE = [
    "{{ 'x' * 10**10 }}",
    "{{ 'x' | center(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ (range(99999) | list * 9999) | length }}",
]
WORDS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
ANSWER = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    tokenizer.name_or_path = "someones/model"
    return tokenizer


def bounds() -> tuple[Any, ...]:
    timer = signal.getitimer(signal.ITIMER_VIRTUAL)
    return resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM), timer


@pytest.mark.parametrize("template", [LONG, *LARGE])
def test_a_template_without_end_is_refused_by_name_and_leaves_no_bounds(tokenizer, template):
    before, started = bounds(), time.process_time()
    tokenizer.chat_template = template
    bound = "0.2 seconds" if template == LONG else "(1024 MiB|0.2 seconds)"
    with pytest.raises(CostlyTemplate, match=f"of someones/model or .*{bound}") as told:
        ChatTemplate(tokenizer)
    assert template[:20] in str(told.value)
    assert time.process_time() - started < 5
    assert bounds() == before
    assert end_tokens(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
def test_a_template_that_waits_for_its_row_ends_the_reading_there(tokenizer, bad_rows):
    tokenizer.chat_template = f"{WORDS}{{% if 'boo' in messages[0].content %}}{LONG}{{% endif %}}"
    encoder = Encoder(tokenizer, 64, bad_rows=bad_rows)
    chats = [ANSWER, [{"role": "user", "content": "boo"}, ANSWER[1]], ANSWER]
    rows = [ParsedRow(f"my.jsonl:{n}", chat) for n, chat in enumerate(chats)]
    with pytest.raises(CostlyTemplate, match="of someones/model or given for it"):
        list(encoder(rows))


def test_renderings_that_overlap_in_threads_leave_no_bounds(tokenizer):
    before, other_renders, main_is_done = bounds(), threading.Event(), threading.Event()

    def render() -> None:
        with bounded_rendering(tokenizer):
            other_renders.set()
            main_is_done.wait(5)

    thread = threading.Thread(target=render)
    with bounded_rendering(tokenizer):
        thread.start()
        assert other_renders.wait(5)
    main_is_done.set()
    thread.join()
    assert bounds() == before


def test_a_timer_of_the_caller_goes_on(tokenizer):
    """A profiler's, which counts the time of the rendering too."""
    rung: list[int] = []
    handler = signal.signal(signal.SIGVTALRM, lambda number, _: rung.append(number))
    signal.setitimer(signal.ITIMER_VIRTUAL, 100, 7)
    try:
        with bounded_rendering(tokenizer):
            spend(0.1)
        left, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
        assert (99 < left < 99.97, interval) == (True, pytest.approx(7, abs=0.1)), left
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.03)
        with bounded_rendering(tokenizer):
            spend(0.1)
        spend(0.05)
        assert rung == [signal.SIGVTALRM]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


def spend(seconds: float) -> None:
    """Compute until the process has used this much time of its own, by the kernel's count.

    The timer counts at least a third of it: it samples what runs at each tick of the clock, and the
    kernel corrects its own count.
    """
    until = resource.getrusage(resource.RUSAGE_SELF).ru_utime + seconds
    while resource.getrusage(resource.RUSAGE_SELF).ru_utime < until:
        sum(range(10_000))


def test_windows_has_no_bounds_and_renders(tokenizer, monkeypatch):
    tokenizer.chat_template = WORDS
    with monkeypatch.context() as windows:
        windows.setitem(sys.modules, "resource", None)
        for name in ("setitimer", "ITIMER_VIRTUAL", "SIGVTALRM"):
            windows.delattr(signal, name)
        windows.setattr("builtins.open", no_proc(open))
        with runpy.run_path(rendering.__file__)["bounded_rendering"](tokenizer):
            text = tokenizer.apply_chat_template(ANSWER, tokenize=False)
    assert text == "<user>q</s><assistant>a</s>"


def no_proc(opens: Any) -> Any:
    def opened(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return opens(path, *arguments, **options)

    return opened


def test_a_lower_limit_of_the_process_stays(tokenizer):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    own = 1 << 40
    resource.setrlimit(resource.RLIMIT_AS, (own, hard))
    try:
        with bounded_rendering(tokenizer):
            assert resource.getrlimit(resource.RLIMIT_AS)[0] < own
        assert resource.getrlimit(resource.RLIMIT_AS)[0] == own
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
