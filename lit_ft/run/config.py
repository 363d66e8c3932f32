"""Check the configuration: existing names, and choices made indirectly."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_ft.run.other_trainers import BY_NAME
from lit_ft.run.override import name_of

# Setting names of earlier versions, and what to type instead. If the replacement has no "=", the
# value that the user typed is added to it.
_MOVED = {
    "data.drop_overlong=true": "data.overlong=drop",
    "data.drop_overlong=false": "data.overlong=cut",
    "auto_batch_size": "callbacks=auto_batch_size",
    "galore.projector.every": "galore.refresh.every",
    "optim=galore_8bit": "optim=adamw_8bit galore=iteration",
    "optim=galore_adafactor": "optim=adafactor_fixed galore=iteration",
    "optim=galore_subspace_paper": "optim=adamw galore=paper optim.lr=4e-4",
    "optim=galore_subspace_8bit_torchao": "optim=adamw_8bit_torchao galore=online",
    "optim/projector=oja": "galore=online",
    "optim/projector=online": "galore=paper",
    "optim/projector=random": "galore=random",
    "optim/projector=subspace_iteration": "galore=iteration",
    "optim/projector=svd": "galore=svd",
}


def refuse_without_class(config: Mapping[str, Any]) -> None:
    """Raise ValueError if an entry has settings but no class, so that nothing would read them.

    Such entries come from `+callbacks.samples.x=1` if no choice brings `samples`, from
    `+galore.rank=64` with galore=none, and from `+adapter.r=8` without an adapter.
    """
    for group in ("callbacks", "logger"):
        entries = _mapping(config.get(group))
        there = [n for n, entry in entries.items() if _names_class(entry)]
        for name in entries:
            if name not in there:
                raise ValueError(
                    f"{group}.{name} has no class (`_target_`), and no choice brings one. "
                    f"Make a choice that does (such as {group}=default), name a class with "
                    f"+{group}.{name}._target_=package.Class, or leave {group}.{name} out. "
                    f"There are: {', '.join(there) or 'none'}."
                )
    if config.get("adapter") is not None and not _names_class(config["adapter"]):
        raise ValueError("There are settings of an adapter, but no adapter: add adapter=lora.")
    if config.get("galore") is not None and "galore" not in _mapping(config.get("callbacks")):
        raise ValueError("There are settings of GaLore, but no GaLore: add galore=online.")


def resolved(config: Any) -> dict[str, Any]:
    """Return Hydra's configuration as plain values, with its interpolations resolved.

    Raises:
        ValueError: If a mandatory setting has no value, or if an interpolation names nothing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing: add {error.full_key}=VALUE.") from error
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{error.full_key}: {reason}. Between ${{ and }} stands the name of a setting that "
            "exists."
        ) from error
    if plain.get("ui") is False:
        plain["ui"] = "off"  # as YAML and Hydra's files read it without quotes
    return dict(plain)


def null_choices(overrides: Sequence[str], *, config_dir: str | Path) -> str:
    """Return a line for each override that chooses null, which no group has; empty without any.

    Args:
        overrides: The command-line arguments, such as `optim=null`.
        config_dir: The folder that holds train.yaml.
    """
    lines = []
    own = _entries(Path(config_dir) / "train.yaml")
    for override in overrides:
        group, _, values = override.lstrip("+").partition("=")
        if "null" not in values.split(",") or not (Path(config_dir) / group).is_dir():
            continue
        names = sorted(path.stem for path in (Path(config_dir) / group).glob("*.yaml"))
        if "none" in names:
            remedy = f"type {group}=none"
        elif group in own and own[group] is None:
            remedy = "leave it out"
        else:
            remedy = f"choose one of {', '.join(f'{group}={name}' for name in names)}"
        lines.append(f"{group}=null is no choice: {remedy}.")
    return "\n".join(lines)


