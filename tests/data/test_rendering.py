"""A chat template that would hang or fill the memory is refused by name, within seconds."""

from __future__ import annotations

import resource
import signal
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


def test_outside_the_main_thread_the_memory_is_bounded(tokenizer):
    tokenizer.chat_template = LARGE[0]
    caught: list[Exception] = []

    def render() -> None:
        try:
            with bounded_rendering(tokenizer):
                tokenizer.apply_chat_template(ANSWER, tokenize=False)
        except CostlyTemplate as error:
            caught.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert len(caught) == 1


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
