"""What works together: facts about choices, rules over the facts, and the error they raise.

The protocols for objects that other projects write are here too.
"""

from lit_ft.compat.protocols import (
    BoundsBatches,
    CountsRows,
    HasModel,
    HasTokenizer,
    IdsBeyond,
    KnowsExamples,
    LoadsAfterSharding,
    Named,
    NamesValidation,
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
    "IdsBeyond",
    "KnowsExamples",
    "LoadsAfterSharding",
    "Named",
    "NamesValidation",
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
