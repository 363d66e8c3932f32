"""What two ranks read is what the files hold."""

from __future__ import annotations

import json

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from lit_ft import CausalLMModule
from lit_ft.models import Pretrained
from lit_ft.parallel import FSDP2Strategy
from lit_ft.sharding import whole
from tests.distributed.test_fsdp import OPTIMIZERS, save_llama
from tests.ranks import WORLD
from tests.test_module import trainer_of

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def loaded(folder, **options):
    """Return the weights, gathered, or the error."""
    module = CausalLMModule(Pretrained(str(folder), **options), optimizer=OPTIMIZERS["adamw"])
    module.trainer = trainer_of(folder, strategy=FSDP2Strategy(), devices=WORLD)
    module.trainer.strategy._lightning_module = module
    module.trainer.strategy.setup_environment()
    try:
        module.configure_model()
    except (MisconfigurationException, ValueError) as error:
        return str(error)
    return {n: whole(p.detach()) for n, p in module.model.named_parameters()}


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
