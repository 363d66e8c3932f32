"""What lit_ft asks of other people's objects: its own offer it, and a plain one is not taken so."""

from __future__ import annotations

from functools import partial
from typing import Any, is_typeddict

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lit_ft import CausalLMModule, InstructionDataModule, compat
from lit_ft.data.collate import Collator
from lit_ft.models import FromConfig
from lit_ft.optim.rounded import stochastically_rounded
from lit_ft.subspace.layers.head import SubspaceHead

SOURCE = FromConfig("llama", {})
MODULE = CausalLMModule(SOURCE, optimizer=partial(AdamW, lr=1e-3))
DATA = InstructionDataModule()
HALF = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
ROUNDED = stochastically_rounded(AdamW([HALF]), seed=0)
OFFERED = {
    compat.BoundsBatches: DATA,
    compat.CountsRows: DATA,
    compat.HasModel: MODULE,
    compat.HasTokenizer: CausalLMModule,  # of the class, since asking the module loads it
    compat.KnowsExamples: DATA,
    compat.LoadsAfterSharding: MODULE,
    compat.Named: SOURCE,
    compat.NamesValidation: DATA,
    compat.OffersPrompts: DATA,
    compat.PlansAhead: MODULE,
    compat.Quantizes: SOURCE,
    compat.ReportsData: DATA,
    compat.ShardsModel: MODULE,
    compat.SumsCrossEntropy: SubspaceHead,
    compat.SumsLoss: MODULE,
    compat.WrapsOptimizer: type(ROUNDED),
}
PROTOCOLS = [
    kind for kind in map(partial(getattr, compat), compat.__all__) if hasattr(kind, "_is_protocol")
]
CHECKED = [kind for kind in PROTOCOLS if kind._is_runtime_protocol]


def members(kind: type) -> set[str]:
    """The names that a protocol and its bases ask for."""
    asked: set[str] = set()
    for base in kind.__mro__:
        if getattr(base, "_is_protocol", False):
            asked |= {name for name in vars(base) if not name.startswith("_")}
            asked |= vars(base).get("__annotations__", {}).keys()
    return asked


@pytest.mark.parametrize("kind", OFFERED, ids=lambda kind: kind.__name__)
def test_what_lit_ft_has_itself_offers_it(kind: type) -> None:
    assert members(kind)
    for name in members(kind):
        assert hasattr(OFFERED[kind], name)
    if kind in CHECKED and not isinstance(OFFERED[kind], type):
        assert isinstance(OFFERED[kind], kind)


def test_each_protocol_is_offered_by_something() -> None:
    assert set(PROTOCOLS) == OFFERED.keys()


@pytest.mark.parametrize(
    "kind", [kind for kind in CHECKED if kind is not compat.Named], ids=lambda kind: kind.__name__
)
def test_a_plain_project_is_not_taken_for_it(kind: type) -> None:
    assert not isinstance(L.LightningModule(), kind)
    assert not isinstance(L.LightningDataModule(), kind)


def test_a_batch_has_the_keys_that_are_listed() -> None:
    assert is_typeddict(compat.TokenBatch)
    example = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    listed = compat.TokenBatch.__annotations__.keys()
    for packed in (False, True):
        for rows in ([], [[example]], [[example, example], [example]]):
            assert Collator(0, packed=packed)(rows).keys() <= listed


def test_the_mark_of_a_clipping_hook_is_not_inherited() -> None:
    class Own(CausalLMModule):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...

    marked = compat.protocols.is_usual_clipping
    assert marked(MODULE.configure_gradient_clipping)
    assert marked(compat.clips_as_lightning_does(lambda *_: None))
    assert not marked(Own.configure_gradient_clipping)
