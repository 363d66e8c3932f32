"""Models that are sharded over ranks: FSDP2 and tensor parallelism as Lightning strategies."""

from lit_ft.distributed.fsdp_strategy import FSDP2Strategy
from lit_ft.distributed.fully_shard import fully_shard_model, with_root_gathered
from lit_ft.distributed.tensor_parallel import TensorParallelStrategy

__all__ = [
    "FSDP2Strategy",
    "TensorParallelStrategy",
    "fully_shard_model",
    "with_root_gathered",
]
