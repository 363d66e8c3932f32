import torch

from lit_ft.isolation import keeps_packed_examples_apart
from tests.test_losses import tiny_model

IDS = torch.arange(5, 25)
POSITIONS = torch.cat([torch.arange(8), torch.arange(12)])


def test_a_transformers_model_keeps_examples_apart():
    for attention in ("sdpa", "eager"):
        model = tiny_model("llama")
        model.set_attn_implementation(attention)
        assert keeps_packed_examples_apart(model, IDS, POSITIONS)


def test_a_model_that_ignores_position_ids_is_caught():
    model = tiny_model("llama")
    forward = model.model.forward
    model.model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    assert not keeps_packed_examples_apart(model, IDS, POSITIONS)


def test_one_example_has_no_neighbour_to_leak_from():
    assert keeps_packed_examples_apart(tiny_model("llama"), IDS, torch.arange(20))
