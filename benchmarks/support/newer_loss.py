"""Give a torch that lacks the chunked loss the one of a newer torch.

lit_ft takes `linear_cross_entropy` with options from torch 2.13. The GPU at hand may have an older
torch. `support.pack` copies this file as `sitecustomize.py`, which Python imports at its start, and
puts torch's own Python code of the loss into the folder `newer_torch` in the same place.
"""

import dataclasses
import math
import warnings
from pathlib import Path

import torch
from torch.nn import functional, modules

if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    newer = Path(__file__).parent / "newer_torch"
    modules.__path__.append(str(newer))
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    torch.nn.LinearCrossEntropyOptions = LinearCrossEntropyOptions
    needed = {"dataclasses": dataclasses, "math": math, "warnings": warnings}
    vars(functional).update(needed)
    exec((newer / "linear_cross_entropy.txt").read_text(encoding="utf-8"), vars(functional))
