"""The examples of lit_ft's batches in their order, for others to train on."""

from __future__ import annotations

from itertools import chain, islice

from datasets import Dataset

from lit_ft import InstructionDataModule


def examples_in_order(data: InstructionDataModule, steps: int) -> Dataset:
    """Return the examples of the first `steps` batches; read in turn, they are the same batches."""
    batches = islice(data.train_dataloader().batch_sampler, steps)
    every = data.train_examples.select_columns(["input_ids", "labels"])
    return every.select(list(chain.from_iterable(batches)))
