"""What a resumed run does with settings that differ from those of its checkpoint's run."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from fnmatch import fnmatchcase
from typing import Any

from lit_ft.optim.schedules import OBEYED as OBEYED_OPTIONS
from lit_ft.run.redaction import MASK
from lit_ft.run.repeats import repeated


class Outcome(Enum):
    """What becomes of a setting that differs."""

    UNLISTED = auto()  # it has no influence on the weights
    SECRET = auto()  # the checkpoint does not hold it, so this run must be given it again
    OBEYED = auto()  # from the first step after the resume
    ELSEWHERE = auto()  # it says where weights or rows are, and these may be the same
    STEP = auto()  # inside an epoch, the rows of a step must stay as many as they were
    ROWS = auto()  # inside an epoch, the rows and their order must stay what they were
    REFUSED = auto()  # the saved state depends on it, and would silently win


# The first row with a pattern that fits a setting decides; `*` stands for any text.
_OUTCOMES: tuple[tuple[Outcome, str], ...] = (
    (Outcome.OBEYED, " ".join(f"optim.{n} groups.*.options.{n}" for n in OBEYED_OPTIONS)),
    (Outcome.UNLISTED, "optim.fused optim.foreach optim.compiled"),
    (Outcome.REFUSED, "optim* groups* seed"),
    (Outcome.OBEYED, "schedule.*"),
    (Outcome.REFUSED, "schedule"),
    (Outcome.OBEYED, "adapter.lora_dropout galore.scale galore.projector.every"),
    (Outcome.UNLISTED, "galore.refresh.every_n_steps"),
    (Outcome.OBEYED, "galore.refresh*"),
    (Outcome.REFUSED, "adapter* galore*"),
    (Outcome.ELSEWHERE, "model.name_or_path model*.gguf_file model*.package"),
    (Outcome.UNLISTED, "model*.install model*.name model*.hub_id model*.license"),
    (Outcome.UNLISTED, "model.trust_remote_code"),
    (Outcome.OBEYED, "model.attn_implementation"),
    (Outcome.REFUSED, "model* module data.streaming"),
    (Outcome.ELSEWHERE, "data.path data.sources* data.source_options*"),
    (Outcome.ELSEWHERE, "data.val_path data.val_source_options*"),
    (Outcome.OBEYED, "data.bad_rows data.drop_unrendered"),  # what a stopped stream may ask for
    (Outcome.UNLISTED, "data.num_workers data.val_batch_size data.max_val_examples"),
    (Outcome.STEP, "data.batch_size trainer.accumulate_grad_batches trainer.accelerator"),
    (Outcome.STEP, "trainer.devices trainer.num_nodes trainer.strategy*"),
    (Outcome.ROWS, "data*"),
    (Outcome.UNLISTED, "trainer.logger* trainer.callbacks* trainer.plugins* trainer.profiler*"),
    (Outcome.UNLISTED, "trainer.default_root_dir trainer.enable_* trainer.log_every_n_steps"),
    (Outcome.UNLISTED, "trainer.val_check_interval trainer.check_val_every_n_epoch"),
    (Outcome.UNLISTED, "trainer.limit_val_batches trainer.num_sanity_val_steps"),
    (Outcome.REFUSED, "callbacks.early_stopping.patience"),  # Lightning restores the saved one
    (Outcome.UNLISTED, "callbacks.progress* callbacks.start_table* callbacks.throughput*"),
    (Outcome.UNLISTED, "callbacks.memory* callbacks.learning_rate* callbacks.samples*"),
    (Outcome.UNLISTED, "callbacks.last_checkpoint* callbacks.best_checkpoint* callbacks.export*"),
    (Outcome.UNLISTED, "callbacks.stop_on_signal* callbacks.layerwise* callbacks.auto_batch_size*"),
    (Outcome.OBEYED, "trainer* loss* module* callbacks*"),
    (Outcome.UNLISTED, "*"),
)


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's run.

    Attributes:
        setting: The name of the setting, such as `optim.lr`.
        was: The value in the checkpoint's run, as plain values.
        now: The value in this run.
        outcome: What becomes of it.
    """

    setting: str
    was: Any
    now: Any
    outcome: Outcome

    def __str__(self) -> str:
        """Return the setting with both values, as in "optim.lr (was 0.0001, now 5e-05)"."""
        return f"{self.setting} (was {_text(self.was)}, now {_text(self.now)})"


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the settings that differ and have an influence on training.

    Args:
        was: The configuration of the checkpoint's run, as plain values.
        now: The configuration of this run. Its classes are imported to learn their defaults, so it
            must be trusted.
    """
    found: dict[str, Change] = {}
    differing = differences(was, now, defaults=True)
    for path, before, after in sorted(differing, key=lambda each: each[0].count(".")):
        setting = repeated(path)
        if not any(f"{setting}.".startswith(f"{known}.") for known in found):
            found[setting] = Change(path, before, after, _outcome(setting, before, after))
    return [change for change in found.values() if change.outcome is not Outcome.UNLISTED]


def differences(
    was: Any, now: Any, path: str = "", *, defaults: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path of each setting that differs, and both values; None if it is left out.

    Args:
        was: One configuration, or a part of it, as plain values.
        now: The other configuration, or the same part of it.
        path: The path of this part.
        defaults: Whether an argument that is left out has the default of its class, which is
            imported.
    """
    if isinstance(was, Mapping) and isinstance(now, Mapping) and _kind(was) == _kind(now):
        for name in {**was, **now}:
            if not name.startswith("_"):
                given = name in was and name in now
                usual = _default(now, name) if defaults and not given else None
                sides = was.get(name, usual), now.get(name, usual)
                yield from differences(*sides, f"{path}.{name}".lstrip("."), defaults=defaults)
    elif _are_lists_of_parts(was, now):
        for index, sides in enumerate(zip(was, now, strict=True)):
            yield from differences(*sides, f"{path}.{index}", defaults=defaults)
    elif was != now:
        yield path, was, now


