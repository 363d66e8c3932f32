"""Training on FSDP2 ranks is training on one: weights, checkpoints, export, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.optim import SGD, AdamW
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_ft import CausalLMModule
from lit_ft.callbacks import GaLore, LastCheckpoint
from lit_ft.models import Pretrained
from lit_ft.parallel import FSDP2Strategy, whole_tensor
from lit_ft.subspace.projectors import Oja, SubspaceIteration
from tests.ranks import WORLD
from tests.test_module import batch_of, rows, trainer_of

pytestmark = pytest.mark.slow

STEPS = 10
LLAMA = {
    "vocab_size": 301,
    "hidden_size": 24,
    "intermediate_size": 37,  # odd: two ranks do not hold as many rows
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPTIMIZERS = {
    "adamw": partial(AdamW, lr=1e-3),
    "adamw_fused": partial(AdamW, lr=1e-3, fused=True),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
}
PROJECTORS = {"oja": Oja(every=2), "iteration": SubspaceIteration(every=4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models as from_pretrained finds them: with tied weights and without."""
    parent = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **LLAMA, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(config).save_pretrained(parent / f"tied_{tied}")
    return parent


def batches(accumulate, rank, size):
    """Each rank's rows of the same global batches: 8 rows, of several lengths."""
    made = [batch_of([12, 3, 9, 4, 12, 2, 5, 7], seed=seed) for seed in range(STEPS)]
    share = 8 // accumulate // size
    starts = [(micro * size + rank) * share for micro in range(accumulate)]
    return [rows(batch, start, start + share) for batch in made for start in starts]


def train(
    model_folder,
    run_dir,
    *,
    sharded,
    optimizer="adamw",
    projector=None,
    accumulate=1,
    clip=None,
    steps=STEPS,
    resume=None,
    **options,
):
    """Train on one process or on all ranks; return the whole weights and what the ranks held."""
    rank, size = (dist.get_rank(), WORLD) if sharded else (0, 1)
    callbacks = [LastCheckpoint(Path(run_dir) / "checkpoints", every_n_steps=100)]
    if projector is not None:
        callbacks.append(GaLore(rank=4, projector=PROJECTORS[projector]))
    module = CausalLMModule(
        Pretrained(str(model_folder), dtype="float64"), optimizer=OPTIMIZERS[optimizer], **options
    )
    strategy = {"strategy": FSDP2Strategy(), "devices": WORLD} if sharded else {}
    trainer = trainer_of(
        run_dir,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=callbacks,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        **strategy,
    )
    data = StatefulDataLoader(batches(accumulate, rank, size), batch_size=None)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, ckpt_path=resume)
    held = {n: type(p).__name__ for n, p in module.named_parameters()}
    weights = {n: whole_tensor(p.detach()).clone() for n, p in module.model.state_dict().items()}
    loss = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return weights, held, loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw_fused", "accumulate": 2, "clip": 0.5},
        {"optimizer": "sgd", "activation_checkpointing": True},
        {"projector": "oja"},
        {"projector": "oja", "accumulate": 2, "clip": 0.01},
        {"projector": "iteration", "optimizer": "adamw_fused", "activation_checkpointing": True},
    ],
)
def test_two_ranks_train_what_one_does(options, tied, folder, tmp_path, on_both):
    model = folder / f"tied_{tied}"
    weights, _, loss = train(model, tmp_path / "one", sharded=False, **options)
    both = on_both(train, model, tmp_path / "two", sharded=True, **options)
    for theirs, held, their_loss in both:
        assert set(held.values()) == {"DTensor"}
        assert theirs.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)
        for name, value in loss.items():
            assert their_loss[name] == pytest.approx(value, rel=1e-9)
    for name in weights:
        assert both[0][0][name].equal(both[1][0][name])


@pytest.mark.parametrize("ranks_after", [1, 2])
@pytest.mark.parametrize("projector", [None, "oja"])
def test_what_two_ranks_save_goes_on_on_one_and_on_two(
    projector, ranks_after, folder, tmp_path, on_both
):
    options = {"projector": projector, "optimizer": "adamw_fused"}
    weights, _, loss = train(folder / "tied_True", tmp_path / "one", sharded=False, **options)
    on_both(train, folder / "tied_True", tmp_path / "two", sharded=True, steps=6, **options)
    last = tmp_path / "two" / "checkpoints" / "last.ckpt"
    options["resume"] = str(last)
    if ranks_after == 1:
        ends = [train(folder / "tied_True", tmp_path / "on", sharded=False, **options)]
    else:
        ends = on_both(train, folder / "tied_True", tmp_path / "on", sharded=True, **options)
    for theirs, _, their_loss in ends:
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)
        assert their_loss["train_loss"] == pytest.approx(loss["train_loss"], rel=1e-9)
