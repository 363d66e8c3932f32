"""Keep libraries' messages off the terminal."""

from __future__ import annotations

import logging
import sys
import warnings

# A user of lit_ft cannot act on these: they are mostly deprecations between libraries.
_WARNINGS = (
    "'set_vital' is deprecated",  # torchdata calls torch
    "`isinstance\\(treespec, LeafSpec\\)`",  # lightning calls torch
    "`torch.jit.script",  # torch calls itself
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers
    "PiSSA changes the base weights",  # the export is for the original weights
    ".*does not have many workers",  # tokenised data is read from a memory map
    ".*sync_dist=True",  # the module logs values that are the same on all ranks
    "Checkpoint directory .* exists and is not empty",  # a resumed run continues in its folder
)
_MESSAGES = (
    "litlogger",  # advertisements
    "litmodels",
    "TPU available",
    "GPU available: False",  # another message says if a GPU is not used
)


def quieten_libraries() -> None:
    """Silence known messages of libraries, and progress bars if stderr is not a terminal."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(part in record.getMessage() for part in _MESSAGES)
    )
    # At import, bitsandbytes reports that a kernel for AVX512-BF16 is missing. Others replace it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers imports torchao if it is installed. torchao then reports kernels that are for
    # other machines, and torch warns about the types that torchao registers.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(
        lambda record: "register_constant" not in record.getMessage()
    )
    if not sys.stderr.isatty():
        from datasets.utils.logging import disable_progress_bar
        from transformers.utils import logging as transformers_logging

        disable_progress_bar()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
