"""Time and memory of a training step: subspace training against AdamW, LoRA and galore-torch.

    python benchmarks/optimizer_step.py            # both sizes
    python benchmarks/optimizer_step.py --size wide --steps 12
    python benchmarks/optimizer_step.py --device cuda --dtype bfloat16 --size four_of_8b

Everything that a step needs is timed: forward, loss, backward, optimizer, fold, rotation, tracking,
head and embedding. All sides use lit_ft's chunked loss; galore-torch's SVD is timed apart. Each
method has a process of its own, as it has for its user, and steps in turn with AdamW's: what one
side frees, another in the same process would find mapped already, and more than two leave too
little memory to be at ease.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import torch
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from smollm2 import SMOLLM2
from torch import Tensor, nn
from torch.optim import AdamW

from lit_ft.losses import ChunkedCrossEntropy
from lit_ft.memory import optimizer_state_bytes, peak_bytes, reset_peak
from lit_ft.models import FromConfig
from lit_ft.subspace import SubspaceStep, inject
from lit_ft.subspace.products import projected_gradient_and_sketch
from lit_ft.subspace.projectors import Oja, Projector, SubspaceIteration
from lit_ft.summary import hardware, versions

RESULTS = Path(__file__).parent / "results"
WIDE = FromConfig(
    "llama",
    {
        "vocab_size": 4096,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
)
FOUR_OF_8B = FromConfig(  # layers of Llama 3 8B, with a third of its vocabulary
    "llama",
    {
        "vocab_size": 49152,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
)
SIZES = {  # source, tokens, rank
    "wide": (WIDE, 1024, 128),
    "smollm2": (SMOLLM2, 512, 64),
    "four_of_8b": (FOUR_OF_8B, 8192, 256),
}
ON_CPU = ("wide", "smollm2")

PROJECTORS: dict[str, Projector] = {
    "galore, between refreshes": SubspaceIteration(every=10**9),
    # One of the 15 subspaces of `wide` moves at every second step: far more often than by default,
    # so that refresh steps can be compared with the others.
    "galore, every 30": SubspaceIteration(every=30),
    "galore_subspace, every step": Oja(every=1),
    "galore_subspace, every 2": Oja(every=2),
    "galore_subspace, every 4": Oja(every=4),
    "galore_subspace, every 8": Oja(every=8),
}
METHODS = ("adamw", "lora r16", "galore-torch without its SVD", *PROJECTORS)


class Step(NamedTuple):
    """What a step took, and whether a basis moved in it."""

    seconds: float
    refreshed: bool


class Side:
    """One method: a model and its optimizer."""

    def __init__(self, method: str, size: str, device: str, dtype: torch.dtype) -> None:
        source, tokens, rank = SIZES[size]
        torch.manual_seed(0)
        self.device = torch.device(device)
        with self.device:
            self.model: nn.Module = source.load_model(dtype).to(self.device).train()
            self.ids = torch.randint(3, 4000, (2, tokens // 2))
        if method == "lora r16":
            config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, config)
        layers = inject(self.model, rank=rank) if method in PROJECTORS else {}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if method == "galore-torch without its SVD":
            self.optimizer = _galore_torch(trainable, rank)
        else:
            self.optimizer = AdamW(trainable, lr=1e-5, fused=True)
        if layers:
            self.steps = SubspaceStep(layers, PROJECTORS[method])
            self.steps.attach(self.optimizer)
        self.beside = 0
        self.layers = layers

    def step(self) -> Step:
        """Train on the batch once."""
        refreshed = any(layer.basis.requires_grad for layer in self.layers.values())
        began = self._now()
        loss = ChunkedCrossEntropy()(self.model, {"input_ids": self.ids}, self.ids)
        (loss / self.ids.numel()).backward()
        if not self.beside:
            self.beside = self._gradient_bytes()
        if self.layers:
            self.steps.before_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(self._now() - began, refreshed)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def bytes_beside_weights(self) -> int:
        """Gradients, sketches, bases, deltas and moments at the end of a backward pass."""
        small = {layer.delta: layer.basis for layer in self.layers.values()}
        tensors = [*small, *small.values()]
        return self.beside + optimizer_state_bytes(self.optimizer) + sum(t.nbytes for t in tensors)

    def _gradient_bytes(self) -> int:
        tensors: set[Tensor] = {*self.model.parameters(), *self.model.buffers()}
        return sum(t.grad.nbytes for t in tensors if t.is_leaf and t.grad is not None)


def main() -> None:
    """Measure, print, and write the results if nothing was left out."""
    options = _parser().parse_args()
    dtype = getattr(torch, options.dtype)
    record: dict[str, Any] = {"steps": options.steps, "dtype": options.dtype}
    record |= {"hardware": hardware(), "versions": versions(), "sizes": {}}
    for size in options.size:
        measured = measure(size, options.steps, options.only, options.device, dtype)
        record["sizes"][size] = measured
        Console().print(table(size, measured))
    record["refresh"] = refresh = measure_refresh(options.device)
    Console().print({name: f"{seconds:.4f} s" for name, seconds in refresh.items()})
    if set(options.only) == set(METHODS) and set(options.size) >= set(ON_CPU):
        name = "optimizer_step" if options.device == "cpu" else f"optimizer_step_{options.device}"
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def measure(
    size: str, steps: int, methods: Sequence[str], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Pair each method with AdamW; the first three steps of each are not counted."""
    found: dict[str, Any] = {}
    for name in track([name for name in METHODS if name in methods and name != "adamw"], size):
        with (
            _process("adamw", size, device, dtype) as adamw,
            _process(name, size, device, dtype) as method,
        ):
            pair = {"adamw": adamw, name: method}
            _alternate(pair, 3)
            for process in pair.values():
                process.submit(_reset_peak).result()
            taken = _alternate(pair, steps)
            for side, process in pair.items():
                found[side] = {
                    **_figures(taken[side], taken["adamw"]),
                    "bytes_beside_weights": process.submit(_bytes_beside_weights).result(),
                    "peak_bytes": process.submit(_peak_bytes).result(),
                }
            found[name]["adamw_beside_it"] = found["adamw"]["median"]
            print(name, f"{found[name]['median']:.4f} s beside {found['adamw']['median']:.4f} s")
    return found


