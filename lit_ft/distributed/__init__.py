"""Models whose weights are spread over ranks: FSDP2 through Lightning's own strategy."""

from lit_ft.distributed.fsdp_strategy import FSDP2Strategy
from lit_ft.distributed.fully_shard import fully_shard_model, with_root_gathered
from lit_ft.distributed.refusals import refuse_sharded_state
from lit_ft.distributed.tensor_parallel import TensorParallelStrategy, refuse_not_elementwise

__all__ = [
    "FSDP2Strategy",
    "TensorParallelStrategy",
    "fully_shard_model",
    "refuse_not_elementwise",
    "refuse_sharded_state",
    "with_root_gathered",
]
