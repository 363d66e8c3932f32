"""A value in a YAML is its constructor's default, or differs from it for a reason given here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tests.support.running import CONF

RATE = "a rate that fine-tunes: the library's is for training from scratch"
RULE = "a rule says which parameters it is for; the defaults match them all"
# File and path of a value (of all below it, if they share the reason): why it differs.
LIKE_LORA = {
    "task_type": "the only task here",
    "target_modules": "all linear layers, as QLoRA found best",
}
DELIBERATE = {
    **{
        f"adapter/{name}.yaml adapter.{setting}": reason
        for name in ("lora", "hira", "miss", "oft", "randlora", "shira", "vera")
        for setting, reason in LIKE_LORA.items()
    },
    **{
        f"adapter/{name}.yaml adapter.r": "the rank of adapter=lora, to compare with"
        for name in ("hira", "miss", "shira")
    },
    "adapter/lora.yaml adapter.r": "16 is what most comparisons use; peft starts from 8",
    "adapter/lora.yaml adapter.lora_alpha": "twice the rank, as most comparisons",
    "adapter/qlora.yaml model.quantization_config": "the 4 bits of QLoRA's paper",
    "data/docstrings.yaml overlong": "half a function teaches a docstring of what is not seen",
    "data/docstrings.yaml max_val_examples": "a run of 40 steps shall not validate for longer",
    "data/docstrings.yaml source_options": "an empty node, which +data.source_options.x=y adds to",
    "data/docstrings.yaml val_source_options": "an empty node, which +x=y adds to",
    "debug/profile.yaml trainer.profiler.filename": "null prints the table to the terminal",
    "galore/online.yaml callbacks.subspace_refresh.every_n_steps": "a logged step takes longer",
    "galore/online.yaml galore.refresh.every_n_steps": "a logged step takes longer",
    "galore/paper.yaml galore.projector.starts_from_svd": "the paper's start",
    "logger/csv.yaml csv.name": "the folder inside run_dir",
    "logger/tensorboard.yaml tensorboard.name": "the folder inside run_dir",
    "logger/tensorboard.yaml tensorboard.version": "a resumed run goes on in the same folder",
    "logger/wandb.yaml wandb.project": "where the user looks for it",
    "model/smollm2.yaml hub_id": "what this package holds",
    "model/smollm2.yaml license": "what this package holds",
    "model/tiny.yaml config": "this is what makes it tiny",
    "model/tiny.yaml name": "told apart from other models from scratch",
    "optim/adafactor.yaml relative_size": RATE,
    "optim/adafactor_fixed.yaml lr": "Adafactor without relative steps needs one",
    "optim/adafactor_fixed.yaml relative_step": "this is the Adafactor with a rate of its user's",
    "optim/adafactor_fixed.yaml scale_parameter": "this is the Adafactor with a rate of its user's",
    "optim/adamw.yaml lr": RATE,
    "optim/adamw.yaml fused": "one kernel; torch's own choice is several",
    "optim/adamw_8bit.yaml lr": RATE,
    "optim/adamw_8bit_paged.yaml lr": RATE,
    "optim/adamw_8bit_torchao.yaml lr": RATE,
    "optim/apollo.yaml optim.lr": RATE,
    "optim/groups/decay_matrices.yaml groups": RULE,
    "optim/groups/galore_matrices.yaml groups": RULE,
    "optim/groups/hidden_matrices.yaml groups": RULE,
    "optim/groups/muon_matrices.yaml groups": RULE,
    "optim/groups/scale_matrices.yaml groups": RULE,
    "optim/lion_8bit.yaml lr": "a fifth of AdamW's rate",
    "optim/lion_8bit.yaml weight_decay": "five times AdamW's decay, for a fifth of its rate",
    "optim/muon.yaml optim.fused": "one kernel for what AdamW steps",
    "optim/scale.yaml optim.lr": RATE,
    "optim/sgd.yaml lr": "SGD's steps are as large as gradients, which are small here",
    "optim/sgd.yaml momentum": "without it, it trains too slowly to compare with",
    "optim/sinkgd.yaml optim.lr": RATE,
    "schedule/cosine.yaml schedule.min_lr_rate": "the last steps shall still learn",
    "trainer/default.yaml check_val_every_n_epoch": "val_check_interval counts over epochs",
    "trainer/default.yaml devices": "several devices are a choice of strategy=",
    "trainer/default.yaml enable_model_summary": "the start table says more",
    "trainer/default.yaml gradient_clip_val": "short runs meet large gradients",
    "trainer/default.yaml log_every_n_steps": "a run of 40 steps shows more than a line",
    "trainer/default.yaml max_steps": "a first run of minutes, not of epochs",
    "trainer/default.yaml num_sanity_val_steps": "the job validates before it trains",
    "trainer/default.yaml use_distributed_sampler": "the data module deals rows to ranks itself",
    "trainer/default.yaml val_check_interval": "the job validates before and after a short run",
}


def compared(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, value and default of each value of a node whose constructor has a default."""
    children = dict(_known(node))
    if "_target_" in children:
        for name, default in _defaults(children["_target_"]).items():
            if name in children and not _holds_objects(children[name]):
                yield f"{path}.{name}".lstrip("."), _plain(children[name]), default
    for key, child in children.items():
        yield from compared(child, f"{path}.{key}".lstrip("."))


def _known(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the children of a node whose values do not depend on another file."""
    keys = node if isinstance(node, DictConfig) else range(len(node)) if _is_list(node) else ()
    for key in keys:
        try:
            yield key, node[key]
        except OmegaConfBaseException:  # ???, ${run_dir}
            continue


def _defaults(target: str) -> dict[str, Any]:
    parameters = inspect.signature(get_object(target)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _holds_objects(value: Any) -> bool:
    """Whether a value names classes: a part of what is chosen, not a setting."""
    if isinstance(value, DictConfig) and "_target_" in value:
        return True
    return any(_holds_objects(child) for _, child in _known(value))


def _is_list(value: Any) -> bool:
    return isinstance(value, ListConfig)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@cache
def differing() -> dict[str, str]:
    """Return each value of conf/ that is not its constructor's default: what it and that are."""
    return {
        f"{file.relative_to(CONF)} {path}": f"{value!r} here, {default!r} there"
        for file in sorted(CONF.glob("**/*.yaml"))
        if file.parent.name != "local"  # a developer's own
        for path, value, default in compared(OmegaConf.load(file))
        if value != default
    }


def _listed(value: str) -> str | None:
    return next((key for key in DELIBERATE if value == key or value.startswith(f"{key}.")), None)


def test_a_value_is_its_constructors_default_or_differs_for_a_reason():
    drifted = {value: told for value, told in differing().items() if _listed(value) is None}
    assert not drifted, "make them equal, or list the reason in DELIBERATE"


def test_no_reason_is_left_over():
    assert DELIBERATE.keys() == {_listed(value) for value in differing()} - {None}


@pytest.mark.parametrize(("threshold", "equal"), [(0.4, True), (0.5, False)])
def test_a_default_that_drifts_is_found(threshold, equal):
    refresh = {"_target_": "lit_ft.callbacks.SubspaceRefresh", "threshold": "${own}"}
    config = OmegaConf.create({"own": threshold, "deep": [{"refresh": refresh}]})
    [(path, value, default)] = compared(config)
    assert path == "deep.0.refresh.threshold"
    assert (value == default) is equal
