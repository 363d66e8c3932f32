import json
from itertools import count, islice, permutations

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_ft.data.collate import Collator
from lit_ft.data.streaming import StreamingBatches

# A busy machine is no failure of a law.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

MAX_LENGTH = 8


def encoded(index, length):
    return {"input_ids": [index] * length, "labels": [index] * length}


def indices_of(rows):
    """Collate into the example indices of each row."""
    return [[example["input_ids"][0] for example in row] for row in rows]


def stream(
    examples, cut=(2, 2, 1), rank=0, packing=False, shuffle_buffer=0, prefetched=0, max_length=8
):
    batch_size, micro_batches, num_replicas = cut
    return StreamingBatches(
        examples,
        indices_of,
        batch_size=batch_size,
        micro_batches=micro_batches,
        num_replicas=num_replicas,
        rank=rank,
        max_length=max_length,
        packing=packing,
        shuffle_buffer=shuffle_buffer,
        prefetched=prefetched,
    )


streams = st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=70).map(
    lambda lengths: [encoded(i, length) for i, length in enumerate(lengths)]
)
cuts = st.tuples(*[st.integers(1, 4)] * 3)
modes = st.fixed_dictionaries({"packing": st.booleans(), "shuffle_buffer": st.integers(0, 20)})


def global_batches(examples, cut, **mode):
    """The rows of each global batch, united over ranks and micro-batches."""
    _, micro_batches, num_replicas = cut
    ranks = [list(stream(examples, cut, rank, **mode)) for rank in range(num_replicas)]
    assert len({len(rank) for rank in ranks}) == 1
    return [
        sorted(row for rank in ranks for batch in rank[at : at + micro_batches] for row in batch)
        for at in range(0, len(ranks[0]), micro_batches)
    ]


@given(streams, cuts, modes)
def test_every_example_occurs_once_whatever_the_cut(examples, cut, mode):
    one_rank = global_batches(examples, (cut[0] * cut[1] * cut[2], 1, 1), **mode)
    assert sorted(i for rows in one_rank for row in rows for i in row) == list(range(len(examples)))
    for other in permutations(cut):
        assert global_batches(examples, other, **mode) == one_rank


