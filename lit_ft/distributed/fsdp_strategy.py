"""FSDP2 as a Lightning strategy: every rank is data-parallel and holds a part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.optim import Optimizer

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Remedy
from lit_ft.distributed.checkpoint import load_file, load_parts, save_parts
from lit_ft.distributed.fully_shard import fully_shard_model
from lit_ft.distributed.plan import Misconfiguration
from lit_ft.tensors.sharding import is_model_sharded


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all ranks data-parallel, and how to shard.

    Weights, gradients and optimizer state take 1 / ranks of their bytes on each; where there are
    replicas (HSDP), their own ranks count. With `precision="bf16-mixed"` the parts are float32, and
    blocks are gathered in bfloat16.

    Args:
        data_parallel_replicate_size: How many times the model is there, each time spread over
            neighbouring ranks: weights are gathered among these, and gradients are reduced among
            them and then over the replicas. "auto" for one on each node.
        reshard_after_forward: Let go of a block's gathered weights between forward and backward:
            less memory, one more gathering.
        cpu_offload: Keep the parts in host memory; a block's weights are on the device while it
            computes, and the optimizer steps on the host.
        save_distributed_checkpoint: A checkpoint is a folder, of which each rank writes a part; on
            a file system that all ranks see. Else one file: rank 0 gathers the whole model and
            optimizer state in host memory. Any number of ranks load either.
        **options: Of `ModelParallelStrategy`: `process_group_backend`, `timeout`.
    """

    def __init__(
        self,
        *,
        data_parallel_replicate_size: int | Literal["auto"] = 1,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        **options: Any,
    ) -> None:
        replicas = data_parallel_replicate_size
        if replicas != "auto" and not (isinstance(replicas, int) and replicas > 0):
            raise Misconfiguration(
                f"data_parallel_replicate_size={replicas} is no number of replicas",
                Remedy("give a number from 1 on, or auto (one on each node)"),
            )
        if cpu_offload and torch.cuda.is_available():  # gradients are reduced there, normed here
            options.setdefault("process_group_backend", "cuda:nccl,cpu:gloo")
        super().__init__(
            data_parallel_size=1,  # of all ranks: known in setup_environment
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **options,
        )
        self.data_parallel_replicate_size = replicas
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Join the process group, as many ranks as there are.

        Raises:
            Misconfiguration: The ranks cannot be dealt to the replicas evenly.
        """
        self._data_parallel_size = ranks = self.num_nodes * self.num_processes
        if ranks % self.num_replicas:
            raise Misconfiguration(
                f"data_parallel_replicate_size={self.num_replicas} does not divide {ranks} ranks "
                f"({self.num_nodes} nodes of {self.num_processes} devices)",
                Remedy("give a divisor, or auto (one replica on each node)"),
                remedies.FSDP,
            )
        super().setup_environment()

    @property
    def num_replicas(self) -> int:
        """How many times the model is there."""
        size = self.data_parallel_replicate_size
        return self.num_nodes if size == "auto" else size

    def setup(self, trainer: Trainer) -> None:
        """Prepare the module, and let validation, test and prediction run under `no_grad`.

        Under `inference_mode`, Lightning's default on NCCL, FSDP2 makes the tensors that it gathers
        into such as training cannot write again, and on one rank fails at once.
        """
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move the module; of an offloaded model only what is not in its parts."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for child in self.model.children():
            if not is_model_sharded(child):
                child.to(self.root_device)

    def shard(self, model: nn.Module) -> None:
        """Spread `model` over the ranks; call it in `configure_model`."""
        options: dict[str, Any] = {"reshard_after_forward": self.reshard_after_forward}
        if self.precision_plugin.precision == "bf16-mixed":
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        if self.cpu_offload:
            pinned = torch.cuda.is_available()
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
        fully_shard_model(model, self._fsdp_mesh(), **options)

    def _fsdp_mesh(self) -> DeviceMesh:
        ranks = self.device_mesh["data_parallel"]
        if self.num_replicas == 1:
            return ranks
        return init_device_mesh(
            ranks.device_type,
            (self.num_replicas, ranks.size() // self.num_replicas),
            mesh_dim_names=("data_parallel_replicate", "data_parallel_shard"),
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights to save: this rank's parts where they are, or all of them on rank 0.

        Lightning copies all parts to the host before the first is written.
        """
        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state to save, like the weights."""
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        return get_optimizer_state_dict(self.model, getattr(optimizer, "optimizer", optimizer))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Save on all ranks; what was at `filepath` is there until the new one is whole.

        Raises:
            OSError: A rank could not write, with the reason; on all ranks.
        """
        if self._save_distributed_checkpoint:
            save_parts(checkpoint, Path(self.broadcast(filepath)))
        else:  # not by ModelParallelStrategy, which removes a folder there first
            ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a file or folder, saved on any number of ranks, on all ranks.

        Raises:
            RuntimeError: It is of another model or optimizer.
            ValueError: It is broken, or holds objects that are more than plain values.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        load = load_file if path.is_file() else load_parts
        return load(path, self.lightning_module, self.optimizers, weights_only=weights_only)
