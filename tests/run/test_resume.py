"""Resuming: what differs from the checkpoint's run is said, obeyed or refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hydra.errors import CompactHydraException

import train
from lit_ft.models import Pretrained
from lit_ft.run.files import LOCK, read_summary
from lit_ft.storage.checkpoint_io import load_rest
from tests.support.running import LORA

OLDER = ("initial_val_loss", "optimizer")  # what a checkpoint has held from the beginning

PLAIN = ["optim=adamw", "schedule=constant", "schedule.warmup=0"]


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def edit(checkpoint, change):
    """Let `change` alter what the job's recorder has saved."""
    saved = torch.load(checkpoint, weights_only=True)
    change(saved["callbacks"]["Recorder"])
    torch.save(saved, checkpoint)


def test_a_checkpoint_holds_the_settings_and_what_differs_is_listed(job, tmp_path, caplog):
    keyed = [
        "trusted_packages=[tests]",
        "+callbacks.keyed._target_=tests.support.stopping.Keyed",
        "+callbacks.keyed.api_key=hf_abc",
    ]
    job("run", *PLAIN, *keyed, "trainer.max_steps=2")
    recorded = load_rest(last(tmp_path / "run"))["callbacks"]["Recorder"]
    assert recorded["config"] == read_summary(tmp_path / "run")["config"]
    assert recorded["config"]["callbacks"]["keyed"]["api_key"] == "***"
    assert b"hf_abc" not in last(tmp_path / "run").read_bytes()
    caplog.clear()
    caplog.set_level("INFO", "lightning.pytorch")
    again = ["trainer.max_steps=3", "optim.lr=5e-5", "logger=csv", "data.num_workers=0"]
    job("run", *PLAIN, *keyed, *again, "resume=auto")
    said = [record.getMessage() for record in caplog.records]
    listed = (
        "These settings differ from the checkpoint's run and are obeyed: trainer.max_steps (was 2, "
        "now 3), optim.lr (was 0.01, now 5e-05)."
    )
    [restored] = [index for index, line in enumerate(said) if line.startswith("Restoring states")]
    assert said.index(listed) < restored


REFUSED = {
    "seed=1": r"seed \(was 0, now 1\)",
    "+optim.amsgrad=true": r"optim\.amsgrad \(was False, now True\)",
    "galore=online": r"galore \(was null, now set\)",
    "trainer.precision=bf16-true": r"trainer\.precision \(was 32-true, now bf16-true\)",
    "data.max_length=64": r"data\.max_length \(was 512, now 64\)",
    "data.train_on=all": r"data\.train_on \(was assistant, now all\)",
    "data.batch_size=3": r"was 4 and is now 6: data\.batch_size \(was 2, now 3\)\. Let data\.batch",
}


def test_what_the_state_depends_on_is_refused_before_a_model_loads(job, tmp_path, monkeypatch):
    options = [*PLAIN, "trainer.max_steps=2"]
    job("run", *options)
    saved = last(tmp_path / "run").read_bytes()
    monkeypatch.setattr(Pretrained, "load_model", None)  # it is not called
    for change, named in REFUSED.items():
        where = " inside an epoch" if change.startswith("data.") else ""
        wanted = rf"(?s)resumes{where} cannot change .*{named}.*own arguments.*model=pretrained"
        with pytest.raises(CompactHydraException, match=wanted):
            job("run", *options, "trainer.max_steps=3", change, "resume=auto")
    assert last(tmp_path / "run").read_bytes() == saved


@pytest.mark.parametrize(
    ("first", "changes"),
    [
        (
            "optim=galore_subspace",
            {
                "galore.rank=4": "galore.rank .was 128, now 4",
                "galore=iteration": "galore.projector .was Oja, now Subspace",
                "galore.targets=[mlp]": "galore.targets .was all, now .mlp",
            },
        ),
        (
            "adapter=lora",
            {
                "adapter.r=8": "adapter.r .was 16, now 8",
                "adapter=dora": "adapter.use_dora .was False, now True",
            },
        ),
    ],
)
def test_other_subspaces_and_adapters_are_refused_by_name(job, monkeypatch, first, changes):
    job("run", first, "trainer.max_steps=1")
    monkeypatch.setattr(Pretrained, "load_model", None)
    for change, named in changes.items():
        with pytest.raises(CompactHydraException, match=f"(?s)cannot change .*{named}"):
            job("run", first, change, "trainer.max_steps=2", "resume=auto")


@pytest.mark.slow
def test_between_two_epochs_other_rows_and_another_batch_are_obeyed(job, tmp_path):
    epoch = [*PLAIN, "trainer.max_steps=4"]  # seven micro-batches
    job("run", *epoch)
    others = ["data.max_length=64", "data.train_on=all", "data.batch_size=3"]
    resumed = job("run", *epoch, "trainer.max_steps=6", *others, "resume=auto")
    assert (resumed["status"], resumed["steps"]) == ("completed", 6)


