"""FSDP2 as a Lightning strategy: every rank is data-parallel and holds a part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Unpack

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
from lit_ft.compat.ranges import Count
from lit_ft.compat.refusal import Remedy
from lit_ft.distributed.checkpoint import load_file, load_parts, save_parts
from lit_ft.distributed.fully_shard import fully_shard_model
from lit_ft.distributed.plan import Misconfiguration
from lit_ft.distributed.process_group import ProcessGroupOptions
from lit_ft.tensors.sharding import is_model_sharded


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all ranks data-parallel, and FSDP2's options.

    Each rank holds 1 / ranks of the weights, gradients and optimizer state. With replicas (HSDP),
    `ranks` is the number of ranks in one replica. With `precision="bf16-mixed"`, the shards are
    float32 and blocks are gathered in bfloat16.

    Args:
        data_parallel_replicate_size: The number of replicas of the model (HSDP), or "auto" for one
            on each node. Each replica is sharded over neighbouring ranks. Weights are gathered
            within a replica; gradients are reduced within it, and then over the replicas.
        reshard_after_forward: Whether to free a block's gathered weights between forward and
            backward, which saves memory but gathers them once more.
        cpu_offload: Whether to keep the shards in host memory. A block's weights are on the device
            only while it computes, and the optimizer steps on the host.
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each rank writes its
            part, on a file system that all ranks see. Otherwise it is one file, for which rank 0
            gathers the whole model and optimizer state in host memory. Any number of ranks can load
            either kind.
        **options: The options `process_group_backend` and `timeout` to pass on to
            `ModelParallelStrategy`.

    Raises:
        Misconfiguration: If `data_parallel_replicate_size` is neither a positive integer nor
            "auto".
    """

    def __init__(
        self,
        *,
        data_parallel_replicate_size: Count | Literal["auto"] = 1,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        **options: Unpack[ProcessGroupOptions],
    ) -> None:
        replicas = data_parallel_replicate_size
        if replicas != "auto" and not (isinstance(replicas, int) and replicas > 0):
            raise Misconfiguration(
                f"data_parallel_replicate_size={replicas} is not a number of replicas",
                Remedy("give an integer of at least 1, or auto (one on each node)"),
            )
        # NCCL reduces gradients on the GPU; gloo reduces their norm on the host.
        if cpu_offload and torch.cuda.is_available():
            options.setdefault("process_group_backend", "cuda:nccl,cpu:gloo")
        super().__init__(
            data_parallel_size=1,  # setup_environment sets it to the number of ranks
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **options,
        )
        self.data_parallel_replicate_size = replicas
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Join the process group of all ranks.

        Raises:
            Misconfiguration: If the number of replicas does not divide the number of ranks.
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
        """The number of replicas of the model."""
        size = self.data_parallel_replicate_size
        return self.num_nodes if size == "auto" else size

    def setup(self, trainer: Trainer) -> None:
        """Prepare the module, and make validation, test and prediction run under `no_grad`.

        FSDP2 gathers weights into tensors that it reuses. If they were made under `inference_mode`,
        which is Lightning's default on NCCL, training could not write to them again. With a single
        rank, FSDP2 fails at once under `inference_mode`.
        """
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move the module to the device; with `cpu_offload`, move only what is not sharded."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for child in self.model.children():
            if not is_model_sharded(child):
                child.to(self.root_device)

    def shard(self, model: nn.Module) -> None:
        """Shard `model` over the ranks; call this in the module's `configure_model`."""
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
        """Return the weights to save: this rank's shards, or for one file all weights on rank 0.

        Shards stay on their device. Lightning's own method copies all of them to the host before
        the first is written.
        """
        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer state to save: this rank's part, or for one file all on rank 0."""
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        return get_optimizer_state_dict(self.model, getattr(optimizer, "optimizer", optimizer))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Save on all ranks; the checkpoint at `filepath` stays until the new one is complete.

        Raises:
            OSError: On all ranks, if one of them could not write. The message gives the reason.
        """
        if self._save_distributed_checkpoint:
            save_parts(checkpoint, Path(self.broadcast(filepath)))
        else:  # ModelParallelStrategy's own method removes a folder at `filepath` first
            ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a file or folder on all ranks, however many ranks saved it.

        Raises:
            KeyError: If there are optimizers, and the checkpoint holds only weights.
            RuntimeError: If the checkpoint belongs to another model or optimizer.
            ValueError: If the checkpoint is broken, or holds objects other than tensors and plain
                values.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        load = load_file if path.is_file() else load_parts
        return load(path, self.lightning_module, self.optimizers, weights_only=weights_only)
