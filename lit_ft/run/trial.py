"""Make a run a trial of an Optuna study that another process has prepared.

The environment names the study, not the settings: a run does not depend on who watches it, and its
recorded command says all that it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lit_ft.callbacks import PruneTrial

if TYPE_CHECKING:
    import optuna

_VARIABLE = "LIT_FT_TRIAL"
_NAME = "learning rate"


def study_in(journal: Path, *, create: bool = False) -> optuna.Study:
    """Return the study in a file of Optuna's journal storage.

    Its pruner halves the trials again and again: after one and after two validations, a trial goes
    on if its loss is in the better half of those that came so far (arXiv:1810.05934).

    Args:
        journal: The path of the file.
        create: Whether to make a new study.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make = optuna.create_study if create else optuna.load_study
    return make(
        study_name=_NAME,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )


def environment_of_trial(journal: Path) -> Mapping[str, str]:
    """Return the variable that makes `python train.py` the next trial of a study."""
    return {_VARIABLE: str(journal)}


def callbacks_of_trial() -> list[PruneTrial]:
    """Return the callback that reports this run to its trial; none if it is no trial."""
    journal = os.environ.get(_VARIABLE)
    return [] if journal is None else [PruneTrial(study_in(Path(journal)).ask())]
