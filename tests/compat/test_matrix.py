"""What the support matrix allows trains, and what it refuses costs nothing and names a way out."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from torch import distributed as dist
from torch.utils._pytree import tree_leaves
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.compat.rules import refusals
from lit_ft.distributed.plan import Misconfiguration
from lit_ft.tensors.sharding import full_tensor, is_sharded
from tests.support.matrix import (
    BEGIN,
    DIMENSIONS,
    END,
    PAGE,
    Cell,
    after,
    cells,
    composed,
    refusal,
    table,
)
from tests.support.ranks import WORLD
from tests.support.sharded_training import batches, save_llama

STEPS = 5  # two moves of every basis, and a start
# Settings that the cover tells apart as on and off alone; where they are on, each has its turn.
ON = {
    "clip": [name for name in DIMENSIONS["clip"] if name != "none"],
    "adapter": [name for name in DIMENSIONS["adapter"] if name != "none"],
}


def test_the_docs_show_what_the_rules_say():
    _, _, rest = PAGE.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == table(), "make matrix writes it"


def test_every_refusal_names_a_way_out():
    refused = [cell for cell in cells() if refusal(cell)]
    assert len(refused) > 1000
    for cell in refused:
        reached = {cell}
        for _ in range(4):  # a combination may be wrong in several ways
            ways = (after(c, r) for c in reached if (said := refusal(c)) for r in said.remedies)
            reached |= {way for way in ways if way is not None}
        assert any(refusal(way) is None for way in reached), (cell, refusal(cell))


def cover() -> list[Cell]:
    """Few combinations of several ranks in which each pair that any of them has is found."""
    shown = [
        c for c in cells() if all(getattr(c, key) in ("none", on[0]) for key, on in ON.items())
    ]
    several = [c for c in shown if not c.strategy.startswith("single") and refusal(c) is None]
    pairs = {c: set(itertools.combinations(vars(c).items(), 2)) for c in several}
    missing = set().union(*pairs.values())
    chosen: list[Cell] = []
    while missing:
        best = max(several, key=lambda cell: len(pairs[cell] & missing))
        missing -= pairs[best]
        for key, on in ON.items():
            if getattr(best, key) != "none":
                had = Counter(getattr(cell, key) for cell in chosen)
                ways = (replace(best, **{key: way}) for way in sorted(on, key=had.__getitem__))
                best = next(way for way in ways if refusal(way) is None)
        chosen.append(best)
    plain = Cell("adamw", "none", "ddp", "whole", 1, "none")
    left = set(ON["adapter"]) - {cell.adapter for cell in chosen}
    return [*chosen, *(replace(plain, adapter=adapter) for adapter in sorted(left))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    # A head for each rank of tensor_parallel.
    save_llama(path, num_key_value_heads=2, tie_word_embeddings=True)
    return path


def tolerance(cell: Cell) -> float:
    """How much of a move may come from a gradient's last bits: 8-bit state, signs, 4 bits."""
    if "8bit" in cell.optim or cell.optim == "muon" or cell.adapter == "qlora":
        return 0.05
    return 1e-3 if cell.adapter == "pissa" else 1e-6  # PiSSA takes float32 at most


def train(cell: Cell, folder: Path, run_dir: Path, *, alone: bool) -> dict:
    """Train on all ranks, or alone, then not layerwise; return how far each weight has moved."""
    rank, size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    if alone:
        update = "whole" if cell.update == "layerwise" else cell.update
        cell = replace(cell, strategy="cpu", update=update)
    overrides = [
        *cell.overrides,
        "model=pretrained",
        f"model.name_or_path={folder}",
        f"model.dtype={'float32' if tolerance(cell) > 1e-6 else 'float64'}",
        "schedule=constant",
        "trainer.accelerator=cpu",
        f"trainer.devices={size}",
        f"trainer.max_steps={STEPS}",
        "+trainer.enable_checkpointing=false",
        "+trainer.enable_progress_bar=false",
        f"trainer.default_root_dir={run_dir}",
        "callbacks=none",
    ]
    if cell.strategy == "hsdp":
        overrides.append("trainer.strategy.data_parallel_replicate_size=2")
    if "galore_torch" in cell.optim:
        overrides += ["optim.rank=4", "optim.update_proj_gap=2"]
    elif cell.galore != "none":
        overrides += ["galore.rank=4", "galore.refresh.every=2"]
    if cell.adapter == "shira":
        overrides.append("adapter.r=2")  # the layers have few entries
    if cell.update == "layerwise":
        overrides.append("callbacks.layerwise.min_grad_bytes=0")
    if cell.update == "blocks":
        overrides.append("callbacks.blocks.every=2")
    config = composed(*overrides)
    L.seed_everything(0, verbose=False)
    module = instantiate(config["module"], _convert_="all")
    vars(module)["tokenizer"] = None  # the folder has none
    trainer = instantiate(config["trainer"], _convert_="all")
    if cell.strategy == "tensor_parallel":  # all ranks see the same rows
        rank, size = 0, 1
    data = StatefulDataLoader(batches(cell.accumulate, rank, size), batch_size=None)
    before: dict = {}  # the first step, adapters' random weights included
    trainer.callbacks += [_Start(before), _Agreement()]
    trainer.fit(module, data)
    return {
        name: full_tensor(p.detach()).clone() - before[name]
        for name, p in module.model.state_dict().items()
        if p.is_floating_point() and not name.endswith(("basis", "delta"))
    }