def _alternate(pair: Mapping[str, ProcessPoolExecutor], steps: int) -> dict[str, list[Step]]:
    taken: dict[str, list[Step]] = {side: [] for side in pair}
    for _ in range(steps):
        for side, process in pair.items():
            taken[side].append(process.submit(_step).result())
    return taken


def _figures(steps: list[Step], of_adamw: list[Step]) -> dict[str, float]:
    seconds = [step.seconds for step in steps]
    ratios = [a.seconds / b.seconds for a, b in zip(of_adamw, steps, strict=True)]
    figures = {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "times_faster_than_adamw": statistics.median(ratios),
    }
    refreshes = [step.seconds for step in steps if step.refreshed]
    others = [step.seconds for step in steps if not step.refreshed]
    if refreshes and others:
        ratio = statistics.median(refreshes) / statistics.median(others)
        figures["refresh_step_over_others"] = ratio
    return figures


def _process(method: str, size: str, device: str, dtype: torch.dtype) -> ProcessPoolExecutor:
    """A process that holds one side."""
    arguments = (method, size, device, dtype)
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=arguments)


_side: Side  # of a side's process


def _start(method: str, size: str, device: str, dtype: torch.dtype) -> None:
    global _side
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _side = Side(method, size, device, dtype)


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _step() -> Step:
    return _side.step()


def _bytes_beside_weights() -> int:
    return _side.bytes_beside_weights


def _reset_peak() -> None:
    reset_peak(_side.device)


def _peak_bytes() -> int | None:
    return peak_bytes(_side.device).value


def measure_refresh(
    device: str, rows: int = 2048, cols: int = 5632, rank: int = 128, tokens: int = 1024
) -> dict[str, float]:
    """Return the seconds that a new basis adds to a step, for one matrix; medians of three.

    galore-torch decomposes the gradient that is there anyway; subspace iteration needs a sketch of
    it from the layer's inputs and output gradients, which counts.
    """
    with torch.device(device):
        x, y = torch.randn(2, tokens // 2, cols), torch.randn(2, tokens // 2, rows)
        basis = torch.linalg.qr(torch.randn(cols, rank)).Q.T.contiguous()
    gradient = y.flatten(0, 1).T @ x.flatten(0, 1)
    rule, generator = SubspaceIteration(), torch.Generator(device)
    svd = GaLoreProjector(rank, proj_type="right")

    def iterate() -> None:
        _, sketch = projected_gradient_and_sketch(y, x, x @ basis.T)
        rule.move(basis, sketch, state={}, decay=1.0, generator=generator)

    def decompose() -> None:
        svd.get_orthogonal_matrix(gradient, rank, type="right")

    return {
        "galore-torch SVD": _median(decompose, device),
        "subspace iteration": _median(iterate, device),
    }


def _median(function: Any, device: str, times: int = 3) -> float:
    if device == "cuda":
        function()  # loads libraries
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _galore_torch(parameters: list[nn.Parameter], rank: int) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.ndim == 2]
    galore = {"rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "right"}
    optimizer = GaLoreAdamW(
        [{"params": [p for p in parameters if p.ndim < 2]}, {"params": matrices, **galore}],
        lr=1e-5,
        no_deprecation_warning=True,
    )
    # A basis to start from, so that no step is an SVD.
    for matrix in matrices:
        projector = GaLoreProjector(rank, update_proj_gap=10**9, scale=0.25, proj_type="right")
        width = min(rank, *matrix.shape)
        basis = torch.linalg.qr(torch.randn(matrix.shape[1], width, device=matrix.device)).Q.T
        projector.ortho_matrix = basis.to(matrix.dtype)
        optimizer.state[matrix].update(step=1, projector=projector)
        zeros = matrix.new_zeros(matrix.shape[0], width)
        optimizer.state[matrix].update(exp_avg=zeros, exp_avg_sq=zeros.clone())
    return optimizer


def table(size: str, measured: dict[str, Any]) -> Table:
    """Lay the figures out."""
    shown = Table(
        "method",
        "s a step",
        "min – max",
        "× adamw",
        "refresh step / others",
        "MiB beside weights",
        "peak MiB",
        title=size,
    )
    for method, row in measured.items():
        shown.add_row(
            method,
            f"{row['median']:.3f}",
            f"{row['min']:.3f} – {row['max']:.3f}",
            f"{row['times_faster_than_adamw']:.3f}",
            f"{row['refresh_step_over_others']:.3f}" if "refresh_step_over_others" in row else "",
            f"{row['bytes_beside_weights'] / 2**20:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        )
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="*", choices=SIZES, default=list(ON_CPU))
    parser.add_argument(
        "--only", nargs="*", choices=METHODS, default=METHODS, help="these methods, and adamw"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each method")
    return parser


if __name__ == "__main__":
    main()
