"""Two ranks load what the files hold, each its part, and let go of it again."""

from __future__ import annotations

import gc
import io
import json
import logging
import weakref

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lit_ft.distributed import FSDP2Strategy
from lit_ft.models import Pretrained
from lit_ft.tensors.sharding import full_tensor
from tests.support.joining import joined
from tests.support.sharded_training import LARGER, LLAMA, load, save_llama, train

pytestmark = pytest.mark.slow

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_no_rank_ever_holds_the_whole_model(tmp_path, on_both):
    config = AutoConfig.for_model("llama", **{**LLAMA, **LARGER})
    model = AutoModelForCausalLM.from_config(config)
    size = sum(p.nbytes for p in model.parameters())
    # Of another type than it is loaded in: else the files would be mapped, and read by nobody.
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="20MB")
    del model
    for peak in on_both(load, tmp_path):
        assert 0.45 * size <= peak <= 0.6 * size
    assert load(tmp_path, sharded=False) > 0.95 * size  # so that it would be seen


def warnings_of_loading(model_folder, run_dir):
    """What transformers says while a model of GaLore is loaded in parts."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("transformers").addHandler(handler)
    train(model_folder, run_dir, sharded=True, projector="oja", steps=1)
    logging.getLogger("transformers").removeHandler(handler)
    return said.getvalue()


@pytest.mark.parametrize("tied", [True, False])
def test_no_rank_reports_galores_tensors_as_missing(tied, folder, tmp_path, on_both):
    for said in on_both(warnings_of_loading, folder / f"tied_{tied}", tmp_path):
        assert "delta" not in said
        assert "MISSING" not in said


def outlives_its_run(model_folder):
    module = joined(Pretrained(str(model_folder)), strategy=FSDP2Strategy())
    module.configure_model()
    parameter = weakref.ref(module.model.lm_head.weight)
    del module
    gc.collect()
    return parameter() is not None


def test_what_nobody_holds_any_more_is_freed(folder, on_both):
    """Torch keeps the classes that it has sharded: through them it kept model and trainer."""
    assert on_both(outlives_its_run, folder / "tied_False") == [False, False]


def loaded(model_folder, **options):
    """Return the weights, gathered, or the error."""
    module = joined(Pretrained(str(model_folder), **options), strategy=FSDP2Strategy())
    try:
        module.configure_model()
    except (MisconfigurationException, ValueError) as error:
        return str(error)
    return {n: full_tensor(p.detach()) for n, p in module.model.named_parameters()}


def test_a_model_that_brings_its_own_code(tmp_path, on_both):
    save_llama(tmp_path, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(OWN_CODE)
    stored = load_file(tmp_path / "model.safetensors")
    for weights in on_both(loaded, tmp_path, trust_remote_code=True):
        assert weights.keys() == stored.keys()
        assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert all("trust_remote_code" in said for said in on_both(loaded, tmp_path))


def test_a_model_that_is_no_causal_one_is_refused(tmp_path, on_both):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    assert all("t5, which is not a causal LM" in said for said in on_both(loaded, tmp_path))


def test_code_that_is_not_trusted_does_not_run(tmp_path, on_both):
    """A type that transformers knows itself needs no trust, and its folder may still bring code."""
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "it_ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    assert all("t5, which is not a causal LM" in said for said in on_both(loaded, tmp_path))
    assert not marker.exists()
