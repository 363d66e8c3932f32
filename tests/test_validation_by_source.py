"""Each source of a mixture has a validation loss of its own."""

import pytest
import torch

from lit_ft import CausalLMModule
from lit_ft.datamodule import InstructionDataModule
from lit_ft.loss import ChunkedCrossEntropy
from lit_ft.models import FromConfig
from lit_ft.run.files import read_summary
from tests.support.commands import TINY as TINY_JOB
from tests.support.commands import run
from tests.support.datamodules import answers, ready, write
from tests.support.running import run_job
from tests.support.tiny_module import TINY, batch_of, inputs_of, loader, module_of, trainer_of


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "a.jsonl", 60, name="a", length=9)
    return [{"path": first}, {"path": write(tmp_path / "b" / "b.jsonl", 25, name="bbb", length=2)}]


def module_for(tokenizer):
    module = CausalLMModule(
        FromConfig("llama", {**TINY, "vocab_size": 320}), optimizer=torch.optim.SGD
    )
    module.tokenizer = tokenizer
    return module


def sums_of(module, batches):
    """The loss and the number of targets of a loader's batches."""
    total, targets = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            inputs = {k: v for k, v in inputs_of(batch).items() if torch.is_tensor(v)}
            total += float(ChunkedCrossEntropy()(module.model, inputs, batch["labels"]))
            targets += batch["num_targets"]
    return total, targets


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_each_source_has_the_mean_over_its_own_targets(tmp_path, tokenizer, sources, streaming):
    options = {"streaming": True} if streaming else {"val_fraction": 0.3}
    data = InstructionDataModule(
        None, sources=sources, tokenizer=tokenizer, max_val_examples=20, **options
    )
    module = module_for(tokenizer)
    metrics = trainer_of(tmp_path).validate(module, data, verbose=False)[0]
    first, second = data.val_dataloader()
    assert {answer[0] for answer in answers(tokenizer, first)} == {"a"}
    assert {answer[0] for answer in answers(tokenizer, second)} == {"b"}
    (a, a_targets), (b, b_targets) = sums_of(module, first), sums_of(module, second)
    assert metrics["val_loss/a.jsonl"] == pytest.approx(a / a_targets, rel=1e-6)
    assert metrics["val_loss/b.jsonl"] == pytest.approx(b / b_targets, rel=1e-6)
    assert metrics["val_loss"] == pytest.approx((a + b) / (a_targets + b_targets), rel=1e-6)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("held_out", ["none", "val_path"])
def test_one_source_has_one_loader_and_no_loss_apart(tmp_path, tokenizer, sources, held_out):
    val_path = write(tmp_path / "v.jsonl", 9, name="v")
    options = {"path": sources[0]["path"]}
    if held_out == "val_path":
        options = {"path": None, "sources": sources, "val_path": val_path}
    data = InstructionDataModule(tokenizer=tokenizer, **options)
    [metrics] = trainer_of(tmp_path).validate(module_for(tokenizer), data, verbose=False)
    assert metrics.keys() == {"val_loss", "val_perplexity"}


@pytest.mark.usefixtures("own_cache")
def test_a_source_of_which_no_row_is_chosen_has_no_loader(tokenizer, sources):
    data = ready(tokenizer, None, sources=sources, max_val_examples=1)
    assert len(answers(tokenizer, data.val_dataloader())) == 1
    assert data.val_names == []


def test_loaders_without_names_are_numbered(tmp_path):
    loaders = [loader(batch_of([12])), loader(batch_of([12, 5], seed=1))]
    together = loader(batch_of([12]), batch_of([12, 5], seed=1))
    metrics = trainer_of(tmp_path).validate(module_of(), loaders, verbose=False)[0]
    [one] = trainer_of(tmp_path).validate(module_of(), together, verbose=False)
    assert metrics["val_loss"] == one["val_loss"]  # bit for bit
    assert {"val_loss/0", "val_loss/1"} < metrics.keys()


def settings(sources):
    paths = ",".join(f"{{path: {source['path']}}}" for source in sources)
    return [
        *TINY_JOB,
        "data=file",
        "data.path=null",
        f"+data.sources=[{paths}]",
        "data.val_fraction=0.3",
        "data.max_val_examples=20",
        "data.batch_size=4",
        "trainer.max_steps=2",
        "trainer.val_check_interval=1",
        "optim=sgd",
        "update=whole",
    ]


def test_a_job_reports_them_in_its_summary(tmp_path, sources, capsys):
    summary = run_job(tmp_path / "run", *settings(sources), "strategy=cpu", "logger=csv")
    by_source = summary["val_loss_by_source"]
    assert by_source.keys() == {"a.jsonl", "b.jsonl"}
    assert min(by_source.values()) < summary["val_loss"] < max(by_source.values())
    [metrics] = (tmp_path / "run" / "csv").rglob("metrics.csv")
    assert "val_loss/a.jsonl" in metrics.read_text().splitlines()[0]
    assert "of a.jsonl" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_report_what_one_does(tmp_path, sources):
    one = run_job(tmp_path / "one", *settings(sources), "strategy=cpu", "data.batch_size=8")
    run_dir = tmp_path / "two"
    two_ranks = ["strategy=ddp", "trainer.devices=2", f"run_dir={run_dir}"]
    status, output = run(*settings(sources), *two_ranks)
    assert status == 0, output
    two = read_summary(run_dir)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6)
    assert two["val_loss_by_source"] == pytest.approx(one["val_loss_by_source"], rel=1e-6)
