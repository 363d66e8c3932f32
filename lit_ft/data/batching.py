"""Batching: which rows form a global batch, and which rank takes them in which micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

# Rows are sorted by length within this many global batches: enough to keep padding small, and few
# enough that rows meet different rows in every epoch. transformers' LengthGroupedSampler uses the
# same number.
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

    With `shuffle`, the longest row opens epoch 0, so that a run that needs too much memory fails
    in its first step. With `group_by_length`, the rows of a full global batch have similar
    lengths. The short last batch is left unsorted, so that no epoch ends on the shortest rows.

    Args:
        lengths: The number of tokens of each row, [rows].
        global_size: The number of rows in a global batch, over all ranks and micro-batches.
        shuffle: Whether to draw a new permutation from (seed, epoch). Otherwise the order of the
            data is kept.
        group_by_length: Whether to sort rows by length within chunks of up to 50 global batches.
        seed: The non-negative seed of the shuffling.
        epoch: The non-negative number of the epoch.

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
    """Assign the rows of one global batch to micro-batches and ranks.

    Rows of similar length share a micro-batch, which keeps padding small. The longest rows come
    first. The ranks of one micro-step get similar work, and a rank that has had less work so far
    gets the longer rows. Over the whole global batch, two ranks therefore differ in padded tokens
    by no more than two micro-batches of the same micro-step do.

    Args:
        lengths: The number of tokens of each row of the global batch, [rows].
        batch_size: The largest number of rows in a micro-batch on one rank.
        num_replicas: The number of data-parallel ranks.

    Returns:
        Positions in `lengths`, indexed [micro-step][rank]. There are ceil(rows / (batch_size *
        num_replicas)) micro-steps, and rows are spread evenly over them. A rank's list is empty
        if there are too few rows for all ranks.
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
    """Yield this rank's micro-batches, one global batch after another.

    A global batch holds the rows of one optimizer step: batch_size * micro_batches * num_replicas
    of them. Its rows depend only on the seed, the epoch, its number and its size, not on how it is
    cut into ranks and micro-batches. Every row occurs exactly once an epoch. All ranks yield the
    same number of micro-batches in every global batch, including the short last one. There, a
    micro-batch may be an empty list: collate it into a dummy, so that the ranks stay in step.

    Each iteration is one epoch. A finished epoch advances to the next unless `set_epoch` is called.
    Iterators have `state_dict` and `load_state_dict`, as torchdata's StatefulDataLoader requires.
    The state is the same on all ranks. It can be loaded if global batches of the same size are cut
    differently. Inside a global batch, `micro_batches` must stay the same.

    Under Lightning, set `Trainer(use_distributed_sampler=False)`. If the loader has workers, also
    call `set_epoch(trainer.fit_loop.epoch_progress.current.processed)` when the loader is made,
    because workers start before Lightning sets the epoch. Save checkpoints in on_train_batch_end or
    at a validation. With max_steps, Lightning 2.6 skips an epoch when it resumes from a checkpoint
    that was saved in on_train_epoch_end.

    Args:
        lengths: The number of tokens of each row, [rows].
        batch_size: The number of rows in a micro-batch on one rank.
        micro_batches: The number of micro-batches that each rank takes from a global batch, as
            with Lightning's `accumulate_grad_batches`.
        num_replicas: The number of data-parallel ranks.
        rank: The index of this data-parallel rank.
        shuffle: Whether to reshuffle the rows every epoch.
        group_by_length: Whether to put rows of similar length into one global batch, which reduces
            padding.
        seed: The non-negative seed of the shuffling, the same on all ranks.

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
        """This sampler, because Lightning calls `dataloader.batch_sampler.sampler.set_epoch`."""
        return self

    @property
    def global_size(self) -> int:
        """The number of rows in a full global batch."""
        return self.batch_size * self.micro_batches * self.num_replicas

    @cached_property  # a state is taken at each batch
    def order_settings(self) -> dict[str, int]:
        """The settings that the row order depends on, apart from `num_rows` and `global_size`."""
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
        """The number of micro-batches that each rank yields per epoch."""
        num_full, rest = divmod(len(self.lengths), self.global_size)
        return num_full * self.micro_batches - (-rest // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over one epoch: lists of row indices."""
        return _EpochIterator(self)


class _EpochIterator(Iterator[list[int]]):
    """One epoch of a GlobalBatchSampler; its state is a place in the endless series of epochs."""

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
        # Lightning makes the first iterator of a fit, and restores it, before it sets the epoch.
        if self._epoch != self._sampler.epoch:
            self._epoch, self._position = self._sampler.epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where to resume, as plain integers that are the same on all ranks."""
        if self._order is None:
            self._follow_set_epoch()
        epoch, position = self._epoch, self._position
        # Lightning saves after the last batch, before it sees StopIteration, and expects the next
        # epoch when it resumes.
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
        """Resume where `state` was taken.

        Raises:
            ValueError: If `state` was taken inside an epoch, and the data, the settings or the size
                of a global batch have changed since then.
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
        "data, settings and batch_size * accumulate_grad_batches * devices, or start a new run."
    )


def check_batch_geometry(batch_size: int, micro_batches: int, num_replicas: int, rank: int) -> None:
    """Check that a global batch can be cut by these sizes.

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
