"""Rules over plans: laws that hold for every combination, and single rules by their reasons."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.compat.optimizers import traits_named
from lit_ft.compat.plan import BASES, Adapter, Plan
from lit_ft.compat.refusal import Refusal
from lit_ft.compat.remedies import OPTIMIZERS
from lit_ft.compat.rules import after, check, goes, refusals

NAMES = [*(name for name, _ in OPTIMIZERS.values()), "torch.optim.lbfgs.LBFGS", "torch.optim.Muon"]
PLANS = st.builds(
    lambda name, **facts: Plan(name.rpartition(".")[2], traits_named(name), **facts),
    st.sampled_from(NAMES),
    parallel=st.sampled_from(["single", "ddp", "fsdp", "tensor", "undefined", "other"]),
    layerwise=st.booleans(),
    blocks=st.booleans(),
    drops_state=st.booleans(),
    clip=st.sampled_from(["none", "norm", "value"]),
    precision=st.sampled_from(["32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true"]),
    adapter=st.sampled_from([None, Adapter(), Adapter(init="pissa"), Adapter("VeraConfig")]),
    quantised=st.booleans(),
    basis=st.sampled_from([None, *BASES.values()]),
    compiled=st.booleans(),
    devices=st.sampled_from([1, 2]),
    finds_batch_size=st.booleans(),
)


@given(PLANS)
def test_what_a_refusal_proposes_is_no_longer_refused_for_that_reason(plan):
    for refusal in refusals(plan):
        for remedy in refusal.remedies:
            then = after(plan, remedy)
            if then != plan:
                assert refusal.why not in [later.why for later in refusals(then)], remedy


@given(PLANS)
def test_check_raises_what_refusals_yield_first(plan):
    said = list(refusals(plan))
    assert goes(plan) == (not said)
    if said:
        with pytest.raises(Refusal) as raised:
            check(plan)
        assert str(raised.value) == str(said[0])
    else:
        check(plan)


@given(PLANS)
def test_a_callback_of_another_project_hears_of_its_own_part_alone(plan):
    alone = replace(plan, basis=None, layerwise=False, blocks=False, finds_batch_size=False)
    assert not list(refusals(alone, parts=["galore", "layerwise", "blocks", "batch size"]))


@pytest.mark.parametrize(
    ("plan", "why", "said"),
    [
        (Plan(precision="16-true"), "float16 weights", "trainer.precision=bf16-true"),
        (Plan(parallel="undefined"), "does not say how", "strategy=fsdp"),
        (
            Plan(basis=BASES["online"], parallel="fsdp", precision="bf16-true"),
            "one dtype within a block",
            "trainer.precision=bf16-mixed",
        ),
        (
            Plan(basis=BASES["svd"], scales_loss=True, precision="16-mixed"),
            "does not unscale",
            "galore=iteration",
        ),
        (Plan(basis=BASES["online"], finds_rate=True), "rate finder", "find the rate without"),
        (
            Plan(basis=BASES["online"], copied_before_galore="EMAWeightAveraging"),
            "copies the module",
            "list GaLore before EMAWeightAveraging",
        ),
        (Plan(layerwise=True, optimizes_by_hand=True), "by hand", "LayerwiseStep"),
        (Plan(layerwise=True, clips_its_own_way=True), "nothing to clip|no gradients", "update"),
        (
            Plan(layerwise=True, clip="norm", back_propagates_its_own_way=True),
            "must do so twice",
            "trainer.gradient_clip_val=null",
        ),
        (Plan(blocks=True, basis=BASES["online"]), "in subspaces", "galore=none or update=whole"),
        (Plan(blocks=True, adapter=Adapter()), "need no turns", "adapter=none or update=whole"),
        (Plan(blocks=True, optimizes_by_hand=True), "by hand", "BlockTurns"),
        (
            Plan(blocks=True, parallel="ddp", strategy="DDPStrategy"),
            "DDPStrategy, whose buckets",
            "strategy=fsdp or update=whole",
        ),
        (
            Plan(blocks=True, parallel="other", strategy="DeepSpeedStrategy"),
            "not under DeepSpeedStrategy",
            "update=whole",
        ),
        (Plan(blocks=True, compiled=True), "again and again", "module.compile=false"),
        (
            Plan("LBFGS", traits_named("torch.optim.lbfgs.LBFGS"), blocks=True),
            "not the others: LBFGS",
            "update=whole",
        ),
        (
            Plan(
                "PagedAdamW8bit",
                traits_named("bitsandbytes.optim.adamw.PagedAdamW8bit"),
                blocks=True,
                drops_state=True,
            ),
            "cannot be freed: paged",
            "callbacks.blocks.state=keep",
        ),
        (Plan(finds_batch_size=True, devices=2), "one device", "trainer.devices=1"),
        (Plan(compiled=True, parallel="fsdp"), "torch.compile", "module.compile=false"),
        (Plan(parallel="fsdp", adapter=Adapter("VeraConfig")), "LoRA alone works", "adapter=lora"),
        (
            Plan(parallel="fsdp", adapter=Adapter(options=frozenset({"modules_to_save"}))),
            "modules_to_save",
            "adapter=lora",
        ),
    ],
)
def test_each_of_these_is_refused_with_its_reason_and_a_way_out(plan, why, said):
    [refusal, *_] = refusals(plan)
    with pytest.raises(Refusal, match=why):
        check(plan)
    assert said.lower() in refusal.on_command_line.lower()


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(basis=BASES["online"], layerwise=True, clip="norm"),
        Plan(basis=BASES["svd"], clip="norm"),
        Plan(basis=BASES["iteration"], parallel="fsdp", precision="bf16-mixed", clip="norm"),
        Plan(layerwise=True, parallel="fsdp", clip="value"),
        Plan(blocks=True, drops_state=True, clip="norm", accumulate=4, skips_steps=True),
        Plan(blocks=True, layerwise=True, clip="norm"),
        Plan(blocks=True, drops_state=True, parallel="fsdp", clip="norm"),
        Plan(adapter=Adapter(init="pissa"), quantised=True, layerwise=True),
    ],
)
def test_what_goes_together_is_let_through(plan):
    assert goes(plan)


@pytest.mark.parametrize("kind", ["GaLoreTorchAdamW", "GaLoreTorchAdafactor"])
def test_gradients_are_not_projected_twice(kind):
    alone = Plan(kind, traits_named(f"lit_ft.optim.galore_torch.{kind}"))
    assert goes(alone)
    with pytest.raises(Refusal, match="projects whole matrices itself"):
        check(replace(alone, basis=BASES["online"]))