def names_near(overrides: Sequence[str], *, config_dir: str | Path) -> str:
    """Return hints for overrides that name no setting: the existing names, the closest first.

    Args:
        overrides: The command-line arguments, such as `trainer.max_step=3`.
        config_dir: The folder that holds train.yaml.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from yaml import YAMLError

    lines = [line for override in overrides for line in _moved(override)]
    groups = {path.name: None for path in Path(config_dir).iterdir() if path.is_dir()}
    choices = [o for o in overrides if o.partition("=")[0] in groups and "," not in o]
    places = [o for o in overrides if o.startswith("hydra.searchpath=")]
    with initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3"):
        # A choice may not exist or be unreadable, which Hydra's own message says.
        of_project = [one for one in choices if one.startswith(("model=", "data="))]
        for tried in ([*places, *choices], of_project, []):
            with suppress(HydraException, YAMLError, RecursionError, ValueError):
                composed = compose("train", tried)
                break
    values: Any = OmegaConf.to_container(composed, resolve=False)
    known = {**groups, **values}
    for override in overrides:
        key, assigned, _ = override.partition("=")
        if not assigned or key.startswith(("+", "~", "-", "hydra")) or "/" in key or key in _MOVED:
            continue
        node, parents = known, list[str]()
        for name in key.split("."):
            if node is None and parents[-1] in groups and len(parents) == 1:
                lines.append(_not_chosen(key, parents[0], Path(config_dir)))
            if not isinstance(node, Mapping):
                break
            if name not in node:
                others = () if parents else BY_NAME
                lines.append(suggestion(key, name, ".".join(parents), list(node), others=others))
                if parents:
                    lines.append(f"  A plus in front adds what is not listed: +{override}\n")
                break
            node = node[name]
            parents.append(name)
    return "".join(lines)


def choices_near(group: str, name: str, *, config_dir: str | Path) -> str:
    """Return a line on a choice that is not there, with those that are; empty if it is there.

    Args:
        group: The group, such as `optim`.
        name: The choice that the user has made.
        config_dir: The folder that holds train.yaml.
    """
    names = sorted(path.stem for path in (Path(config_dir) / group).glob("*.yaml"))
    if not names or set(name.strip("[]").split(",")) <= set(names):
        return ""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}There are: {', '.join(names)}."


def also_chosen(
    choices: Mapping[str, Any], overrides: Sequence[str], *, config_dir: str | Path
) -> str:
    """Return the choices that the user's choices bring along, as a phrase; empty without any.

    A choice is listed if it differs from the default in train.yaml and no override names its group.

    Args:
        choices: The chosen name in each group, from Hydra's `hydra.runtime.choices`.
        overrides: The command-line arguments of this run, from Hydra's `hydra.overrides.task`.
        config_dir: The folder that holds train.yaml.
    """
    named = set(map(name_of, overrides))
    own = _entries(Path(config_dir) / "train.yaml")
    # In Hydra, the last file of the list that overrides a group decides.
    files = [(group, Path(config_dir) / group / f"{choices.get(group)}.yaml") for group in own]
    by_file = [(f"{group}={file.stem}", _overridden_in(file)) for group, file in reversed(files)]
    brought = []
    for group, default in own.items():
        if group in named or choices.get(group) in (default, None):
            continue
        by = next((source for source, overridden in by_file if group in overridden), None)
        if by is not None:
            brought.append(f"{group}={choices[group]} (by {by})")
    return ", ".join(brought)


def low_rate(choices: Mapping[str, Any], overrides: Sequence[str], lr: Any) -> str:
    """Return a note if an adapter is trained at the rate of a whole model; empty otherwise.

    Args:
        choices: The chosen name in each group, from Hydra's `hydra.runtime.choices`.
        overrides: The command-line arguments of this run, from Hydra's `hydra.overrides.task`.
        lr: The learning rate.
    """
    adapter, optimizer = choices.get("adapter"), choices.get("optim")
    is_typed = any(one.lstrip("+").startswith("optim.lr=") for one in overrides)
    if adapter in (None, "none") or is_typed or not isinstance(lr, float) or lr > 1e-4:
        return ""
    return (
        f"adapter={adapter} with optim={optimizer}: the rate {lr:g} suits a whole model, and "
        "adapters learn better at about optim.lr=5e-4."
    )


def recipe(choices: Mapping[str, Any]) -> str:
    """Return the names of a run's method, such as "galore_subspace, single_gpu".

    Args:
        choices: The chosen name in each group, from Hydra's `hydra.runtime.choices`.
    """
    names = [choices.get(group) for group in ("experiment", "optim", "adapter", "strategy")]
    if "blocks" in str(choices.get("update")):  # the other updates train the same weights
        names.insert(2, "blocks")
    return ", ".join(str(name) for name in names if name not in (None, "none"))


def _entries(file: Path) -> dict[str, Any]:
    """Return a file's defaults list, keyed by group, or by the entry's name if it has no group."""
    from omegaconf import OmegaConf

    listed: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    entries: dict[str, Any] = {}
    for entry in listed.get("defaults", []):
        if isinstance(entry, Mapping):
            entries.update({key.removeprefix("optional "): name for key, name in entry.items()})
        elif entry != "_self_":
            entries[entry] = entry
    return entries


def _overridden_in(file: Path) -> dict[str, str]:
    """Return the choices that a configuration file overrides, including those it inherits."""
    if not file.is_file():  # null, several choices at once, or an optional file
        return {}
    entries = _entries(file)
    inherited = [key.partition("@")[0] for key, name in entries.items() if key == name]
    moved: dict[str, str] = {}
    for name in inherited:
        moved |= _overridden_in(file.parent / f"{name}.yaml")
    marker = "override /"
    return moved | {k.removeprefix(marker): n for k, n in entries.items() if k.startswith(marker)}


def _moved(override: str) -> Iterator[str]:
    """Yield a line that says what to type instead, if an override uses an earlier name."""
    key, _, values = override.lstrip("+").partition("=")
    for value in values.split(","):
        for once, value_now in ((key, f"={value}"), (f"{key}={value}", "")):
            if once in _MOVED:
                now = _MOVED[once] + (value_now if "=" not in _MOVED[once] else "")
                yield f"\n{key}={value}: type {now} instead\n"


def suggestion(
    key: str, name: str, parent: str, names: list[str], *, others: Iterable[str] = ()
) -> str:
    """Return a line on a name that is not there, with the names that are, the nearest first.

    Args:
        key: The whole setting, as the user types it.
        name: The part of it that is not there.
        parent: The part ahead of `name`; empty at the top.
        names: The names that are in `parent`.
        others: Further names that may stand there, which are not listed.
    """
    names = [n for n in names if not n.startswith("_")]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.8) or near
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    where = f" in {parent}" if parent else ""
    listed = ", ".join(sorted(names))
    names_there = f"\n  Names: {listed}" if listed else ""
    return f"\n{key}: there is no '{name}'{where}.{hint}{names_there}\n"


def _not_chosen(key: str, group: str, config_dir: Path) -> str:
    """Return a line that lists a group's choices, of which the current one has no settings."""
    names = sorted(path.stem for path in (config_dir / group).glob("*.yaml") if path.stem != "none")
    choices = ", ".join(f"{group}={name}" for name in names)
    return f"\n{key}: no current choice has it. Choose one of {choices}\n"


def _mapping(node: Any) -> Mapping[str, Any]:
    return node if isinstance(node, Mapping) else {}


def _names_class(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "_target_" in entry
