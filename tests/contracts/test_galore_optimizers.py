"""GaLore goes with every optimizer that can step from zero; the others are refused by name."""

from __future__ import annotations

import math

import pytest
from hydra.errors import CompactHydraException

from tests.support.running import CONF, run_job

JOB = [
    "model=tiny",
    "galore.rank=8",
    "callbacks=none",
    "logger=none",
    "data.batch_size=2",
    "data.max_length=128",
    "data.max_val_examples=2",
]
REFUSED = {
    "adafactor": r"(?i)adafactor",  # its step is a share of the weight's size
    "adamw_8bit_paged": r"(?i)paged",  # its state lies where no move of a basis reaches it
    "apollo": r"random subspaces of its own.*optim=adamw galore=online",
    "apollo_mini": r"random subspaces of its own.*optim=adamw galore=online",
    "galore_torch": r"projects whole matrices itself.*galore=none",
    "galore_torch_adafactor": r"projects whole matrices itself.*galore=none",
}
OPTIMIZERS = sorted(path.stem for path in CONF.glob("optim/*.yaml"))


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if name not in REFUSED])
def test_it_trains_in_subspaces(optim, tmp_path):
    summary = run_job(tmp_path, *JOB, f"optim={optim}", "galore=online", "trainer.max_steps=6")
    assert (summary["status"], summary["steps"]) == ("completed", 6)
    assert summary["val_loss"] < summary["initial_val_loss"]
    assert math.isfinite(summary["train_loss"])
    assert summary["config"]["galore"]["projector"]["_target_"].endswith(".Oja")
    # Every matrix is in a subspace, so that the state of none has the matrix's own size.
    assert summary["optimizer_state_bytes"] < 2 * summary["model"]["weight_bytes"]


@pytest.mark.parametrize("optim", REFUSED)
def test_it_is_refused(optim, tmp_path):
    assert optim in OPTIMIZERS
    with pytest.raises(CompactHydraException, match=rf"(?s){REFUSED[optim]}"):
        run_job(tmp_path, *JOB, f"optim={optim}", "galore=online", "trainer.max_steps=1")
