"""What a program shows while it works: one line that changes, or plain lines for a file."""

from lit_ft.terminal.console import console
from lit_ft.terminal.display import display, stage
from lit_ft.terminal.live_line import LiveLine
from lit_ft.terminal.plain_lines import PlainLines
from lit_ft.terminal.styles import Style, resolved, use_live_line, use_style

__all__ = [
    "LiveLine",
    "PlainLines",
    "Style",
    "console",
    "display",
    "resolved",
    "stage",
    "use_live_line",
    "use_style",
]
