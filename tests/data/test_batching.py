import json
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_ft.data.batching import GlobalBatchSampler, assign_rows

# A busy machine is no failure of a law.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

row_lengths = st.lists(st.integers(1, 50), min_size=1, max_size=70)
cuts = st.tuples(*[st.integers(1, 4)] * 3)  # batch_size, micro_batches, num_replicas
modes = st.fixed_dictionaries(
    {"shuffle": st.booleans(), "group_by_length": st.booleans(), "seed": st.integers(0, 3)}
)


def sampler(lengths, cut=(2, 2, 1), rank=0, shuffle=True, group_by_length=True, seed=0, epoch=0):
    batch_size, micro_batches, num_replicas = cut
    made = GlobalBatchSampler(
        lengths,
        batch_size=batch_size,
        micro_batches=micro_batches,
        num_replicas=num_replicas,
        rank=rank,
        shuffle=shuffle,
        group_by_length=group_by_length,
        seed=seed,
    )
    made.set_epoch(epoch)
    return made


def global_batches(lengths, cut, **mode):
    """The rows of each global batch, united over ranks and micro-batches."""
    _, micro_batches, num_replicas = cut
    ranks = [list(sampler(lengths, cut, rank, **mode)) for rank in range(num_replicas)]
    return [
        sorted(i for rank in ranks for batch in rank[start : start + micro_batches] for i in batch)
        for start in range(0, len(ranks[0]), micro_batches)
    ]


@given(row_lengths, cuts, modes, st.integers(0, 2))
def test_every_row_occurs_exactly_once_an_epoch(lengths, cut, mode, epoch):
    seen = [i for batch in global_batches(lengths, cut, epoch=epoch, **mode) for i in batch]
    assert sorted(seen) == list(range(len(lengths)))


@given(row_lengths, cuts, modes, st.integers(0, 2))
def test_rows_of_a_global_batch_do_not_depend_on_its_cut(lengths, cut, mode, epoch):
    one_rank = global_batches(lengths, (cut[0] * cut[1] * cut[2], 1, 1), epoch=epoch, **mode)
    for other in permutations(cut):
        assert global_batches(lengths, other, epoch=epoch, **mode) == one_rank


