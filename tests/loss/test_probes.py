import torch

from lit_ft.loss.probes import keeps_packed_examples_apart
from tests.support.tiny_model import tiny_model

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


def test_a_model_that_reads_borders_in_batches_of_one_row_alone_is_caught_in_others():
    model = tiny_model("llama")  # as flash attention does
    forward = model.model.forward

    def borders_of_one_row(input_ids, position_ids, **inputs):
        kept = position_ids if len(input_ids) == 1 else None
        return forward(input_ids=input_ids, position_ids=kept, **inputs)

    model.model.forward = borders_of_one_row
    assert keeps_packed_examples_apart(model, IDS, POSITIONS)
    assert not keeps_packed_examples_apart(model, IDS, POSITIONS, rows=2)


def test_one_example_has_no_neighbour_to_leak_from():
    assert keeps_packed_examples_apart(tiny_model("llama"), IDS, torch.arange(20))
