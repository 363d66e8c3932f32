"""NaN and infinity: nothing that is not finite is stepped, saved, exported or called completed."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from hydra.errors import CompactHydraException
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from peft import LoraConfig
from torch.optim import SGD, AdamW

from lit_ft.callbacks import (
    AtomicCheckpointIO,
    ExportHF,
    GaLore,
    LastCheckpoint,
    LayerwiseUpdate,
    StopOnNonFinite,
)
from lit_ft.distributed.plan import Misconfiguration
from lit_ft.loss import ChunkedCrossEntropy
from lit_ft.optim import GroupRule, MuonAdamW
from lit_ft.optim.adafactor import RelativeStepAdafactor
from lit_ft.subspace.projectors import SVD, Oja
from tests.support.checkpoints import is_whole
from tests.support.commands import TINY, run
from tests.support.running import SHORT, run_job
from tests.support.stopping import BadGradient, bad_gradient
from tests.support.tiny_module import batch_of, float16, loader, module_of, trainer_of

MUON = (
    GroupRule("rest", max_ndim=1),
    GroupRule("embeddings", match="embed"),
    GroupRule("matrices", min_ndim=2, options={"use_muon": True}),
)
# For each method: options of the module, options of the trainer, and callbacks.
METHODS = {
    "adamw": ({"optimizer": partial(AdamW, lr=1e-2)}, {}, []),
    "adamw_clipped": ({"optimizer": partial(AdamW, lr=1e-2)}, {"gradient_clip_val": 0.1}, []),
    "adamw_8bit": ({"optimizer": partial(AdamW8bit, lr=1e-2)}, {}, []),
    "muon": ({"optimizer": partial(MuonAdamW, lr=1e-2), "groups": MUON}, {}, []),
    "adafactor": ({"optimizer": RelativeStepAdafactor}, {}, []),
    "sgd": ({}, {}, []),
    "lora": ({"adapter": LoraConfig(r=2, target_modules="all-linear")}, {}, []),
    "galore": ({}, {}, [partial(GaLore, rank=4, projector=Oja(every=1))]),
    "galore_svd": ({}, {}, [partial(GaLore, rank=4, projector=SVD(every=1))]),
    "layerwise": ({}, {}, [partial(LayerwiseUpdate, 0)]),
    "layerwise_clipped": ({}, {"gradient_clip_val": 0.1}, [partial(LayerwiseUpdate, 0)]),
}
STEPS = 3


def batches(*kept):
    """Return micro-batches whose rows have names; `kept` leaves the others out."""
    made = [
        {**batch_of([12, 9, 5], seed=seed), "origins": [f"a.jsonl:{seed}{row}" for row in range(3)]}
        for seed in range(2 * STEPS)
    ]
    return loader(*(made[index] for index in kept or range(len(made))))


def fit(folder, method, *faults, data=None, watch=None, module=None, **trainer):
    options, of_trainer, callbacks = METHODS[method]
    module = module or module_of(**options)
    saves = LastCheckpoint(folder, every_n_steps=1)
    trainer = trainer_of(
        folder,
        callbacks=[
            *faults,
            watch or StopOnNonFinite(),
            *(make() for make in callbacks),
            saves,
            ExportHF(folder / "export"),
        ],
        **{"max_steps": STEPS, "enable_checkpointing": True, **of_trainer, **trainer},
    )
    trainer.fit(module, data or batches())
    return module


def saved(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("step", [1, STEPS - 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_gradient_is_seen_before_the_step(method, step, tmp_path):
    module = module_of(**METHODS[method][0])
    with pytest.raises(FloatingPointError) as stop:
        fit(tmp_path, method, BadGradient(step, parameter=-2), module=module)
    told = str(stop.value)
    for part in (
        f"at step {step + 1}",
        f"(rows: a.jsonl:{step}0, a.jsonl:{step}1, a.jsonl:{step}2)",
        "layers.1",
        "Lower the learning rate",
    ):
        assert part in told
    assert saved(tmp_path)["global_step"] == step
    assert is_whole(tmp_path / "last.ckpt")
    assert not (tmp_path / "export").exists()
    weights = module.state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    if method != "layerwise":  # there, backward has moved what came before
        for name, value in saved(tmp_path)["state_dict"].items():
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("method", [name for name in METHODS if "layerwise" not in name])
def test_a_skipped_step_leaves_no_trace(method, tmp_path):
    watch = StopOnNonFinite("skip")
    faults = [BadGradient(1, value=torch.inf)]
    module = fit(tmp_path, method, *faults, watch=watch, data=batches(0, 1, 2))
    unseen = fit(tmp_path / "unseen", method, data=batches(0, 2), max_steps=2)
    assert (watch.skipped, saved(tmp_path)["global_step"]) == (1, 3)
    for (name, ours), other in zip(
        module.state_dict().items(), unseen.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, other), name


class Bad(ChunkedCrossEntropy):
    """Has no finite loss where the first token says so."""

    def __init__(self, factor=torch.nan, only_training=False):
        super().__init__()
        self.factor = factor
        self.only_training = only_training

    def __call__(self, model, inputs, labels):
        loss = super().__call__(model, inputs, labels)
        return loss * self.factor if inputs["input_ids"][0, 0] == 3 else loss


def marked(batch):
    ids = batch["input_ids"].clone()
    ids[0, 0] = 3
    return {**batch, "input_ids": ids}


@pytest.mark.parametrize("method", ["adamw", "layerwise"])
def test_of_several_micro_batches_the_one_with_a_bad_loss_is_named(method, tmp_path):
    first, second, third, fourth, *_ = batches()
    data = loader(first, second, third, marked(fourth))
    with pytest.raises(FloatingPointError, match=r"step 2 \(rows: a\.jsonl:30, [^)]*:32\)"):
        module = module_of(loss=Bad())
        fit(tmp_path, method, module=module, data=data, accumulate_grad_batches=2)
    assert saved(tmp_path)["global_step"] == 1


def test_steps_are_skipped_only_so_often_in_a_row(tmp_path):
    data = loader(*(batch if i in (0, 2) else marked(batch) for i, batch in enumerate(batches())))
    watch = StopOnNonFinite("skip", limit=3)
    with pytest.raises(FloatingPointError, match="step 6, for 3 steps in a row"):
        fit(tmp_path, "sgd", watch=watch, module=module_of(loss=Bad()), data=data, max_steps=6)
    assert (watch.skipped, saved(tmp_path)["global_step"]) == (3, 5)
    assert is_whole(tmp_path / "last.ckpt")


def test_a_step_that_is_half_taken_cannot_be_skipped(tmp_path):
    with pytest.raises(Misconfiguration, match="cannot be skipped under layerwise"):
        fit(tmp_path, "layerwise", watch=StopOnNonFinite("skip"))
    with pytest.raises(Misconfiguration, match="List StopOnNonFinite before GaLore"):
        fit(tmp_path, "sgd", GaLore(rank=4), watch=StopOnNonFinite("skip"))


def test_an_overflow_under_a_loss_scaler_is_the_scalers(tmp_path):
    """It halves its scale until gradients fit; a loss that is NaN ends the run all the same."""
    module = module_of(optimizer=partial(SGD, lr=1e-3))
    fit(tmp_path, "sgd", BadGradient(0), module=module, plugins=float16(2.0**4))
    assert is_whole(tmp_path / "last.ckpt")
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        fit(tmp_path / "b", "sgd", BadGradient(1), module=module_of(), plugins=float16(0.5))


def test_a_validation_that_is_not_finite_fails_the_run(tmp_path):
    module = module_of(loss=Bad())
    watch = [StopOnNonFinite(), LastCheckpoint(tmp_path, every_n_steps=1)]
    trainer = trainer_of(tmp_path, callbacks=watch, enable_checkpointing=True, val_check_interval=1)
    with pytest.raises(FloatingPointError, match="validation after step 1, val_loss, is not"):
        trainer.fit(module, batches(), loader(marked(batch_of([12]))))
    assert saved(tmp_path)["global_step"] == 1


def test_weights_that_a_finite_gradient_spoils_are_neither_saved_nor_exported(tmp_path):
    fault = BadGradient(1, value=3e38)
    module = module_of(optimizer=partial(SGD, lr=10.0))
    with pytest.raises(
        FloatingPointError, match=r"embed_tokens.* after step 2, and nothing is saved"
    ):
        fit(tmp_path, "sgd", fault, module=module)
    assert saved(tmp_path)["global_step"] == 1
    export = ExportHF(tmp_path / "export")
    trainer = trainer_of(tmp_path, callbacks=[fault, export])
    with pytest.raises(FloatingPointError, match="nothing is exported"):
        trainer.fit(module_of(optimizer=partial(SGD, lr=10.0)), batches())
    assert not (tmp_path / "export").exists()


def test_in_another_project_batches_are_named_by_number(tmp_path):
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        barebones=True,
        callbacks=[BadGradient(2, parameter=1), StopOnNonFinite()],
    )
    with pytest.raises(FloatingPointError, match=r"layer\.bias .* step 3 \(rows: batch 2 of"):
        trainer.fit(BoringModel())


def test_the_job_fails_and_names_the_rows(tmp_path):
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(9)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CompactHydraException, match=r"step 3 \(rows: [^)]*rows\.jsonl:\d+"):
        run_job(
            tmp_path / "run",
            *SHORT,
            *bad_gradient(2),
            "model=tiny",
            "logger=none",
            f"data.path={data}",
            "checkpoint.every_n_steps=2",
        )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["export_path"]) == ("failed", None)
    assert "python -m lit_ft.preview" in summary["error"]["message"]
    assert saved(tmp_path / "run" / "checkpoints")["global_step"] == 2
    assert is_whole(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "step"),
    [([], 1), ([], 2), (["update=layerwise", "callbacks.layerwise.min_grad_bytes=0"], 2)],
)
def test_two_ranks_stop_together(update, step, tmp_path):
    status, output = run(
        *TINY,
        *bad_gradient(step, parameter=-2, rank=1),
        f"run_dir={tmp_path}",
        "strategy=fsdp",
        "trainer.devices=2",
        "data.batch_size=2",
        "optim=adamw",
        *update,
        "trainer.gradient_clip_val=null",
        "trainer.max_steps=3",
        "checkpoint.every_n_steps=1",
    )
    assert status == 1, output
    assert f"not finite at step {step + 1} (rows: " in output
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert AtomicCheckpointIO().load_checkpoint(last)["global_step"] == step
    assert is_whole(last)
    assert not (tmp_path / "export").exists()
