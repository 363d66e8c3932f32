"""Block updates in a trainer: layerwise, foreign projects, resume, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig
from torch import nn
from torch.optim import AdamW
from torchdata.stateful_dataloader import StatefulDataLoader

from examples.other_project import Regression
from lit_ft.callbacks import BlockUpdate, GaLore, LayerwiseUpdate, StartTable
from lit_ft.module import CausalLMModule
from tests.support.tiny_model import two_towers
from tests.support.tiny_module import batch_of, float16, loader, module_of, trainer_of

ADAMW = partial(AdamW, lr=1e-2, weight_decay=0.1)
BATCHES = [batch_of([12, 5, 9], seed=seed) for seed in range(24)]


class Watch(Callback):
    """Notes which blocks have gradients before each step, and which have state after it."""

    def __init__(self) -> None:
        self.gradients: list[set[str]] = []
        self.states: list[set[str]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        held = dict(pl_module.named_parameters())
        self.gradients.append({_block(n) for n, p in held.items() if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        [optimizer] = trainer.optimizers
        held = dict(pl_module.named_parameters())
        self.states.append({_block(n) for n, p in held.items() if p in optimizer.state})


def _block(name: str) -> str:
    return name.split(".")[3] if ".layers." in name else "embeddings"


def fit(folder: Path, *callbacks: Any, steps: int = 8, kind: str = "llama", **options: Any) -> Any:
    ckpt_path = options.pop("ckpt_path", None)
    module = module_of(kind, optimizer=options.pop("optimizer", ADAMW))
    data = StatefulDataLoader(options.pop("batches", BATCHES), batch_size=None)
    trainer = trainer_of(folder, max_steps=steps, callbacks=list(callbacks), **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert all(p.requires_grad for p in module.parameters())
    return trainer, module.model.state_dict()


def test_gradients_and_state_are_those_of_the_active_block(tmp_path):
    watch = Watch()
    fit(tmp_path, BlockUpdate(every=2), watch, steps=6)
    assert watch.gradients == watch.states
    assert all(len(blocks) == 1 for blocks in watch.gradients)
    assert watch.gradients[::2] == watch.gradients[1::2]
    assert set.union(*watch.gradients) == {"embeddings", "0", "1"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3},
    ],
)
@pytest.mark.parametrize("layerwise_first", [True, False])
def test_layerwise_trains_the_same_weights_bit_for_bit(options, layerwise_first, tmp_path):
    _, alone = fit(tmp_path, BlockUpdate(every=2), **options)
    both = [LayerwiseUpdate(min_grad_bytes=0), BlockUpdate(every=2)]
    _, together = fit(tmp_path, *(both if layerwise_first else both[::-1]), **options)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "olmo2"])
def test_each_block_of_other_families_has_its_turn(kind, tmp_path):
    _, before = fit(tmp_path, steps=1, kind=kind, optimizer=partial(AdamW, lr=0.0))
    trainer, after = fit(tmp_path, BlockUpdate(every=1), steps=3, kind=kind)
    assert trainer.global_step == 3
    matrices = [name for name, p in after.items() if p.ndim > 1]
    assert len(matrices) >= 9
    assert not [name for name in matrices if after[name].equal(before[name])]


@pytest.mark.parametrize("stop", [3, 4])  # inside a turn, and between two
@pytest.mark.parametrize("state", ["drop", "keep"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_resumed_fit_is_the_uninterrupted_one(stop, state, precision, tmp_path):
    def blocks():
        return BlockUpdate(every=2, state=state)

    options = {"precision": precision, "gradient_clip_val": 0.5}
    _, whole = fit(tmp_path, blocks(), **options)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "at.ckpt", weights_only=False)

    fit(tmp_path, blocks(), Save(), **options)
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert (len(saved) < len(whole) / 2) is (state == "drop")
    _, resumed = fit(tmp_path, blocks(), ckpt_path=tmp_path / "at.ckpt", **options)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [3, 4])  # inside a turn, and between two
@pytest.mark.parametrize("state", ["drop", "keep"])
def test_what_is_saved_after_a_fit_goes_on_too(stop, state, tmp_path):
    def blocks():
        return BlockUpdate(every=2, state=state)

    _, whole = fit(tmp_path, blocks())
    trainer, _ = fit(tmp_path, blocks(), steps=stop)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    # Such a checkpoint of Lightning's does not say where in the data it is.
    rest = {"batches": BATCHES[stop:], "ckpt_path": tmp_path / "after.ckpt"}
    _, resumed = fit(tmp_path, blocks(), **rest)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_the_length_of_a_turn_that_a_run_has_chosen_is_kept_by_the_one_that_resumes(tmp_path):
    trainer, _ = fit(tmp_path, BlockUpdate(), steps=6)  # two steps for each of its three blocks
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    later, watch = BlockUpdate(), Watch()
    trainer, _ = fit(tmp_path, later, watch, steps=24, ckpt_path=tmp_path / "after.ckpt")
    turns = [watch.gradients[step : step + 2] for step in range(0, 18, 2)]
    assert all(first == second for first, second in turns)
    assert all(turn != after for turn, after in zip(turns[:2], turns[1:3], strict=True))
    assert ", for 2 steps each" in later.described(trainer.lightning_module, 8000)
    assert ", for 100 steps each" in BlockUpdate().described(trainer.lightning_module, 8000)


def test_a_fit_that_begins_afresh_forgets_the_one_before(tmp_path):
    again = BlockUpdate()
    fit(tmp_path, again, steps=6)
    watch = Watch()
    fit(tmp_path, again, watch, steps=12)  # four steps for each of its three blocks
    assert watch.gradients[0] == watch.gradients[3] != watch.gradients[4] == watch.gradients[7]


class Tower(Regression):
    """Somebody's module, with blocks that no library names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), nn.Linear(32, 8))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(count: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(8, 32, generator=generator), torch.randn(8, 8, generator=generator)]
        for _ in range(count)
    ]