@given(row_lengths, cuts, modes)
def test_all_ranks_yield_equally_many_batches_in_every_window(lengths, cut, mode):
    batch_size, micro_batches, num_replicas = cut
    ranks = [sampler(lengths, cut, rank, **mode) for rank in range(num_replicas)]
    num_full, rest = divmod(len(lengths), batch_size * micro_batches * num_replicas)
    expected = num_full * micro_batches + -(-rest // (batch_size * num_replicas))
    for rank in ranks:
        assert len(list(rank)) == expected
        assert len(rank) == expected
    full = [batch for rank in ranks for batch in list(rank)[: num_full * micro_batches]]
    assert all(len(batch) == batch_size for batch in full)


@given(row_lengths, cuts)
def test_a_micro_batch_has_at_most_batch_size_rows_spread_evenly(lengths, cut):
    batch_size, _, num_replicas = cut
    sizes = [
        len(rows)
        for step in assign_rows(lengths, batch_size=batch_size, num_replicas=num_replicas)
        for rows in step
    ]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@given(row_lengths, cuts)
def test_ranks_differ_by_no_more_work_than_micro_batches_of_one_step(lengths, cut):
    work = np.array(
        [
            [max((lengths[i] for i in rows), default=0) * len(rows) for rows in step]
            for step in assign_rows(lengths, batch_size=cut[0], num_replicas=cut[2])
        ]
    )
    assert np.ptp(work.sum(axis=0)) <= np.ptp(work, axis=1).max()


@given(row_lengths, cuts)
def test_a_micro_batch_joins_neighbours_in_length(lengths, cut):
    micro_batches = [
        [lengths[i] for i in rows]
        for step in assign_rows(lengths, batch_size=cut[0], num_replicas=cut[2])
        for rows in step
        if rows
    ]
    micro_batches.sort(key=lambda rows: (-max(rows), -min(rows)))
    for longer, shorter in zip(micro_batches, micro_batches[1:], strict=False):
        assert min(longer) >= max(shorter)


@given(row_lengths, cuts, st.booleans())
def test_the_longest_row_opens_epoch_0(lengths, cut, group_by_length):
    first = [
        next(iter(sampler(lengths, cut, rank, group_by_length=group_by_length)))
        for rank in range(cut[2])
    ]
    assert max(lengths) in [lengths[i] for batch in first for i in batch]


def test_epochs_and_seeds_differ_and_repeat():
    lengths = list(range(1, 65))
    orders = [list(sampler(lengths, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)]
    assert len({str(order) for order in orders}) == 4
    assert orders[3] == list(sampler(lengths, seed=1, epoch=1))


def test_grouped_rows_meet_other_rows_in_the_next_epoch():
    lengths = np.random.default_rng(0).integers(1, 2000, 64).tolist()
    first, second = (
        {tuple(rows) for rows in global_batches(lengths, (2, 2, 1), epoch=epoch)}
        for epoch in (1, 2)
    )
    assert not first & second


def test_without_shuffling_global_batches_keep_the_order_of_the_data():
    batches = global_batches([3, 1, 2, 9, 4], (1, 2, 1), shuffle=False, group_by_length=False)
    assert batches == [[0, 1], [2, 3], [4]]


def test_grouping_saves_padding():
    lengths = np.random.default_rng(0).lognormal(5, 1, 4_000).astype(int).clip(1).tolist()

    def padded_tokens(group_by_length):
        batches = sampler(lengths, (4, 2, 1), group_by_length=group_by_length)
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    assert padded_tokens(True) < 1.1 * sum(lengths)
    assert padded_tokens(False) > 1.3 * sum(lengths)


@pytest.mark.parametrize(
    ("cut", "rank", "message"),
    [
        ((0, 1, 1), 0, "batch_size must be at least 1, got 0"),
        ((1, 0, 1), 0, "micro_batches must be at least 1"),
        ((1, 1, 0), 0, "num_replicas must be at least 1"),
        ((1, 1, 2), 2, r"rank must be in 0\.\.1, got 2"),
    ],
)
def test_impossible_cuts_are_refused(cut, rank, message):
    with pytest.raises(ValueError, match=message):
        sampler([1], cut, rank)


# ---- resuming, by torchdata alone

LENGTHS = [1 + i % 5 for i in range(7)]  # with cut (2, 2, 1): a full and a short window


class Indices(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index


def loader(lengths=LENGTHS, cut=(2, 2, 1), num_workers=0, epoch=0):
    return StatefulDataLoader(
        Indices(),
        batch_sampler=sampler(lengths, cut, epoch=epoch),
        collate_fn=list,
        num_workers=num_workers,
    )


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.process)])
@pytest.mark.parametrize("saved_after_the_end", [False, True])
def test_resumes_after_every_batch_of_every_epoch(num_workers, saved_after_the_end):
    running, batches, states = loader(num_workers=num_workers), [], []
    for _ in range(3):
        for batch in running:
            batches.append(batch)
            states.append(running.state_dict())
        if saved_after_the_end:  # what follows StopIteration resumes as what follows the last batch
            states[-1] = running.state_dict()
    assert len(batches) == 12
    for num_seen in range(1, 12) if not num_workers else (3, 4):
        resumed = loader(num_workers=num_workers)
        resumed.load_state_dict(json.loads(json.dumps(states[num_seen - 1])))
        rest = [batch for _ in range(3) for batch in resumed]
        assert rest[: 12 - num_seen] == batches[num_seen:]


def test_a_state_loads_under_another_cut_of_the_same_global_batch():
    lengths = list(range(1, 19))
    running = sampler(lengths, (2, 2, 1))
    iterator = iter(running)
    for _ in range(running.micro_batches):
        next(iterator)
    rest = []
    for rank in range(2):
        resumed = iter(sampler(lengths, (1, 2, 2), rank))
        resumed.load_state_dict(iterator.state_dict())
        rest += [i for batch in resumed for i in batch]
    assert sorted(rest) == sorted(i for batch in iterator for i in batch)


