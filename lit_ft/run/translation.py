"""What a setting of another trainer is here: the same, or what to type instead."""

from __future__ import annotations

from dataclasses import dataclass

from lit_ft.run.other_trainers import ANY, BY_NAME, Name

NOTHING = "nothing: "
"""How `Name.why` begins if there is nothing to type."""


@dataclass(frozen=True)
class Translation:
    """Settings that mean what a setting of another trainer means.

    Args:
        settings: What it sets.
        brings: What it implies, which gives way to what the user sets.
    """

    settings: tuple[str, ...] = ()
    brings: tuple[str, ...] = ()


def translated(name: str, value: str) -> Translation | None:
    """Return what a setting of another trainer is here; None if no other trainer has the name.

    Args:
        name: The name of the setting.
        value: Its value in Hydra's grammar.

    Raises:
        ValueError: If nothing here means the same. The message says what to type.
    """
    if (one := BY_NAME.get(name)) is None:
        return None
    plain = value.strip("'\"")
    template = one.values.get(plain.lower(), one.values.get(ANY, one.here or None))
    if template is None:
        raise ValueError(f"{name}={plain}{_remedy(one)}.")
    if not template:
        return Translation()
    if one.is_whole and plain.endswith(".0"):
        value = plain.removesuffix(".0")
    if one.is_list and "," in plain and plain[0] != "[":
        value = f"[{plain}]"
    brings = tuple(one.brings.split())
    settings = (part.format(value) for part in template.split())
    return Translation(tuple(part for part in settings if part not in brings), brings)


def _remedy(one: Name) -> str:
    if not one.why:
        return f": give one of {', '.join(one.values)}"
    why = one.why.removeprefix(NOTHING).replace("`", "")
    if one.why.startswith(NOTHING):
        return f" is no setting here, leave it out: {why}"
    return f", here: {why}"
