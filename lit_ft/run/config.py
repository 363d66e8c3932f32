"""What the configuration may say: whose classes it may name, and which names exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TRUSTED_PACKAGES = (
    "lit_ft",
    "lightning.pytorch",
    "torch.optim",
    "transformers",
    "peft",
    "bitsandbytes.optim",
    "galore_torch",
    "torchao.optim",
)


def refuse_untrusted(config: Mapping[str, Any], *, also: Sequence[str] = ()) -> None:
    """Raise ValueError if a `_target_` lies outside lit_ft, the libraries it uses and `also`.

    A configuration is data; Hydra would let it call any function of any installed package.
    """
    trusted = (*TRUSTED_PACKAGES, *also)
    for path, target in _targets(config):
        if not any(target == package or target.startswith(f"{package}.") for package in trusted):
            raise ValueError(
                f"{path}._target_={target}: only classes of {', '.join(trusted)} can be named. "
                f"If you trust it: trusted_packages=[{target.split('.')[0]}]"
            )


def refuse_without_class(config: Mapping[str, Any]) -> None:
    """Raise ValueError if there are settings of what was not chosen, which nothing would read.

    `+callbacks.samples.x=1` makes such an entry where no choice brings `samples`, `+galore.rank=64`
    beside optim=adamw, `+adapter.r=8` without an adapter.
    """
    for group in ("callbacks", "logger"):
        entries = config.get(group) or {}
        there = [n for n, entry in entries.items() if _names_class(entry)]
        for name in entries:
            if name not in there:
                raise ValueError(
                    f"{group}.{name} has no class (`_target_`): nothing that was chosen brings it. "
                    f"Choose what does (such as {group}=default), name a class with "
                    f"+{group}.{name}._target_=package.Class, or leave {group}.{name} out. "
                    f"There are: {', '.join(there) or 'none'}."
                )
    if config.get("adapter") is not None and not _names_class(config["adapter"]):
        raise ValueError("There are settings of an adapter and none was chosen: add adapter=lora.")
    if config.get("galore") is not None and "galore" not in (config.get("callbacks") or {}):
        raise ValueError("There are settings of GaLore and no GaLore: add optim=galore_subspace.")


def names_near(overrides: Sequence[str], *, config_dir: str | Path) -> str:
    """Return, for each override of a value that does not exist, the names that do, closest first.

    Args:
        overrides: Command-line arguments (`trainer.max_step=3`).
        config_dir: The folder of train.yaml.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    groups = {path.name: None for path in Path(config_dir).iterdir() if path.is_dir()}
    choices = [o for o in overrides if o.partition("=")[0] in groups and "," not in o]
    with initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3"):
        try:
            composed = compose("train", choices)
        except HydraException:  # a choice that does not exist: Hydra's own message lists them
            composed = compose("train")
    values: Any = OmegaConf.to_container(composed, resolve=False)
    known = {**groups, **values}
    lines = []
    for override in overrides:
        key, assigned, _ = override.partition("=")
        if not assigned or key.startswith(("+", "~", "-", "hydra")) or "/" in key:
            continue
        node, parents = known, list[str]()
        for name in key.split("."):
            if node is None and parents[-1] in groups and len(parents) == 1:
                lines.append(_not_chosen(key, parents[0], Path(config_dir)))
            if not isinstance(node, Mapping):
                break
            if name not in node:
                lines.append(_suggestion(key, name, ".".join(parents), list(node)))
                break
            node = node[name]
            parents.append(name)
    return "".join(lines)


def _suggestion(key: str, name: str, parent: str, names: list[str]) -> str:
    names = [n for n in names if not n.startswith("_")]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    where = f" in {parent}" if parent else ""
    listed = ", ".join(sorted(names))
    return f"\n{key}: there is no '{name}'{where}.{hint}\n  Names: {listed}\n"


def _not_chosen(key: str, group: str, config_dir: Path) -> str:
    """Name the choices that have settings of a group of which nothing is chosen."""
    bringing = [p for p in config_dir.glob("*/*.yaml") if f"- /{group}:" in p.read_text()]
    files = bringing or [p for p in (config_dir / group).glob("*.yaml") if p.stem != "none"]
    choices = sorted(f"{path.parent.name}={path.stem}" for path in files)
    return f"\n{key}: nothing that was chosen has it. Choose one of {', '.join(choices)}\n"


def _names_class(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "_target_" in entry


def _targets(node: Any, path: str = "config") -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, str(node["_target_"])
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]")
