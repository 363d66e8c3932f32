"""Build the run of a configuration on fake tensors, and record the memory that it takes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoModelForCausalLM

from lit_ft.data.collate import Collator
from lit_ft.distributed import TensorParallelStrategy
from lit_ft.loss import ChunkedCrossEntropy, ModelLoss
from lit_ft.measure.fake_fit import STEPS
from lit_ft.measure.fake_tensors import without_fakes
from lit_ft.measure.known_values import DependsOnData
from lit_ft.measure.memory_plan import MemoryPlan, plan_memory
from lit_ft.models.miniature import miniature, with_blocks
from lit_ft.module import CausalLMModule
from lit_ft.optim.model_blocks import EMBEDDINGS, HEAD
from lit_ft.run.fake_callbacks import Buckets, block_update, callbacks_in_a_plan
from lit_ft.run.preview import settings_of_data

# A plan counts the memory of one device, and its fake tensors do not tell the host from it.
NO_OFFLOADING = (
    "There is no plan for offloading yet, which keeps weights and optimizer state in host memory: "
    "plan with strategy=fsdp. What that takes is more than what offloading takes."
)


def plan_run(config: Mapping[str, Any], *, device_type: str) -> MemoryPlan:
    """Return the memory plan of the run that a configuration describes.

    Args:
        config: The resolved configuration of `train.py`. It must name only trusted classes.
        device_type: The type of the devices to train on, "cpu" or "cuda".

    Raises:
        ValueError: If a setting is wrong, or if the settings do not work together.
    """
    data = settings_of_data(config)
    source = instantiate(config["model"], _convert_="all")
    if "Paged" in str(config["optim"].get("_target_")):
        raise ValueError(
            "There is no plan for a paged optimizer, which keeps its state where there is room: "
            "plan with optim=adamw_8bit."
        )
    if device_type != "cpu" and offloads(config["trainer"]):
        raise ValueError(NO_OFFLOADING)
    whole = source.load_config()
    loss = instantiate(config["loss"], _convert_="all")
    if isinstance(loss, ChunkedCrossEntropy) and not _is_exact_for(loss, whole):
        loss = ModelLoss()
    length = data["max_length"]
    rows, val_rows = data["batch_size"], data["val_batch_size"] or data["batch_size"]
    ranks = num_ranks(config["trainer"])
    turns = block_update(config["trainer"]["callbacks"])
    # A model of fewer blocks may not have what is named, and its only trained blocks are not alike.
    is_alike = _all_alike(whole) and (turns is None or {*turns.always} <= {EMBEDDINGS, HEAD})
    with _quiet(), _process_group(ranks), _explained():
        return plan_memory(
            lambda blocks: _built(config, source, whole, loss, blocks, device_type),
            _batch(rows, length, packed=data["packing"]),
            _batch(val_rows, length, packed=False),
            blocks=whole.num_hidden_layers if is_alike else None,
            shallowest=2 + (1 if turns is None else turns.active),
            device_type=device_type,
            ranks=ranks,
        )


def _built(
    config: Mapping[str, Any],
    source: Any,
    whole: Any,
    loss: Any,
    blocks: int | None,
    device_type: str,
) -> tuple[CausalLMModule, Trainer]:
    """Return the module and the trainer of a fit of `STEPS` steps with so many blocks."""
    plain = {"model": None, "loss": None, "compile": False}
    module: CausalLMModule = instantiate({**config["module"], **plain}, _convert_="all")
    resized: Any = _Resized(source, whole if blocks is None else with_blocks(whole, blocks))
    module.source = resized
    module.loss = loss
    module.skip_probes()
    # On real tensors, which is faster: bitsandbytes computes its tables of codes once more.
    vars(module)["try_optimizer"] = without_fakes(module.try_optimizer)
    settings = dict(config["trainer"])
    [strategy] = instantiate([settings.get("strategy", "auto")], _convert_="all")
    ranks = num_ranks(settings)
    callbacks = list(callbacks_in_a_plan(settings["callbacks"], on_host=device_type == "cpu"))
    if isinstance(strategy, DDPStrategy) or str(strategy).startswith("ddp"):
        # Each rank does what a single one does, and has the gradients once more in buckets.
        strategy, ranks = "auto", 1
        settings |= {"devices": 1, "num_nodes": 1}
        callbacks.append(Buckets())
    elif isinstance(strategy, TensorParallelStrategy):
        raise ValueError("There is no plan for tensor parallelism yet: plan with strategy=fsdp.")
    micro_batches = STEPS * settings["accumulate_grad_batches"]
    settings |= {
        "accelerator": "cpu",
        "strategy": strategy,
        "callbacks": callbacks,
        "plugins": [_Cluster(ranks)] if ranks > 1 else None,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "max_steps": STEPS,
        "max_epochs": None,
        "limit_val_batches": 1,
        "val_check_interval": micro_batches,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "inference_mode": False,  # it would hide from the tracker how operations are composed
    }
    settings.pop("default_root_dir", None)
    return module, instantiate(settings, _convert_="all")


class _Resized:
    """A model source with another configuration than its own."""

    def __init__(self, source: Any, config: Any) -> None:
        self.source = source
        self.config = config
        self.check = lambda: None  # the configuration has been loaded, and nothing else is used

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def build_empty(self) -> Any:
        """Return the model on the meta device."""
        return self.source.build_empty(copy.deepcopy(self.config))


class _Cluster(ClusterEnvironment):
    """A cluster of several processes. This one is the first."""

    creates_processes_externally = True
    main_address = "localhost"
    main_port = 0

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks

    def set_world_size(self, size: int) -> None: ...

    def global_rank(self) -> int:
        return 0

    def set_global_rank(self, rank: int) -> None: ...

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0


@contextmanager
def _process_group(ranks: int) -> Iterator[None]:
    """Provide a process group whose other ranks do not exist, for more than one rank."""
    if ranks == 1:
        already = dist.is_initialized()
        try:
            yield
        finally:
            if dist.is_initialized() and not already:  # by FSDP2 on one device
                dist.destroy_process_group()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    """Turn the error of code that needs values into a ValueError that says what it means."""
    try:
        yield
    except DependsOnData as error:
        raise ValueError(
            f"There is no plan for this model, because its memory depends on the data: {error}."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's messages and this package's: the run itself will print them."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lit_ft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _batch(rows: int, length: int, *, packed: bool) -> Mapping[str, Any]:
    """Return a micro-batch of rows of `length` tokens, all of them targets.

    Of several rows one is padded, and a packed row holds two examples: each needs a mask.
    """
    sizes = [[length]] * rows
    if packed:
        sizes = [[length - length // 2, length // 2]] * rows
    elif rows > 1:
        sizes[-1] = [length - 1]
    examples = [
        [{"input_ids": [1] * size, "labels": [1] * size} for size in row if size] for row in sizes
    ]
    return Collator(0, packed=packed)(examples)


def _all_alike(config: Any) -> bool:
    """Return whether all blocks of a model have the same weights."""
    try:
        with_blocks(config, 3)
    except ValueError:
        return False
    return True


def _is_exact_for(loss: ChunkedCrossEntropy, config: Any) -> bool:
    """Return whether the chunked loss is that of the model, tried on a small one of its kind."""
    small = miniature(config)
    try:
        with torch.random.fork_rng(devices=[]):
            build: Any = AutoModelForCausalLM.from_config
            model = build(small)
            return loss.is_exact_for(model, torch.arange(16)[None])
    except (ValueError, RuntimeError, TypeError):  # its sizes depend on each other in another way
        return True


def num_ranks(trainer: Mapping[str, Any]) -> int:
    """Return the number of ranks that a trainer's settings ask for."""
    devices = trainer.get("devices", 1)
    return (devices if isinstance(devices, int) else 1) * (trainer.get("num_nodes") or 1)


def offloads(trainer: Mapping[str, Any]) -> bool:
    """Return whether a trainer keeps weights and optimizer state in host memory."""
    strategy = trainer.get("strategy")
    return isinstance(strategy, Mapping) and bool(strategy.get("cpu_offload"))
