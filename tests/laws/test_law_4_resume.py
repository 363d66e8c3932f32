"""Law 4: a run that stops and resumes is the run that never stopped, bit for bit."""

import copy
import io

import bitsandbytes as bnb
import pytest
import torch
from torch.optim import AdamW

from lit_ft.optim import RowwiseAdamW8bit
from lit_ft.subspace import Refresh
from lit_ft.subspace.projectors import SVD, SubspaceIteration
from tests.support.subspace_run import PROJECTORS, Run, assert_equal, batches
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (AdamW, torch.float32),
        (AdamW, torch.bfloat16),
        (bnb.optim.AdamW8bit, torch.float32),
        (RowwiseAdamW8bit, torch.float32),
    ],
)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_resume_equals_never_having_stopped(projector, optimizer, dtype):
    """Law 4: bit for bit, through weights_only, over a move of the basis."""
    data = batches(7)
    model = tiny_model("llama", tie_word_embeddings=True).eval().to(dtype)
    options = {"optimizer": optimizer, "rank": 32, "stagger": True}
    straight = Run(PROJECTORS[projector], model=copy.deepcopy(model), **options).train(data)
    first = Run(PROJECTORS[projector], model=copy.deepcopy(model), **options).train(data[:4])
    file = io.BytesIO()
    torch.save(
        {
            "model": first.model.state_dict(),
            "optimizer": first.optimizer.state_dict(),
            "steps": first.steps.state_dict(),
        },
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Run(PROJECTORS[projector], model=copy.deepcopy(model), **options)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.steps.load_state_dict(saved["steps"])
    resumed.train(data[4:])
    assert_equal(resumed, straight)


@pytest.mark.parametrize(
    ("projector", "threshold"),
    [(SubspaceIteration(every=2), 0.35), (SVD(every=2), 0.15)],
)
def test_an_adaptive_run_resumes_bit_for_bit(projector, threshold):
    data = batches(14)
    model = tiny_model("llama", tie_word_embeddings=True).double().eval()
    refresh = Refresh(adaptive=True, threshold=threshold, longest=4)

    def run_of():
        return Run(projector, model=copy.deepcopy(model), refresh=refresh)

    straight, first, resumed = run_of().train(data), run_of().train(data[:7]), run_of()
    file = io.BytesIO()
    torch.save([p.state_dict() for p in (first.model, first.optimizer, first.steps)], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for part, state in zip((resumed.model, resumed.optimizer, resumed.steps), saved, strict=True):
        part.load_state_dict(state)
    assert len(set(saved[2]["turns"]["interval"].values())) > 1  # some layers rest
    resumed.train(data[7:])
    assert_equal(resumed, straight)
    assert resumed.steps.state_dict()["turns"] == straight.steps.state_dict()["turns"]
