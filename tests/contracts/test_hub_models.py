"""The configurations of the hub's models in conf/model/ are those that are published."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.running import CONF

# What the hub shows, from the files of the weights. Tied weights are counted once.
PARAMETERS = {
    "gemma_3_1b": 999_885_952,
    "gemma_3_4b": 4_300_079_472,
    "gemma_3_12b": 12_187_325_040,
    "gemma_3_27b": 27_432_406_640,
    "llama_3_1_8b": 8_030_261_248,
    "llama_3_1_70b": 70_553_706_496,
    "llama_3_2_1b": 1_235_814_400,
    "llama_3_2_3b": 3_212_749_824,
    "mistral_7b": 7_248_023_552,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
}
FILES = sorted(
    path.stem
    for path in CONF.glob("model/*.yaml")
    if OmegaConf.load(path).get("config") and not OmegaConf.load(path).get("_target_")
)


@pytest.mark.parametrize("name", FILES)
def test_it_has_the_published_number_of_parameters(name):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"model={name}"]).model
    source = instantiate(config, _convert_="all")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source.config))
    assert model.num_parameters() == PARAMETERS[name]
