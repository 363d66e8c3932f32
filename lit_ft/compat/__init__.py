"""What goes with what: facts about objects, rules over facts, one error that renders them.

What lit_ft asks of objects that others write is here too, as protocols.
"""

from lit_ft.compat.protocols import (
    BoundsBatches,
    CountsRows,
    HasModel,
    HasTokenizer,
    LoadsAfterSharding,
    Named,
    OffersPrompts,
    PlansAhead,
    Quantizes,
    ReportsData,
    ShardsModel,
    SumsCrossEntropy,
    SumsLoss,
    TokenBatch,
    WrapsOptimizer,
    clips_as_lightning_does,
)

__all__ = [
    "BoundsBatches",
    "CountsRows",
    "HasModel",
    "HasTokenizer",
    "LoadsAfterSharding",
    "Named",
    "OffersPrompts",
    "PlansAhead",
    "Quantizes",
    "ReportsData",
    "ShardsModel",
    "SumsCrossEntropy",
    "SumsLoss",
    "TokenBatch",
    "WrapsOptimizer",
    "clips_as_lightning_does",
]
