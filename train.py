"""Fine-tune a causal language model: `python train.py --help` shows what can be chosen."""

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lit_ft.run.arguments import CONF
from lit_ft.run.background_plan import BackgroundPlan, wants_plan
from lit_ft.run.launch import launch, reported_by_hydra
from lit_ft.run.loading import ended_at_once_by_signals, loading_libraries
from lit_ft.run.redaction import redact_output, redacted
from lit_ft.run.supervised import end_with_starter
from lit_ft.terminal import stage, use_style


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run the job that the configuration describes."""
    with reported_by_hydra():
        return _job(cfg)


def _job(cfg: DictConfig) -> float:
    """Build the objects that the configuration names, and run the job with them."""
    end_with_starter()
    redact_output()  # on a cluster, this function is all that runs of this file

    run = HydraConfig.get()
    planning = BackgroundPlan(wanted=wants_plan(cfg, run.mode))  # it takes seconds to load, too

    # Imported here so that --help and mistyped names answer at once.
    with loading_libraries(), ended_at_once_by_signals():
        import lightning as L
        from lightning.pytorch.utilities import rank_zero_warn

        from lit_ft.run.console import quieten_libraries

        quieten_libraries()  # the imports below print messages too
        from lit_ft.run.config import also_chosen, low_rate, recipe, resolved
        from lit_ft.run.end_panel import ends_with_panel
        from lit_ft.run.exits import command_line_exits
        from lit_ft.run.folder import RunFolder
        from lit_ft.run.job import (
            available_accelerator,
            fine_tune,
            refuse_to_start_processes,
            saves_checkpoints,
            sensible_precision,
        )
        from lit_ft.run.memory_check import MemoryCheck
        from lit_ft.run.record import record_of
        from lit_ft.run.resume import checkpoint_to_resume, finished_val_loss
        from lit_ft.run.save_config import settings_of_run
        from lit_ft.run.settings import admit
        from lit_ft.run.summary import RunSummary
        from lit_ft.run.tensorboard import hparams

    cfg.run_dir = run.runtime.output_dir  # each job of a sweep has its own
    written = OmegaConf.to_container(cfg, resolve=False)
    settings = settings_of_run(cfg, conf=CONF)
    log_name = f"{run.job.name}.log"
    folder = RunFolder(cfg.run_dir, record_of(cfg), settings=settings, log_name=log_name)
    summary = RunSummary(cfg.run_dir, written, folder=folder)
    with planning, command_line_exits(), ends_with_panel(summary), folder, summary:
        config = resolved(cfg)
        if "accelerator" in (wanted := config.get("trainer") or {}):
            wanted["accelerator"] = available_accelerator(wanted["accelerator"])
        summary.update(config=redacted(config), seed=config.get("seed"))
        if (val_loss := finished_val_loss(summary)) is not None:
            return val_loss
        with stage("checking the settings"):
            admit(config, written, run.overrides.task)
        use_style(config["ui"])
        facts = {"recipe": recipe(run.runtime.choices), "run_dir": cfg.run_dir}
        if low := low_rate(run.runtime.choices, run.overrides.task, config["optim"].get("lr")):
            rank_zero_warn(low)
        if moved := also_chosen(run.runtime.choices, run.overrides.task, config_dir=CONF):
            facts["also chosen"] = moved
        L.seed_everything(config["seed"], workers=True, verbose=False)
        resume = checkpoint_to_resume(config["resume"], config["run_dir"])
        trains = not config["validate_only"]
        folder.begin(resume, trains=trains, overwrite=config["overwrite"])
        summary.note_start(run.overrides.task, resume)
        # Built before the trainer: the precision depends on whether it shards the weights.
        [strategy] = instantiate([config["trainer"].get("strategy", "auto")], _convert_="all")
        if config["trainer"].get("precision") is None:
            precision = sensible_precision(config["trainer"]["accelerator"], strategy)
            config["trainer"]["precision"] = precision
            summary.update(config=redacted(config))
        memory = MemoryCheck(planning, summary, run.overrides.task)
        with stage("checking the memory"):
            memory.begin(config)
        with stage("loading the tokenizer"):
            module = instantiate(config["module"], _convert_="all")
            datamodule = instantiate(config["data"], tokenizer=module.tokenizer, _convert_="all")
        with stage("building the trainer"):
            callbacks = instantiate(config["trainer"]["callbacks"] or [], _convert_="all")
            own = {"strategy": strategy, "callbacks": callbacks}
            usual = {"enable_checkpointing": saves_checkpoints(callbacks)}
            trainer = instantiate({**usual, **config["trainer"], **own}, _convert_="all")
        if run.mode == RunMode.MULTIRUN:
            refuse_to_start_processes(trainer)
        return fine_tune(
            module,
            datamodule,
            trainer,
            summary,
            resume=resume,
            validate_only=config["validate_only"],
            facts=facts,
            hparams=hparams(run.runtime.choices, config),
            memory=memory,
        )


if __name__ == "__main__":
    launch(main)
