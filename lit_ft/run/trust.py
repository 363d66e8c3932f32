"""What a configuration may run: classes of known kinds, and what the command line itself trusts.

A configuration is data, which people copy from each other. Hydra, however, calls whatever a
`_target_` names, and a file under conf/ can set Hydra's own callbacks, launcher and loggers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import OmegaConf

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

# What Hydra itself runs or passes on: as classes, as logging's factories, or as the environment.
_RUN_BY_HYDRA = (
    "callbacks",
    "launcher",
    "sweeper",
    "job_logging",
    "hydra_logging",
    "job.env_set",
    "job.env_copy",
    "searchpath",
)


def refuse_untrusted(
    config: Mapping[str, Any],
    *,
    also: Sequence[str] = (),
    remedy: str = "trusted_packages=[{package}]",
) -> None:
    """Raise ValueError if a `_target_` is neither a class of a known kind nor of `also`.

    The object decides, not its name: `lit_ft.x.shutil.rmtree` is a function of shutil.

    Args:
        config: The configuration as plain dicts, lists and values.
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


def trusted_packages(config: Mapping[str, Any], arguments: Sequence[str]) -> list[str]:
    """Return the packages that the command line trusts.

    Args:
        config: The configuration as plain dicts, lists and values.
        arguments: The arguments of the command line. Only they can give trust.

    Raises:
        ValueError: If the configuration trusts a package, or code of a model, that the command
            line does not name.
    """
    named = {argument.partition("=")[0].lstrip("+~") for argument in arguments}
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
    return list(map(str, trusted)) if isinstance(trusted, list) else []


def remote_code(config: Mapping[str, Any]) -> str | None:
    """Return the setting by which a repository's Python code would run; None if there is none."""
    settings = (path for path, value in _values(config, "trust_remote_code") if value)
    return next(settings, None)


def compositions(arguments: Sequence[str], *, config_dir: Path) -> list[Any]:
    """Return what Hydra composes, its own settings included; several for the choices of a sweep.

    Args:
        arguments: The arguments of the command line. If Hydra cannot read them, nothing is
            composed: it says itself what is wrong with them.
        config_dir: The folder that holds train.yaml.
    """
    settings = [one for one in arguments if not one.startswith("-")]
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            return [
                compose("train", chosen, return_hydra_config=True)
                for chosen in _without_sweeps(settings)
            ]
    except HydraException:
        return []


def hold_hydra_to_command_line(
    composed: Sequence[Any], arguments: Sequence[str], *, config_dir: Path
) -> None:
    """Raise ValueError if a chosen file changes what Hydra itself runs, before Hydra runs it.

    Args:
        composed: What Hydra composes; see `compositions`.
        arguments: The arguments of the command line, which may change it.
        config_dir: The folder that holds train.yaml.
    """
    own = [one for one in arguments if one.lstrip("+~").startswith("hydra")]
    [expected] = compositions(own, config_dir=config_dir) or [None]
    if expected is None:
        return
    for whole in composed:
        for name in _RUN_BY_HYDRA:
            if _of_hydra(whole, name) != _of_hydra(expected, name):
                raise ValueError(
                    f"A configuration file sets hydra.{name}, and only the command line may, since "
                    "Hydra runs what it names. If you trust it, repeat it there."
                )


def _of_hydra(config: Any, name: str) -> Any:
    node = OmegaConf.select(config.hydra, name)
    value: Any = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    if name == "sweeper":
        value = {key: one for key, one in value.items() if key != "params"}  # values to try
    return value


def _without_sweeps(settings: Sequence[str]) -> Iterator[list[str]]:
    """Yield the settings with one choice of each sweep, until each choice has had its turn."""
    parser = OverridesParser.create()
    choices = []
    for setting in settings:
        try:
            override = parser.parse_override(setting)
        except HydraException:
            return
        swept = override.is_sweep_override()
        key = f"{override.get_key_element()}="
        choices.append(
            [f"{key}{one}" for one in override.sweep_string_iterator()] if swept else [setting]
        )
    for turn in range(max(map(len, choices), default=1)):
        yield [several[min(turn, len(several) - 1)] for several in choices]


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
    parents = {f"{parent.__module__}.{parent.__qualname__}" for parent in found.__mro__}
    return module.startswith("lit_ft.") or not parents.isdisjoint(KINDS)


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


def _values(node: Any, name: str, path: str = "config") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each entry of that name."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == name:
                yield f"{path}.{key}", value
            yield from _values(value, name, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _values(value, name, f"{path}[{index}]")
