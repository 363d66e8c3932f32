"""How many bytes does a rank give to each collective in a training step?

    python benchmarks/communication.py
    python benchmarks/communication.py --steps 6 --output /tmp/trial

SmolLM2-135M trains in float32 on two ranks. DDP all-reduces gradients; FSDP2 gathers weights and
reduce-scatters gradients. GaLore's gradients are small, and one more small all-reduce averages the
sketches that its bases move by. The bytes are counted at torch's dispatcher, on two gloo processes
of this machine; NCCL is given the same operations.

Results: results/communication.json.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from support.arguments import script_parser
from support.ledger import Ledger
from support.results import this_run, write_json
from support.smollm2 import SMOLLM2
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lit_ft import CausalLMModule
from lit_ft.callbacks import GaLore
from lit_ft.distributed import FSDP2Strategy
from lit_ft.subspace.projectors import Oja, Projector, SubspaceIteration

WORLD, TOKENS = 2, 64
METHODS: dict[str, Projector | None] = {
    "adamw": None,
    "galore": SubspaceIteration(every=200),
    "galore_subspace": Oja(),
}


class Count(Callback):
    """Counts the bytes of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start to count."""
        self.ledger = Ledger()
        self.ledger.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop, and note the step's bytes."""
        self.ledger.__exit__(None, None, None)
        self.steps.append(dict(self.ledger.bytes))


def count(strategy: str, method: str, steps: int) -> list[dict[str, int]]:
    """Train on one rank; return the bytes of each step by collective."""
    torch.set_num_threads(1)
    module = CausalLMModule(SMOLLM2, optimizer=partial(AdamW, lr=1e-5))
    counted = Count()
    projector = METHODS[method]
    galore = [GaLore(rank=64, projector=projector)] if projector else []
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=FSDP2Strategy() if strategy == "fsdp" else strategy,
        max_steps=steps,
        callbacks=[*galore, counted],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ids = torch.randint(
        3, 4000, (steps, 1, TOKENS), generator=torch.Generator().manual_seed(trainer.global_rank)
    )
    batches = [{"input_ids": row, "labels": row} for row in ids]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    dist.destroy_process_group()
    return counted.steps


def main() -> None:
    """Count, print, and write the results."""
    parser = script_parser(__doc__)
    parser.add_argument("--steps", type=int, default=9, help="steps of each run; the last 5 count")
    options = parser.parse_args()
    record: dict[str, Any] = {**this_run(), "megabytes": {}}
    shown = Table("strategy", "optim", "collectives, MB a step", "most in a step, MB", "of adamw's")
    two_ranks = LaunchConfig(
        1, 1, WORLD, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    for strategy in ("ddp", "fsdp"):
        adamw = 0.0
        for method in METHODS:
            counted = elastic_launch(two_ranks, count)(strategy, method, options.steps)[0]
            totals = [sum(step.values()) / 1e6 for step in counted]
            usual, most = sorted(totals[-5:])[2], max(totals[1:])
            adamw = adamw or usual
            last = {name: round(size / 1e6, 1) for name, size in counted[-1].items() if size > 1e3}
            record["megabytes"][f"{strategy}, {method}"] = {
                "last_step": last,
                "median": usual,
                "most": most,
                "of_adamw": usual / adamw,
                "most_of_adamw": most / adamw,
            }
            shares = f"{usual / adamw:.3f}, at most {most / adamw:.3f}"
            listed = "\n".join(f"{name} {size}" for name, size in last.items())
            shown.add_row(strategy, method, listed, f"{most:.1f}", shares)
    Console().print(shown)
    write_json(options.output / "communication.json", record)


if __name__ == "__main__":
    main()
