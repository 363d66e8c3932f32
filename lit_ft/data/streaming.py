"""Streaming: global batches, packed or not, from examples that arrive one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from lit_ft.compat.protocols import TokenBatch
from lit_ft.data.batching import assign_rows, check_batch_geometry
from lit_ft.data.collate import Example, Row
from lit_ft.data.packing import pack

# A packed block of this many rows leaves about one of them unfilled. The first batch waits until
# the whole block is tokenised.
PACKED_BLOCK_ROWS = 64

Batch = TokenBatch


class StreamingBatches(IterableDataset[Batch]):
    """Read global batches from a stream and yield this rank's micro-batches, collated.

    All ranks read the same stream in order. As with GlobalBatchSampler, the rows of a global batch
    do not depend on how it is cut, and no row is dropped or yielded twice. Every rank yields the
    same number of batches, with dummies if there are too few rows.

    The stream is read in blocks. A block is one example or, with `packing` or `shuffle_buffer`,
    enough examples to pack tightly and to shuffle well. Each block is packed and shuffled by
    itself. A place in the stream is therefore a place in the source and a number of rows, and no
    buffer has to be saved. Prefer `shuffle_buffer` to
    `datasets.IterableDataset.shuffle(buffer_size=...)`, which loses its buffer on resume.

    Use it in torchdata's `StatefulDataLoader(self, batch_size=None, num_workers=0)`. Each iteration
    is one pass over the stream. A finished pass advances `epoch`, and a source with `set_epoch` is
    given the new one. A source with `state_dict` and `load_state_dict` resumes through them
    (`load_state_dict({})` starts from the beginning, as in datasets). Any other source is read
    again from the beginning up to the place. Under Lightning, set prefetched=1 and call `set_epoch`
    when the loader is made, as for GlobalBatchSampler.

    Args:
        examples: The encoded examples, each `{"input_ids": [...], "labels": [...]}`.
        collate: The function that makes a batch from a list of rows, and a dummy from an empty
            list.
        batch_size: The number of rows in a micro-batch on one rank.
        micro_batches: The number of micro-batches that each rank takes from a global batch, as
            with Lightning's `accumulate_grad_batches`.
        num_replicas: The number of data-parallel ranks.
        rank: The index of this data-parallel rank.
        max_length: The largest number of tokens in a row.
        packing: Whether to put several examples into one row.
        shuffle_buffer: The smallest number of examples in a block that is shuffled; 0 keeps the
            order.
        seed: The non-negative seed of the shuffling, the same on all ranks.
        prefetched: The number of batches that the training loop has fetched but not started when
            it saves the state. These batches are yielded again on resume. Lightning fetches 1 batch
            early from a loader without a length.

    Raises:
        ValueError: If a size is below 1 or the rank is not one of the replicas. While iterating,
            if an example is longer than `max_length`, or in a loader's worker process, since each
            worker would read the whole stream.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        collate: Callable[[list[Row]], Batch],
        *,
        batch_size: int,
        micro_batches: int,
        num_replicas: int,
        rank: int,
        max_length: int,
        packing: bool,
        shuffle_buffer: int = 0,
        seed: int = 0,
        prefetched: int = 0,
    ) -> None:
        check_batch_geometry(batch_size, micro_batches, num_replicas, rank)
        self.examples = examples
        self.collate = collate
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.num_replicas = num_replicas
        self.rank = rank
        self.max_length = max_length
        self.packing = packing
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.prefetched = prefetched
        self.epoch = 0

    @property
    def global_size(self) -> int:
        """The number of rows in a full global batch."""
        return self.batch_size * self.micro_batches * self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the iterators made from now on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over one pass; the iterator has `state_dict` and `load_state_dict`."""
        if get_worker_info() is not None:
            raise ValueError("A stream is read in the training process: set num_workers=0.")
        return _Pass(self)


class _Pass(Iterator[Batch]):
    """One pass over the stream; its state is a place in the endless series of passes."""

    def __init__(self, data: StreamingBatches) -> None:
        self._data = data
        self._restart(_place(data.epoch))

    def _restart(self, place: dict[str, Any]) -> None:
        # The place before each batch that the consumer may not have started; the oldest is saved.
        self._places = deque([place], maxlen=self._data.prefetched + 1)
        self._batches = self._read(place)

    def __next__(self) -> Batch:
        return next(self._batches)

    def _read(self, place: dict[str, Any]) -> Iterator[Batch]:
        data = self._data
        rows = _Rows(data, place)
        step = place["micro_batch"]
        while True:
            window_place = rows.place()
            window = list(islice(rows, data.global_size))
            if not window:
                break
            lengths = [sum(len(example["input_ids"]) for example in row) for row in window]
            steps = assign_rows(lengths, batch_size=data.batch_size, num_replicas=data.num_replicas)
            while step < len(steps):
                batch = data.collate([window[row] for row in steps[step][data.rank]])
                step += 1
                is_inside = step < len(steps)
                place = window_place | {"micro_batch": step} if is_inside else rows.place()
                self._places.append(place)
                yield batch
            step = 0
        data.set_epoch(rows.epoch + 1)
        self._places.clear()
        self._places.append(_place(data.epoch))

    def state_dict(self) -> dict[str, Any]:
        """Return where to resume; it is the same on all ranks."""
        return {"place": self._places[0], "form": _form(self._data)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state` was taken.

        Raises:
            ValueError: If the rows at the saved place were packed, shuffled or cut into
                micro-batches with other settings.
        """
        place, form = state["place"], _form(self._data)
        names = ["max_length", "packing", "shuffle_buffer", "seed"] if place["row"] else []
        if place["micro_batch"]:
            names = list(form)
        for name in names:
            if state["form"][name] != form[name]:
                raise ValueError(
                    f"Cannot resume here: {name} was {state['form'][name]} and is now "
                    f"{form[name]}. Resume with the same setting, or start a new run."
                )
        self._data.set_epoch(place["epoch"])
        self._restart(place)


