"""What a configuration may run: classes of known kinds, and what the command line itself trusts.

A configuration is data, which people copy from each other. Hydra, however, calls whatever a
`_target_` names. `lit_ft.run.hydra_trust` looks at the settings of Hydra itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_object

from lit_ft.evaluation.files import is_task_file
from lit_ft.run.override import name_of
from lit_ft.run.repeats import repeated

KINDS = (
    "lightning.fabric.plugins.environments.cluster_environment.ClusterEnvironment",
    "lightning.fabric.plugins.io.checkpoint_io.CheckpointIO",
    "lightning.fabric.plugins.precision.precision.Precision",
    "lightning.pytorch.callbacks.callback.Callback",
    "lightning.pytorch.loggers.logger.Logger",
    "lightning.pytorch.profilers.profiler.Profiler",
    "lightning.pytorch.strategies.strategy.Strategy",
    "lightning.pytorch.trainer.trainer.Trainer",
    "peft.config.PeftConfigMixin",
    "torch.optim.lr_scheduler.LRScheduler",
    "torch.optim.optimizer.Optimizer",
    "transformers.utils.quantization_config.QuantizationConfigMixin",
)
"""The classes whose subclasses a configuration may name, if a library of `LIBRARIES` defines them.

They stand under the names where they are defined, so that looking does not import them.
"""

FACTORIES = ("transformers.optimization",)
"""The modules whose functions a configuration may name: those that make schedules."""

LIBRARIES = (
    "bitsandbytes",
    "galore_torch",
    "lightning",
    "lit_ft",
    "peft",
    "torch",
    "torchao",
    "transformers",
)
"""The packages that lit_ft uses. Naming a class of another one would already run its code."""

OWN = "lit_ft.run."
"""The modules of the program itself. Some of their classes open a file to write to."""

TRUST = ("trusted_packages", "trust_remote_code", "include_path")
"""The names of the settings that give trust, which only the command line may set."""

# Tasks of lm-eval that are files, too: as those of `include_path`, they name Python code to run.
_TASK_FILE = re.compile(r"\btasks\b.*\.ya?ml\b", re.DOTALL)


def refuse_untrusted(
    config: Mapping[str, Any],
    *,
    also: Sequence[str] = (),
    remedy: str = "trusted_packages=[{package}]",
) -> None:
    """Raise ValueError unless Hydra may build what a configuration describes.

    Each `_target_` must be a class of a known kind, or of `also`. The object decides, not its name:
    `lit_ft.x.shutil.rmtree` is a function of shutil. No text may hold an interpolation, since Hydra
    would resolve it to targets that nobody has looked at.

    Args:
        config: The configuration as plain dicts, lists and values, with its interpolations
            resolved.
        also: The names of further packages that the user trusts, with all that they define.
        remedy: What gives trust on the command line, with `{package}` for the package's name.
    """
    positional = {path.removesuffix("._args_") for path, value in _values(config, "_args_")}
    for path, target in _targets(config):
        if path in positional and _home(_found(target)).partition(".")[0] == "lit_ft":
            raise ValueError(
                f"{path}._args_: the classes of lit_ft take their arguments by name, because some "
                "of the names give trust. Write the names."
            )
        if not _is_trusted(target, also):
            raise ValueError(
                f"{path}._target_={target}: this is no class that a configuration may name. Those "
                f"are the classes of lit_ft, and of {', '.join(LIBRARIES)} the optimizers, "
                "schedules, callbacks, loggers, strategies, plugins and configurations. If you "
                f"trust it, add {remedy.format(package=_defined_in(target))} to the command line."
            )
    for path, text in _texts(config):
        if "${" in text:
            raise ValueError(
                f"{path}={text}: no value may hold ${{...}} once the configuration is composed, "
                "because it would be filled in unseen. Write the value itself."
            )


def trusted_packages(config: Mapping[str, Any], arguments: Sequence[str]) -> list[str]:
    """Return the packages that the command line trusts.

    Args:
        config: The configuration as plain dicts, lists and values.
        arguments: The arguments of the command line. Only they can give trust, each to the value
            that it sets: what an interpolation in it stands for may be a file's.

    Raises:
        ValueError: If the configuration trusts a package, the code of a model or the file of a task
            that the command line does not name.
    """
    typed = [_typed(one) for one in arguments if _sets_value(one)]
    trusted = config.get("trusted_packages")
    if trusted and not set(_texts_in(trusted)) <= _texts_under("trusted_packages", typed):
        raise ValueError(
            f"A configuration file sets trusted_packages={trusted}, and only the command line may. "
            "If you trust them, repeat it there."
        )
    if remote := [one for one in _remote_code(config) if one not in _trusting(typed)]:
        raise ValueError(
            f"A configuration file sets config.{remote[0]}=true, and only the command line may. If "
            "you trust the code in this repository, repeat it there."
        )
    if files := _task_files(config, typed):
        raise ValueError(
            f"A configuration file sets {files}, and only the command line may, because the files "
            "of tasks can run Python code. If you trust them, repeat it there."
        )
    return list(map(str, trusted)) if isinstance(trusted, list) else []


def gives_trust(setting: str) -> bool:
    """Whether a setting, as `name=value`, gives trust or names code to run.

    >>> gives_trust("eval.tasks=[my.yaml]"), gives_trust("eval.tasks=[arc_easy]")
    (True, False)
    """
    return any(name in setting for name in TRUST) or _TASK_FILE.search(setting) is not None


def remote_code(config: Mapping[str, Any]) -> str | None:
    """Return the setting by which a repository's Python code would run; None if there is none."""
    return next((f"config.{setting}" for setting in _remote_code(config)), None)


