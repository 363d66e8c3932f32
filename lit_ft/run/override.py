"""What an argument in Hydra's form sets."""

from __future__ import annotations


def name_of(argument: str) -> str:
    """Return the name that an argument sets, with its package if it has one.

    >>> name_of("++optim.lr=1"), name_of("optim@groups=adamw"), name_of("~callbacks")
    ('optim.lr', 'optim@groups', 'callbacks')
    """
    return argument.lstrip("+~").partition("=")[0]


def bare_name_of(argument: str) -> str:
    """Return the name that an argument sets, such as `optim` for `optim@groups=adamw`."""
    return name_of(argument).partition("@")[0]
