"""`python train.py` on two ranks in real processes: it leaves what one process leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loops import utilities as loops
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.chat import main as chat
from lit_ft.export import main as export
from tests.support.checkpoints import is_whole
from tests.support.commands import TINY, TWO_RANKS, start

pytestmark = pytest.mark.slow


class AsOnNCCL(Callback):
    """Lets Lightning validate in inference mode, which it does not do on gloo."""

    def __init__(self) -> None:
        loops._distributed_is_initialized = lambda: False


def test_it_trains_and_leaves_what_one_process_leaves(tmp_path, capsys):
    process = start(*TWO_RANKS, f"run_dir={tmp_path}", "strategy=fsdp", "trainer.max_steps=3")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 3)
    assert summary["val_loss"] < summary["initial_val_loss"]
    assert is_whole(tmp_path / "checkpoints" / "last.ckpt")
    exported = weights_of(tmp_path / "export")
    export([str(tmp_path), "--output", str(tmp_path / "last")])
    assert_equal(weights_of(tmp_path / "last"), exported)
    export([str(tmp_path), "--checkpoint", "best", "--output", str(tmp_path / "best")])
    assert_equal(weights_of(tmp_path / "best"), exported)  # the last validation was the best
    capsys.readouterr()
    chat([str(tmp_path / "last"), "--prompt", "What is it?", "--max-new-tokens", "2"])
    assert capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_an_adapter_trains_and_leaves_what_one_process_leaves(adapter, tmp_path, capsys):
    job = [*TINY, f"adapter={adapter}", "optim=sgd", "optim.lr=3", "trainer.max_steps=4", "seed=3"]
    job += ["trainer.devices=2", "data.batch_size=2", "trainer.accumulate_grad_batches=2"]
    one = ["strategy=cpu", "trainer.devices=1", "data.batch_size=4"]
    for name, options in (("one", one), ("two", ["strategy=fsdp"])):
        process = start(*job, *options, f"run_dir={tmp_path / name}")
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert (two["status"], two["steps"]) == ("completed", 4)
    assert two["model"]["trainable_parameters"] == one["model"]["trainable_parameters"]
    for key in ("initial_val_loss", "val_loss", "train_loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
    exported = weights_of(tmp_path / "two" / "export")
    expected = weights_of(tmp_path / "one" / "export")
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-5)
    export([str(tmp_path / "two"), "--output", str(tmp_path / "last")])
    assert_equal(weights_of(tmp_path / "last"), exported)
    export([str(tmp_path / "two"), "--adapter-only", "--output", str(tmp_path / "apart")])
    apart, written = (
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "apart", tmp_path / "two" / "export" / "adapter")
    )
    assert_equal(apart, written)
    capsys.readouterr()
    chat([str(tmp_path / "two"), "--prompt", "What is it?", "--max-new-tokens", "2"])
    assert capsys.readouterr().out


def weights_of(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_layers_streamed_from_the_host_train_the_same_weights(tmp_path):
    ends = []
    for strategy in ("cpu", "single_gpu_offload"):
        folder = tmp_path / strategy
        options = [*TWO_RANKS, "trainer.devices=1", "trainer.max_steps=4", "~callbacks.export"]
        options.append("+callbacks.nccl._target_=tests.distributed.test_job.AsOnNCCL")
        options.append("trusted_packages=[tests]")
        process = start(*options, f"strategy={strategy}", f"run_dir={folder}")
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        ends.append(AtomicCheckpointIO().load_checkpoint(folder / "checkpoints" / "last.ckpt"))
    torch.testing.assert_close(ends[1]["state_dict"], ends[0]["state_dict"], rtol=0, atol=0)
