"""Find the largest micro-batch that fits in memory, and keep the global batch the same."""

from __future__ import annotations

import gc
from typing import Any, cast

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_ft.compat import remedies
from lit_ft.compat.protocols import BoundsBatches, SumsLoss
from lit_ft.compat.ranges import Decay
from lit_ft.distributed.plan import Misconfiguration, check_run
from lit_ft.measure import estimate_state_bytes, is_out_of_memory, peak_bytes, reset_peak
from lit_ft.measure.memory import current_bytes


class AutoBatchSize(Callback):
    """Set `datamodule.batch_size` to the largest micro-batch that fits, before training starts.

    The product `batch_size * accumulate_grad_batches` does not change: micro-batches become larger
    and fewer. The callback tries the divisors of this product, smallest first. Each trial runs two
    forward and backward passes over rows of `datamodule.max_length` random tokens, the longest rows
    that can occur. Part of the free memory is set aside: `headroom`, and the bytes that the
    optimizer's state will take. The search stops at the first size that does not fit in the rest.
    Before each trial, the memory that it needs is extrapolated from the smaller sizes, and a size
    that cannot fit is not tried.

    The module must have a method `loss_sum(batch)`, and the data module the attributes `batch_size`
    and `max_length`.

    Args:
        headroom: The fraction of the free memory to leave unused, between 0 and 1. It is kept for
            fragmentation and for other processes on the device.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(
        ...     callbacks=[AutoBatchSize(headroom=0.2)],
        ...     accumulate_grad_batches=8,
        ...     logger=False,
        ...     accelerator="cpu",
        ... )
    """

    def __init__(self, headroom: Decay = 0.1) -> None:
        self.headroom = headroom

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run on several devices, because their trials could disagree."""
        if stage == "fit":
            own = self.plan_facts(trainer, pl_module)
            check_run(trainer, pl_module, parts=["batch size"], **own)

    def plan_facts(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return the fact that this callback sets the batch size."""
        return {"finds_batch_size": True}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search for the largest micro-batch, and set it."""
        data: BoundsBatches = trainer.datamodule  # type: ignore[attr-defined]
        rows = data.batch_size * trainer.accumulate_grad_batches
        found, peak = self._largest(trainer, pl_module, rows, data.max_length)
        rank_zero_info(
            f"AutoBatchSize: batch_size={found} accumulate_grad_batches={rows // found} "
            f"({peak / 2**30:.2f} GiB for rows of {data.max_length} tokens)."
        )
        if isinstance(trainer.val_check_interval, int):  # counts micro-batches
            steps = trainer.val_check_interval / trainer.accumulate_grad_batches
            trainer.val_check_interval = max(1, round(steps * rows / found))
        data.batch_size = found
        trainer.accumulate_grad_batches = rows // found
        # Counting the steps of an epoch has already made a loader, with batches of the old size.
        trainer.fit_loop._combined_loader = None

    def _largest(
        self, trainer: Trainer, module: LightningModule, rows: int, length: int
    ) -> tuple[int, int]:
        device = trainer.strategy.root_device
        states = [n for o in trainer.optimizers for n in estimate_state_bytes(o)]
        if None in states:
            rank_zero_warn(
                "The optimizer does not report the size of its state, so no memory is reserved for "
                "it. If the first step runs out of memory, use a smaller batch size."
            )
        reserved = sum(n or 0 for n in states)
        free = int(_free_bytes(device) * (1 - self.headroom)) - reserved
        # All trials share one baseline. On a CPU, the allocator keeps the memory that a smaller
        # batch freed, so the growth from one trial to the next would look too small.
        baseline = current_bytes(device).value
        needed: dict[int, int] = {}
        for size in (n for n in range(1, rows + 1) if rows % n == 0):
            if needed and _extrapolated(needed, size) > free:
                break
            try:
                peak = _peak_of(trainer, module, size, length, device)
                # Resident memory is noisy for small batches, so the estimate never falls.
                needed[size] = max(peak - baseline, 1, *needed.values())
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break
            finally:
                module.zero_grad(set_to_none=True)
                gc.collect()
            if needed[size] > free:
                del needed[size]
                break
        if not needed:
            raise Misconfiguration(
                f"Not even one row of {length} tokens fits",
                remedies.SHORTER_ROWS,
                remedies.CHECKPOINTED,
                remedies.GALORE_8BIT,
                remedies.LORA,
            )
        return max(needed), needed[max(needed)]


def _peak_of(
    trainer: Trainer, module: LightningModule, size: int, length: int, device: torch.device
) -> int:
    """Return the peak of the bytes in use during two micro-batches of `size` rows."""
    vocabulary = module.model.get_input_embeddings().num_embeddings  # type: ignore[union-attr, operator]
    reset_peak(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(2):  # the first pass leaves gradients in memory, as accumulation does
            tokens: Tensor = torch.randint(vocabulary, (size, length), device=device)
            with trainer.precision_plugin.forward_context():
                batch = {"input_ids": tokens, "labels": tokens}
                loss, num_targets = cast(SumsLoss, module).loss_sum(batch)
            (loss / num_targets).backward()  # type: ignore[no-untyped-call]
    return peak_bytes(device).value


def _extrapolated(needed: dict[int, int], size: int) -> float:
    """Return the bytes that a batch of `size` rows should need, by linear extrapolation.

    The line goes through the last two measurements, or through the origin and the only one.
    """
    sizes = sorted(needed)[-2:]
    if len(sizes) == 1:
        return needed[sizes[0]] * size / sizes[0]
    small, large = sizes
    slope = max(needed[large] - needed[small], 0) / (large - small)
    return needed[large] + slope * (size - large)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available)
