"""How many bytes does each of 8, 64 or 512 ranks hold and send in a training step of a 70B Llama?

    python benchmarks/at_scale.py
    python benchmarks/at_scale.py --ranks 8 --output /tmp/trial

The figures are on paper: one process plays rank 0 of torch's fake process group, and the tensors
have no values (FakeTensorMode). The model is sharded and trained by the code that a real run takes.
What a rank holds is counted from its local shards. What it sends is what goes into the collectives
of the first step. Activations are left out. All blocks are alike, so the script counts what the
first two add and takes it for the others.

tests/distributed/test_at_scale.py compares the count with two real ranks.

Results: results/at_scale.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from support.arguments import script_parser
from support.ledger import Ledger
from support.results import this_run, write_json
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import AdamW
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_ft.distributed import fully_shard_model
from lit_ft.measure import optimizer_state_bytes, weight_bytes
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.projectors import Oja
from lit_ft.tensors.sharding import local

RANKS_A_NODE = 8
HELD = ("weights", "bases", "sketches", "gradients", "optimizer_state")
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def average(tensors: Iterable[Tensor]) -> None:
    """Average the tensors over the ranks, in place."""
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def step_on_this_rank(
    config: LlamaConfig, mesh: DeviceMesh, *, galore_rank: int | None = None, tokens: int = 64
) -> dict[str, Any]:
    """Train for one step on this rank of the process group; return what it holds and sends.

    Args:
        config: shape of the model
        mesh: all ranks; two dimensions for replicas of a sharded model (strategy=hsdp)
        galore_rank: rank of the subspaces; None for AdamW on whole weights
        tokens: length of the one example on each rank
    """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = inject(model, rank=galore_rank) if galore_rank else {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard_model(model, mesh, mp_policy=policy)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    if layers:
        SubspaceUpdater(layers, Oja(), all_reduce=average).attach(optimizer)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with Ledger() as ledger:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = sum(local(p.grad).nbytes for p in model.parameters() if p.grad is not None)
        sketches = sum(la.basis.grad.nbytes for la in layers.values() if la.basis.grad is not None)
        optimizer.step()
    bases = sum(layer.basis.nbytes for layer in layers.values())  # whole on every rank
    return {
        "weights": weight_bytes(model) - bases,
        "bases": bases,
        "sketches": sketches,  # of all layers in the first three steps, later of those that move
        "gradients": gradients,
        "optimizer_state": optimizer_state_bytes(optimizer),
        "sent": dict(ledger.bytes),
    }


def on_paper(
    config: LlamaConfig, ranks: int, *, replicas: int = 1, **options: Any
) -> dict[str, Any]:
    """Return what `step_on_this_rank` returns on rank 0 of so many ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    shape = (ranks,) if replicas == 1 else (replicas, ranks // replicas)
    try:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            # Rank 0 has the first rows; torch would ask values for that, and there are none.
            patch("lit_ft.subspace.layers.base.first_row", return_value=0),
        ):
            return step_on_this_rank(config, mesh, **options)
    finally:
        dist.destroy_process_group()


def of_many_blocks(config: LlamaConfig, ranks: int, **options: Any) -> dict[str, Any]:
    """Return what `on_paper` returns, worked out from models of one and of two blocks."""
    one, two = (
        on_paper(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": n}), ranks, **options)
        for n in (1, 2)
    )

    def grown(first: Any, second: Any) -> Any:
        if isinstance(first, dict):
            return {name: grown(first[name], second[name]) for name in first}
        return first + (config.num_hidden_layers - 1) * (second - first)

    found: dict[str, Any] = grown(one, two)
    return found


def main() -> None:
    """Count, print, and write the results."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[8, 64, 512], help="numbers of ranks, 8 a node"
    )
    parser.add_argument("--galore-rank", type=int, default=1024, help="rank of the subspaces")
    options = parser.parse_args()
    config = LlamaConfig(**LLAMA_70B)
    record: dict[str, Any] = {
        **this_run(),
        "model": config.to_diff_dict(),
        "galore_rank": options.galore_rank,
        "precision": "bf16-mixed",
        "bytes": {},
    }
    shown = Table("ranks", "strategy", "optim", *HELD, "sent in a step")
    shown.caption = "GB a rank (10^9 bytes)"
    for ranks in options.ranks:
        nodes = ranks // RANKS_A_NODE
        for strategy, replicas in {"fsdp": 1, "hsdp": nodes}.items():
            if strategy == "hsdp" and nodes == 1:
                continue  # one node has one replica: that is fsdp
            for optim, rank in {"adamw": None, "galore_subspace": options.galore_rank}.items():
                found = of_many_blocks(config, ranks, replicas=replicas, galore_rank=rank)
                record["bytes"][f"{ranks} ranks, {strategy}, {optim}"] = found
                held = [found[name] for name in HELD]
                sent = "\n".join(f"{name} {n / 1e9:.2f}" for name, n in found["sent"].items())
                shown.add_row(
                    str(ranks), strategy, optim, *(f"{size / 1e9:.2f}" for size in held), sent
                )
    Console().print(shown)
    write_json(options.output / "at_scale.json", record)


if __name__ == "__main__":
    main()
