"""Load a pretrained model that is sharded over ranks; each rank reads only its part."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lit_ft.models.adapters import base_layer_of, in_place_of_adapters
from lit_ft.tensors.stochastic_rounding import own_gpu


def from_pretrained_in_shards(
    name_or_path: str, shard: Callable[[PreTrainedModel], None], **options: Any
) -> PreTrainedModel:
    """Build the model on the meta device, shard it, then read each rank's part of the weights.

    transformers can do all of this itself if it is given a `DistributedConfig`. Here `shard` takes
    the place of transformers' own sharding. The model can then be changed before it is sharded, and
    it is sharded in the way that Lightning's strategy requires.

    Args:
        name_or_path: The hub id of a model, or a local folder with its safetensors files.
        shard: The function that shards the model over all ranks with `fully_shard`. It receives the
            model on the meta device, and may add an adapter to it first. Tensors that it adds with
            values keep their values.
        **options: Further arguments of `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: If the model is not a causal language model.
    """
    loading = ("dtype", "attn_implementation", "quantization_config")
    config = AutoConfig.from_pretrained(
        name_or_path, **{k: v for k, v in options.items() if k not in loading}
    )
    kind: Any = causal_lm_class(
        config,
        name_or_path,
        trust_remote_code=options.get("trust_remote_code", False),
        revision=options.get("revision"),
    )
    # Popped, because torch keeps each sharded class forever, and all that its methods refer to.
    shards = [shard]

    class InShards(kind):  # type: ignore[misc]
        @classmethod
        def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
            model.tie_weights()  # transformers ties them after loading, too late for sharding
            shards.pop()(model)
            # The files hold no adapter, so weights are read under their names without it.
            without_adapter.enter_context(in_place_of_adapters(model, base_layer_of))
            # Tensors that already have values are in no file: do not warn that they are missing.
            each = (model.named_parameters, model.named_buffers)
            tensors = chain(*(named(remove_duplicate=False) for named in each))
            made = {re.escape(name) for name, tensor in tensors if not tensor.is_meta}
            model._keys_to_ignore_on_load_missing |= made
            model._device_mesh = mesh.get_mesh(("pp", "fsdp", "tp"))
            model._is_distributed_loading_by_transformers = True
            return model

        def _move_missing_keys_from_meta_to_device(
            self, missing_keys: Any, *args: Any, **kwargs: Any
        ) -> None:
            to_come = {k for k in missing_keys if self.get_parameter_or_buffer(k).is_meta}
            super()._move_missing_keys_from_meta_to_device(to_come, *args, **kwargs)

    InShards.__name__ = kind.__name__
    everywhere = DistributedConfig(fsdp_size=dist.get_world_size())
    with torch.random.fork_rng(devices=own_gpu()), ExitStack() as without_adapter:
        model: PreTrainedModel = InShards.from_pretrained(
            name_or_path, config=config, distributed_config=everywhere, **options
        )
    model.config.distributed_config = None  # it belongs to this run, not to the model
    return model


def causal_lm_class(
    config: PreTrainedConfig, name_or_path: str, *, trust_remote_code: bool, revision: str | None
) -> Any:
    """Return the class that `AutoModelForCausalLM` builds, from transformers or the repository.

    Raises:
        ValueError: If there is none, or only in a repository that is not trusted.
    """
    known = AutoModelForCausalLM._model_mapping
    if type(config) in known:
        return known[type(config)]
    brought = getattr(config, "auto_map", None) or {}
    # A configuration of a type that transformers knows has been read without any trust.
    if not trust_remote_code or "AutoModelForCausalLM" not in brought:
        raise ValueError(
            f"{name_or_path} is a {config.model_type}, which is not a causal LM: "
            "choose one that AutoModelForCausalLM loads."
        )
    name = brought["AutoModelForCausalLM"]
    return get_class_from_dynamic_module(name, name_or_path, revision=revision)
