"""What a configuration may run: classes of known kinds, and what the command line itself trusts.

A configuration is data, which people copy from each other. Hydra, however, calls whatever a
`_target_` names. `lit_ft.run.hydra_trust` looks at the settings of Hydra itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_object

from lit_ft.run.override import name_of

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
    for path, target in _targets(config):
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
        arguments: The arguments of the command line. Only they can give trust.

    Raises:
        ValueError: If the configuration trusts a package, or code of a model, that the command
            line does not name.
    """
    named = set(map(name_of, arguments))
    trusted = config.get("trusted_packages")
    if trusted and "trusted_packages" not in named:
        raise ValueError(
            f"A configuration file sets trusted_packages={trusted}, and only the command line may. "
            "If you trust them, repeat it there."
        )
    setting = remote_code(config)
    if setting and not any("trust_remote_code" in argument for argument in arguments):
        raise ValueError(
            f"A configuration file sets {setting}=true, and only the command line may. If you "
            "trust the code in this repository, repeat it there."
        )
    files = task_files(config)
    if files and not any("include_path" in one or _TASK_FILE.search(one) for one in arguments):
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


def task_files(config: Mapping[str, Any]) -> str | None:
    """Return the setting that names files of lm-eval's tasks; None if there is none."""
    found = [(path, value) for path, value in _values(config, "include_path") if value]
    found += [
        (path, value)
        for path, value in _values(config, "tasks")
        if any(str(one).endswith((".yaml", ".yml")) for one in _listed(value))
    ]
    told = (f"{path.removeprefix('config.')}={value}" for path, value in found)
    return min(told, key=len, default=None)  # not that of the callback which reads it


def remote_code(config: Mapping[str, Any]) -> str | None:
    """Return the setting by which a repository's Python code would run; None if there is none."""
    settings = (path for path, value in _values(config, "trust_remote_code") if value)
    return next(settings, None)


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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _targets(node: Any) -> Iterator[tuple[str, str]]:
    for path, target in _values(node, "_target_"):
        yield path.removesuffix("._target_"), str(target)


def _texts(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the path and the value of each text."""
    return ((path, value) for path, _, value in _entries(config) if isinstance(value, str))


def _values(config: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each entry of that name."""
    return ((path, value) for path, key, value in _entries(config) if key == name)


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
