"""Find tasks of lm-eval by name, and load them with their data."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal, Remedy
from lit_ft.evaluation.files import is_task_file
from lit_ft.evaluation.quiet import quiet

OWN = Path(__file__).parent / "tasks"
"""The folder of the tasks that come with lit_ft."""

_PARTS = ("tasks", "groups", "group_map")
_GROUP = re.compile(r"^group:", re.MULTILINE)
_NEEDED = ("lm_eval", "accelerate")  # the second one is of the extra [hf]


@dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded with their data.

    Attributes:
        names: The tasks and groups that were asked for. A tag stands for its tasks.
        loaded: What `lm_eval.evaluate` takes.
    """

    names: tuple[str, ...]
    loaded: Mapping[str, dict[str, Any]]


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Tasks:
    """Load tasks. Their data is read from the network, or from the cache of an earlier time.

    The random state changes, because tasks may draw from their data: it is seeded as lm-eval does.

    Args:
        names: The names of tasks, groups and tags of lm-eval, of lit_ft or of `include_path`, and
            paths of YAML files that describe one.
        include_path: The path of a folder with YAML files of further tasks; None for no folder.

    Raises:
        Refusal: If lm-eval, a task, its data or the folder is not there.
    """
    if not all(find_spec(name) for name in _NEEDED):
        raise Refusal("Scores need lm-eval, which is not installed", remedies.INSTALL_LM_EVAL)
    folder = None if include_path is None else Path(include_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise Refusal(
            f"include_path={include_path}: there is no such folder",
            Remedy("name the folder of your task files"),
        )
    with quiet():
        seed_as_lm_eval()
        manager = _manager_of(names, folder)
        found: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        asked: list[str] = []
        for name in names:
            one = _load(manager, name)
            members = {each for several in one["group_map"].values() for each in several}
            asked += [each for each in (*one["groups"], *one["tasks"]) if each not in members]
            for part in _PARTS:
                found[part] = {**one[part], **found[part]}
    for name, task in found["tasks"].items():
        _ensure_possible(name, task)
    return Tasks(tuple(dict.fromkeys(asked)), found)


def seed_as_lm_eval() -> None:
    """Seed the random states of the CPU as `lm_eval.simple_evaluate` does, for the same scores."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.default_generator.manual_seed(DEFAULT_OTHER_SEED)


def _manager_of(names: Sequence[str], folder: Path | None) -> Any:
    """Return what knows the tasks. lm-eval's own are 14,000 files, which take seconds to read."""
    manager = task_manager(folder, with_defaults=False)
    if all(_stands_alone(name, manager) for name in names):
        return manager
    return task_manager(folder, with_defaults=True)


def task_manager(folder: Path | None, *, with_defaults: bool) -> Any:
    """Return lm-eval's manager of the tasks of lit_ft, of a folder, and perhaps of lm-eval."""
    from lm_eval.tasks import TaskManager

    folders = [OWN] if folder is None else [folder, OWN]  # of tasks with one name, the last wins
    return TaskManager(include_path=folders, include_defaults=with_defaults)


def _stands_alone(name: str, manager: Any) -> bool:
    """Whether a task names no others, which may be lm-eval's; a file that is missing names none."""
    file = _file(name)
    if file is None or name in manager.all_subtasks:
        return name in manager.all_subtasks
    if not file.is_file():
        return True
    return _GROUP.search(file.read_text(encoding="utf-8", errors="replace")) is None


def _load(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    file = _file(name)
    if name in manager.all_tasks:
        spec = name
    elif file is not None and file.is_file():
        spec = str(file)
    elif file is not None:
        raise Refusal(f"The task {name} is a file that does not exist", Remedy("check the path"))
    else:
        raise _unknown(name, manager.all_tasks)
    try:
        loaded: dict[str, dict[str, Any]] = manager.load([spec])
    except Exception as error:  # whatever a task's own code and the network can raise
        reason = str(error).strip().partition("\n")[0].rstrip(".") or repr(error)
        is_offline = isinstance(error, ConnectionError)
        remedy = [remedies.TASK_WITHOUT_NETWORK, remedies.FILL_CACHE] if is_offline else []
        raise Refusal(f"The task {name} cannot be loaded: {reason}", *remedy) from error
    return loaded


def _file(name: str) -> Path | None:
    return Path(name).expanduser() if is_task_file(name) else None


def _unknown(name: str, known: Sequence[str]) -> Refusal:
    near = get_close_matches(name, known, n=3)
    hint = f"; the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""
    return Refusal(
        f"lm-eval has no task {name}{hint}",
        Remedy("see `lm-eval ls tasks`"),
        remedies.FOLDER_OF_TASKS,
    )


def _ensure_possible(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise Refusal(f"The task {name} runs the code that a model writes", remedies.SCORE_EXPORT)
    if getattr(task, "MULTIMODAL", False):
        raise Refusal(f"The task {name} shows pictures or plays sounds", remedies.SCORE_EXPORT)
