"""InstructionDataModule: rows from any source as batches for CausalLMModule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from lit_ft import terminal
from lit_ft.compat import remedies
from lit_ft.compat.protocols import IdsBeyond
from lit_ft.compat.ranges import Count, OpenShare, WholeNumber
from lit_ft.compat.refusal import Remedy
from lit_ft.data import notes
from lit_ft.data.batching import GlobalBatchSampler
from lit_ft.data.collate import Collator
from lit_ft.data.conversation import Message
from lit_ft.data.encoded import EncodingReport
from lit_ft.data.encoding import (
    Encoder,
    Overlong,
    chosen,
    load_chat_template,
    turns_to_learn,
)
from lit_ft.data.formats import Format
from lit_ft.data.masks import ControlTokens, TrainOn
from lit_ft.data.mixing import Bins, chosen_places, subset
from lit_ft.data.packing import pack
from lit_ft.data.sources import EMBEDDED
from lit_ft.data.splits import (
    load_tables,
    open_streams,
    rows_of_choice,
    source_choices,
    weighted_sources,
)
from lit_ft.data.streaming import StreamingBatches
from lit_ft.data.tables import column, repeated
from lit_ft.data.token_ids import ids_from, num_ids
from lit_ft.distributed.plan import Misconfiguration
from lit_ft.distributed.ranks import data_parallel_rank

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

STREAM_SHUFFLE_BUFFER = 1000  # examples
SHOWN = 20  # bad rows that are listed


class InstructionDataModule(LightningDataModule):
    """Reads, encodes, splits, mixes and batches instruction data.

    Batches are dicts of `input_ids` and `labels` [B, T], `attention_mask` or `position_ids` [B, T]
    where needed, `num_tokens` and `num_targets`; see `lit_ft.data.collate.Collator`. The rows of a
    global batch do not depend on how it is cut into micro-batches and ranks. Validation sees each
    example once. Set `Trainer(use_distributed_sampler=False)`, since this module assigns the
    batches to the ranks.

    After `setup`, `train_examples` and `val_examples` are tables of
    `lit_ft.data.encoded.EncodedRow` (with `streaming`, the former is a stream), and `reports` has
    an EncodingReport for `train` and one for `val`.

    Args:
        path: The embedded data, `python-docstrings`; a .jsonl, .json, .csv, .tsv, .parquet or .txt
            file, also compressed (.gz, .zst); a folder of these files; or the name of a Hugging
            Face dataset.
        val_path: The path of the data to validate on; None splits the training data.
        sources: Several sources in place of `path`, each as `{path, weight?, format?, ...}`, with
            further entries as in `source_options`. Each example is drawn from one of them by weight
            until all are exhausted. A source that is small for its weight repeats within the epoch.
        format: The format that reads the rows, such as `lit_ft.data.formats.alpaca.Alpaca()`, or
            its name ("alpaca") for the default columns; None detects it from the keys of each
            source's first row.
        tokenizer: A fast tokenizer of transformers; None takes that of the trainer's module.
        chat_template: The shipped template `plain`, or the path of a Jinja file; None keeps the
            tokenizer's own. It is set on the tokenizer, so that generation and export use the
            template of the training.
        max_length: The largest number of tokens in an example, and in a packed row.
        batch_size: The number of rows in a micro-batch on one rank.
        val_batch_size: The number of rows in a validation batch on one rank; None uses
            `batch_size`.
        packing: Whether to put several examples into a training row, kept apart by `position_ids`.
        group_by_length: Whether to put rows of similar length into one global batch.
        overlong: What to do with a row that is too long. "drop" leaves it out, "cut" cuts off its
            end, and "cut_left" cuts off its start. "split" makes several examples of it: a text
            loses no token, and a chat is split before turns of the user. A part of a chat that is
            still too long is left out.
        train_on: The turns of a chat to learn: "assistant" for all answers, "last" for the last
            answer, "all" for every token, or a list of roles. A message's own `train` takes
            precedence.
        control_tokens: What to do with a control token of the tokenizer in the text of a message.
            "text" encodes it as ordinary text, "keep" keeps it as a token, and "refuse" treats the
            row as bad.
        learn_empty_think: Whether an empty thinking block before an answer is learnt.
        drop_unrendered: Whether a text that the chat template leaves out is dropped and counted.
            Otherwise its row is treated as bad, unless the text is reasoning in an earlier answer.
        bad_rows: What to do with a row that cannot be read or encoded. "stop" raises its error, and
            "skip" leaves it out, counts it and lists it.
        val_fraction: The share of the rows to validate on, between 0 and 1, if neither `val_path`
            nor the source decides.
        max_train_examples: The largest number of examples to train on, chosen at random but the
            same in every run; None trains on all. A stream takes its first examples.
        max_val_examples: The largest number of examples to validate on, chosen at random but the
            same in every run; None validates on all. A stream without `val_path` takes its first
            rows.
        streaming: Whether to encode while training and not before, for data larger than the disk. A
            stream has no length, so set `Trainer(max_steps=...)`.
        num_workers: The number of processes that load batches; 0 loads them in the main process.
        seed: The seed of the order of the rows and of the mixture. The split does not depend on it,
            so that runs with different seeds can be compared.
        source_options: The options of `path`: those of `datasets.load_dataset` (such as `name`,
            `split` and `revision`) for a hub dataset, or of `lit_ft.data.docstrings.Docstrings` for
            the embedded data.
        val_source_options: The options of `val_path`, of the same kinds as `source_options`.

    Raises:
        ValueError: At once, if an argument is bad or a path is unknown. In `setup`, if a row cannot
            be read or encoded (the message names it), or if no example is left.
        Misconfiguration: At once, if `streaming` cannot be combined with the other arguments. In
            `setup`, if there is no tokenizer, or if the trainer of a stream has no `max_steps`.
    """

    def __init__(
        self,
        path: str | None = EMBEDDED,
        *,
        val_path: str | None = None,
        sources: Sequence[Mapping[str, Any]] | None = None,
        format: Format | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        max_length: Annotated[int, Ge(2)] = 512,
        batch_size: Count = 4,
        val_batch_size: Count | None = None,
        packing: bool = False,
        group_by_length: bool = True,
        overlong: Overlong = "cut",
        train_on: TrainOn = "assistant",
        control_tokens: ControlTokens = "text",
        learn_empty_think: bool = False,
        drop_unrendered: bool = False,
        bad_rows: Literal["stop", "skip"] = "stop",
        val_fraction: OpenShare = 0.05,
        max_train_examples: Count | None = None,
        max_val_examples: Count | None = None,
        streaming: bool = False,
        num_workers: WholeNumber = 0,
        seed: WholeNumber = 0,
        source_options: Mapping[str, Any] | None = None,
        val_source_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _at_least(1, batch_size=batch_size, val_batch_size=val_batch_size)
        _at_least(1, max_train_examples=max_train_examples, max_val_examples=max_val_examples)
        _at_least(2, max_length=max_length)
        _at_least(0, num_workers=num_workers, seed=seed)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {val_fraction}")
        self.tokenizer = tokenizer
        self.chat_template = None if chat_template is None else load_chat_template(chat_template)
        self.max_length = max_length
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.packing = packing
        self.group_by_length = group_by_length
        self.encoding: dict[str, Any] = {
            **chosen(overlong=overlong, control_tokens=control_tokens, bad_rows=bad_rows),
            "max_length": max_length,
            "train_on": turns_to_learn(train_on),
            "learn_empty_think": learn_empty_think,
            "drop_unrendered": drop_unrendered,
        }
        self.val_fraction = val_fraction
        self.max_train_examples = max_train_examples
        self.max_val_examples = max_val_examples
        self.streaming = streaming
        self.num_workers = num_workers
        self.seed = seed
        self.verbose = True  # False leaves it to a `StartTable` to print the reports
        self.reports: dict[str, EncodingReport] = {}
        self.train_examples: Dataset | IterableDataset | None = None
        self.val_examples: Dataset | None = None
        self._val_sources = np.empty(0, np.int64)
        sources = source_choices(path, sources, source_options)
        if val_source_options and not val_path:
            raise ValueError("val_source_options needs val_path")
        held_out = [{"path": val_path, **(val_source_options or {})}] if val_path else []
        trained_on = [rows_of_choice(source) for source in sources]
        if held_out and rows_of_choice(held_out[0]) in trained_on and val_path != EMBEDDED:
            raise ValueError(f"{val_path} cannot be both trained and validated on")
        if streaming:
            self._check_streaming(sources, val_path)
        self._train = weighted_sources(sources, format=format, streaming=streaming)
        self._val = weighted_sources(held_out, format=format) if held_out else []

    def _check_streaming(self, sources: Sequence[Mapping[str, Any]], val_path: str | None) -> None:
        if any(source.get("path") == EMBEDDED for source in sources):
            raise Misconfiguration(f"{EMBEDDED} is not streamed", remedies.NO_STREAM)
        if val_path is None and self.max_val_examples is None:
            raise Misconfiguration(
                "a stream is not split by a fraction",
                remedies.VALIDATE_ON_FIRST,
                remedies.VALIDATE_ELSEWHERE,
            )
        if self.num_workers:
            raise Misconfiguration("a stream is read by the main process", remedies.NO_WORKERS)

    def prepare_data(self) -> None:
        """Encode the sources into the cache, in one process per machine."""
        with terminal.stage("reading the data"):
            encoder = self._encoder()
            for source in [*([] if self.streaming else self._train), *self._val]:
                source.table(encoder)

    def setup(self, stage: str | None = None) -> None:
        """Load the examples from the cache, or open the streams."""
        if self.val_examples is not None:
            return
        with terminal.stage("reading the data"):
            self._read(for_fit=stage == "fit")
            self._say_counts()

    def _read(self, *, for_fit: bool) -> None:
        val = self._val[0] if self._val else None
        if self.streaming:
            trainer = self.trainer if for_fit else None
            if trainer is not None and trainer.max_steps < 1:
                raise Misconfiguration(
                    "A stream has no length", remedies.MAX_STEPS, remedies.NO_STREAM
                )
            splits = open_streams(
                self._train,
                val,
                self._encoder(),
                val_rows=self.max_val_examples,
                seed=self.seed,
            )
        else:
            splits = load_tables(
                self._train,
                val,
                self._encoder(),
                val_fraction=self.val_fraction,
                seed=self.seed,
            )
        self.train_examples = self._limited(splits.train)
        self.val_examples = subset(splits.val, self.max_val_examples)
        self._val_sources = splits.val_sources[
            chosen_places(len(splits.val), self.max_val_examples)
        ]
        self.reports = splits.reports

    def teardown(self, stage: str | None = None) -> None:
        """Log the counts and the notes of a stream's rows."""
        if self.streaming and stage == "fit":
            rank_zero_info(f"Training data, repetitions included: {self.reports['train']}.")
            for line in notes.lines(self.reports["train"].notes):
                rank_zero_info(line)

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        """Return the loader of this rank's micro-batches; its state resumes inside an epoch."""
        micro_batches = self.trainer.accumulate_grad_batches if self.trainer else 1
        cut = self._cut(self.batch_size, micro_batches)
        collate = self._collator(packed=self.packing)
        if not self.streaming:
            rows = self._rows()
            sampler = GlobalBatchSampler(
                rows.lengths,
                **cut,
                shuffle=True,
                group_by_length=self.group_by_length,
                seed=self.seed,
            )
            return self._loader(rows, batch_sampler=sampler, collate_fn=collate)
        assert self.train_examples is not None
        batches = StreamingBatches(
            self.train_examples,
            collate,
            **cut,
            max_length=self.max_length,
            packing=self.packing,
            shuffle_buffer=STREAM_SHUFFLE_BUFFER,
            seed=self.seed,
            prefetched=1 if self.trainer else 0,  # Lightning looks for the end one batch ahead
        )
        return self._loader(batches, batch_size=None)

    def val_dataloader(self) -> StatefulDataLoader[Any] | list[StatefulDataLoader[Any]]:
        """Return the loader of this rank's batches, longest first; each example occurs once.

        If the validation examples are held out from several sources, each source has a loader of
        its own, named in `val_names`.
        """
        assert self.val_examples is not None
        numbers = np.unique(self._val_sources)
        if len(numbers) < 2:
            return self._val_loader(self.val_examples)
        places = [np.flatnonzero(self._val_sources == number) for number in numbers]
        return [self._val_loader(self.val_examples.select(of_source)) for of_source in places]

    @property
    def val_names(self) -> list[str]:
        """The names of the sources in the order of their validation loaders; empty for one."""
        numbers = np.unique(self._val_sources)
        return [self._train[number].label for number in numbers] if len(numbers) > 1 else []

    def _val_loader(self, examples: Dataset) -> StatefulDataLoader[Any]:
        rows = Bins(examples)
        sampler = GlobalBatchSampler(
            rows.lengths,
            **self._cut(self.val_batch_size, 1),
            shuffle=False,
            group_by_length=True,
            seed=self.seed,
        )
        return self._loader(rows, batch_sampler=sampler, collate_fn=self._collator())

    def sample_prompts(self, n: int) -> list[list[Message]]:
        """Return the messages before the last assistant turn of the first n validation examples.

        Examples without such messages, as in plain text, are left out.
        """
        assert self.val_examples is not None, "call setup first"
        prompts = self.val_examples.select_columns(["prompt"])
        rows = prompts.take(min(n, len(prompts)))
        return [json.loads(row["prompt"]) for row in rows if row["prompt"]]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Hold a stream's batch against the model while it is on the CPU, where errors are clear.

        Raises:
            Refusal: If the model has no row for a token or a position.
        """
        assert self.trainer is not None
        limits = getattr(self.trainer.lightning_module, "limits", None)
        if self.streaming and limits is not None:
            limits.hold_batch(batch)
        return batch

    def ids_beyond(self, rows: int) -> IdsBeyond | None:
        """Return the token ids from `rows` on; see `lit_ft.compat.KnowsExamples`."""
        tokenizer = self._tokenizer()
        padding = self._collator().pad_token_id
        if padding < rows and num_ids(tokenizer) <= rows:
            return None
        tables = [self.val_examples, *([] if self.streaming else [self.train_examples])]
        found = np.concatenate([ids_from(table, rows) for table in tables])
        if padding >= rows:
            found = np.append(found, padding)
        if not found.size:
            return None
        largest = int(found.max())
        return IdsBeyond(found.size, largest, tokenizer.convert_ids_to_tokens([largest])[0])

    def longest_example(self) -> int:
        """Return the number of tokens of the longest example; see `lit_ft.compat.KnowsExamples`."""
        if self.streaming:
            return self.max_length
        tables = (self.train_examples, self.val_examples)
        return max(int(column(table, "num_tokens").max(initial=0)) for table in tables)

    def _limited(self, examples: Dataset | IterableDataset) -> Dataset | IterableDataset:
        if self.streaming and self.max_train_examples is not None:
            return examples.take(self.max_train_examples)
        return subset(examples, self.max_train_examples)

    def _say_counts(self) -> None:
        assert self.val_examples is not None
        train = "read while training" if self.streaming else str(self.reports["train"])
        if self.max_train_examples is not None:
            train += f", at most {self.max_train_examples:,} of them used"
        used = len(self.val_examples)
        choice = f", {used:,} of them used" if used < self.reports["val"].examples else ""
        if self.verbose:
            val = f"{self.reports['val']}{choice}"
            rank_zero_info(f"Training data: {train}. Validation data: {val}.")
        for weighted in [*self._train, *self._val]:
            if others := getattr(weighted.source, "others", ()):
                rank_zero_info(
                    f"{weighted.source.name}: no files, and not read: {', '.join(others)}."
                )
        if not self.streaming:
            self._say_notes()

    def _say_notes(self) -> None:
        """Log the notes, the rows that were skipped, and the number of repeated examples."""
        train, val = self.reports["train"], self.reports["val"]
        for line in notes.lines(notes.added(train.notes, val.notes)):
            rank_zero_info(line)
        if errors := [*train.errors, *val.errors]:
            more = [f"... and {len(errors) - SHOWN:,} more"] if len(errors) > SHOWN else []
            skipped = "\n".join(f"  {error}" for error in [*errors[:SHOWN], *more])
            rank_zero_info(f"Skipped {len(errors):,} bad rows:\n{skipped}")
        assert self.train_examples is not None and self.val_examples is not None
        if again := repeated(self.train_examples):
            rank_zero_info(f"{again:,} training examples are the same as earlier ones.")
        if shared := repeated(self.train_examples, self.val_examples):
            rank_zero_info(
                f"{shared:,} of the {len(self.val_examples):,} validation examples are in the "
                "training data too, so the validation loss says little about new rows."
            )

    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer(), **self.encoding)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        module = self.trainer.lightning_module if self.trainer else None
        tokenizer = self.tokenizer or getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise Misconfiguration(
                "InstructionDataModule needs a tokenizer",
                Remedy("pass tokenizer=..."),
                Remedy("give one to the module that is trained"),
            )
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    def _rows(self) -> Bins:
        if not self.packing:
            return Bins(self.train_examples)
        lengths = column(self.train_examples, "num_tokens")
        return Bins(self.train_examples, pack(lengths.tolist(), self.max_length))

    def _collator(self, *, packed: bool = False) -> Collator:
        tokenizer = self._tokenizer()
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return Collator(next(id for id in ids if id is not None), packed=packed)

    def _cut(self, batch_size: int, micro_batches: int) -> dict[str, int]:
        """Return how a global batch is cut into micro-batches and ranks."""
        rank, num_replicas = data_parallel_rank(self.trainer) if self.trainer else (0, 1)
        return {
            "batch_size": batch_size,
            "micro_batches": micro_batches,
            "num_replicas": num_replicas,
            "rank": rank,
        }

    def _loader(self, rows: Any, **options: Any) -> StatefulDataLoader[Any]:
        return StatefulDataLoader(
            rows, num_workers=self.num_workers, pin_memory=torch.cuda.is_available(), **options
        )


def _at_least(bound: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, not {value}")
