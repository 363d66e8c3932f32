"""The styles from which a user chooses."""

from __future__ import annotations

import os
from typing import Literal

from lit_ft.terminal.console import console
from lit_ft.terminal.display import Display, display, set_display
from lit_ft.terminal.live_line import LiveLine
from lit_ft.terminal.plain_lines import PlainLines

Style = Literal["auto", "rich", "plain", "off"]

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # as torchrun, Lightning and Slurm set them


def use_style(style: Style) -> None:
    """Choose how this process shows what it does; of several ranks only the first shows anything.

    Args:
        style: "rich" shows a line that changes, if the output can show one; "plain" prints lines,
            and "off" shows nothing. "auto" is "rich" if standard output is such a terminal, and
            "plain" otherwise.
    """
    if not is_first_rank():
        style = "off"
    kind = {"rich": LiveLine, "plain": PlainLines, "off": Display}[resolved(style)]
    console().quiet = kind is Display
    if type(display()) is not kind:
        set_display(kind())


def is_first_rank() -> bool:
    """Return whether this process is the first rank of its run, as its launcher has set it."""
    return all(os.environ.get(rank, "0") == "0" for rank in _RANKS)


def use_live_line() -> None:
    """Show a line that changes in a terminal, and nothing where only the result is wanted."""
    if resolved("auto") == "rich":
        use_style("rich")


def resolved(style: Style) -> Style:
    """Return the style that is possible here: "rich" needs an output that can change a line."""
    if style not in ("auto", "rich"):
        return style
    can_change = console().is_terminal and not console().is_dumb_terminal
    # FORCE_COLOR, which CI systems set, makes a terminal of a file; "auto" asks for a real one.
    return "rich" if can_change and (style == "rich" or console().file.isatty()) else "plain"