def _remote_code(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings that trust the code of a repository, each as the user types its name."""
    for path, value in _values(config, "trust_remote_code"):
        if value:
            yield repeated(path.removeprefix("config."))


def _trusting(typed: Sequence[tuple[str, Any]]) -> set[str]:
    """Return the settings by which the command line trusts the code of a repository."""
    # What else is typed there is not true or false, which is told later.
    found = {name for name, value in typed if _last(name) == "trust_remote_code" and value}
    for name, node in typed:
        found |= {path for path, value in _values(node, "trust_remote_code", name) if value}
    # Trainer's name of the model's setting has none in front of it.
    return {repeated(name if "." in name else f"model.{name}") for name in found}


def _task_files(config: Mapping[str, Any], typed: Sequence[tuple[str, Any]]) -> str | None:
    """Return the setting that names a file of lm-eval's tasks which the command line does not."""
    found = []
    for name, is_file in (("include_path", bool), ("tasks", is_task_file)):
        named = _texts_under(name, typed)
        for path, value in _values(config, name):
            if any(is_file(text) and text not in named for text in _texts_in(value)):
                found.append(f"{path.removeprefix('config.')}={value}")
    return min(found, key=len, default=None)  # not that of the callback which reads it


def _sets_value(argument: str) -> bool:
    """Whether an argument sets a value: it is no option, deletes nothing, and chooses no group."""
    return "=" in argument and argument[0] not in "-~" and "@" not in name_of(argument)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _typed(argument: str) -> tuple[str, Any]:
    """Return the name that an argument sets, and its value, without what it refers to."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:  # a path with brackets, which the program quotes before Hydra reads it
        return name_of(argument), argument.partition("=")[2].strip("'\"")
    return name_of(argument), None if override.is_sweep_override() else override.value()


def _texts_under(name: str, typed: Sequence[tuple[str, Any]]) -> set[str]:
    """Return the texts that the command line sets under a name, also inside other settings."""
    own = [value for setting, value in typed if _last(setting) == name]
    inside = [value for _, node in typed for _, value in _values(node, name)]
    return {text for value in (*own, *inside) for text in _texts_in(value)}


def _texts_in(value: Any) -> list[str]:
    """Return a value, or the values of a list, as texts; none if it is null."""
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one is not None]


def _is_trusted(target: str, also: Sequence[str]) -> bool:
    if target.partition(".")[0] not in (*LIBRARIES, *(name.partition(".")[0] for name in also)):
        return False  # importing it would run it
    found = _found(target)
    module = _home(found)
    if any(module == name or module.startswith(f"{name}.") for name in also):
        return callable(found)
    if inspect.isfunction(found):
        return module in FACTORIES
    if not inspect.isclass(found) or module.partition(".")[0] not in LIBRARIES:
        return False
    if module.startswith("lit_ft.") and not module.startswith(OWN):
        return True
    parents = {f"{parent.__module__}.{parent.__qualname__}" for parent in found.__mro__}
    return not parents.isdisjoint(KINDS)


def _defined_in(target: str) -> str:
    """Return the package that defines a target, or that its name begins with."""
    root = target.partition(".")[0]
    module = _home(_found(target)) if root in LIBRARIES else ""
    return (module or root).partition(".")[0]


def _found(target: str) -> Any:
    """Return what a name stands for; None if there is no such thing, or its import fails."""
    try:
        return get_object(target)
    except Exception:  # whatever an import can raise; Hydra names the error later
        return None


def _home(found: Any) -> str:
    """Return the module that defines an object; empty if none does."""
    return str(getattr(found, "__module__", None) or "")


def _targets(node: Any) -> Iterator[tuple[str, str]]:
    for path, target in _values(node, "_target_"):
        yield path.removesuffix("._target_"), str(target)


def _texts(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the path and the value of each text."""
    return ((path, value) for path, _, value in _entries(config) if isinstance(value, str))


def _values(config: Any, name: str, path: str = "config") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each entry of that name."""
    return ((inner, value) for inner, key, value in _entries(config, path) if key == name)


def _entries(node: Any, path: str = "config") -> Iterator[tuple[str, Any, Any]]:
    """Yield the path, the key and the value of each entry, those inside other entries included."""
    if isinstance(node, Mapping):
        below = [(f"{path}.{key}", key, value) for key, value in node.items()]
    elif isinstance(node, list | tuple):
        below = [(f"{path}[{index}]", index, value) for index, value in enumerate(node)]
    else:
        return
    for inner, key, value in below:
        yield inner, key, value
        yield from _entries(value, inner)
