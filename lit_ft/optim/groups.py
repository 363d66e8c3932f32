"""Parameter groups by rule: the first rule that matches a parameter takes it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lit_ft.compat.ranges import WholeNumber


@dataclass(frozen=True)
class GroupRule:
    """Says which parameters form a group, and which optimizer options the group has.

    Attributes:
        name: The group's name in learning-rate monitors and checkpoints.
        match: The regular expression to search for in a parameter's names: a tied weight has
            several. An empty one matches all.
        min_ndim: The smallest number of dimensions that a parameter of the group may have.
        max_ndim: The largest number of dimensions that a parameter of the group may have; None sets
            no limit.
        required: Whether it is an error if the rule takes no parameter.
        options: The optimizer options of the group, such as `{"weight_decay": 0.0}`. Other options
            keep the optimizer's defaults.

    Raises:
        ValueError: If `match` is not a regular expression, if `max_ndim` is below `min_ndim`, or if
            an option has a name that torch uses for the group itself.
    """

    name: str
    match: str = ""
    min_ndim: WholeNumber = 0
    max_ndim: WholeNumber | None = None
    required: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dict(self.options))
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(
                f"Group rule '{self.name}': match={self.match!r} is not a regular expression: "
                f"{error}."
            ) from error
        if self.max_ndim is not None and self.max_ndim < self.min_ndim:
            raise ValueError(
                f"Group rule '{self.name}': max_ndim={self.max_ndim} is less than "
                f"min_ndim={self.min_ndim}."
            )
        if reserved := {"params", "param_names", "name"} & self.options.keys():
            raise ValueError(
                f"Group rule '{self.name}': {', '.join(sorted(reserved))} cannot be an option."
            )

    def takes(self, name: str, parameter: Tensor) -> bool:
        """Return whether `parameter`, called `name`, fits the rule."""
        fits = self.min_ndim <= parameter.ndim and (
            self.max_ndim is None or parameter.ndim <= self.max_ndim
        )
        return fits and re.search(self.match, name) is not None


DECAY_MATRICES = (
    GroupRule("no_decay", max_ndim=1, required=False, options={"weight_decay": 0.0}),
    GroupRule("decay", min_ndim=2, required=False),
)
"""Weight decay for matrices only: norms, biases and scales are not pulled towards zero."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], rules: Sequence[GroupRule] = DECAY_MATRICES
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups for a torch optimizer.

    Args:
        named_parameters: The parameters with their names, as from `module.named_parameters()`.
            Frozen parameters are left out. A parameter with several names (a tied weight) counts
            once, under its first name. With `remove_duplicate=False`, a rule may match any of its
            names.
        rules: The rules in the order in which they are tried. The first rule that matches a
            parameter takes it.

    Returns:
        One group per rule, in the order of the rules, without empty groups. Each group has the
        rule's options, its `name`, and `params` as (name, parameter) pairs. Torch's optimizers
        split the pairs into `params` and `param_names`.

    Raises:
        ValueError: If two rules share a name, if a required rule takes no parameter, if a parameter
            fits no rule, or if no parameter is trainable.
    """
    trainable: dict[Tensor, list[str]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            trainable.setdefault(parameter, []).append(name)
    if not trainable:
        raise ValueError(
            "There is nothing to optimize, since no parameter requires a gradient: unfreeze what "
            "is to be trained."
        )
    members: dict[str, list[tuple[str, Tensor]]] = {rule.name: [] for rule in rules}
    if len(members) < len(rules):
        raise ValueError(f"Group rules must differ in name: {[rule.name for rule in rules]}.")
    left_over = []
    for parameter, names in trainable.items():
        rule = next(
            (rule for rule in rules if any(rule.takes(name, parameter) for name in names)), None
        )
        if rule is None:
            left_over.append(f"{names[0]} {tuple(parameter.shape)}")
        else:
            members[rule.name].append((names[0], parameter))
    for rule in rules:
        if rule.required and not members[rule.name]:
            raise ValueError(_took_nothing(rule, trainable))
    if left_over:
        raise ValueError(
            f"No group rule takes {', '.join(left_over[:5])}"
            + (f" and {len(left_over) - 5} more" if len(left_over) > 5 else "")
            + f" (rules: {', '.join(members)}): end the rules with one that takes the rest."
        )
    return [
        {**rule.options, "name": rule.name, "params": members[rule.name]}
        for rule in rules
        if members[rule.name]
    ]


def build_optimizer(
    optimizer: Callable[..., Optimizer],
    named_parameters: Iterable[tuple[str, Tensor]],
    rules: Sequence[GroupRule] = DECAY_MATRICES,
) -> Optimizer:
    """Build an optimizer on the groups that `rules` make.

    Args:
        optimizer: An optimizer class, or a partial of one that holds its options.
        named_parameters: The parameters with their names; see `parameter_groups`.
        rules: The rules in the order in which they are tried; see `parameter_groups`.

    Raises:
        ValueError: If `parameter_groups` refuses the rules, or if a rule sets an option that the
            optimizer does not have. (Torch would keep such an option in the group and never read
            it.) `weight_decay: 0` is always allowed, since without this option there is no decay.
    """
    built = optimizer(parameter_groups(named_parameters, rules))
    for rule in rules:
        for option, value in rule.options.items():
            if option not in built.defaults and not (option == "weight_decay" and value == 0):
                raise ValueError(
                    f"Group rule '{rule.name}' sets {option}={value}, which "
                    f"{type(built).__name__} does not have: it has {', '.join(built.defaults)}."
                )
    return built


def _took_nothing(rule: GroupRule, trainable: Mapping[Tensor, Sequence[str]]) -> str:
    every_name = [name for names in trainable.values() for name in names]
    if any(rule.takes(name, p) for p, names in trainable.items() for name in names):
        why = "earlier rules take all that it matches: put it before them"
    else:
        names = difflib.get_close_matches(rule.match, every_name, n=3, cutoff=0.0)
        limits = f"min_ndim={rule.min_ndim}, max_ndim={rule.max_ndim}"
        why = f"nothing matches {rule.match!r} with {limits}; the closest are {', '.join(names)}"
    return f"Group rule '{rule.name}' takes no parameter: {why}, or set required: false."
