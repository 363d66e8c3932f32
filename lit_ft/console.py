"""A terminal that shows the run, not the libraries' asides."""

from __future__ import annotations

import logging
import sys
import warnings

# Nothing that a user of lit_ft could act on: deprecations between libraries, and an advertisement.
_WARNINGS = (
    "'set_vital' is deprecated",  # torchdata calls torch
    "`isinstance\\(treespec, LeafSpec\\)`",  # lightning calls torch
    "`torch.jit.script",  # torch calls itself
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers
    "PiSSA changes the base weights",  # exported as an adapter for the original ones
    ".*does not have many workers",  # tokenised data is read from a memory map
)


def quieten_libraries() -> None:
    """Silence known asides, and progress bars where they would not be drawn but printed."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    if not sys.stderr.isatty():
        from datasets.utils.logging import disable_progress_bar
        from transformers.utils import logging as transformers_logging

        disable_progress_bar()
        transformers_logging.disable_progress_bar()
