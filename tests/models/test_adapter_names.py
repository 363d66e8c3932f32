"""Names in an adapter's configuration are held against the layers that there are."""

import re

import pytest
from peft import LoraConfig

from lit_ft.compat.refusal import Refusal
from lit_ft.models import add_adapter
from lit_ft.models.adapter_names import match_names
from tests.support.tiny_model import tiny_model

LINEAR = (
    r"There are q_proj \(2\), k_proj \(2\), v_proj \(2\), o_proj \(2\), gate_proj \(2\), .*lm_head"
)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_modules": ["q_projj"]}, rf"(?s)q_projj, which .*{LINEAR}.*use .*\[q_proj\]"),
        ({"target_modules": "k_prj"}, r"There are k_proj \(2\), q_proj .*modules=\[k_proj\]"),
        (  # peft takes the one that matches and says nothing of the other
            {"target_modules": ["v_proj", "q_projj"]},
            rf"(?s)has q_projj, which .*{LINEAR}.*modules=\[q_proj,v_proj\] or .*all-linear",
        ),
        ({"target_modules": ["xyz"]}, r"has xyz, .*Use adapter\.target_modules=all-linear"),
        ({"exclude_modules": ["lm_haed"]}, r"exclude_modules has lm_haed.*=\[lm_head\]"),
        ({"modules_to_save": ["embed_token"]}, r"modules_to_save has embed_token.*embed_tokens"),
        ({"modules_to_save": ["xyz"]}, r"There are embed_tokens, .*Leave modules_to_save out"),
        ({"layers_to_transform": [0, 5]}, r"layers_to_transform has 5, .* are 0, 1"),
        ({"target_parameters": ["xyz.weight"]}, r"target_parameters has xyz\.weight"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_those_that_there_are(options, told):
    config = LoraConfig(**{"target_modules": ["q_proj"], **options})
    with pytest.raises(Refusal) as refusal:
        add_adapter(tiny_model("llama"), config)
    text = refusal.value.on_command_line
    assert re.search(told, text, re.IGNORECASE), text


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]}),
        ("llama", {"target_modules": r".*\.1\..*_proj", "modules_to_save": ["norm"]}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
        ("gpt2", {"target_modules": ["c_attn"]}),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),  # transformers 4's names
        ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ],
)
def test_names_that_match_are_not_refused(model_type, options):
    config = LoraConfig(**options)
    before = dict(vars(config))
    match_names(tiny_model(model_type), config)
    assert vars(config) == before