@pytest.mark.parametrize(
    ("lengths", "cut", "num_seen", "message"),
    [
        ([1] * 9, (2, 2, 1), 2, "num_rows was 8 and is now 9"),
        ([1] * 8, (2, 1, 1), 2, "global_size was 4 and is now 2"),
        ([1] * 8, (4, 1, 1), 1, "micro_batches was 2 and is now 1"),
    ],
)
def test_a_state_of_other_global_batches_is_refused(lengths, cut, num_seen, message):
    iterator = iter(sampler([1] * 8, (2, 2, 1)))
    for _ in range(num_seen):
        next(iterator)
    with pytest.raises(ValueError, match=message):
        iter(sampler(lengths, cut)).load_state_dict(iterator.state_dict())


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([1] * 8, {"seed": 9}, "seed was . and is now 9"),
        ([1] * 8, {"group_by_length": False}, "group_by_length was 1 and is now 0"),
        ([1] * 8, {"shuffle": False}, "shuffle was 1 and is now 0"),
        ([1] * 7 + [2], {}, "tokens was 8 and is now 9"),
    ],
)
def test_a_state_of_another_order_is_refused(lengths, options, message):
    iterator = iter(sampler([1] * 8, (2, 2, 1)))
    next(iterator)
    with pytest.raises(ValueError, match=message):
        iter(sampler(lengths, (2, 2, 1), **options)).load_state_dict(iterator.state_dict())


def test_set_epoch_after_a_restore_has_the_last_word():
    # Lightning restores the loader first, then tells the epoch, which limit_train_batches may
    # have ended early.
    iterator = iter(sampler(LENGTHS))
    next(iterator)
    resumed = sampler(LENGTHS)
    batches = iter(resumed)
    batches.load_state_dict(iterator.state_dict())
    resumed.set_epoch(1)
    assert list(batches) == list(sampler(LENGTHS, epoch=1))


# ---- resuming, by Lightning


class Recorder(LightningModule):
    """Records the batches that it is trained on."""

    def __init__(self, make_loader):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.make_loader = make_loader
        self.batches = []

    def train_dataloader(self):
        return self.make_loader(epoch=self.trainer.fit_loop.epoch_progress.current.processed)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Save(Callback):
    """Saves at the end of every batch and, where asked to, of every epoch."""

    def __init__(self, folder, at_epoch_end):
        self.folder = folder
        self.at_epoch_end = at_epoch_end
        self.saved = []  # (batches seen, path)

    def save(self, trainer, module):
        self.saved.append((len(module.batches), self.folder / f"{len(self.saved)}.ckpt"))
        trainer.save_checkpoint(self.saved[-1][1])

    def on_train_batch_end(self, trainer, module, *_):
        self.save(trainer, module)

    def on_train_epoch_end(self, trainer, module):
        if self.at_epoch_end:
            self.save(trainer, module)


def fit(make_loader, callbacks=(), ckpt_path=None, **limits):
    module = Recorder(make_loader)
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


# Lightning 2.6 itself skips an epoch when it resumes with max_steps from a checkpoint that was
# written in on_train_epoch_end.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("limits", "at_epoch_end"),
    [({"max_epochs": 3}, True), ({"max_epochs": -1, "max_steps": 6}, False)],
)
def test_a_lightning_run_resumes_after_every_batch(tmp_path, limits, at_epoch_end):
    save = Save(tmp_path, at_epoch_end)
    batches = fit(loader, [save], **limits)
    epochs = [list(sampler(LENGTHS, epoch=epoch)) for epoch in range(3)]
    assert batches == [batch for epoch in epochs for batch in epoch]
    for num_seen, path in save.saved[:-1]:
        assert fit(loader, ckpt_path=path, **limits) == batches[num_seen:]


@pytest.mark.process
@pytest.mark.filterwarnings("ignore")
def test_a_lightning_run_with_workers_resumes_at_the_end_of_an_epoch(tmp_path):
    def make_loader(epoch):
        return loader(num_workers=1, epoch=epoch)

    save = Save(tmp_path, at_epoch_end=True)
    batches = fit(make_loader, [save], max_epochs=2)
    for num_seen, path in save.saved[3:5]:
        assert num_seen == 4
        assert fit(make_loader, ckpt_path=path, max_epochs=2) == batches[4:]
