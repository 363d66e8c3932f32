"""What goes together: facts about choices, rules over facts, and one error that renders them.

What lit_ft needs of objects that others write is here too, as protocols.
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
