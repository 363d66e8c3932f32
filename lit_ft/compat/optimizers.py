"""The table of optimizers: what a step of each class depends on, and so what it goes with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

Unit = Literal["element", "row", "parameter", "optimizer"]


@dataclass(frozen=True)
class Mean:
    """A state entry that is a running mean of gradients: it turns with the basis."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries that the rule reads."""
        return (self.key,)


@dataclass(frozen=True)
class Square:
    """A state entry that is a running mean of squared gradients; of columns alone, if 1-D."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries that the rule reads."""
        return (self.key,)


@dataclass(frozen=True)
class MeanAndSquare:
    """Both moments of Adam, with the count of steps that their bias correction needs."""

    mean: str
    square: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries that the rule reads."""
        return (self.mean, self.square, "step")


Moment = Mean | Square | MeanAndSquare
# What torch's optimizers and most that follow them call their state.
_USUAL = (MeanAndSquare("exp_avg", "exp_avg_sq"), Mean("momentum_buffer"), Mean("exp_avg"))


@dataclass(frozen=True)
class Traits:
    """What a step of an optimizer depends on.

    Attributes:
        unit: The smallest part that the optimizer can step alone with the same result: an element;
            a row, or a block of elements within rows; a parameter; or only all of them together.
        works_from_zero: The step of a parameter depends on its gradient and state, not on its
            value: an optimizer can step GaLore's parameters, which are zero before each step.
        decoupled_decay: Weight decay shrinks the weights and is not added to the gradient.
        sharded_rows: A rank can step the rows that it holds of a parameter.
        own_rate: The optimizer chooses its learning rate, and no schedule applies.
        step_size: What sets the size of a step: "unit" makes steps of one size (an RMS near 1,
            times the rate), "gradient" steps by the gradient itself, "spectral" makes matrices of
            a spectral norm that depends on their shape.
        moments: How the state follows a change of basis; empty if no rule is known.
        movable_state: The state can be rewritten between two steps.
        copies_on_cpu: On the CPU a step holds several float32 copies of the parameter.
        why: The reason for what is missing, a clause.
        instead: The nearest choices of `optim=` that have what is missing.
    """

    unit: Unit = "parameter"
    works_from_zero: bool = True
    decoupled_decay: bool = True
    sharded_rows: bool = True
    own_rate: bool = False
    step_size: Literal["unit", "gradient", "spectral"] = "unit"
    moments: tuple[Moment, ...] = _USUAL
    movable_state: bool = True
    copies_on_cpu: bool = False
    why: str = ""
    instead: tuple[str, ...] = ("adamw",)

    @property
    def elementwise(self) -> bool:
        """Whether each element's step depends on that element's gradient and state alone."""
        return self.unit == "element"

    @property
    def rowwise(self) -> bool:
        """Whether some rows of a parameter can be stepped without the others."""
        return self.unit in ("element", "row")

    @property
    def per_parameter(self) -> bool:
        """Whether a parameter can be stepped without the others."""
        return self.unit != "optimizer"


_FACTORED = (Square("exp_avg_sq_col"), Mean("exp_avg"))
_COPIES = Traits(unit="optimizer", works_from_zero=False)
_BNB = Traits(
    unit="row",
    sharded_rows=False,
    copies_on_cpu=True,
    why="bitsandbytes' optimizers do not know sharded parameters",
    instead=("adamw_8bit_torchao",),
)
_BNB_NORMED = replace(
    _BNB,
    unit="parameter",
    works_from_zero=False,
    why="it scales its step by the norm of the whole parameter",
)
_COUPLED = Traits(unit="element", decoupled_decay=False)

# Patterns are searched in "module.Class"; the first that fits decides. A class of which none fits
# is looked up by its bases, and one without any entry has `Traits()`.
TABLE: tuple[tuple[str, Traits], ...] = (
    # torch
    (r"^torch\.optim\.adamw\.AdamW$", Traits(unit="element")),
    (r"^torch\.optim\.\w+\.(Adam|NAdam|RAdam)$", _COUPLED),
    (r"^torch\.optim\.sgd\.SGD$", replace(_COUPLED, step_size="gradient")),
    (r"^torch\.optim\.\w+\.(RMSprop|Adagrad)$", replace(_COUPLED, moments=())),
    (
        r"^torch\.optim\.\w+\.(Adadelta|Adamax|ASGD|Rprop)$",
        Traits(decoupled_decay=False, moments=()),
    ),
    (
        r"^torch\.optim\.Adafactor$",
        Traits(
            works_from_zero=False,
            sharded_rows=False,
            why="torch's Adafactor scales its step by the parameter's size, and takes means over "
            "all rows",
            instead=("adafactor_fixed", "adamw"),
        ),
    ),
    (
        r"^torch\.optim\.Muon$",
        Traits(
            sharded_rows=False,
            step_size="spectral",
            why="Muon orthogonalises whole matrices",
        ),
    ),
    (
        r"^torch\.optim\..*\.LBFGS$",
        replace(
            _COPIES,
            sharded_rows=False,
            why="LBFGS looks at all gradients at once and keeps copies of the parameters",
        ),
    ),
    # lit_ft
    (
        r"^lit_ft\.optim\.adafactor\.RelativeStepAdafactor$",
        Traits(
            works_from_zero=False,
            own_rate=True,
            moments=_FACTORED,
            why="Adafactor with a rate of its own scales its step by the parameter's size",
            instead=("adafactor_fixed", "adamw"),
        ),
    ),
    (r"^lit_ft\.optim\.adafactor\.Adafactor$", Traits(moments=_FACTORED)),
    (r"^lit_ft\.optim\.adamw_8bit\.RowwiseAdamW8bit$", Traits(unit="row")),
    (
        r"^lit_ft\.optim\.muon\.MuonAdamW$",
        Traits(sharded_rows=False, why="Muon orthogonalises whole matrices"),
    ),
    # The original package, which projects by itself
    (
        r"^(lit_ft\.optim\.)?galore_torch\.",
        Traits(
            works_from_zero=False,
            sharded_rows=False,
            why="galore-torch projects whole matrices itself",
            instead=("galore", "galore_subspace"),
        ),
    ),
    # transformers
    (
        r"^transformers\..*\.Adafactor$",
        Traits(
            sharded_rows=False,
            moments=_FACTORED,
            why="transformers' Adafactor takes means over the rows of one rank",
            instead=("adafactor_fixed", "adafactor"),
        ),
    ),
    # bitsandbytes, whose class names say the kind
    (
        r"^bitsandbytes\..*\.Paged\w+$",
        replace(
            _BNB,
            unit="parameter",
            movable_state=False,
            why="paged optimizers keep their state where nothing else can reach it",
            instead=("adamw_8bit", "adamw_8bit_torchao"),
        ),
    ),
    (
        r"^bitsandbytes\..*\.AdamW?(\d+bit)?$",
        replace(_BNB, moments=(MeanAndSquare("state1", "state2"),)),
    ),
    (r"^bitsandbytes\..*\.Lion(\d+bit)?$", replace(_BNB, moments=(Mean("state1"),))),
    (
        r"^bitsandbytes\..*\.SGD(\d+bit)?$",
        replace(_BNB, decoupled_decay=False, step_size="gradient", moments=(Mean("state1"),)),
    ),
    (
        r"^bitsandbytes\..*\.(RMSprop|Adagrad)(\d+bit)?$",
        replace(_BNB, decoupled_decay=False, moments=(Square("state1"),)),
    ),
    (r"^bitsandbytes\..*\.\w*LARS(\d+bit)?$", _BNB_NORMED),
    (r"^bitsandbytes\..*\.LAMB(\d+bit)?$", _BNB_NORMED),
    (r"^bitsandbytes\.", replace(_BNB, unit="parameter", moments=())),
    # torchao, whose moments are tensor subclasses
    (r"^torchao\.optim\.adam\.Adam(\d+bit|Fp8)$", Traits(decoupled_decay=False, moments=())),
    (r"^torchao\.optim\.", Traits(moments=())),
    # Others, by the names that they have wherever they come from
    (
        r"\.Lamb$",
        replace(_COPIES, why="Lamb scales by the norms of parameters and of all gradients"),
    ),
    (
        r"(?i:lamb)(\d+bit)?$",
        Traits(works_from_zero=False, why="LAMB scales its step by the parameter's norm"),
    ),
    (
        r"\.(?i:lars)",
        Traits(works_from_zero=False, why="LARS scales its step by the parameter's norm"),
    ),
    (
        r"ScheduleFree",
        replace(
            _COPIES,
            why="schedule-free optimizers keep copies of the parameters and count in the groups",
        ),
    ),
    (
        r"\.(Prodigy|DAdapt)",
        replace(
            _COPIES,
            why="it sums over all parameters and measures the distance from the first ones",
        ),
    ),
    (
        r"\.(A?SAM|Lookahead)$",
        Traits(works_from_zero=False, why="it steps from and to copies of the parameters"),
    ),
    (
        r"\.Adafactor\w*$",
        Traits(
            works_from_zero=False,
            sharded_rows=False,
            why="Adafactor scales its step by the parameter's size, and takes means over all rows",
            instead=("adafactor_fixed", "adamw"),
        ),
    ),
)


def traits_of(kind: type) -> Traits:
    """Return what a step of that class of optimizers depends on.

    A class that wraps another (`wrapped_class`) has the wrapped one's traits. One that steps in
    its own way is trusted with no part of a parameter, whatever its bases can do.
    """
    kind = unwrapped(kind)
    for base in kind.__mro__:
        traits = traits_named(f"{base.__module__}.{base.__qualname__}")
        if traits is not None:
            inherits = base is kind or _plain_step(kind) is _plain_step(base)
            return traits if inherits or not traits.rowwise else replace(traits, unit="parameter")
    return Traits()


@cache
def traits_named(name: str) -> Traits | None:
    """Return the table's entry for a class by its full name; None if it has none."""
    return next((traits for pattern, traits in TABLE if re.search(pattern, name)), None)


def unwrapped(kind: type) -> type:
    """Return the class that an optimizer had before it was wrapped."""
    while (wrapped := vars(kind).get("wrapped_class")) is not None:
        kind = wrapped
    return kind


def class_of(build: Callable[..., Any]) -> type | None:
    """Return the class that an optimizer's constructor or a partial of it makes, if it is known."""
    kind = getattr(build, "func", build)
    return kind if isinstance(kind, type) else None


def _plain_step(kind: type) -> Any:
    # torch replaces a class's step by one that runs hooks as soon as there is an instance.
    step = getattr(kind, "step", None)
    return inspect.unwrap(step) if callable(step) else None
