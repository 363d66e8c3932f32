"""Models whose weights are spread over ranks: FSDP2 through Lightning's own strategy."""

from lit_ft.parallel.fully_shard import fully_shard_model, with_root_gathered
from lit_ft.parallel.refusals import refuse_sharded_state
from lit_ft.parallel.strategy import FSDP2Strategy

__all__ = [
    "FSDP2Strategy",
    "fully_shard_model",
    "refuse_sharded_state",
    "with_root_gathered",
]
