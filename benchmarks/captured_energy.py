"""How much of the gradient each rule's basis captures, against the best basis of the same rank.

    python benchmarks/captured_energy.py
    python benchmarks/captured_energy.py --rank 128

SmolLM2-135M trains on the embedded data once with each rule, which moves a sample of its matrices
(the others train whole). Now and then ||G Pᵀ||² / ||G||² is taken, G being the batch's gradient of
the whole matrix, and divided by what the top singular vectors of that very G would capture. No rule
can reach 1: a basis meets the gradient that comes after the ones that made it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from support.composed import composed, module_and_data
from torch import Tensor, nn
from torch.optim import AdamW

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.run.console import quieten_libraries
from lit_ft.run.summary import hardware, versions
from lit_ft.subspace import SubspaceLayer, SubspaceUpdater, inject
from lit_ft.subspace.projectors import SVD, Oja, Online, Projector, Random, SubspaceIteration

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "captured_energy.json"
RULES: dict[str, Projector] = {
    "svd, every 20": SVD(every=20),
    "subspace_iteration, every 20": SubspaceIteration(every=20),
    "subspace_iteration, start only": SubspaceIteration(every=10**9),
    "oja, every step": Oja(every=1),
    "oja, every 2": Oja(every=2),
    "oja, every 4": Oja(every=4),
    "oja, every 8": Oja(every=8),
    "online (AdamW on P)": Online(),
    "random, every 20": Random(every=20),
}
MEASURED_AT = (1, 2, 3, 5, 10, 15, 20, 30, 39)  # steps
BLOCKS = (0, 14, 29)
MATRICES = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
LAYERS = [f"model.layers.{block}.{matrix}" for block in BLOCKS for matrix in MATRICES]


class Gradients:
    """The whole weight gradients of some linear layers, formed from what goes through them."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}
        for name, layer in layers.items():
            layer.register_forward_hook(self._listener(name))

    def _listener(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            self.inputs[name] = args[0].detach()
            out.register_hook(lambda grad: self._form(name, grad))

        return keep

    def _form(self, name: str, grad: Tensor) -> None:
        self.found[name] = grad.flatten(0, -2).T @ self.inputs.pop(name).flatten(0, -2)


def main() -> None:
    """Measure every rule, print the table and write it."""
    quieten_libraries()
    options = _parser().parse_args()
    shares = {}
    with Progress() as progress:
        for name, rule in progress.track(RULES.items(), description="rules"):
            shares[name] = train(rule, options)
    record = {
        "command": "python benchmarks/captured_energy.py",
        "settings": vars(options),
        "hardware": hardware(),
        "versions": versions(),
        "share_of_the_best": shares,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(table(shares))


def train(rule: Projector, options: argparse.Namespace) -> dict[int, float]:
    """Return the share of the best basis's energy at some steps, over the layers together."""
    module, batches = _module_and_batches(options)
    model = module.source.load_model(torch.float32)
    layers = inject(model, rank=options.rank, targets=[re.escape(name) for name in LAYERS])
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    steps = SubspaceUpdater(layers, rule)
    steps.attach(optimizer)
    gradients = Gradients(layers)
    shares = {}
    for step in range(1, max(MEASURED_AT) + 1):
        batch = next(batches)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
        loss = ChunkedCrossEntropy()(model, inputs, batch["labels"])
        (loss / batch["num_targets"]).backward()
        if step in MEASURED_AT:  # the basis that this step was given, not the one that it makes
            shares[step] = share_of_the_best(layers, gradients.found)
        steps.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return shares


def share_of_the_best(layers: dict[str, SubspaceLayer], gradients: dict[str, Tensor]) -> float:
    """Return Σ ||G Pᵀ||² over Σ of what the top singular vectors capture, over the layers."""
    captured = best = 0.0
    for name, gradient in gradients.items():
        basis = layers[name].basis.detach()
        # An orthonormal basis of P's rows: AdamW on P (`online`) does not keep P orthonormal.
        span = torch.linalg.qr(basis.T).Q
        captured += float((gradient @ span).square().sum())
        best += float(torch.linalg.svdvals(gradient)[: len(basis)].square().sum())
    return captured / best


def table(shares: dict[str, dict[int, float]]) -> Table:
    """Lay the shares out."""
    shown = Table("rule", *(f"step {step}" for step in MEASURED_AT), "mean from step 10")
    for name, by_step in shares.items():
        late = statistics.mean(share for step, share in by_step.items() if step >= 10)
        shown.add_row(name, *(f"{share:.3f}" for share in [*by_step.values(), late]))
    return shown


def _module_and_batches(options: argparse.Namespace) -> tuple[Any, Any]:
    overrides = ["optim=adamw", "strategy=cpu", "data.max_length=192"]
    overrides.append(f"data.batch_size={options.batch_size}")
    module, data = module_and_data(composed(*overrides))
    return module, iter(data.train_dataloader())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    return parser


if __name__ == "__main__":
    main()
