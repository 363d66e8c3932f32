"""The choices that a run combines, as plain values for the rules to check."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from lit_ft.compat.optimizers import Traits

Parallel = Literal["single", "ddp", "fsdp", "tensor", "undefined", "other"]

_STRATEGIES: tuple[tuple[str, Parallel], ...] = (
    (r"^lit_ft\..*\.FSDP2Strategy$", "fsdp"),
    (r"^lit_ft\..*\.TensorParallelStrategy$", "tensor"),
    (r"\.ModelParallelStrategy$", "undefined"),
    (r"\.DDPStrategy$", "ddp"),
    (r"\.SingleDeviceStrategy$", "single"),
)


@dataclass(frozen=True)
class Basis:
    """The facts about GaLore's projector.

    Attributes:
        projector: The name of the projector's class.
        forms_gradients: Whether a basis is computed from the whole gradient of a matrix.
    """

    projector: str
    forms_gradients: bool = False

    @property
    def choice(self) -> str | None:
        """The choice of `galore=` that has this projector; None if no choice has it."""
        return _PROJECTORS.get(self.projector)


_PROJECTORS = {
    "Oja": "online",
    "SubspaceIteration": "iteration",
    "SVD": "svd",
    "Random": "random",
    "Online": "paper",
}
BASES = {
    choice: Basis(projector, forms_gradients=choice in ("svd", "paper"))
    for projector, choice in _PROJECTORS.items()
}
"""The facts about each choice of `galore=`. "paper" forms gradients for its SVD at the start."""


@dataclass(frozen=True)
class Adapter:
    """The facts about an adapter.

    Attributes:
        kind: The name of the adapter's configuration class.
        init: How the adapter's values are initialised, as in peft's `init_lora_weights`.
        options: The names of all other options whose values differ from the defaults.
    """

    kind: str = "LoraConfig"
    init: bool | str = True
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """One combination of optimizer, GaLore, update, adapter, strategy and trainer.

    Attributes:
        optimizer: The name of the optimizer's class; empty if it is not known yet.
        traits: The traits of the optimizer's class.
        parallel: How the model is spread over the devices. "undefined" stands for Lightning's
            `ModelParallelStrategy`, which does not define it.
        strategy: The name of the strategy's class.
        devices: The number of processes of the run on all nodes together.
        layerwise: Whether large parameters are stepped inside the backward pass.
        blocks: Whether a few blocks of the model are trained at a time, in turns.
        drops_state: Whether a block's optimizer state is deleted when its turn ends.
        clip: How gradients are clipped: by their norm, by value, or not at all ("none").
        accumulate: The number of micro-batches in an optimizer step.
        precision: The precision in Lightning's notation, such as "bf16-mixed".
        scales_loss: Whether a gradient scaler scales the loss and may skip steps.
        adapter: The facts about the adapter; None trains every weight.
        quantised: Whether the weights under the adapter are quantised.
        basis: The facts about GaLore's projector; None trains without GaLore.
        compiled: Whether torch.compile runs the model.
        skips_steps: Whether a step whose gradient is not finite is skipped.
        finds_batch_size: Whether the run first measures the largest micro-batch that fits.
        module: The name of the module's class.
        optimizes_by_hand: Whether the module steps its optimizer itself.
        clips_its_own_way: Whether the module clips gradients in a way of its own.
        back_propagates_its_own_way: Whether the module runs backward in a way of its own.
        copied_before_galore: The name of a callback that copies the module before `GaLore` changes
            it; None if there is none.
        finds_rate: Whether Lightning's learning rate finder runs.
    """

    optimizer: str = ""
    traits: Traits = Traits()
    parallel: Parallel = "single"
    strategy: str = "SingleDeviceStrategy"
    devices: int = 1
    layerwise: bool = False
    blocks: bool = False
    drops_state: bool = False
    clip: Literal["none", "norm", "value"] = "none"
    accumulate: int = 1
    precision: str = "32-true"
    scales_loss: bool = False
    adapter: Adapter | None = None
    quantised: bool = False
    basis: Basis | None = None
    compiled: bool = False
    skips_steps: bool = False
    finds_batch_size: bool = False
    module: str = "CausalLMModule"
    optimizes_by_hand: bool = False
    clips_its_own_way: bool = False
    back_propagates_its_own_way: bool = False
    copied_before_galore: str | None = None
    finds_rate: bool = False

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of every weight."""
        return self.parallel in ("fsdp", "tensor", "undefined")


def parallel_of(kind: type) -> Parallel:
    """Return how a Lightning strategy class spreads a model over the devices."""
    for base in kind.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        for pattern, parallel in _STRATEGIES:
            if re.search(pattern, name):
                return parallel
    return "other"


def adapter_of(config: Any) -> Adapter | None:
    """Return the facts about an adapter, from its `peft.PeftConfig`; None if `config` is None."""
    if config is None:
        return None
    kind = type(config)
    usual = kind() if kind.__name__ == "LoraConfig" else config
    changed = {f.name for f in fields(config) if getattr(config, f.name) != getattr(usual, f.name)}
    init = getattr(config, "init_lora_weights", True)
    return Adapter(kind.__name__, init, frozenset(changed - {"init_lora_weights"}))