class _Start(L.Callback):
    def __init__(self, before: dict) -> None:
        self.before = before

    def on_train_start(self, trainer, pl_module):
        for name, p in pl_module.model.state_dict().items():
            if p.is_floating_point():
                self.before[name] = full_tensor(p.detach()).clone()


class _Agreement(L.Callback):
    """Sees to it that ranks have the same bits in all that is not spread over them."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        [optimizer] = trainer.optimizers
        held = [*pl_module.state_dict().values(), *_tensors(optimizer.state_dict()["state"])]
        alike = [t for t in held if not is_sharded(t)]
        if trainer.world_size == 1 or not alike:
            return
        mine = torch.cat([t.detach().contiguous().flatten().view(torch.uint8) for t in alike])
        everyones = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        dist.all_gather(everyones, mine)
        assert all(theirs.equal(mine) for theirs in everyones)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_alike(cell: Cell, ranks: list[dict], alone: dict) -> None:
    """Each rank's weights have the bits of the others', and moved as those of one process did."""
    for theirs in ranks:
        assert theirs.keys() == alone.keys()
        assert all(theirs[name].equal(ranks[0][name]) for name in theirs)
    moved = torch.cat([move.flatten().double() for move in alone.values()])
    differences = torch.cat([(ranks[0][n] - alone[n]).flatten().double() for n in alone])
    assert moved.norm() > 0
    assert differences.norm() <= moved.norm() * tolerance(cell)


@pytest.mark.slow
@pytest.mark.parametrize("optim", DIMENSIONS["optim"])
def test_each_optimizer_on_four_ranks(optim, folder, tmp_path, four_ranks):
    """Weights that four ranks cut into parts of unlike sizes, which two do not."""
    ways = [
        Cell(optim, galore, "fsdp", update, 2, clip)
        for galore, update, clip in (
            ("none", "whole", "norm"),
            ("none", "blocks", "norm"),
            ("online", "layerwise", "value"),
        )
    ]
    for cell in (way for way in ways if refusal(way) is None):
        alone = train(cell, folder, tmp_path, alone=True)
        assert_alike(cell, four_ranks(train, cell, folder, tmp_path, alone=False), alone)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # ninety trainings at most
def test_what_is_allowed_trains_as_one_process_does(folder, tmp_path, on_both, subtests):
    chosen = cover()
    assert len(chosen) <= 90
    assert {c.optim for c in chosen} == set(DIMENSIONS["optim"])
    assert {c.galore for c in chosen} == set(DIMENSIONS["galore"])
    assert {c.adapter for c in chosen} == set(DIMENSIONS["adapter"])
    for cell in chosen:
        with subtests.test(cell=cell):
            alone = train(cell, folder, tmp_path, alone=True)
            assert_alike(cell, on_both(train, cell, folder, tmp_path, alone=False), alone)


class Loaded(Exception):
    """The model's weights were asked for."""


def say(cell: Cell, run_dir: Path) -> str:
    """What a run of the job says on a rank, whose model must not load."""
    overrides = [*cell.overrides, "model=tiny", "trainer.accelerator=cpu", "callbacks=none"]
    config = composed(*overrides, f"trainer.devices={WORLD}", f"trainer.default_root_dir={run_dir}")
    module = instantiate(config["module"], _convert_="all")
    trainer = instantiate(config["trainer"], _convert_="all")

    def load_model(*args, **kwargs):
        raise Loaded

    module.source.load_model = load_model
    with pytest.raises((Misconfiguration, Loaded)) as raised:
        trainer.fit(module, StatefulDataLoader(batches(1, 0, 1), batch_size=None))
    return message_on_command_line(raised.value)


@pytest.mark.slow
def test_what_is_refused_does_not_load_the_model(tmp_path, on_both):
    examples = {
        said and said.on_command_line: cell
        for cell in cells()
        if not cell.strategy.startswith("single")
        for said in [refusal(cell)]
    }
    for message, cell in examples.items():
        said = on_both(say, cell, tmp_path)
        # Of several refusals, that of the callback that is set up first.
        known = {each.on_command_line for each in refusals(cell.plan)} or {""}
        assert len(said) == WORLD and len(set(said)) == 1 and set(said) <= known, (cell, message)
