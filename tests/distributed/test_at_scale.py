"""What is counted on paper is what two real ranks hold and send."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig

from tests.support.ranks import WORLD

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 37,  # ranks do not hold as many rows
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def at_scale():
    sys.path.insert(0, str(BENCHMARKS))  # as where it is run
    try:
        import at_scale
    finally:
        sys.path.remove(str(BENCHMARKS))
    return at_scale


def on_this_rank(galore_rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    return at_scale().step_on_this_rank(LlamaConfig(**TINY), mesh, galore_rank=galore_rank)


@pytest.mark.parametrize("galore_rank", [None, 8])
def test_paper_and_two_ranks_agree(galore_rank, on_both):
    real, _ = on_both(on_this_rank, galore_rank)
    paper = at_scale().of_many_blocks(LlamaConfig(**TINY), WORLD, galore_rank=galore_rank)
    assert paper == real
    assert real["weights"] > 0 and real["sent"]["reduce_scatter_base"] > 0
