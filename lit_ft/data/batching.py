"""Batching: which rows form a global batch, and which rank takes them in which micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

# Length-sorting spans this many global batches: enough for little padding, few enough that rows
# meet other rows in every epoch (transformers' LengthGroupedSampler chose the same number).
GROUPED_GLOBAL_BATCHES = 50


def epoch_order(
    lengths: NDArray[np.int64],
    *,
    global_size: int,
    shuffle: bool,
    group_by_length: bool,
    seed: int,
    epoch: int,
) -> NDArray[np.int64]:
    """Order the rows of one epoch; global batch t is `order[t * global_size :][:global_size]`.

    With `shuffle`, a longest row opens epoch 0, so that a run too large for the memory fails in
    its first step. With `group_by_length`, the rows of a full global batch have similar lengths;
    the short last one is left as it falls, so that no epoch ends on the shortest rows.

    Args:
        lengths: Tokens of each row, [rows].
        global_size: Rows of a global batch over all ranks and micro-batches.
        shuffle: Draw a new permutation from (seed, epoch); otherwise keep the order of the data.
        group_by_length: Sort by length within chunks of many global batches.
        seed: Non-negative.
        epoch: Non-negative.

    Returns:
        A permutation of the row indices, [rows].
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    longest_first = shuffle and epoch == 0 and len(order) > 0
    if longest_first:
        longest = int(lengths[order].argmax())
        order[0], order[longest] = order[longest], order[0]
    if not group_by_length:
        return order
    num_full = len(order) // global_size
    full, rest = np.split(order, [num_full * global_size])
    chunk_size = global_size * min(GROUPED_GLOBAL_BATCHES, max(1, num_full // 4))
    full = full[np.lexsort((-lengths[full], np.arange(len(full)) // chunk_size))]
    if shuffle:
        batches = full.reshape(num_full, global_size)
        movable = batches[1:] if longest_first else batches
        movable[:] = rng.permutation(movable)
    return np.concatenate((full, rest))


def assign_rows(
    lengths: Sequence[int] | NDArray[np.int64], *, batch_size: int, num_replicas: int
) -> list[list[list[int]]]:
    """Deal the rows of one global batch to micro-batches and ranks.

    Neighbours in length share a micro-batch (little padding), the longest come first, the ranks of
    one micro-step get similar work, and a rank that has had less work so far gets the longer
    rows: the padded tokens of two ranks differ by no more than two micro-batches of one step do.

    Args:
        lengths: Tokens of each row of the global batch.
        batch_size: Rows of a micro-batch on one rank at most.
        num_replicas: Number of ranks.

    Returns:
        Positions in `lengths`, indexed [micro-step][rank]: ceil(rows / (batch_size *
        num_replicas)) micro-steps, rows spread evenly. A list is empty where rows do not suffice.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    num_steps = -(-len(sizes) // (batch_size * num_replicas))
    longest_first = np.argsort(-sizes, kind="stable")
    work = np.zeros(num_replicas, dtype=np.int64)  # padded tokens dealt to each rank so far
    steps = []
    for step in np.array_split(longest_first, num_steps):
        micro_batches = np.array_split(step, num_replicas)
        cost = np.array([sizes[rows[:1]].sum() * len(rows) for rows in micro_batches])
        dealt: list[list[int]] = [[] for _ in range(num_replicas)]
        for rank, costly in zip(
            np.argsort(work, kind="stable"), np.argsort(-cost, kind="stable"), strict=True
        ):
            dealt[rank] = micro_batches[costly].tolist()
            work[rank] += cost[costly]
        steps.append(dealt)
    return steps


class GlobalBatchSampler(Sampler[list[int]]):
    """Yield this rank's micro-batches, global batch by global batch.

    A global batch (the rows of one optimizer step) has batch_size * micro_batches * num_replicas
    rows. Which rows depends on (seed, epoch, its number, its size) alone, not on how it is cut into
    ranks and micro-batches. Every row occurs exactly once an epoch, and all ranks yield equally
    many micro-batches in every global batch, the short last one included, where a micro-batch
    may be an empty list: collate it into a dummy, so that the ranks keep step.

    Each iteration is one epoch; a finished one moves on to the next unless `set_epoch` is called.
    Iterators have `state_dict` and `load_state_dict`, as torchdata's StatefulDataLoader wants
    them. The state is the same on all ranks, and may be loaded under another cut of the same
    global batch.

    Under Lightning, set `Trainer(use_distributed_sampler=False)`, and where the loader has workers
    call `set_epoch(trainer.fit_loop.epoch_progress.current.processed)` when it is made: they
    begin before Lightning tells the epoch. Save in on_train_batch_end or at a validation: Lightning
    2.6 with max_steps skips an epoch when it resumes from on_train_epoch_end.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a micro-batch on one rank.
        micro_batches: Micro-batches of a rank in one global batch (gradient accumulation).
        num_replicas: Number of data-parallel ranks.
        rank: This rank.
        shuffle: Reshuffle every epoch.
        group_by_length: Put rows of similar length into one global batch: less padding.
        seed: Seed of the shuffling, non-negative, the same on all ranks.

    Raises:
        ValueError: If a size is below 1 or the rank is not one of the replicas.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batches: int,
        num_replicas: int,
        rank: int,
        shuffle: bool,
        group_by_length: bool,
        seed: int,
    ) -> None:
        check_batch_geometry(batch_size, micro_batches, num_replicas, rank)
        self.lengths: NDArray[np.int64] = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Itself: Lightning calls `dataloader.batch_sampler.sampler.set_epoch`."""
        return self

    @property
    def global_size(self) -> int:
        """Rows of a full global batch."""
        return self.batch_size * self.micro_batches * self.num_replicas

    @cached_property  # a state is taken at each batch
    def order_settings(self) -> dict[str, int]:
        """What the order of the rows hangs on, beside their number and that of a global batch."""
        return {
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "group_by_length": int(self.group_by_length),
            "tokens": int(np.sum(self.lengths)),
        }

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of iterators that have not yielded yet."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches that this rank (as every rank) yields per epoch."""
        num_full, rest = divmod(len(self.lengths), self.global_size)
        return num_full * self.micro_batches - (-rest // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over one epoch: lists of row indices."""
        return _EpochIterator(self)


class _EpochIterator(Iterator[list[int]]):
    """One epoch of a GlobalBatchSampler; its state is a place in the endless run of epochs."""

    def __init__(self, sampler: GlobalBatchSampler) -> None:
        self._sampler = sampler
        self._epoch = sampler.epoch
        self._position = 0  # micro-batches yielded or, before the first, to skip
        self._order: NDArray[np.int64] | None = None
        self._window: list[list[int]] = []

    def __next__(self) -> list[int]:
        sampler = self._sampler
        if self._order is None:
            self._follow_set_epoch()
            self._order = epoch_order(
                sampler.lengths,
                global_size=sampler.global_size,
                shuffle=sampler.shuffle,
                group_by_length=sampler.group_by_length,
                seed=sampler.seed,
                epoch=self._epoch,
            )
        if self._position == len(sampler):
            raise StopIteration
        global_batch, step = divmod(self._position, sampler.micro_batches)
        if step == 0 or not self._window:
            self._window = self._share(self._order, global_batch)
        self._position += 1
        if self._position == len(sampler):
            sampler.set_epoch(self._epoch + 1)
        return self._window[step]

    def _share(self, order: NDArray[np.int64], global_batch: int) -> list[list[int]]:
        """Return this rank's micro-batches of a global batch."""
        sampler = self._sampler
        rows = order[global_batch * sampler.global_size :][: sampler.global_size]
        steps = assign_rows(
            sampler.lengths[rows],
            batch_size=sampler.batch_size,
            num_replicas=sampler.num_replicas,
        )
        return [rows[step[sampler.rank]].tolist() for step in steps]

    def _follow_set_epoch(self) -> None:
        # Lightning makes the first iterator of a fit, and restores it, before it tells the epoch.
        if self._epoch != self._sampler.epoch:
            self._epoch, self._position = self._sampler.epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Say where to go on: plain integers, the same on all ranks."""
        if self._order is None:
            self._follow_set_epoch()
        epoch, position = self._epoch, self._position
        # Lightning saves after the last batch, never having seen StopIteration, and wants the
        # next epoch when it resumes.
        if position == len(self._sampler):
            epoch, position = epoch + 1, 0
        global_batch, step = divmod(position, self._sampler.micro_batches)
        return {
            "epoch": epoch,
            "global_batch": global_batch,
            "micro_batch": step,
            "micro_batches": self._sampler.micro_batches,
            "global_size": self._sampler.global_size,
            "num_rows": len(self._sampler.lengths),
            **self._sampler.order_settings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: If the state lies inside an epoch of other global batches or other data.
        """
        sampler = self._sampler
        if state["global_batch"] or state["micro_batch"]:
            sizes = {"num_rows": len(sampler.lengths), "global_size": sampler.global_size}
            for name, now in (sizes | sampler.order_settings).items():
                if state.get(name, now) != now:
                    raise ValueError(_other_data(name, state[name], now))
        if state["micro_batch"] and state["micro_batches"] != sampler.micro_batches:
            raise ValueError(
                _other_data("micro_batches", state["micro_batches"], sampler.micro_batches)
            )
        self._epoch = state["epoch"]
        self._position = state["global_batch"] * sampler.micro_batches + state["micro_batch"]
        self._order = None
        self._window = []
        sampler.set_epoch(self._epoch)


def _other_data(name: str, saved: int, now: int) -> str:
    return (
        f"Cannot resume inside an epoch: {name} was {saved} and is now {now}. Resume with the same "
        "data, settings and batch_size * accumulate_grad_batches * devices, or start anew."
    )


def check_batch_geometry(batch_size: int, micro_batches: int, num_replicas: int, rank: int) -> None:
    """Refuse sizes that cut no global batch.

    Raises:
        ValueError: If a size is below 1 or the rank is not one of the replicas.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("micro_batches", micro_batches),
        ("num_replicas", num_replicas),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 <= rank < num_replicas:
        raise ValueError(f"rank must be in 0..{num_replicas - 1}, got {rank}.")