def test_going_on_with_other_data_is_said(job, tmp_path):
    rows, others = tmp_path / "mine.jsonl", tmp_path / "others.jsonl"
    for file in (rows, others):
        file.write_text('{"text": "a b c d e f"}\n' * 40)
    job("run", f"data.path={rows}", "trainer.max_steps=1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        job("run", f"data.path={rows}", "trainer.max_steps=2", "resume=auto")
    with pytest.warns(UserWarning, match=r"another data\.path .was .*mine\.jsonl, now .*others"):
        job("run", f"data.path={others}", "trainer.max_steps=3", "resume=auto")


def rates(folder):
    return [
        group["lr"] for group in torch.load(last(folder))["optimizer_states"][0]["param_groups"]
    ]


@pytest.mark.slow
def test_another_schedule_is_obeyed_from_its_own_place(job, tmp_path):
    """The rates after the resume are those that the new schedule has at these steps."""
    options = ["optim=adamw", "trainer.max_steps=6"]
    job("whole", *options, "schedule=linear", "schedule.warmup=1")
    job("run", *options, "trainer.max_steps=3", "schedule=cosine", "schedule.warmup=2")
    job("run", *options, "schedule=linear", "schedule.warmup=1", "resume=auto")
    assert rates(tmp_path / "run") == rates(tmp_path / "whole")


@pytest.mark.slow
def test_a_checkpoint_without_the_settings_resumes(job, tmp_path, caplog):
    job("run", *PLAIN, "trainer.max_steps=2")
    edit(last(tmp_path / "run"), lambda saved: [saved.pop(n) for n in set(saved) - {*OLDER}])
    caplog.set_level("INFO", "lightning.pytorch")
    resumed = job("run", *PLAIN, "trainer.max_steps=3", "resume=auto")
    assert "does not hold its run's settings" in caplog.text
    assert (resumed["status"], resumed["steps"]) == ("completed", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        ("optim=galore_subspace", "optim=adamw", "has subspaces .* trains whole"),
        ("optim=adamw", "optim=galore_subspace", "no subspaces .* trains in one"),
        ("galore.targets=[mlp]", "galore.targets=[attention]", r"other galore\.targets"),
        ("optim=adamw", "optim=sgd", "one of AdamW, not SGD"),
        ("optim=adamw", LORA[0], "of another model or adapter"),
    ],
)
def test_without_the_settings_the_state_itself_is_compared(job, tmp_path, first, then, named):
    job("run", first, "trainer.max_steps=1")
    edit(last(tmp_path / "run"), lambda saved: [saved.pop(n) for n in set(saved) - {*OLDER}])
    with pytest.raises(CompactHydraException, match=rf"(?s){named}.*own arguments.*RUN_DIR/export"):
        job("run", then, "resume=auto")


def test_the_weights_alone_and_a_damaged_checkpoint_are_refused_by_name(job, tmp_path):
    alone = [*PLAIN, "checkpoint.save_optimizer=false"]
    job("run", *alone, "trainer.max_steps=1")
    assert "optimizer_states" not in torch.load(last(tmp_path / "run"), weights_only=True)
    # Neither resume=auto nor a name lets the optimizer start afresh without a word.
    for resume in ("auto", last(tmp_path / "run").with_name("best.ckpt")):
        with pytest.raises(
            CompactHydraException,
            match=r"(?s)holds the model alone.*save_optimizer=true.*lit_ft\.export \S*run .*"
            r"model=pretrained model\.name_or_path=\S*run/export",
        ):
            job("run", *alone, f"resume={resume}", "trainer.max_steps=2")
    with last(tmp_path / "run").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CompactHydraException, match=r"last\.ckpt is damaged"):
        job("run", *alone, "resume=auto", "trainer.max_steps=2")


def times(folder):
    """Return when each file and folder was written, but the lock."""
    return {one: one.stat().st_mtime_ns for one in folder.rglob("*") if one.name != LOCK}


def test_a_finished_run_is_left_as_it_is(job, tmp_path, caplog, monkeypatch):
    """So are its figures, which another start would replace by zeros."""
    options = [*PLAIN, "trainer.max_steps=2"]
    trained = job("run", *options)
    before = times(tmp_path / "run")
    monkeypatch.setattr(Pretrained, "load_model", None)  # it is not called
    main, results = train.main, []
    monkeypatch.setattr(train, "main", lambda config: results.append(main(config)))
    caplog.set_level("INFO", "lightning.pytorch")
    assert job("run", *options, "logger=csv", "ui=plain", "resume=auto") == trained
    assert results == [trained["val_loss"]]  # which a sweeper asks for
    assert "is finished: 2 steps, val_loss " in caplog.text
    assert times(tmp_path / "run") == before
    # Otherwise the summary would name a rate at which no step was taken.
    with pytest.raises(CompactHydraException, match=r"none would obey optim\.lr .*trainer\.max_st"):
        job("run", *options, "optim.lr=1", "resume=auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    "length", [["trainer.max_steps=2"], ["trainer.max_steps=-1", "trainer.max_epochs=1"]]
)
def test_a_run_without_a_step_left_keeps_its_figures(job, tmp_path, caplog, length):
    trained = job("run", *PLAIN, *length)
    caplog.set_level("INFO", "lightning.pytorch")
    again = job("run", *PLAIN, *length, "data.max_val_examples=1", "resume=auto")
    assert trained["tokens"] > 0 and trained["train_loss"] is not None
    for key in ("steps", "tokens", "train_loss", "tokens_per_second", "val_loss"):
        assert again[key] == trained[key], key
    assert again["seconds"]["train"] == trained["seconds"]["train"]
    assert f"has all {trained['steps']} steps, so none is left" in caplog.text


@pytest.mark.slow
def test_a_run_that_did_not_complete_goes_on(job, tmp_path):
    options = [*PLAIN, "trainer.max_steps=2"]
    trained = {**job("run", *options)}
    del trained["checksum"]
    states = [json.dumps({**trained, "status": status}) for status in ("failed", "interrupted")]
    for state in (*states, "{"):  # the last is damaged
        (tmp_path / "run" / "summary.json").write_text(state)
        again = job("run", *options, "resume=auto")
        assert (again["status"], again["val_loss"]) == ("completed", trained["val_loss"])
