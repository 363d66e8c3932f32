"""The error for values that are not finite: NaN or infinite."""

from __future__ import annotations

from collections.abc import Sequence

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal, Remedy

SHOWN_NAMES = 4
SHOWN_ROWS = 8


class NotFinite(Refusal, FloatingPointError):
    """The error for a loss, a gradient or a weight that is not finite.

    In a run on several ranks, all ranks raise it at the same place.

    Args:
        why: What is not finite and at which step, as a sentence without its full stop.
        *cures: The changes that may help; without any, those that usually do.
    """

    def __init__(self, why: str, *cures: Remedy) -> None:
        super().__init__(why, *(cures or remedies.AGAINST_NON_FINITE))

    def add_rows(self, rows: Sequence[str]) -> None:
        """Name the rows of the step in the message, at most 8 of them."""
        if rows:
            self.why += f" (rows: {_listed(rows, SHOWN_ROWS)})"


def of_gradients(names: Sequence[str], step: int) -> NotFinite:
    """Return the error for gradients.

    Args:
        names: The names of the layers, or of their parameters, in the order of the model.
        step: The number of optimizer steps before this one.
    """
    # Backward meets the last one first, and passes its NaN on to those before it.
    met = _listed(list(reversed(names)), SHOWN_NAMES)
    return NotFinite(f"The gradient of {met} is not finite at step {step + 1}")


def of_loss(step: int) -> NotFinite:
    """Return the error for the loss of the step after the first `step` optimizer steps."""
    return NotFinite(f"The loss is not finite at step {step + 1}")


def of_validation(metric: str, step: int) -> NotFinite:
    """Return the error for the result `metric` of a validation after `step` optimizer steps."""
    return NotFinite(f"The result of the validation after step {step}, {metric}, is not finite")


def of_weights(names: Sequence[str], step: int, purpose: str) -> NotFinite:
    """Return the error for weights.

    Args:
        names: The names of the weights.
        step: The number of optimizer steps that the weights have had.
        purpose: What they are not, for that reason, such as "saved".
    """
    listed = _listed(names, SHOWN_NAMES)
    return NotFinite(
        f"The weights {listed} are not finite after step {step}, and nothing is {purpose}"
    )


def _listed(names: Sequence[str], shown: int) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")
