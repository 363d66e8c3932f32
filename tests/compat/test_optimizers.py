"""The table of traits, held to what the optimizers really do."""

import bitsandbytes as bnb
import pytest
import torch
from galore_torch import GaLoreAdamW
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, RAdam, RMSprop
from transformers.optimization import Adafactor as TransformersAdafactor

from lit_ft.compat.optimizers import TABLE, Traits, traits_of
from lit_ft.optim import Apollo, MuonAdamW, RowwiseAdamW8bit, Scale, SinkGD, stochastically_rounded
from lit_ft.optim.adafactor import Adafactor, RelativeStepAdafactor
from lit_ft.optim.galore_torch import GaLoreTorchAdafactor

ELEMENTWISE = [Adam, AdamW, NAdam, RAdam, SGD, RMSprop, Adagrad]


def stepped(kind, weight, gradients, **options):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = kind([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def case():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 512, generator=random)
    return weight, [torch.randn(6, 512, generator=random) for _ in range(3)]


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elements_that_are_stepped_alone_step_the_same(kind):
    assert traits_of(kind).elementwise
    weight, gradients = case()
    whole = stepped(kind, weight, gradients, lr=1e-2)
    part = stepped(kind, weight[:, 7:9], [g[:, 7:9] for g in gradients], lr=1e-2)
    torch.testing.assert_close(part, whole[:, 7:9], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [*ELEMENTWISE, RowwiseAdamW8bit, bnb.optim.AdamW8bit])
def test_rows_that_are_stepped_alone_step_the_same(kind):
    assert traits_of(kind).rowwise
    weight, gradients = case()
    weight, gradients = weight.repeat(4, 1), [g.repeat(4, 1) for g in gradients]
    whole = stepped(kind, weight, gradients, lr=1e-2)
    part = stepped(kind, weight[:12], [g[:12] for g in gradients], lr=1e-2)
    torch.testing.assert_close(part, whole[:12], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [Muon, SinkGD, TransformersAdafactor, torch.optim.Adafactor])
def test_those_that_see_the_whole_matrix_are_trusted_with_no_part_of_it(kind):
    assert not traits_of(kind).rowwise
    weight, gradients = case()
    whole = stepped(kind, weight, gradients)
    part = stepped(kind, weight[:3], [g[:3] for g in gradients])
    assert not torch.allclose(part, whole[:3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "from_zero"),
    [
        (AdamW, {"weight_decay": 0.0}, True),
        (SGD, {"momentum": 0.9}, True),
        (Muon, {"weight_decay": 0.0}, True),
        (bnb.optim.Lion8bit, {"lr": 1e-2}, True),
        (Scale, {"momentum": 0.9}, True),
        (SinkGD, {}, True),
        (Apollo, {"rank": 4}, True),
        (Adafactor, {"lr": 1e-2, "scale_parameter": False, "relative_step": False}, True),
        (RelativeStepAdafactor, {}, False),
        (torch.optim.Adafactor, {"weight_decay": 0.0}, False),
        (bnb.optim.LARS, {"lr": 1e-2, "momentum": 0.9}, False),
    ],
)
def test_a_step_from_zero_is_the_step_from_elsewhere(kind, options, from_zero):
    """What GaLore's parameters ask for: the value of the parameter says nothing."""
    assert traits_of(kind).works_from_zero == from_zero
    weight, gradients = case()
    moved = stepped(kind, weight, gradients, **options) - weight
    from_nothing = stepped(kind, torch.zeros_like(weight), gradients, **options)
    assert torch.allclose(from_nothing, moved, rtol=1e-3, atol=1e-5) == from_zero


def test_weight_decay_of_those_that_add_it_to_the_gradient_changes_the_direction():
    weight, gradients = case()
    for kind in (Adam, NAdam, RAdam, SGD, RMSprop, Adagrad, AdamW):
        plain = stepped(kind, weight, gradients[:1], lr=1e-2, weight_decay=0.0)
        decayed = stepped(kind, weight, gradients[:1], lr=1e-2, weight_decay=0.1)
        decoupled = torch.allclose(decayed, plain - 1e-3 * weight, rtol=1e-5, atol=1e-6)
        # Linear in the gradient, as their first steps are: there both are the same.
        linear = kind in (SGD, RAdam)
        assert decoupled == (traits_of(kind).decoupled_decay or linear), kind


def test_a_wrapped_class_has_the_traits_of_what_it_wraps():
    weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    for kind in (torch.optim.Adafactor, AdamW, bnb.optim.Lion8bit):
        options = {} if kind is torch.optim.Adafactor else {"lr": 1e-3}
        wrapped = stochastically_rounded(kind([weight], **options), seed=0)
        assert type(wrapped) is not kind
        assert traits_of(type(wrapped)) == traits_of(kind)


def test_a_subclass_that_steps_in_its_own_way_is_trusted_with_no_part():
    class Own(AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Renamed(AdamW):
        pass

    assert not traits_of(Own).rowwise
    assert traits_of(Own).per_parameter
    assert traits_of(Renamed) == traits_of(AdamW)


def test_an_unknown_optimizer_goes_wherever_a_parameter_is_stepped_alone():
    class Unknown(torch.optim.Optimizer):
        pass

    assert traits_of(Unknown) == Traits()
    assert traits_of(Unknown).per_parameter
    assert not traits_of(Unknown).elementwise


@pytest.mark.parametrize(
    ("kind", "sharded", "per_parameter"),
    [
        (AdamW, True, True),
        (torch.optim.LBFGS, False, False),
        (bnb.optim.PagedAdamW8bit, False, True),
        (GaLoreAdamW, False, True),
        (GaLoreTorchAdafactor, False, True),
        (MuonAdamW, False, True),
        (TransformersAdafactor, False, True),
        (Adafactor, True, True),
        (RelativeStepAdafactor, True, True),
        (Apollo, True, True),
        (Scale, True, True),
        (SinkGD, True, True),
    ],
)
def test_who_steps_a_part_of_the_rows_and_who_one_parameter(kind, sharded, per_parameter):
    assert traits_of(kind).sharded_rows == sharded
    assert traits_of(kind).per_parameter == per_parameter


def test_what_an_entry_lacks_it_gives_a_reason_for():
    for pattern, traits in TABLE:
        lacks = not (traits.works_from_zero and traits.sharded_rows and traits.movable_state)
        if lacks or not traits.per_parameter:
            assert traits.why and traits.instead, pattern
