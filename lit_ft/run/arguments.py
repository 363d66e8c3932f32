"""Turn the arguments of the command line into a configuration, with paths as people type them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lit_ft.run.command_line import understood
from lit_ft.run.config import choices_near, names_near, null_choices, resolved
from lit_ft.run.hidden import in_quotes, references, without_secrets
from lit_ft.run.hydra_trust import compositions
from lit_ft.run.implied import with_implied

_PACKAGE = Path(__file__).parents[1]

# A wheel holds these files inside the package: see setup.py.
ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
"""The folder that holds `conf/` and `benchmarks/`."""

CONF = ROOT / "conf"

_ADVICE = "To append to your config use +"

UNREADABLE = (HydraException, OmegaConfBaseException, YAMLError, RecursionError)
"""The errors that arguments or configuration files raise which Hydra cannot compose."""

PATHS = (
    "run_dir",
    "resume",
    "data.path",
    "data.val_path",
    "data.chat_template",
    "model.name_or_path",
    "model.gguf_file",
    "eval.include_path",
)
"""The settings whose values are paths."""


def composed(arguments: Sequence[str], *, config_dir: Path = CONF) -> dict[str, Any]:
    """Return the configuration that `python train.py` would have with these arguments.

    Args:
        arguments: The choices and settings, such as `model=tiny` and `data.path=my.jsonl`, and
            files of settings, as `--config=my.yaml`.
        config_dir: The folder that holds train.yaml.

    Raises:
        ValueError: If an argument is wrong, if a mandatory setting is missing, or if `config_dir`
            holds no train.yaml.
    """
    if not (config_dir / "train.yaml").is_file():
        raise ValueError(
            f"{config_dir} holds no train.yaml: clone the repository, and install lit_ft from the "
            "clone with `pip install -e .`."
        )
    arguments = understood(arguments, config_dir=config_dir).arguments
    arguments = with_implied(arguments, config_dir=config_dir)
    arguments = quoted_paths(without_secrets(arguments))
    if told := null_choices(arguments, config_dir=config_dir):
        raise ValueError(told)
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            return resolved(compose("train", list(arguments)))
    except UNREADABLE as error:
        raise ValueError(said_by_hydra(error, arguments, config_dir=config_dir)) from error


def said_by_hydra(
    error: BaseException, arguments: Sequence[str], *, config_dir: Path = CONF
) -> str:
    """Return the message of an error of `UNREADABLE`, with the names that are there.

    Hydra's own advice, to put a plus in front of a name that is not there, is left out: it would
    add a setting that nothing reads.

    Args:
        error: The error.
        arguments: The arguments that Hydra was given.
        config_dir: The folder that holds train.yaml.
    """
    said = _missing_choice(error, config_dir) or why_unreadable(error)
    lines = [line for line in said.splitlines() if not line.startswith(_ADVICE)]
    near = names_near(arguments, config_dir=config_dir).rstrip()
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    if cause is not None and not near:
        lines.append(str(cause))
    if "INTERVAL_SWEEP" in said:
        lines.append("`python -m lit_ft.search` with the same arguments draws values from a range.")
    return "\n".join([*lines, *filter(None, [near])])


def _missing_choice(error: BaseException, config_dir: Path) -> str:
    """Return a line on a choice that is not there; empty if the error is another one."""
    if not isinstance(error, MissingConfigException) or error.missing_cfg_file is None:
        return ""
    group, _, name = error.missing_cfg_file.rpartition("/")
    near = choices_near(group, name, config_dir=config_dir)
    return near and f"{group}={name}: there is no such choice. {near}"


def why_unreadable(error: BaseException) -> str:
    """Return the message of an error of `UNREADABLE`."""
    if isinstance(error, RecursionError):
        return "A configuration file names itself in its defaults, or is nested too deeply."
    return (
        f"A configuration file is no YAML: {error}" if isinstance(error, YAMLError) else str(error)
    )


def for_hydra(arguments: Sequence[str], *, config_dir: Path = CONF) -> list[str]:
    """Return the arguments with which Hydra can be trusted: with paths quoted, and no secrets.

    Args:
        arguments: The command-line arguments as the user typed them.
        config_dir: The folder that holds train.yaml.

    Raises:
        HydraException: If Hydra cannot compose a configuration from the arguments.
        ValueError: If a configuration file changes what Hydra runs, or if a secret is one that was
            left out of a run's files.
    """
    arguments = quoted_paths(without_secrets(arguments))
    of_files = _secrets_of_files(compositions(arguments, config_dir=config_dir))
    hidden = [f"++{name}={reference}" for name, reference in of_files.items()]
    # Hydra takes its settings in one piece: none may stand behind an option that follows them.
    places = [place for place, one in enumerate(arguments, 1) if "=" in one and one[0] != "-"]
    end = max(places, default=0)
    return [*arguments[:end], *hidden, *arguments[end:]]


def _secrets_of_files(composed: Sequence[Any]) -> dict[str, str]:
    """Return references to the secrets of configuration files, keyed by setting."""
    found: list[dict[str, str]] = []
    for one in composed:
        config: Any = OmegaConf.to_container(one, resolve=False)
        found.append(references({name: node for name, node in config.items() if name != "hydra"}))
    # Of a sweep, the first is the whole: Hydra writes it to a file, and it need not hold them all.
    whole, jobs = found[:1], found[1:] or found
    if any(one != jobs[0] for one in jobs) or any(one.items() - jobs[0].items() for one in whole):
        raise ValueError(
            "The configuration files of a sweep hold different secrets. Write ${oc.env:VARIABLE} "
            "in their place, which reads a variable of the environment."
        )
    return jobs[0] if jobs else {}


def quoted_paths(arguments: Sequence[str]) -> list[str]:
    """Put quotes around the paths that Hydra would not read as paths.

    In Hydra's own grammar, `data.path=my (1).jsonl` is an error, and `data.path=2024` is a number.

    Args:
        arguments: The command-line arguments as the user typed them.
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    setting, assigned, value = argument.partition("=")
    if not assigned or not value or argument.startswith("-"):
        return argument
    is_path = setting.lstrip("+") in PATHS
    exists = path_exists(value)
    if not (is_path or exists):
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        several = value.split(",")
        if not exists and all(map(path_exists, several)):  # the paths of a sweep
            return f"{setting}={','.join(map(in_quotes, several))}"
        return f"{setting}={in_quotes(value)}"
    if not is_path or (override.is_sweep_override() and not exists):
        return argument
    read = override.value()
    if read is None or read == value or (isinstance(read, str) and not exists):
        return argument
    return f"{setting}={in_quotes(value)}"


def path_exists(path: str) -> bool:
    """Return whether there is a file or folder of this name; False for what can be no path."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user
        return False
