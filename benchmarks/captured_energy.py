"""How much of the gradient does each projector's basis capture?

    python benchmarks/captured_energy.py                 # all projectors, rank 64
    python benchmarks/captured_energy.py --rank 128
    python benchmarks/captured_energy.py --only svd --steps 3 --output /tmp/trial

A basis P captures the energy ||G Pᵀ||² of a gradient G. The best basis of the same rank, which an
SVD of that very G finds, captures the most. Two questions are answered on SmolLM2-135M, over 15
linear layers together:

- On one gradient: how much of the best basis's energy does a random basis reach in one to five
  rounds of subspace iteration? A run starts with three.
- In training: the model trains on the embedded data once with each projector, and at some steps
  the basis meets the gradient of the next batch. No projector reaches 1 here, and neither does the
  SVD: the basis is older than the gradient. The last column compares each projector with `svd`.

Results: results/captured_energy.json.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.arguments import script_parser
from support.composed import composed, module_and_data
from support.results import this_run, write_json
from torch import Tensor, nn
from torch.optim import AdamW

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.run.console import quieten_libraries
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.layers.products import projected_gradient_and_sketch
from lit_ft.subspace.projectors import SVD, Oja, Online, Projector, Random, SubspaceIteration

PROJECTORS: dict[str, Projector] = {
    "svd, every 20": SVD(every=20),
    "subspace_iteration, every 20": SubspaceIteration(every=20),
    "oja, every 4": Oja(every=4),
    "online (AdamW on P)": Online(),
    "random, every 20": Random(every=20),
    "subspace_iteration, start only": SubspaceIteration(every=10**9),
    "oja, every step": Oja(every=1),
    "oja, every 2": Oja(every=2),
    "oja, every 8": Oja(every=8),
}
YARDSTICK = "svd, every 20"
MEASURED_AT = (1, 2, 3, 5, 10, 15, 20, 30, 39)  # steps
LATE = 10  # from this step on, every basis has left its start
BLOCKS = (0, 14, 29)
MATRICES = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
LAYERS = [f"model.layers.{block}.{matrix}" for block in BLOCKS for matrix in MATRICES]


class Factors:
    """The two factors of some linear layers' weight gradients: G is rowsᵀ cols.

    Args:
        layers: the layers to listen to, by name
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in layers.items():
            layer.register_forward_hook(self._listener(name))

    def _listener(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            self.inputs[name] = args[0].detach()
            out.register_hook(lambda grad: self._pair(name, grad))

        return keep

    def _pair(self, name: str, grad: Tensor) -> None:
        self.found[name] = (grad.detach(), self.inputs.pop(name))

    def gradients(self) -> dict[str, Tensor]:
        """Return the whole weight gradients of the last backward pass."""
        return {
            name: rows.flatten(0, -2).T @ cols.flatten(0, -2)
            for name, (rows, cols) in self.found.items()
        }


def main() -> None:
    """Measure every projector, print the tables and write the results."""
    quieten_libraries()
    options = _parser().parse_args()
    chosen = {name: rule for name, rule in PROJECTORS.items() if _is_wanted(name, options.only)}
    source, batches = _model_and_batches(options)
    rounds = on_one_gradient(source.load_model(torch.float32), batches[0], options.rank)
    print_rounds(rounds)
    record = {
        **this_run(),
        "model": source.name,
        "settings": {name: getattr(options, name) for name in ("rank", "batch_size", "steps")},
        "layers": LAYERS,
        "subspace_iteration_on_one_gradient": rounds,
    }
    shares = {}
    for name, rule in track(chosen.items(), "projectors"):
        shares[name] = train(source.load_model(torch.float32), rule, batches, options.rank)
        record["in_training"] = compared(shares)
        write_json(options.output / "captured_energy.json", record)
    Console().print(table(record["in_training"]))


def on_one_gradient(
    model: nn.Module, batch: dict[str, Any], rank: int, rounds: int = 5
) -> dict[int, dict[str, Any]]:
    """Return what 1, 2, ... rounds of subspace iteration reach on the gradient of one batch."""
    factors = Factors({name: model.get_submodule(name) for name in LAYERS})
    _backward(model, batch)
    found = {}
    for number in range(1, rounds + 1):
        pairs = {
            name: energies(
                rows.flatten(0, -2).T @ cols.flatten(0, -2),
                iterated(rows, cols, rank=rank, rounds=number),
            )
            for name, (rows, cols) in factors.found.items()
        }
        shares = {name: captured / best for name, (captured, best) in pairs.items()}
        lowest = min(shares, key=lambda name: shares[name])
        found[number] = {
            "layers_together": _share(pairs.values()),
            "lowest": shares[lowest],
            "lowest_layer": lowest,
        }
    return found


def iterated(rows: Tensor, cols: Tensor, *, rank: int, rounds: int) -> Tensor:
    """Return the basis [rank, n] that subspace iteration makes of a random one on one gradient.

    Args:
        rows: gradients of the layer's output [batch, tokens, m]
        cols: the layer's inputs [batch, tokens, n]
        rank: rows of the basis
        rounds: how often the basis moves
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(cols.shape[-1], rank, generator=generator)).Q.T
    for _ in range(rounds):
        _, sketch = projected_gradient_and_sketch(rows, cols, cols @ basis.T)
        basis = SubspaceIteration().move(basis, sketch, state={}, decay=1.0, generator=generator)
    return basis


def train(
    model: nn.Module, rule: Projector, batches: list[dict[str, Any]], rank: int
) -> dict[int, float]:
    """Train a step on each batch; return, by step, the share of the best bases' energy."""
    layers = inject(model, rank=rank, targets=[re.escape(name) for name in LAYERS])
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    updater = SubspaceUpdater(layers, rule)
    updater.attach(optimizer)
    factors = Factors(layers)
    shares = {}
    for step, batch in enumerate(batches, start=1):
        _backward(model, batch)
        if step in MEASURED_AT:  # the basis that this step was given, not the one that it makes
            shares[step] = _share(
                energies(gradient, layers[name].basis.detach())
                for name, gradient in factors.gradients().items()
            )
        updater.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return shares


def energies(gradient: Tensor, basis: Tensor) -> tuple[float, float]:
    """Return what the rows of `basis` [r, n] capture of `gradient` [m, n], and the most r can."""
    # An orthonormal basis of P's rows: AdamW on P (`online`) does not keep P orthonormal.
    span = torch.linalg.qr(basis.T).Q
    captured = float((gradient @ span).square().sum())
    return captured, float(torch.linalg.svdvals(gradient)[: len(basis)].square().sum())


def compared(shares: dict[str, dict[int, float]]) -> dict[str, dict[str, Any]]:
    """Add to each projector's shares their mean from the tenth step on, and that over the SVD's."""
    means = {name: _late_mean(by_step) for name, by_step in shares.items()}
    svd = means.get(YARDSTICK)
    return {
        name: {
            "share_of_the_best": by_step,
            "mean_from_step_10": means[name],
            "over_svd": means[name] / svd if svd and means[name] is not None else None,
        }
        for name, by_step in shares.items()
    }


def print_rounds(found: dict[int, dict[str, Any]]) -> None:
    """Print what rounds of subspace iteration reach on one gradient."""
    shown = Table("rounds on one gradient", "layers together", "lowest layer", "")
    for number, row in found.items():
        shares = (f"{row[name]:.4f}" for name in ("layers_together", "lowest"))
        shown.add_row(str(number), *shares, row["lowest_layer"])
    Console().print(shown)


def table(found: dict[str, dict[str, Any]]) -> Table:
    """Lay the shares in training out."""
    steps = sorted({step for row in found.values() for step in row["share_of_the_best"]})
    shown = Table("projector", *(f"step {step}" for step in steps), "mean from step 10", "over svd")
    for name, row in found.items():
        figures = [row["share_of_the_best"][step] for step in steps]
        figures += [row["mean_from_step_10"], row["over_svd"]]
        shown.add_row(name, *("" if figure is None else f"{figure:.3f}" for figure in figures))
    return shown


def _share(pairs: Iterable[tuple[float, float]]) -> float:
    """Return Σ captured over Σ best."""
    captured, best = map(sum, zip(*pairs, strict=True))
    return captured / best


def _late_mean(shares: dict[int, float]) -> float | None:
    late = [share for step, share in shares.items() if step >= LATE]
    return statistics.mean(late) if late else None


def _backward(model: nn.Module, batch: dict[str, Any]) -> None:
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
    loss = ChunkedCrossEntropy()(model, inputs, batch["labels"])
    (loss / batch["num_targets"]).backward()


def _model_and_batches(options: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """Return what loads the model, and the first batches of the embedded data."""
    overrides = ["optim=adamw", "strategy=cpu", "data.max_length=192"]
    overrides.append(f"data.batch_size={options.batch_size}")
    module, data = module_and_data(composed(*overrides))
    return module.source, list(islice(data.train_dataloader(), options.steps))


def _is_wanted(name: str, only: list[str] | None) -> bool:
    return only is None or any(name.startswith(start) for start in only)


def _parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.add_argument("--rank", type=int, default=64, help="rows of each basis")
    parser.add_argument("--batch-size", type=int, default=4, help="examples in a batch")
    parser.add_argument(
        "--steps", type=int, default=max(MEASURED_AT), help="optimizer steps with each projector"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="projectors whose names start like this"
    )
    return parser


if __name__ == "__main__":
    main()
