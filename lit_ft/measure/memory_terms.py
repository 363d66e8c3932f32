"""The memory of a training, as the sum of its terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lit_ft.measure.memory import optimizer_state_bytes, peak_bytes, weight_bytes
from lit_ft.measure.optimizer_state import estimate_state_bytes
from lit_ft.measure.storage_bytes import storage_bytes

REST = "activations and the rest"


def memory_terms(
    module: nn.Module, optimizers: Sequence[Optimizer], device: torch.device | str
) -> dict[str, int]:
    """Return the bytes of each term of the memory on this rank, the largest first.

    Weights are counted. Optimizer state that does not exist yet is estimated, and so are gradients,
    which are as large as what is trained. The rest of the peak is activations, and whatever else
    the device or the process holds.

    Args:
        module: The module that is trained.
        optimizers: Its optimizers; none before they are made.
        device: The device whose memory it is.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    estimates = [size or 0 for one in optimizers for size in estimate_state_bytes(one)]
    terms = {
        "weights": weight_bytes(module),
        "gradients": storage_bytes(trained) if optimizers else 0,
        "optimizer state": max(sum(map(optimizer_state_bytes, optimizers)), sum(estimates)),
    }
    terms[REST] = max(0, peak_bytes(device).value - sum(terms.values()))
    return dict(sorted(terms.items(), key=lambda term: term[1], reverse=True))
