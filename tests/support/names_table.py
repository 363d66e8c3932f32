"""The names of other trainers as tables of docs/coming-from.md.

`python -m tests.support.names_table` prints them, `--write` puts them into the docs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from lit_ft.run.other_trainers import ANY, NAMES, Name
from tests.support.running import CONF

PAGE = CONF.parent / "docs" / "coming-from.md"
BEGIN, END = "<!-- names: begin -->\n", "<!-- names: end -->\n"


def tables() -> str:
    """Return a heading and a table for each trainer, in Markdown."""
    return "\n".join(line for trainer in NAMES for line in _table(trainer)) + "\n"


def _table(trainer: str) -> Iterator[str]:
    yield from (f"## {trainer}", "", "| You write | Here | Typed as it is |", "| --- | --- | --- |")
    for one in NAMES[trainer]:
        yield f"| `{one.theirs}` | {_here(one)} | {_outcome(one)} |"
    yield ""


def _here(one: Name) -> str:
    """Return what a name is here: its settings, what single values are, and what differs."""
    parts = []
    if one.here:
        is_name = one.here.endswith("={}") and not one.brings and one.here[0] != "+"
        is_name &= " " not in one.here
        parts.append(f"`{one.here[:-3]}`" if is_name else _code(f"{one.brings} {one.here}".strip()))
    by_settings: dict[str, list[str]] = {}
    for value, settings in one.values.items():
        # Where true means something, false means nothing; and what here says is not repeated.
        if value == ANY or (value == "false" and "true" in one.values):
            continue
        if not one.here or settings != one.here.format(value):
            by_settings.setdefault(settings, []).append(value)
    if list(by_settings.values()) == [["true"]] and not one.here and not one.why:
        parts += map(_code, by_settings)
    else:
        parts += [f"{_code(s)} for {', '.join(values)}" for s, values in by_settings.items()]
    if one.why and (one.here or not any(by_settings)):
        parts.append(f"otherwise {one.why}" if by_settings and not one.here else one.why)
    return "; ".join(parts)


def _code(settings: str) -> str:
    return f"`{settings.replace('++', '+').format('VALUE')}`" if settings else "nothing"


def _outcome(one: Name) -> str:
    if one.here or ANY in one.values:
        return "works"
    named = ", ".join(f"`{value}`" for value in one.values)
    if not one.why:
        return "works"
    return f"{named} work{'s' * (len(one.values) == 1)}" if named else "is answered"


if __name__ == "__main__":
    if "--write" in sys.argv:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(before + BEGIN + tables() + END + rest.partition(END)[2], encoding="utf-8")
    else:
        print(tables())
