"""Types of arguments that state a range, for constructors whose arguments a configuration sets.

A range is part of the annotation, so that one place says it. Python ignores it; the check of a
configuration (`lit_ft.run.settings`) and the docs read it.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Interval

Count = Annotated[int, Ge(1)]
"""A number of things: one or more."""

WholeNumber = Annotated[int, Ge(0)]
"""A number of things: none or more."""

Positive = Annotated[float, Gt(0)]
"""A finite number above 0."""

NonNegative = Annotated[float, Ge(0)]
"""A finite number of at least 0."""

Share = Annotated[float, Interval(ge=0, le=1)]
"""A part of a whole: none, some or all of it."""

OpenShare = Annotated[float, Interval(gt=0, lt=1)]
"""A part of a whole: some of it, and not all."""

Decay = Annotated[float, Interval(ge=0, lt=1)]
"""A factor by which something fades in each step."""
