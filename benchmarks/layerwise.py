"""How long does a training step with layerwise updates take, compared with a whole step?

    python benchmarks/layerwise.py
    python benchmarks/layerwise.py --steps 20

SmolLM2-135M, 512 tokens, `adamw` and `adamw_8bit`. Both ways run in one process and take turns step
by step. tests/callbacks/test_layerwise_memory.py measures the memory that they save.

Results: results/layerwise.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from rich.console import Console
from rich.table import Table
from support.arguments import script_parser
from support.results import this_run, write_json
from support.smollm2 import SMOLLM2
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.optim import row_chunked
from lit_ft.optim.layerwise import LayerwiseStep, large_parameters

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, lr=1e-5, fused=True),
    "adamw_8bit": partial(bnb.optim.AdamW8bit, lr=1e-5),
}
MAX_NORM = 1.0


class Side:
    """One way to update: a model, its optimizer and the seconds of its steps."""

    def __init__(self, optimizer: str, *, layerwise: bool, clips: bool) -> None:
        torch.manual_seed(0)
        self.model = SMOLLM2.load_model(torch.float32).train()
        self.ids = torch.randint(3, 4000, (2, 256))
        self.clips = clips and not layerwise
        self.loss = ChunkedCrossEntropy(repeatable=layerwise and clips)
        self.optimizer = row_chunked(OPTIMIZERS[optimizer](self.model.parameters()))
        self.backward: Callable[[Tensor], None] = Tensor.backward
        if layerwise:
            large = large_parameters(self.optimizer, 2**20)
            max_norm = MAX_NORM if clips else None
            self.backward = LayerwiseStep(self.optimizer, large, max_norm=max_norm).backward
        self.seconds: list[float] = []

    def step(self) -> None:
        """Train on the batch once, as Lightning does."""
        began = time.perf_counter()
        self.optimizer.step(self._closure)
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)

    @torch.enable_grad()
    def _closure(self) -> Tensor:
        loss = self.loss(self.model, {"input_ids": self.ids}, self.ids) / self.ids.numel()
        self.backward(loss)
        if self.clips:
            clip_grad_norm_(self.model.parameters(), MAX_NORM)
        return loss


def main() -> None:
    """Measure, print, and write the results."""
    parser = script_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each way")
    options = parser.parse_args()
    record: dict[str, Any] = {**this_run(), "pairs": {}}
    shown = Table("optimizer", "clipping", "whole, s", "layerwise, s", "layerwise / whole")
    for optimizer, clips in (("adamw", False), ("adamw_8bit", False), ("adamw", True)):
        pair = measure(optimizer, clips=clips, steps=options.steps)
        record["pairs"][f"{optimizer}{', clipped' * clips}"] = pair
        figures = (f"{pair[key]:.3f}" for key in ("whole", "layerwise", "ratio"))
        shown.add_row(optimizer, "by norm" if clips else "", *figures)
    Console().print(shown)
    write_json(options.output / "layerwise.json", record)


def measure(optimizer: str, *, clips: bool, steps: int) -> dict[str, float]:
    """Return medians, and the median ratio, of steps in turn; the first two do not count."""
    whole, layerwise = (Side(optimizer, layerwise=b, clips=clips) for b in (False, True))
    for _ in range(steps + 2):
        whole.step()
        layerwise.step()
    pairs = list(zip(whole.seconds[2:], layerwise.seconds[2:], strict=True))
    ratios = [b / a for a, b in pairs]
    return {
        "whole": statistics.median(a for a, _ in pairs),
        "layerwise": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


if __name__ == "__main__":
    main()