def _outcome(setting: str, was: Any, now: Any) -> Outcome:
    if MASK in (was, now):
        return Outcome.SECRET if now is None else Outcome.UNLISTED
    if setting == "trainer.precision" and _precision_of_weights(was) != _precision_of_weights(now):
        return Outcome.REFUSED
    return next(
        outcome
        for outcome, patterns in _OUTCOMES
        if any(fnmatchcase(setting, pattern) for pattern in patterns.split())
    )


def _precision_of_weights(precision: Any) -> str:
    """Return the precision in which the trainer keeps the weights, such as "bf16"."""
    kept, _, how = str(precision).partition("-")
    return kept if how == "true" or kept == "64" else "32"


def _kind(part: Mapping[str, Any]) -> str:
    """Return the class of a part; a paged optimizer keeps the state of one that is not."""
    return str(part.get("_target_")).replace(".Paged", ".")


def _default(part: Mapping[str, Any], name: str) -> Any:
    """Return the default of an argument of a part's class; None if it is not a plain value."""
    target: Any = pydoc.locate(str(part.get("_target_")))
    argument = inspect.signature(target).parameters.get(name) if callable(target) else None
    value = None if argument is None else argument.default
    return list(value) if isinstance(value, tuple) else value if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _are_lists_of_parts(was: Any, now: Any) -> bool:
    return (
        isinstance(was, list)
        and isinstance(now, list)
        and len(was) == len(now)
        and all(isinstance(part, Mapping) for part in (*was, *now))
    )


def _text(value: Any) -> str:
    """Return a value as text; a part of the configuration is named by its class."""
    if isinstance(value, Mapping):
        return str(value.get("_target_", "set")).rpartition(".")[2]
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return "null" if value is None else str(value)
