"""The process that plans the memory of a run while the run loads; see `background_plan`.

It reads what to plan from standard input, as a line of JSON, and writes the plan to standard
output. It ends with its parent, whose end closes standard input.
"""

from __future__ import annotations

import json
import os
from queue import SimpleQueue
from threading import Thread
from typing import Any

from lit_ft.run.loading import loading_libraries

_LONGEST = 1000  # characters of a message: the pipe holds it without a reader
_BLOCK = 1 << 16  # bytes


def main() -> None:
    """Plan one run, and end the process."""
    lines: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_listen, args=(lines,), daemon=True).start()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    try:
        # Imported before the question comes, because it takes seconds.
        with loading_libraries():
            from lit_ft.run.fake_run import plan_run

        asked = json.loads(lines.get())
        plan = plan_run(asked["config"], device_type=asked["device_type"])
        told: dict[str, Any] = {"plan": plan.to_dict()}
    except Exception as error:  # the parent logs it, and goes on
        told = {"why_not": f"{type(error).__name__}: {error}"[:_LONGEST]}
    answer.write(json.dumps(told))
    answer.flush()
    os._exit(0)  # the thread still reads


def _listen(lines: SimpleQueue[bytes]) -> None:
    """Hand on the first line of standard input, and end the process at its end."""
    read = b""
    while block := os.read(0, _BLOCK):
        read += block
        if block.endswith(b"\n"):
            lines.put(read)
    os._exit(0)


if __name__ == "__main__":
    main()
