"""The table of optimizer classes: the traits that decide what each class works with."""

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
    """The rule for a running mean of gradients in the state: it rotates with the basis."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the state entries that the rule reads."""
        return (self.key,)


@dataclass(frozen=True)
class Square:
    """The rule for a running mean of squared gradients, one value per column if it is 1-D."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the state entries that the rule reads."""
        return (self.key,)


@dataclass(frozen=True)
class MeanAndSquare:
    """The rule for both moments of Adam, with the step count for their bias correction."""

    mean: str
    square: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the state entries that the rule reads."""
        return (self.mean, self.square, "step")


Moment = Mean | Square | MeanAndSquare
# The state of torch's optimizers, and of most that follow them.
_USUAL = (MeanAndSquare("exp_avg", "exp_avg_sq"), Mean("momentum_buffer"), Mean("exp_avg"))


@dataclass(frozen=True)
class Traits:
    """The facts about an optimizer's steps that decide what it works with.

    Attributes:
        unit: The smallest part that can be stepped by itself with the same result. "row" includes
            blocks of elements within a row, and "optimizer" means all parameters together.
        works_from_zero: Whether a parameter's step depends only on its gradient and state, not on
            its value. The optimizer can then step GaLore's parameters, which are zero before each
            step.
        decoupled_decay: Whether weight decay shrinks the weights directly, instead of being added
            to the gradient.
        sharded_rows: Whether a rank can step only the rows of a parameter that it holds.
        own_rate: Whether the optimizer sets its own learning rate, so that no schedule applies.
        step_size: The size of a step before the learning rate multiplies it: "unit" for an RMS near
            1, "gradient" for the size of the gradient, and "spectral" for a matrix whose spectral
            norm depends on its shape.
        moments: The rules by which the state follows a change of basis; empty if none is known.
        movable_state: Whether the state can be rewritten between two steps.
        frees_state: Whether a parameter's state takes no memory once the optimizer has let it go.
        copies_on_cpu: Whether a step on the CPU makes several float32 copies of the parameter.
        why: The reason why the optimizer lacks an ability, as a clause for messages.
        instead: The choices of `optim=` that have the missing ability, the closest first.
    """

    unit: Unit = "parameter"
    works_from_zero: bool = True
    decoupled_decay: bool = True
    sharded_rows: bool = True
    own_rate: bool = False
    step_size: Literal["unit", "gradient", "spectral"] = "unit"
    moments: tuple[Moment, ...] = _USUAL
    movable_state: bool = True
    frees_state: bool = True
    copies_on_cpu: bool = False
    why: str = ""
    instead: tuple[str, ...] = ("adamw",)

    @property
    def elementwise(self) -> bool:
        """Whether each element's step depends on that element's gradient and state alone."""
        return self.unit == "element"

    @property
    def rowwise(self) -> bool:
        """Whether some rows of a parameter can be stepped without the other rows."""
        return self.unit in ("element", "row")

    @property
    def per_parameter(self) -> bool:
        """Whether a parameter can be stepped without the other parameters."""
        return self.unit != "optimizer"


_FACTORED = (Square("exp_avg_sq_col"), Mean("exp_avg"))
_COPIES = Traits(unit="optimizer", works_from_zero=False)
_BNB = Traits(
    unit="row",
    sharded_rows=False,
    copies_on_cpu=True,
    why="bitsandbytes' optimizers do not support sharded parameters",
    instead=("adamw_8bit_torchao",),
)
_BNB_NORMED = replace(
    _BNB,
    unit="parameter",
    works_from_zero=False,
    why="it scales its step by the norm of the whole parameter",
)
_COUPLED = Traits(unit="element", decoupled_decay=False)

# Patterns are searched in "module.Class", and the first that matches decides. If none matches a
# class, its base classes are looked up. A class without any entry has `Traits()`.
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
            why="Adafactor with its own learning rate scales its step by the parameter's size",
            instead=("adafactor_fixed", "adamw"),
        ),
    ),
    (r"^lit_ft\.optim\.adafactor\.Adafactor$", Traits(moments=_FACTORED)),
    (r"^lit_ft\.optim\.adamw_8bit\.RowwiseAdamW8bit$", Traits(unit="row")),
    (
        r"^lit_ft\.optim\.muon\.MuonAdamW$",
        Traits(sharded_rows=False, why="Muon orthogonalises whole matrices"),
    ),
    # Their rows are normalised, or ranks add up what they need of the others' rows.
    (r"^lit_ft\.optim\.(scale\.Scale|sinkgd\.SinkGD)$", Traits()),
    (
        r"^lit_ft\.optim\.apollo\.Apollo$",
        Traits(
            moments=(),
            movable_state=False,
            why="APOLLO keeps its moments in random subspaces of its own",
            instead=("adamw", "adamw_8bit"),
        ),
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
    # bitsandbytes, whose class names tell the kind of optimizer
    (
        r"^bitsandbytes\..*\.Paged\w+$",
        replace(
            _BNB,
            unit="parameter",
            movable_state=False,
            frees_state=False,
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
    # Others, by their class names, wherever they come from
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
            why="schedule-free optimizers keep copies of the parameters and count steps in groups",
        ),
    ),
    (
        r"\.(Prodigy|DAdapt)",
        replace(
            _COPIES,
            why="it sums over all parameters and measures the distance from their first values",
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
    """Return the traits of an optimizer class.

    A class that wraps another (`wrapped_class`) has the traits of the wrapped class. If a subclass
    overrides `step`, it is assumed to need whole parameters, even if its base class can step single
    rows or elements.
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
    """Return the table's entry for the full name of a class; None if there is none."""
    return next((traits for pattern, traits in TABLE if re.search(pattern, name)), None)


def unwrapped(kind: type) -> type:
    """Return the class that an optimizer class wraps, or the class itself if it wraps none."""
    while (wrapped := vars(kind).get("wrapped_class")) is not None:
        kind = wrapped
    return kind


def class_of(build: Callable[..., Any]) -> type | None:
    """Return the optimizer class that `build`, a class or a partial, makes; None if unknown."""
    kind = getattr(build, "func", build)
    return kind if isinstance(kind, type) else None


def _plain_step(kind: type) -> Any:
    # As soon as a class has an instance, torch replaces its step by one that runs hooks.
    step = getattr(kind, "step", None)
    return inspect.unwrap(step) if callable(step) else None
