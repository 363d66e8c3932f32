"""What a process prints is rewritten, whoever prints it."""

from __future__ import annotations

import io
import sys

from lit_ft.run.output import rewrite_output


def shout(text: str) -> str:
    return text.upper() + "!" * text.endswith("\n")


def test_each_text_is_rewritten_once_also_for_who_replaces_the_function_that_writes(monkeypatch):
    there, heard = io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", there)
    monkeypatch.setattr(sys, "stderr", None)  # as in a process without a terminal
    rewrite_output(shout)
    rewrite_output(shout)
    print("a")
    write = sys.stdout.write
    sys.stdout.write = lambda text: heard.append(text) or write(text)  # as wandb does
    sys.stdout.writelines(["b", "c"])
    assert there.getvalue() == "A\n!BC"
    assert heard == ["B", "C"]
