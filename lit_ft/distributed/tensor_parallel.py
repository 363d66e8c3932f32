"""Cut every layer's matrices over the devices of a node, as transformers' plan says."""

from __future__ import annotations

from typing import Any

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
from lit_ft.tensors.sharding import is_sharded

# Of transformers' styles those with the right gradients over several micro-batches too.
# "replicated_with_grad_allreduce" (Qwen3's norms of heads) adds the accumulated ones up again.
_STYLES = {"colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"}


class TensorParallelStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all ranks tensor-parallel, and how to cut the model.

    All ranks see the same batch, and compute a part of each layer. Two all-reduces a layer and pass
    carry activations: for the devices of one node, and models whose single layer is large.

    Args:
        save_distributed_checkpoint: A checkpoint of a file a rank; else one file, which rank 0
            writes.
        **options: Of `ModelParallelStrategy`: `process_group_backend`, `timeout`.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = False, **options: Any) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,  # of all ranks: known in setup_environment
            save_distributed_checkpoint=save_distributed_checkpoint,
            **options,
        )

    def setup_environment(self) -> None:
        """Join the process group, as many ranks as there are.

        Raises:
            Misconfiguration: There are several nodes, or there is one device.
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
        """Cut `model` over the ranks; call it in `configure_model`."""
        tensor_parallel_model(model, self.device_mesh["tensor_parallel"])


def tensor_parallel_model(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Let each rank of `mesh` hold a part of the matrices in the model's plan, in place.

    What the plan does not name (norms) is whole on every rank, as a DTensor too: torch's functions
    on many tensors take no mixture.

    Args:
        model: With its values, the same on all ranks, or still on the meta device.
        mesh: Of the ranks, with one dimension.

    Raises:
        Misconfiguration: transformers has no plan for the model, or one with parts that
            would be trained wrongly; or its heads cannot be dealt to the ranks; or it has dropout.
    """
    for name in model.all_tied_weights_keys:  # the plan is for each by itself; tied again below
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
            f"The tensor-parallel plan of {name} has parts that are not trained here "
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
    # Ranks would have to draw the same numbers for what is whole and others for what is cut.
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if drops or getattr(config, "attention_dropout", False):
        raise Misconfiguration(
            f"{name} has dropout, which would differ between tensor-parallel ranks", remedies.FSDP
        )
    plans: Any = model._resolve_parallel_plans(DistributedConfig(tp_size=ranks))
    plan: dict[str, str] = plans[0]
    return plan