def _place(
    epoch: int, source: Any = None, block: int = 0, row: int = 0, micro_batch: int = 0
) -> dict[str, Any]:
    """Return a place: the source's state where a block begins, and the rows to skip in it."""
    return {
        "epoch": epoch,
        "source": source,
        "block": block,
        "row": row,
        "micro_batch": micro_batch,
    }


def _form(data: StreamingBatches) -> dict[str, Any]:
    names = ("max_length", "packing", "shuffle_buffer", "seed", "global_size", "micro_batches")
    return {name: getattr(data, name) for name in names}


class _Rows(Iterator[Row]):
    """The rows of the stream from a place onwards, read block by block."""

    def __init__(self, data: StreamingBatches, place: dict[str, Any]) -> None:
        self._data = data
        self.epoch: int = place["epoch"]
        self._source = _Source(data.examples, self.epoch, place["source"])
        self._block_source = place["source"]
        self._block: int = place["block"]
        self._rows = self._read_block()
        self._row: int = place["row"]

    def place(self) -> dict[str, Any]:
        """Return the place of the next row."""
        if self._row < len(self._rows):
            return _place(self.epoch, self._block_source, self._block, self._row)
        return _place(self.epoch, self._source.state(), self._block + 1)

    def __next__(self) -> Row:
        if self._row == len(self._rows):
            self._block_source = self._source.state()
            self._block += 1
            self._rows = self._read_block()
            self._row = 0
        if not self._rows:
            raise StopIteration
        self._row += 1
        return self._rows[self._row - 1]

    def _read_block(self) -> list[Row]:
        data = self._data
        min_tokens = PACKED_BLOCK_ROWS * data.max_length if data.packing else 0
        examples: list[Example] = []
        lengths: list[int] = []
        num_tokens = 0
        for example in self._source:
            length = len(example["input_ids"])
            if length > data.max_length:
                raise ValueError(
                    f"An example of the stream has {length} tokens, more than max_length="
                    f"{data.max_length}: truncate it first, or raise max_length."
                )
            examples.append(example)
            lengths.append(length)
            num_tokens += max(length, 1)  # else empty examples would never fill a block
            if len(examples) >= max(data.shuffle_buffer, 1) and num_tokens >= min_tokens:
                break
        bins = (
            pack(lengths, data.max_length) if data.packing else [[i] for i in range(len(lengths))]
        )
        rows: list[Row] = [[examples[i] for i in indices] for indices in bins]
        if data.shuffle_buffer:
            rng = np.random.default_rng((data.seed, self.epoch, self._block))
            rows = [rows[i] for i in rng.permutation(len(rows))]
        return rows


class _Source(Iterator[Example]):
    """The examples of one epoch from a state onwards."""

    def __init__(self, examples: Any, epoch: int, state: Any) -> None:
        self._examples = examples
        self._is_stateful = hasattr(examples, "state_dict") and hasattr(examples, "load_state_dict")
        if hasattr(examples, "set_epoch"):
            examples.set_epoch(epoch)
        if self._is_stateful:
            # Always, because datasets resumes from the last state it was given in each iteration.
            examples.load_state_dict(state or {})
        self._num_read: int = 0 if self._is_stateful else state or 0
        self._iterator: Iterator[Example] = islice(examples, self._num_read, None)

    def __next__(self) -> Example:
        example = next(self._iterator)
        self._num_read += 1
        return example

    def state(self) -> Any:
        """Return the state of the source before the next example."""
        return self._examples.state_dict() if self._is_stateful else self._num_read
