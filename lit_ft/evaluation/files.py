"""Which names of tasks are files."""

from __future__ import annotations

_ENDINGS = (".yaml", ".yml")


def is_task_file(task: str) -> bool:
    """Whether a task is named by its file, which can run Python code."""
    return task.endswith(_ENDINGS)
