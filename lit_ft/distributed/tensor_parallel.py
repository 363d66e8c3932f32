"""Tensor parallelism: split each layer's matrices over a node's devices."""

from __future__ import annotations

from typing import Any, Unpack

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from lit_ft.compat import remedies
from lit_ft.distributed.plan import Misconfiguration
from lit_ft.distributed.process_group import ProcessGroupOptions
from lit_ft.tensors.sharding import is_sharded

# transformers' styles whose gradients stay correct when micro-batches are accumulated.
# "replicated_with_grad_allreduce" (for the head norms of Qwen3) would sum the accumulated gradients
# over the ranks again in each micro-batch.
_STYLES = {"colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"}


class TensorParallelStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all ranks tensor-parallel (arXiv:1909.08053).

    All ranks see the same batch, and each computes a part of every layer. In each pass, forward or
    backward, a layer needs two all-reduces of activations. Use this strategy on the devices of one
    node, for models whose single layers are large.

    Args:
        save_distributed_checkpoint: Whether each rank writes a checkpoint file of its own.
            Otherwise a checkpoint is one file, which rank 0 writes.
        **options: The options `process_group_backend` and `timeout` to pass on to
            `ModelParallelStrategy`.
    """

    def __init__(
        self, *, save_distributed_checkpoint: bool = False, **options: Unpack[ProcessGroupOptions]
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,  # setup_environment sets it to the number of ranks
            save_distributed_checkpoint=save_distributed_checkpoint,
            **options,
        )

    def setup_environment(self) -> None:
        """Join the process group of all ranks.

        Raises:
            Misconfiguration: If there are several nodes, or only one device.
        """
        if self.num_nodes > 1:
            raise Misconfiguration(
                "Tensor parallelism sends every layer's activations between all devices, and "
                f"{self.num_nodes} nodes are too far apart for that",
                remedies.HSDP,
                remedies.FSDP,
            )
        if self.num_processes == 1:
            raise Misconfiguration(
                "Tensor parallelism needs two devices or more",
                remedies.MORE_DEVICES,
                remedies.ONE_DEVICE,
            )
        self._tensor_parallel_size = self.num_processes
        super().setup_environment()

    def shard(self, model: PreTrainedModel) -> None:
        """Split `model` over the ranks; call this in the module's `configure_model`."""
        tensor_parallel_model(model, self.device_mesh["tensor_parallel"])


def tensor_parallel_model(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the matrices that the model's plan names over the ranks of `mesh`, in place.

    The plan is transformers' tensor-parallel plan for the model. Parameters that it does not name,
    such as norms, are whole on every rank. They become DTensors too, because torch's functions on
    many tensors do not accept DTensors and plain tensors together.

    Args:
        model: The model, with the same values on all ranks or still on the meta device.
        mesh: The one-dimensional mesh of the tensor-parallel ranks.

    Raises:
        Misconfiguration: If transformers has no plan for the model, if the plan would train parts
            of the model wrongly, if the number of ranks does not divide the numbers of heads, or if
            the model has dropout.
    """
    for name in model.all_tied_weights_keys:  # the plan needs them untied; tied again below
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        module.register_parameter(own, nn.Parameter(module.get_parameter(own).detach()))
    plan = _plan(model, mesh.size())
    apply_tensor_parallelism(model, mesh, plan)
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        whole = {name: p for name, p in own.items() if not is_sharded(p)}
        for name, p in whole.items():
            replicated = distribute_tensor(p.detach(), mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(replicated, p.requires_grad))
        if whole:
            ALL_PARALLEL_STYLES["local_params"].install_forward(module, mesh)
    model.tie_weights()


def _plan(model: PreTrainedModel, ranks: int) -> dict[str, str]:
    name, config = type(model).__name__, model.config.get_text_config()
    if not model.tp_plan:
        raise Misconfiguration(
            f"transformers has no tensor-parallel plan for {name}", remedies.FSDP
        )
    unknown = set(model.tp_plan.values()) - _STYLES
    if unknown:
        raise Misconfiguration(
            f"The tensor-parallel plan of {name} has parts that would be trained wrongly "
            f"({', '.join(sorted(unknown))})",
            remedies.FSDP,
        )
    for heads in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(config, heads, None) or ranks
        if number % ranks:
            raise Misconfiguration(
                f"{name} has {heads}={number}, which {ranks} devices do not divide",
                remedies.FEWER_DEVICES,
                remedies.FSDP,
            )
    # Ranks would need the same random numbers where activations are whole, and different ones where
    # activations are split.
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if drops or getattr(config, "attention_dropout", False):
        raise Misconfiguration(
            f"{name} has dropout, which would differ between tensor-parallel ranks", remedies.FSDP
        )
    plans: Any = model._resolve_parallel_plans(DistributedConfig(tp_size=ranks))
    plan: dict[str, str] = plans[0]
    return plan
