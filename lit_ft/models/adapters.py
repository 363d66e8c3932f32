"""Adapters through peft."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training


def add_adapter(model: Any, config: Any) -> PeftModel:
    """Freeze `model` and put the adapter that `config` (any `peft.PeftConfig`) describes onto it.

    An initialisation that rewrites the frozen weights (PiSSA, OLoRA, ...) makes an adapter that
    fits only the rewritten ones; the initial adapter is kept as `model.initial_adapter`, so that
    `export_model` can turn it into one for the original weights.

    Raises:
        ValueError: No layer of the model matches `config.target_modules` (peft's own message).
    """
    if getattr(model, "is_quantized", False):
        # Checkpointing is the module's own choice; here only norms and head become float32.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
        for module in model.modules():
            # On CPUs with AVX512-BF16 the first evaluation would repack the weights for bfloat16
            # arithmetic, and training and export would go on with those.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    adapted = cast(PeftModel, get_peft_model(model, config))
    initial = (
        {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name}
        if rewrites_base_weights(adapted)
        else None
    )
    # Not as a submodule or buffer: it is no part of the model's state.
    vars(adapted)["initial_adapter"] = initial
    return adapted


def rewrites_base_weights(model: PeftModel) -> bool:
    """Whether the adapter's initialisation changed the frozen weights (PiSSA and its kin)."""
    init = getattr(model.active_peft_config, "init_lora_weights", True)
    return isinstance(init, str) and init.lower().split("_")[0] in {
        "pissa",
        "olora",
        "corda",
        "loftq",
    }