@given(streams, cuts, modes)
def test_the_short_last_window_has_as_many_batches_as_rows_need(examples, cut, mode):
    batch_size, micro_batches, num_replicas = cut
    num_rows = sum(len(rows) for rows in global_batches(examples, cut, **mode))
    num_full, rest = divmod(num_rows, batch_size * micro_batches * num_replicas)
    expected = num_full * micro_batches + -(-rest // (batch_size * num_replicas))
    assert len(list(stream(examples, cut, **mode))) == expected


def test_plain_streams_keep_their_order():
    examples = [encoded(i, 1) for i in range(10)]
    assert global_batches(examples, (1, 2, 2)) == [
        [[0], [1], [2], [3]],
        [[4], [5], [6], [7]],
        [[8], [9]],
    ]


@given(streams)
def test_packed_rows_hold_max_length_at_most(examples):
    lengths = [len(example["input_ids"]) for example in examples]
    rows = [row for batch in stream(examples, packing=True) for row in batch]
    assert all(sum(lengths[i] for i in row) <= MAX_LENGTH for row in rows)


def test_packing_is_tight():
    lengths = np.random.default_rng(0).lognormal(5, 1, 5_000).astype(int).clip(1, 2048)
    examples = [encoded(i, length) for i, length in enumerate(lengths.tolist())]
    rows = [row for batch in stream(examples, packing=True, max_length=2048) for row in batch]
    assert sum(lengths) / (len(rows) * 2048) > 0.97


@pytest.mark.parametrize("mode", [{"packing": False}, {"packing": True}, {"shuffle_buffer": 10}])
def test_an_endless_stream_is_read_block_by_block(mode):
    num_read = count()
    examples = (encoded(next(num_read), 4) for _ in count())
    list(islice(stream(examples, **mode), 4))
    assert next(num_read) <= 2 * 64 + 2


def test_shuffling_differs_from_pass_to_pass():
    shuffled = stream([encoded(i, 1) for i in range(40)], shuffle_buffer=20)
    first, second = list(shuffled), list(shuffled)
    assert first != second
    rows = [row[0] for batch in first for row in batch]
    assert rows != list(range(40))
    assert set(rows[:20]) == set(range(20))
    assert rows[20:] != [row + 20 for row in rows[:20]]


def test_the_source_is_told_the_epoch():
    class Source(list):
        told = []

        def set_epoch(self, epoch):
            self.told.append(epoch)

    batches = stream(Source(examples_list()))
    for _ in range(3):
        list(batches)
    assert batches.examples.told == [0, 1, 2]


@pytest.mark.process
def test_workers_which_would_each_read_everything_are_refused():
    batches = StatefulDataLoader(stream(examples_list()), batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="num_workers=0"):
        next(iter(batches))


@pytest.mark.parametrize("packing", [False, True])
def test_too_long_examples_are_refused(packing):
    with pytest.raises(ValueError, match="9 tokens.*max_length=8.*truncate"):
        next(iter(stream([encoded(0, 9)], packing=packing)))


def test_impossible_cuts_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        stream([], cut=(0, 1, 1))


def test_batches_are_collated_through_a_loader():
    batches = StreamingBatches(
        [encoded(i, 3) for i in range(3)],
        Collator(0, packed=True),
        batch_size=1,
        micro_batches=1,
        num_replicas=2,
        rank=1,
        max_length=6,
        packing=True,
    )
    (batch,) = StatefulDataLoader(batches, batch_size=None)
    assert batch["position_ids"].tolist() == [[0, 1, 2]]
    assert (batch["num_tokens"], batch["num_targets"]) == (3, 2)


# ---- resuming, by torchdata alone

NUM_EXAMPLES = 14


def examples_list():
    return [encoded(i, 1 + i % 5) for i in range(NUM_EXAMPLES)]


def hugging_face():
    source = datasets.Dataset.from_list(examples_list()).to_iterable_dataset(num_shards=3)
    return source.map(lambda row: {"labels": row["input_ids"]})


SOURCES = [examples_list, hugging_face]
MODES = [
    {"packing": False},
    {"packing": True},
    {"packing": False, "shuffle_buffer": 6},
    {"packing": True, "shuffle_buffer": 6},
]


def loader(source, mode, prefetched=0, epoch=0):
    data = stream(source(), prefetched=prefetched, **mode)
    data.set_epoch(epoch)
    return StatefulDataLoader(data, batch_size=None, collate_fn=lambda batch: batch)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("lit_ft.data.streaming.PACKED_BLOCK_ROWS", 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", MODES)
def test_resumes_after_every_batch_of_every_pass(source, mode):
    running, batches, saved = loader(source, mode), [], []
    for _ in range(3):
        for batch in running:
            batches.append(batch)
            saved.append((len(batches), running.state_dict()))
        saved.append((len(batches), running.state_dict()))
    for num_seen, state in saved:
        resumed = loader(source, mode)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        rest = [batch for _ in range(4) for batch in resumed]
        assert rest[: len(batches) - num_seen] == batches[num_seen:]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("source", SOURCES)
def test_prefetched_batches_are_yielded_again(source):
    running = iter(stream(source(), packing=True, prefetched=1))
    for fetched in running:
        resumed = iter(stream(source(), packing=True))
        resumed.load_state_dict(running.state_dict())
        assert next(resumed) == fetched


@pytest.mark.parametrize("source", SOURCES)
def test_a_pass_broken_off_after_a_restore_starts_anew(source):
    # datasets would go on from the restored state whenever it is iterated in the same epoch.
    running = iter(stream(source()))
    next(running), next(running)
    data = stream(source())
    resumed = iter(data)
    resumed.load_state_dict(running.state_dict())
    next(resumed)
    assert list(data) == list(stream(source()))


def test_a_state_of_other_rows_is_refused():
    iterator = iter(stream(examples_list(), packing=True))
    next(iterator)
    other = iter(stream(examples_list(), packing=True, max_length=9))
    with pytest.raises(ValueError, match="max_length was 8 and is now 9"):
        other.load_state_dict(iterator.state_dict())
    other = iter(stream(examples_list(), cut=(1, 1, 1), packing=True))
    with pytest.raises(ValueError, match="global_size was 4 and is now 1"):
        other.load_state_dict(iterator.state_dict())


def test_a_state_loads_under_another_cut_of_the_same_global_batch():
    iterator = iter(stream(examples_list(), (2, 2, 1)))
    next(iterator), next(iterator)
    rest = []
    for rank in range(2):
        resumed = iter(stream(examples_list(), (1, 2, 2), rank))
        resumed.load_state_dict(iterator.state_dict())
        rest += [row for batch in resumed for row in batch]
    assert sorted(rest) == sorted(row for batch in iterator for row in batch)


# ---- resuming, by Lightning, which fetches one batch ahead from a loader without length


class Recorder(LightningModule):
    def __init__(self, source, mode):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.source = source
        self.mode = mode
        self.batches = []

    def train_dataloader(self):
        epoch = self.trainer.fit_loop.epoch_progress.current.processed
        return loader(self.source, self.mode, prefetched=1, epoch=epoch)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveEveryBatch(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, *_):
        trainer.save_checkpoint(self.folder / f"{len(module.batches)}.ckpt")


def fit(source, mode, callbacks=(), ckpt_path=None, **limits):
    module = Recorder(source, mode)
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        callbacks=list(callbacks),
        **limits,
    ).fit(module, ckpt_path=ckpt_path)
    return module.batches


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 6}])
def test_a_lightning_run_resumes_after_every_batch(tmp_path, source, limits):
    mode = {"packing": True, "shuffle_buffer": 6}
    batches = fit(source, mode, [SaveEveryBatch(tmp_path)], **limits)
    passes = loader(source, mode)
    assert batches == [batch for _ in range(3) for batch in passes][: len(batches)]
    for num_seen in range(1, len(batches)):
        path = tmp_path / f"{num_seen}.ckpt"
        assert fit(source, mode, ckpt_path=path, **limits) == batches[num_seen:]
