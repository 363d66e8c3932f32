"""The mean loss over the target tokens of a global batch (all micro-batches of one step)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TokenMean:
    """Makes the gradient the mean over the target tokens of the whole global batch.

    A mean of micro-batch means would give a token more weight if its micro-batch had fewer targets.
    So every micro-batch back-propagates its summed loss, divided by one reference count. Before the
    step, the accumulated gradient is scaled once, by `reference / num_targets`. The reference is
    the number of targets in the first micro-batch, over all ranks. Without accumulation the factor
    is 1, and the gradient is not touched.

    Attributes:
        all_reduce: The function that sums a tensor over the ranks and returns the sum. Ranks with
            the same share of the data count once.
        reference: The reference count for the current global batch, in target tokens.
    """

    all_reduce: Callable[[Tensor], Tensor]
    reference: int = field(default=0, init=False)
    _sums: Tensor | None = field(default=None, init=False)

    def add(self, loss_sum: Tensor, num_targets: int, *, alone: bool = False) -> Tensor:
        """Add a micro-batch, and return the scalar to back-propagate: `loss_sum / reference`.

        Args:
            loss_sum: The loss summed over this rank's target tokens in the micro-batch, a scalar.
            num_targets: The number of this rank's target tokens in the micro-batch.
            alone: Whether this rank has all of the data. The host then knows the total count, and
                need not wait for the device.
        """
        # float64 where the device has it: token counts beyond 2^24 are not exact in float32.
        dtype = torch.float32 if loss_sum.device.type == "mps" else torch.float64
        sums = torch.stack(
            [loss_sum.detach().to(dtype), loss_sum.new_tensor(num_targets).to(dtype)]
        )
        if self._sums is None:
            self._sums = sums
            count = num_targets if alone else int(self.all_reduce(sums[1].clone()))
            self.reference = max(count, 1)
        else:
            self._sums = self._sums + sums
        return loss_sum / self.reference

    def finish(self, parameters: Iterable[Tensor]) -> tuple[Tensor, int]:
        """Scale the gradients of `parameters`, and begin the next global batch.

        Returns:
            The mean loss of the global batch, a scalar equal on all ranks, and the number of its
            target tokens.
        """
        assert self._sums is not None, "a step without a micro-batch"
        loss_sum, count = self.all_reduce(self._sums)
        num_targets = max(int(count), 1)
        if num_targets != self.reference:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, self.reference / num_targets)
        self._sums = None
        return loss_sum / num_targets, int(count)
