"""What configuration files may change of Hydra itself: nothing that it runs.

A file under conf/ can set Hydra's own callbacks, launcher and loggers, and start a sweep. So all
that Hydra will compose is composed here first, in the same way, and looked at.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from lit_ft.run.override import name_of
from lit_ft.run.trust import gives_trust

# What Hydra itself runs or passes on: as classes, as logging's factories, or as the environment.
# It writes files of its own to `output_subdir`, over what is there.
_RUN_BY_HYDRA = (
    "callbacks",
    "launcher",
    "sweeper",
    "job_logging",
    "hydra_logging",
    "job.env_set",
    "job.env_copy",
    "searchpath",
    "mode",
    "output_subdir",
)


def compositions(arguments: Sequence[str], *, config_dir: Path) -> list[Any]:
    """Return what Hydra composes, its own settings included; several if it is a sweep.

    The first one is the whole sweep's. In the others, each choice of each setting has its turn.

    Args:
        arguments: The arguments of the command line, which alone may change what Hydra runs.
        config_dir: The folder that holds train.yaml.

    Raises:
        HydraException: If Hydra cannot compose a configuration from the arguments.
        ValueError: If a configuration file changes what Hydra runs, or starts a sweep.
    """
    options = get_args_parser().parse_args(list(arguments))
    if options.shell_completion or options.experimental_rerun is not None:
        return []  # Hydra does not compose these arguments
    typed: list[str] = options.overrides
    expected = _expected(typed, options, config_dir=config_dir)
    searches = options.multirun or any(name_of(one) == "hparams_search" for one in typed)
    found = []
    for settings, whole in _composed(typed, options, config_dir=config_dir):
        for name in _RUN_BY_HYDRA:
            is_asked_for = name == "mode" and searches
            if not is_asked_for and _of_hydra(whole, name) != _of_hydra(expected, name):
                raise _set_by_file(f"hydra.{name}", "since Hydra runs what it names")
        for name in ("overrides.task", "overrides.hydra"):
            if not set(_of_hydra(whole, name)) <= set(settings):
                raise _set_by_file(f"hydra.{name}", "since it stands for the command line")
        _ensure_harmless(_tried(whole).items() - _tried(expected).items())
        found.append(whole)
    return found


def composer(options: Sequence[str], *, config_dir: Path) -> Callable[[Sequence[str]], Any]:
    """Return a function that composes settings as Hydra would with these options.

    Args:
        options: The options of the command line, such as `--config-dir=FOLDER`.
        config_dir: The folder that holds train.yaml.
    """
    parsed = get_args_parser().parse_args(list(options))

    def composed(settings: Sequence[str]) -> Any:
        with _hydra_in(_main(parsed, config_dir), parsed.config_dir):
            name = parsed.config_name or "train"
            return compose(name, list(settings), return_hydra_config=True)

    return composed


def composer_of_job(name: str | None, *, config_dir: Path) -> Callable[[Sequence[str]], Any]:
    """Return a function that composes settings as those of the job that is running.

    Args:
        name: The name of the job's configuration.
        config_dir: The folder that holds train.yaml.
    """
    if not GlobalHydra.instance().is_initialized():  # the job was started without Hydra's program
        return composer([], config_dir=config_dir)
    return lambda settings: compose(name, list(settings), return_hydra_config=True)


def _composed(
    typed: Sequence[str], options: Namespace, *, config_dir: Path
) -> Iterator[tuple[list[str], Any]]:
    """Yield the settings of each composition, and the composition."""
    main, name = _main(options, config_dir), options.config_name or "train"
    with _hydra_in(main, options.config_dir):
        for settings in _without_sweeps(typed):
            whole = compose(name, settings, return_hydra_config=True)
            yield settings, whole
            keys = {one.partition("=")[0] for one in typed}  # these win
            if tried := [f"{key}={one}" for key, one in _tried(whole).items() if key not in keys]:
                for job in _without_sweeps([*tried, *settings]):
                    yield job, compose(name, job, return_hydra_config=True)


def _expected(typed: Sequence[str], options: Namespace, *, config_dir: Path) -> Any:
    """Return what is composed without the files that the command line chooses."""
    # A sweep's values are compared one by one, and only a file may have begun them.
    values = "hydra.sweeper.params"
    own = [one for one in typed if name_of(one).startswith("hydra") and values not in one]
    if not (config_dir / "local" / "default.yaml").is_file():
        own.append("~local")  # another folder might bring it
    others = [_main(options, config_dir), options.config_dir]  # may hold a launcher that is chosen
    with _hydra_in(config_dir, *others):
        return compose("train", own, return_hydra_config=True)


@contextmanager
def _hydra_in(folder: Path, *others: str | Path | None) -> Iterator[None]:
    """Let Hydra find files in a folder, and in others if it has none of that name."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        path = loader.get_search_path()
        for other in others:
            if other is not None:
                where = f"file://{os.path.abspath(other)}"
                path.prepend("command-line", where, SearchPathQuery(provider="schema"))
        loader.repository.initialize_sources(path)
        yield


def _main(options: Namespace, config_dir: Path) -> Path:
    """Return the folder in which Hydra looks first; `--config-path` is relative to train.py."""
    given = options.config_path
    if given is None:
        return config_dir
    if "://" in given:
        raise ValueError(f"--config-path={given}: give the path of a folder.")
    return Path(os.path.abspath(config_dir.parent / given))


def _ensure_harmless(tried: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError if the values that a file lets a sweep try change more than the run."""
    for key, value in tried:
        if name_of(key.strip()).startswith("hydra") or gives_trust(f"{key}={value}"):
            why = f"since it sets {key}"
            raise _set_by_file("hydra.sweeper.params", why)


def _set_by_file(name: str, why: str) -> ValueError:
    return ValueError(
        f"A configuration file sets {name}, and only the command line may, {why}. If you trust it, "
        "repeat it there."
    )


def _of_hydra(config: Any, name: str) -> Any:
    node = OmegaConf.select(config.hydra, name)
    value: Any = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    if name == "mode" and value is None:
        return RunMode.RUN
    if name == "sweeper" and isinstance(value, dict):
        value = {key: one for key, one in value.items() if key != "params"}  # values to try
    return value


def _tried(config: Any) -> dict[str, str]:
    """Return the values that a sweep tries, as texts of Hydra's grammar, keyed by setting."""
    node = OmegaConf.select(config.hydra, "sweeper.params")
    values: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else {}
    return {str(key): str(value) for key, value in values.items()}


def _without_sweeps(settings: Sequence[str]) -> Iterator[list[str]]:
    """Yield the settings that are not swept, and then all, until each choice has had its turn."""
    loader = GlobalHydra.instance().config_loader()  # lists the choices of `optim=glob(*)`
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(settings))
    choices = [
        [f"{one.get_key_element()}={choice}" for choice in one.sweep_string_iterator()]
        if one.is_discrete_sweep()
        else [str(one.input_line)]
        for one in overrides
        if one.is_discrete_sweep() or not one.is_sweep_override()
    ]
    fixed = [str(one.input_line) for one in overrides if not one.is_sweep_override()]
    yield fixed
    if len(fixed) == len(choices) or not all(choices):
        return  # no sweep, or one without jobs
    for turn in range(max(map(len, choices))):
        yield [several[min(turn, len(several) - 1)] for several in choices]