def test_a_foreign_project_trains_its_blocks_in_turns(tmp_path):
    torch.manual_seed(0)
    module = Tower()
    before = [p.detach().clone() for p in module.parameters()]
    trainer = trainer_of(tmp_path, max_steps=3, callbacks=[BlockUpdate(1, order="ascending")])
    trainer.fit(module, loader(*rows(3)))
    moved = [not p.equal(b) for p, b in zip(module.parameters(), before, strict=True)]
    assert moved == [True] * 6 + [False] * 2  # three of its four blocks have had their turn


class HalfUsed(Tower):
    """A module whose loss does not depend on its last two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net[1](self.net[0](batch[0])).square().mean()


def test_a_block_that_takes_no_part_in_the_loss_is_named(tmp_path):
    module = HalfUsed()
    trainer = trainer_of(tmp_path, max_steps=4, callbacks=[BlockUpdate(1, order="ascending")])
    said = r"step 2 does not depend on the active block 'net.2'. Freeze .*leave BlockUpdate out"
    with pytest.raises(MisconfigurationException, match=said):
        trainer.fit(module, loader(*rows(4)))
    assert all(p.requires_grad for p in module.parameters())
    for parameter in module.net[2:].parameters():
        parameter.requires_grad_(False)
    trainer_of(tmp_path, max_steps=4, callbacks=[BlockUpdate(1)]).fit(module, loader(*rows(4)))
    assert not any(p.requires_grad for p in module.net[2:].parameters())


@pytest.mark.parametrize("always", [None, ["embeddings"]])
def test_a_tower_for_images_has_no_turn_and_text_does_not_move_it(always, tmp_path):
    class Text(CausalLMModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    module = module_of("llama", optimizer=ADAMW)
    module.model = two_towers()
    before = copy.deepcopy(module.model.state_dict())
    watch = Watch()
    trainer = trainer_of(tmp_path, max_steps=6, callbacks=[BlockUpdate(1, always=always), watch])
    trainer.fit(module, loader(*BATCHES[:6]))
    moved = {n for n, p in module.model.state_dict().items() if not p.equal(before[n])}
    assert not [name for name in moved if "vision_tower" in name]
    assert {"model.language_model.embed_tokens.weight"} <= moved
    assert all(p.requires_grad for p in module.parameters())


def test_one_callback_serves_two_fits(tmp_path):
    callback = BlockUpdate(every=1)
    first, second = fit(tmp_path, callback)[1], fit(tmp_path, callback)[1]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_loss_scaler_goes_with_it(tmp_path):
    trainer, weights = fit(tmp_path, BlockUpdate(every=2), plugins=[float16(2.0**8)])
    assert trainer.global_step == 8
    assert all(p.isfinite().all() for p in weights.values())


class Fails(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyError("stop")


def test_after_an_error_everything_is_trainable_again(tmp_path):
    module = module_of("llama", optimizer=ADAMW)
    trainer = trainer_of(tmp_path, callbacks=[BlockUpdate(), Fails()])
    with pytest.raises(KeyError, match="stop"):
        trainer.fit(module, loader(*BATCHES))
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every": 0}, "every must be a whole number of at least 1, not 0"),
        ({"every": 2.0}, "every must be a whole number"),
        ({"active": None}, "active must be a whole number of at least 1, not None"),
        ({"active": True}, "active must be a whole number"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"order": "fixed"}, "order must be 'random' or 'ascending' or 'descending', not 'fixed'"),
        ({"state": None}, "state must be 'drop' or 'keep', not None"),
        ({"always": ["("]}, "is not a regular expression"),
        ({"always": [3]}, "always must be a list of texts, and 3 is none"),
        ({"always": 5}, "always must be a list of texts, not 5"),
        ({"always": ""}, "an entry of always is an empty text, which fits every parameter"),
        ({"always": ["head", ""]}, "an entry of always is an empty text"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        BlockUpdate(**arguments)


class Manual(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callbacks", "options", "said"),
    [
        (Manual, [], {}, "optimizes by hand. Use lit_ft.optim.blocks.BlockTurns"),
        (
            Tower,
            [],
            {"strategy": "ddp"},
            r"DDPStrategy.*FSDP2Strategy\(\) or leave BlockUpdate out",
        ),
        (partial(module_of, compile=True), [], {}, "Do not compile the model"),
        (partial(module_of, adapter=LoraConfig()), [], {}, "need no turns"),
        (module_of, [GaLore(rank=4)], {}, "Leave GaLore out or leave BlockUpdate out"),
        (partial(module_of, optimizer=torch.optim.LBFGS), [], {}, "LBFGS"),
    ],
)
def test_what_cannot_be_right_is_refused_before_training(
    module, callbacks, options, said, tmp_path
):
    trainer = trainer_of(tmp_path, callbacks=[*callbacks, BlockUpdate()], **options)
    built = module()
    built.trainer = trainer
    with pytest.raises(MisconfigurationException, match=said):
        trainer.callbacks[-1].setup(trainer, built, "fit")


@pytest.mark.parametrize(
    ("module", "blocks", "said"),
    [
        (Regression, BlockUpdate(), "Regression has no repeated blocks: neither `_no_split"),
        (Tower, BlockUpdate(active=4), "active=4 keeps all 4 blocks of Tower active. Lower active"),
        (
            Tower,
            BlockUpdate(always=["embeddings"]),
            "always='embeddings' fits no trainable parameter of Tower. Correct always: ",
        ),
        (
            Tower,
            BlockUpdate(always=["net.0", "."]),
            "always covers every parameter of Tower that could take turns. Correct always: ",
        ),
        (
            Tower,
            BlockUpdate(always=["net.[012]"]),
            "active=1 keeps the only block of Tower active, apart from what always covers. "
            "Take entries out of always or",
        ),
    ],
)
def test_a_model_without_turns_is_refused_before_it_trains(module, blocks, said, tmp_path):
    built = module()
    before = copy.deepcopy(built.state_dict())
    with pytest.raises(MisconfigurationException, match=said):
        trainer_of(tmp_path, callbacks=[blocks]).fit(built, loader(*rows(2)))
    torch.testing.assert_close(built.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("blocks", "steps", "said"),
    [
        (BlockUpdate(3), 4, "9 until .* 3 .*: lower every=3, raise active=1, or raise max_steps."),
        (BlockUpdate(every=3, active=2), 4, "6 until .* 3 .*: lower every=3, or raise max_steps."),
        (BlockUpdate(), 2, "3 until .* its 3 .*: raise active=1, or raise max_steps."),
        (BlockUpdate(active=2), 1, "2 until .* its 3 .*: raise max_steps."),
    ],
)
def test_a_run_that_ends_too_early_for_some_blocks_says_what_helps(blocks, steps, said, tmp_path):
    with pytest.warns(UserWarning, match=f"ends at step {steps}, and it takes {said}$"):
        fit(tmp_path, blocks, steps=steps)


def table_of(capsys: Any, folder: Path, *callbacks: Any) -> str:
    fit(folder, *callbacks, StartTable(), steps=1)
    return " ".join(capsys.readouterr().out.split())


def test_the_start_table_says_what_takes_turns(tmp_path, capsys):
    shown = table_of(capsys, tmp_path, BlockUpdate(20, state="keep", always=["norm"]))
    told = "update 1 of 3 blocks at a time, for 20 steps each, random; always norm; state is kept"
    assert told in shown


def test_the_start_table_counts_the_state_of_the_largest_turn(tmp_path, capsys):
    whole = table_of(capsys, tmp_path).partition("state (estimate)")[2]
    dropped = table_of(capsys, tmp_path, BlockUpdate(1)).partition("state (estimate)")[2]
    kept = table_of(capsys, tmp_path, BlockUpdate(1, state="keep")).partition("state (estimate)")[2]
    assert dropped != whole == kept
