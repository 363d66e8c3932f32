"""The methods of optimizer_step.py: each is a model and its optimizer, on a device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from bitsandbytes.optim import AdamW8bit
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.profiler import profile

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.measure import optimizer_state_bytes, peak_bytes, reset_peak
from lit_ft.models import FromConfig
from lit_ft.optim import row_chunked
from lit_ft.optim.layerwise import LayerwiseStep
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.projectors import Oja, Projector, SubspaceIteration
from support.smollm2 import SMOLLM2
from support.timing import now

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
FOUR_OF_8B = FromConfig(  # four layers of Llama 3 8B, a third of its vocabulary
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
TINY = FromConfig(  # to try the benchmark out
    "llama",
    {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
)
SIZES = {  # source, tokens, rank
    "wide": (WIDE, 1024, 128),
    "smollm2": (SMOLLM2, 512, 64),
    "four_of_8b": (FOUR_OF_8B, 8192, 256),
    "tiny": (TINY, 64, 8),
}
PROJECTORS: dict[str, Projector] = {
    "galore, between refreshes": SubspaceIteration(every=10**9),
    # Far more often than by default: one of the 15 subspaces of `wide` moves at every second step,
    # so that steps with a move can be compared with the others.
    "galore, every 30": SubspaceIteration(every=30),
    "galore_subspace, every step": Oja(every=1),
    "galore_subspace, every 2": Oja(every=2),
    "galore_subspace, every 4": Oja(every=4),
    "galore_subspace, every 8": Oja(every=8),
    "galore_subspace_8bit, every 4": Oja(every=4),
    "galore_subspace_8bit, every 4, layerwise": Oja(every=4),
}
METHODS = ("adamw", "lora r16", "galore-torch without its SVD", *PROJECTORS)


class Step(NamedTuple):
    """The seconds of a step, and whether a basis moved in it."""

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
        elif "8bit" in method:
            self.optimizer = row_chunked(AdamW8bit(trainable, lr=1e-5))
        else:
            self.optimizer = AdamW(trainable, lr=1e-5, fused=True)
        self.gradient_bytes = 0
        self.layers = layers
        if layers:
            # As in training on one device.
            self.updater = SubspaceUpdater(layers, PROJECTORS[method], releases_deltas=True)
            self.updater.attach(self.optimizer)
        if "layerwise" in method:
            self._step_layerwise()

    def step(self) -> Step:
        """Train one step on the batch."""
        refreshed = any(layer.basis.requires_grad for layer in self.layers.values())
        began = now(self.device)
        self.optimizer.step(self._closure)
        self.optimizer.zero_grad()
        return Step(now(self.device) - began, refreshed)

    @torch.enable_grad()
    def _closure(self) -> Tensor:
        loss = ChunkedCrossEntropy()(self.model, {"input_ids": self.ids}, self.ids)
        loss = loss / self.ids.numel()
        loss.backward()
        if not self.gradient_bytes:
            self.gradient_bytes = self._count_gradient_bytes()
        if self.layers:
            self.updater.before_step(self.optimizer)
        return loss

    def _step_layerwise(self) -> None:
        """Let backward step the deltas, as `LayerwiseUpdate` does."""
        layers = self.layers.values()
        self.updater.step_in_parts(layer.delta for layer in layers)
        LayerwiseStep(
            self.optimizer,
            [layer.delta for layer in layers],
            in_parts=[layer.delta for layer in layers],
            companions={layer.delta: (layer.basis, layer.energy) for layer in layers},
            around=self.updater.stepping,
        )

    def profiled(self) -> str:
        """Train four steps; return torch's tables of their time by kernel and by CPU operation."""
        with profile() as profiler:
            for _ in range(4):
                self.step()
        orders = ["self_device_time_total"] * (self.device.type == "cuda") + ["self_cpu_time_total"]
        averages = profiler.key_averages()
        return "\n".join(
            averages.table(sort_by=order, row_limit=40, max_name_column_width=100)
            for order in orders
        )

    def bytes_beside_weights(self) -> int:
        """Return the bytes of gradients, sketches, bases, deltas and moments after a backward.

        All deltas count, although training on one device gives them memory only where they step.
        """
        small = {layer.delta: layer.basis for layer in self.layers.values()}
        tensors = [*small, *small.values()]
        return (
            self.gradient_bytes
            + optimizer_state_bytes(self.optimizer)
            + sum(t.nbytes for t in tensors)
        )

    def reset_peak(self) -> None:
        """Let the peak of the device's memory start from here."""
        reset_peak(self.device)

    def peak_bytes(self) -> int | None:
        """Return the most memory that was in use since; None where nobody counts it."""
        return peak_bytes(self.device).value

    def _count_gradient_bytes(self) -> int:
        tensors: set[Tensor] = {*self.model.parameters(), *self.model.buffers()}
        return sum(t.grad.nbytes for t in tensors if t.is_leaf and t.grad is not None)


def _galore_torch(parameters: list[nn.Parameter], rank: int) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.ndim == 2]
    galore = {"rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "right"}
    optimizer = GaLoreAdamW(
        [{"params": [p for p in parameters if p.ndim < 2]}, {"params": matrices, **galore}],
        lr=1e-5,
        no_deprecation_warning=True,
    )
    # Each matrix gets a basis to start from, so that no step computes an SVD.
    for matrix in matrices:
        projector = GaLoreProjector(rank, update_proj_gap=10**9, scale=0.25, proj_type="right")
        width = min(rank, *matrix.shape)
        basis = torch.linalg.qr(torch.randn(matrix.shape[1], width, device=matrix.device)).Q.T
        projector.ortho_matrix = basis.to(matrix.dtype)
        optimizer.state[matrix].update(step=1, projector=projector)
        zeros = matrix.new_zeros(matrix.shape[0], width)
        optimizer.state[matrix].update(exp_avg=zeros, exp_avg_sq=zeros.clone())
    return optimizer
