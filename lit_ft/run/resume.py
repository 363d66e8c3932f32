"""Resume a run: find its checkpoint, compare the settings, and leave a finished run alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Remedy
from lit_ft.distributed.plan import Misconfiguration
from lit_ft.distributed.ranks import process_rank
from lit_ft.run.changes import Change, Outcome, changes, differences
from lit_ft.run.failures import not_this_run
from lit_ft.run.recorder import Recorder
from lit_ft.run.redaction import MASK
from lit_ft.run.summary import RunSummary, as_written
from lit_ft.storage.atomic import earlier, existing_or_backup
from lit_ft.storage.checkpoint_io import load_rest
from lit_ft.storage.damage import damage

# A finished run need not be repeated for other values of these.
_NOT_OF_THE_RESULT = ("resume", "overwrite", "ui", "trusted_packages", "logger*", "trainer.logger*")
_LISTED = (Outcome.OBEYED, Outcome.STEP, Outcome.ROWS)
# What Lightning needs to load weights, and to go on, besides what is large.
_MODEL = {"pytorch-lightning_version"}
_STATE = {"callbacks", "loops", "epoch", "global_step", *_MODEL}
_LENGTH = ("trainer.max_steps", "trainer.max_epochs")


def checkpoint_to_resume(resume: str | None, run_dir: str | Path) -> Path | None:
    """Return the checkpoint that `resume` names; None to start from the model's own weights.

    Args:
        resume: The path of a checkpoint; "auto" for the newest whole one in `run_dir`, if there is
            one; or None to resume nothing.
        run_dir: The folder of the run, in which "auto" looks for a checkpoint.

    Raises:
        ValueError: If the path does not exist, or if the checkpoint, or each one in `run_dir`, is
            damaged.
    """
    if resume is None:
        return None
    if resume == "auto":
        newest = _newest_whole(Path(run_dir) / "checkpoints" / "last.ckpt")
        if newest is None:
            rank_zero_info(f"There is no checkpoint in {run_dir}: the run starts afresh.")
        return newest
    path = existing_or_backup(resume)
    if path is None:
        raise ValueError(
            f"resume={resume}: there is no such checkpoint. resume=auto takes the last one of "
            "run_dir; resume=null overwrite=true starts afresh."
        )
    if (reason := _damage(path)) is not None:
        raise ValueError(
            f"resume={resume} is damaged: {reason}. resume=auto takes the newest whole checkpoint "
            "of run_dir."
        )
    return path


def _newest_whole(last: Path) -> Path | None:
    """Return the newest state of `last` that is not damaged; None if there is no state at all.

    Raises:
        ValueError: If each one is damaged.
    """
    others = last.parent.glob(f"{last.stem}-*{last.suffix}")
    ages = (path.stem.rpartition("-")[2] for path in others)
    oldest = max((int(age) for age in ages if age.isdecimal()), default=0)
    states = [existing_or_backup(place) for place in (last, *earlier(last, oldest))]
    damaged: list[str] = []
    for state in filter(None, states):
        if (reason := _damage(state)) is None:
            if damaged:
                rank_zero_warn(f"{'; '.join(damaged)}. The run goes on from {state}.")
            return state
        damaged.append(f"{state} is damaged: {reason}")
    if damaged:
        raise ValueError(
            f"{'; '.join(damaged)}. No whole checkpoint is left: resume=null overwrite=true starts "
            "afresh."
        )
    return None


def _damage(path: Path) -> str | None:
    # A folder can be large. Its path is the first rank's on all ranks, so that one is enough.
    return damage(path) if path.is_file() or process_rank() == 0 else None


def finished_val_loss(summary: RunSummary) -> float | None:
    """Return the result of the run that is to be resumed, if it is finished; otherwise None.

    It is finished if `resume` is "auto", and its folder holds the summary of a completed run of the
    same configuration.

    Args:
        summary: The summary of this run, which is not yet written.
    """
    config, earlier = as_written(summary.fields["config"]), summary.earlier
    if earlier is None or earlier["status"] != "completed" or earlier.get("val_loss") is None:
        return None
    if config["resume"] != "auto" or config["validate_only"]:
        return None
    for path, _, now in differences(earlier["config"], config):
        ignored = any(fnmatchcase(path, pattern) for pattern in _NOT_OF_THE_RESULT)
        if not ignored and (path, now) != ("trainer.precision", None):  # chosen by the device
            return None
    rank_zero_info(
        f"{summary.run_dir} is finished: {earlier['steps']} steps, val_loss "
        f"{earlier['val_loss']:.4f}. It is not run again. A larger trainer.max_steps or max_epochs "
        "would go on with it, and resume=null overwrite=true would replace it."
    )
    return float(earlier["val_loss"])


def compare_with_checkpoint(
    resume: str | Path, recorder: Recorder, *, weights_only: bool = False
) -> None:
    """Say which settings differ from the checkpoint's run, and refuse what cannot be obeyed.

    Args:
        resume: The checkpoint. Its weights are not read.
        recorder: The recorder of this run.
        weights_only: Whether the run uses only its weights, with which any setting goes.

    Raises:
        Misconfiguration: If the saved state depends on a setting that differs.
        ValueError: If the checkpoint is broken, or does not hold what the run needs of it.
    """
    rest, own = load_rest(resume), recorder.state_dict()
    if missing := (_MODEL if weights_only else _STATE) - rest.keys():
        raise ValueError(
            f"resume={resume} holds the model alone, and no state to continue with (there is no "
            f"{', '.join(sorted(missing))}). Resume from the last.ckpt of a run with "
            f"checkpoint.save_optimizer=true, or begin a new run with these weights: {_new(resume)}"
        )
    if weights_only:
        return
    saved = rest["callbacks"].get(recorder.state_key, {})
    if saved.get("optimizer", own["optimizer"]) != own["optimizer"]:
        raise not_this_run(f"The checkpoint is one of {saved['optimizer']}, not {own['optimizer']}")
    if "config" not in saved:
        rank_zero_info("The checkpoint does not hold its run's settings, so none are compared.")
        return
    found = changes(saved["config"], own["config"])
    for objection in _objections(found, saved, own):
        raise objection
    for change in found:
        if change.outcome is Outcome.ELSEWHERE:
            rank_zero_warn(
                f"The checkpoint's run had another {change}. Repeat its value if this is not "
                "intended."
            )
    if secrets := [one.setting for one in found if one.now is None and MASK in str(one.was)]:
        rank_zero_warn(
            f"The checkpoint's run was given a secret, which its files do not hold: "
            f"{', '.join(secrets)}. Give it again if this run needs it."
        )
    if obeyed := [change for change in found if change.outcome in _LISTED]:
        rank_zero_info(
            f"These settings differ from the checkpoint's run and are obeyed: {_listed(obeyed)}."
        )


def _new(checkpoint: str | Path) -> str:
    """Return the commands that train the weights of a checkpoint in a new run."""
    path = Path(checkpoint)
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else Path("RUN_DIR")
    return (
        f"`python -m lit_ft.export {run_dir} --checkpoint {path.stem}`, then `python train.py "
        f"model=pretrained model.name_or_path={run_dir / 'export'}`, whose optimizer starts afresh."
    )


def _objections(
    found: Sequence[Change], saved: Mapping[str, Any], own: Mapping[str, Any]
) -> Iterator[Misconfiguration]:
    """Yield what speaks against going on with these changes."""
    inside = saved["inside_epoch"]
    fixed = (Outcome.REFUSED, Outcome.ROWS) if inside else (Outcome.REFUSED,)
    if refused := [change for change in found if change.outcome in fixed]:
        where = " inside an epoch" if any(c.outcome is Outcome.ROWS for c in refused) else ""
        yield not_this_run(f"A run that resumes{where} cannot change {_listed(refused)}")
    if inside and saved["rows_per_step"] != own["rows_per_step"]:
        yield _another_step(saved["rows_per_step"], own["rows_per_step"], found)
    obeyed = [change for change in found if change.outcome is Outcome.OBEYED]
    of_steps = [change for change in obeyed if not change.setting.startswith("callbacks.")]
    longer = any(change.setting in _LENGTH for change in obeyed)
    if saved["finished"] and of_steps and not longer:
        yield Misconfiguration(
            f"The checkpoint's run has taken all its steps, so none would obey {_listed(of_steps)}",
            remedies.MORE_STEPS,
            remedies.AFRESH,
        )


def _another_step(was: int, now: int, found: Sequence[Change]) -> Misconfiguration:
    """Return the error for a step of another number of rows inside an epoch."""
    causes = [change for change in found if change.outcome is Outcome.STEP]
    told = f": {_listed(causes)}" if causes else ", because the number of devices is another"
    return not_this_run(
        "A run that resumes inside an epoch cannot change the number of rows in a step, which was "
        f"{was} and is now {now}{told}",
        Remedy(
            f"let batch_size * accumulate_grad_batches * devices be {was}",
            advice=f"let data.batch_size x trainer.accumulate_grad_batches x devices be {was}",
        ),
    )


def _listed(found: Sequence[Change]) -> str:
    return ", ".join(map(str, found))
