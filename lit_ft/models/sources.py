"""Model sources: each loads a model and its tokenizer, and fails early if it cannot."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # has no __all__
from transformers import AutoConfig, PreTrainedTokenizerBase

from lit_ft.compat import remedies
from lit_ft.compat.ranges import WholeNumber
from lit_ft.compat.refusal import Refusal, Remedy
from lit_ft.models.base import is_run, name_of_folder
from lit_ft.models.gguf import as_safetensors
from lit_ft.models.tokenizer import load_tokenizer
from lit_ft.storage.hub import offline_if_unreachable, why_unreachable
from lit_ft.storage.model_errors import model_errors_name
from lit_ft.tensors.stochastic_rounding import own_gpu

# `transformers` imports a name when it is used. Those of models take seconds, and who only looks at
# data needs a tokenizer alone.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")
Shard = Callable[["PreTrainedModel"], None]


class ModelSource(Protocol):
    """The interface through which `CausalLMModule` and a run load a model."""

    @property
    def name(self) -> str:
        """The name of the model in tables and reports."""

    def check(self) -> None:
        """Raise an error if the model cannot be loaded, before anything expensive starts."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, or None if the model has none."""

    def load_model(self, dtype: torch.dtype, *, shard: Shard | None = None) -> PreTrainedModel:
        """Return the model, on the default device.

        Args:
            dtype: The dtype of the weights.
            shard: The function that shards a model over the ranks, in place; None leaves the model
                whole. If the source can, it calls the function while the model is on the meta
                device, so that no rank ever holds the whole model.
        """

    def load_config(self) -> PreTrainedConfig:
        """Return the model's configuration."""

    def build_empty(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """Return the model on the meta device, without values, which takes no time or memory.

        Args:
            config: The configuration to build in place of the model's own, such as one with fewer
                blocks; None builds the model itself.
        """


def _from_cache_if_unreachable(load: Callable[P, T]) -> Callable[P, T]:
    """Return a function that loads from the cache at once if the hub cannot be reached.

    Its errors say which model cannot be read.
    """

    @wraps(load)
    def loaded(*args: P.args, **kwargs: P.kwargs) -> T:
        source: Any = args[0]
        reachable = nullcontext() if source._is_local else offline_if_unreachable()
        with reachable, model_errors_name(source.name_or_path):
            return load(*args, **kwargs)

    return loaded


@dataclass
class Pretrained:
    """A model in Hugging Face format, or a GGUF file, from the hub or from a local folder.

    Args:
        name_or_path: The hub id, such as "HuggingFaceTB/SmolLM2-135M-Instruct", or the path of a
            local folder.
        gguf_file: The name of a GGUF file in the repository or folder; None for weights in Hugging
            Face format. Weights from a GGUF file are dequantised once, and kept as safetensors in
            the user's cache folder.
        revision: The branch, tag or commit on the hub; None for the default branch.
        dtype: The dtype of the weights, such as "bfloat16"; None follows the trainer's precision.
        attn_implementation: The attention implementation, such as "sdpa", "eager" or
            "flash_attention_2"; None lets transformers choose.
        quantization_config: The quantization config of transformers, such as `BitsAndBytesConfig`
            for QLoRA (arXiv:2305.14314); None does not quantise the weights.
        trust_remote_code: Whether to run Python code from the model's repository.
        resize_embeddings: Whether to add rows to the embedding and the head for tokens of the
            tokenizer that have none.
        config: The published configuration, with its `model_type`, for a memory plan where neither
            the cache nor the hub has the model; None for none.
    """

    name_or_path: str
    gguf_file: str | None = None
    revision: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    quantization_config: Any = None
    trust_remote_code: bool = False
    resize_embeddings: bool = False
    config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The hub id, or the name of the folder or of the run that has exported to it."""
        return name_of_folder(self.name_or_path) if self._is_local else self.name_or_path

    def check(self) -> None:
        """Raise ValueError if a folder or file is missing, or dtype or quantisation cannot work."""
        path = Path(self.name_or_path)
        looks_local = path.is_absolute() or self.name_or_path.startswith((".", "~"))
        if looks_local and not path.is_dir():
            raise ValueError(f"name_or_path={self.name_or_path}: there is no such folder.")
        if self.gguf_file is None and is_run(path) and not (path / "config.json").is_file():
            raise Refusal(
                f"name_or_path={self.name_or_path} is the folder of a run, not of a model",
                remedies.exported_model(str(Path(self.name_or_path) / "export")),
            )
        if not path.is_dir():
            try:
                validate_repo_id(self.name_or_path)
            except HFValidationError as error:
                raise ValueError(
                    f"name_or_path={self.name_or_path}: there is no such folder, and it is "
                    "not a hub id, which has at most one slash."
                ) from error
            if not self._is_cached and (why := why_unreachable()) is not None:
                raise ValueError(
                    f"name_or_path={self.name_or_path}: there is no such folder, the cache holds "
                    f"no such model, and the hub cannot be reached ({why}). Give a folder, or "
                    "connect to the hub."
                )
        if self.gguf_file and path.is_dir() and not (path / self.gguf_file).is_file():
            found = ", ".join(p.name for p in path.glob("*.gguf")) or "none"
            raise ValueError(
                f"gguf_file={self.gguf_file}: not in {path}. GGUF files there: {found}."
            )
        if self.dtype is not None:
            dtype_named(self.dtype)
        if self.quantization_config is not None:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise ValueError("Quantised weights need bitsandbytes: pip install bitsandbytes")
            if torch.backends.mps.is_available():
                raise Refusal(
                    "bitsandbytes has no 4-bit kernels for Apple GPUs",
                    remedies.LORA,
                    Remedy('use Trainer(accelerator="cpu")', {"strategy": "cpu"}),
                )

    @_from_cache_if_unreachable
    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's own tokenizer, with a padding token."""
        folder = self._folder()
        tokenizer = load_tokenizer(folder, **self._hub_options(folder))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @_from_cache_if_unreachable
    def load_model(self, dtype: torch.dtype, *, shard: Shard | None = None) -> PreTrainedModel:
        """Return the pretrained model; `self.dtype` overrides `dtype`."""
        folder = self._folder()
        options = self._hub_options(folder)
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization_config is not None:
            options["quantization_config"] = self.quantization_config
        dtype = dtype_named(self.dtype) if self.dtype else dtype
        if shard is not None and dist.get_world_size() > 1:
            from lit_ft.models.load_sharded import from_pretrained_in_shards

            if self.resize_embeddings and hasattr(self.build_empty(), "first_new_row"):
                raise Refusal(
                    "Rows cannot be added to an embedding that each rank reads a part of",
                    remedies.DDP,
                    remedies.RESIZED_BEFORE,
                )
            return from_pretrained_in_shards(folder, shard, dtype=dtype, **options)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model: PreTrainedModel = load(folder, dtype=dtype, **options)
        if self.resize_embeddings:
            _add_rows(model, self)
        if shard is not None:
            shard(model)
        return model

    def load_config(self) -> PreTrainedConfig:
        """Return the configuration from the folder, the cache, the hub or, at last, `config`."""
        if self.config is not None and not (self._is_local or self._is_cached):
            published: PreTrainedConfig = AutoConfig.for_model(**self.config)
            return published
        self.check()
        return self._loaded_config()

    @_from_cache_if_unreachable
    def _loaded_config(self) -> PreTrainedConfig:
        folder = self._folder()
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **self._hub_options(folder))
        return config

    @_from_cache_if_unreachable
    def build_empty(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """Return the model on the meta device, built from `config` or its own configuration.

        Raises:
            ValueError: If the model is not a causal language model.
        """
        folder = self._folder()
        options = self._hub_options(folder)
        is_own = config is None
        config = self._loaded_config() if config is None else config
        # Imported here, as it imports what loads models.
        from lit_ft.models.load_sharded import causal_lm_class

        causal_lm_class(
            config,
            folder,
            trust_remote_code=self.trust_remote_code,
            revision=options.get("revision"),
        )
        building: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None:
            building["attn_implementation"] = self.attn_implementation
        with torch.device("meta"):
            build: Any = transformers.AutoModelForCausalLM.from_config
            model: PreTrainedModel = build(config, **building)
        if self.resize_embeddings:
            _add_rows(model, self)
        if not is_own:
            return model
        del options["trust_remote_code"]  # GenerationConfig keeps options that it does not know
        with suppress(OSError):  # a model may have none
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                folder, **options
            )
        return model

    def _folder(self) -> str:
        if self.gguf_file is None:
            return (
                str(Path(self.name_or_path).expanduser()) if self._is_local else self.name_or_path
            )
        return str(as_safetensors(self.name_or_path, self.gguf_file, revision=self.revision))

    @property
    def _is_local(self) -> bool:
        return Path(self.name_or_path).expanduser().is_dir()

    @property
    def _is_cached(self) -> bool:
        file = self.gguf_file or "config.json"
        found = try_to_load_from_cache(self.name_or_path, file, revision=self.revision)
        return isinstance(found, str)

    def _hub_options(self, folder: str) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.revision is not None and folder == self.name_or_path:
            options["revision"] = self.revision
        return options


@dataclass
class Packaged:
    """A GGUF model inside an installed Python package; it loads without access to a hub.

    Args:
        package: The import name of the package, which is located but never imported.
        gguf_file: The name of the GGUF file inside the package.
        install: The command that installs the package. The error message shows it if the package
            is missing.
        name: The name of the model in tables and reports.
        dtype: The dtype of the weights, such as "bfloat16"; None follows the trainer's precision.
        attn_implementation: The attention implementation, such as "sdpa" or "eager"; None lets
            transformers choose.
        quantization_config: The quantization config of transformers, such as `BitsAndBytesConfig`
            for QLoRA (arXiv:2305.14314); None does not quantise the weights.
        resize_embeddings: Whether to add rows to the embedding and the head for tokens of the
            tokenizer that have none.
        hub_id: The name of the model on the Hugging Face Hub, for model cards; None if it has none.
        license: The identifier of its license, such as "apache-2.0", for model cards; None if it is
            not known.
    """

    package: str
    gguf_file: str
    install: str
    name: str
    dtype: str | None = None
    attn_implementation: str | None = None
    quantization_config: Any = None
    resize_embeddings: bool = False
    hub_id: str | None = None
    license: str | None = None

    def check(self) -> None:
        """Raise ValueError if the package is not installed; the message says how to install it."""
        self._pretrained().check()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer that the GGUF file describes."""
        return self._pretrained().load_tokenizer()

    def load_model(self, dtype: torch.dtype, *, shard: Shard | None = None) -> PreTrainedModel:
        """Return the dequantised model."""
        return self._pretrained().load_model(dtype, shard=shard)

    def load_config(self) -> PreTrainedConfig:
        """Return the configuration that the GGUF file describes."""
        return self._pretrained().load_config()

    def build_empty(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """Return the model on the meta device, as `config` or the GGUF file describes it."""
        return self._pretrained().build_empty(config)

    def _pretrained(self) -> Pretrained:
        if "." in self.package:
            raise ValueError(
                f"package={self.package}: give the name of a package without a dot. To look for "
                "what is inside a package, Python would import it."
            )
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ValueError(f"The model {self.name} is not installed: {self.install}")
        return Pretrained(
            name_or_path=str(Path(spec.origin).parent),
            gguf_file=self.gguf_file,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            quantization_config=self.quantization_config,
            resize_embeddings=self.resize_embeddings,
        )


@dataclass
class FromConfig:
    """A model with random weights, for pretraining small models and for tests.

    Args:
        model_type: The name of the architecture in transformers, such as "llama".
        config: The arguments of the architecture's configuration class, such as `hidden_size`.
        tokenizer: The source of the tokenizer: a model source, a folder or a hub id. None for no
            tokenizer.
        name: The name of the model in tables and reports.
        attn_implementation: The attention implementation, such as "sdpa" or "eager"; None lets
            transformers choose.
        quantization_config: Must be None, because random weights are not quantised.
        seed: The seed of the weights. The same seed always gives the same weights. Frozen weights
            that a checkpoint leaves out, as under an adapter, are therefore the same after a
            restart.
        resize_embeddings: Whether to add rows to the embedding and the head for tokens of the
            tokenizer that have none.
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: ModelSource | str | None = None
    name: str = "from scratch"
    attn_implementation: str | None = None
    quantization_config: Any = None
    seed: WholeNumber = 0
    resize_embeddings: bool = False

    def check(self) -> None:
        """Raise ValueError if the architecture, tokenizer or `quantization_config` cannot work."""
        self._try_config()
        if self.quantization_config is not None:
            raise Refusal(
                "Random weights are not quantised",
                remedies.LORA,
                Remedy("take a pretrained model", {"model": "pretrained"}),
            )
        source = self._tokenizer_source()
        if source is not None:
            source.check()

    def _try_config(self) -> None:
        defaults = AutoConfig.for_model(self.model_type)
        for name in self.config:
            if not (hasattr(defaults, name) or _reads(defaults, name)):
                near = get_close_matches(name, defaults.to_dict(), n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"config has '{name}', which {self.model_type} has not.{hint}")
        try:
            AutoConfig.for_model(self.model_type, **self.config)
        except StrictDataclassError as error:
            raise ValueError(f"config of {self.model_type}: {error}") from error

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer from the source `tokenizer`; None if there is none."""
        source = self._tokenizer_source()
        return None if source is None else source.load_tokenizer()

    def load_model(self, dtype: torch.dtype, *, shard: Shard | None = None) -> PreTrainedModel:
        """Return a model with random weights; with `shard`, each rank briefly holds all of it."""
        model = self._random(self.load_config(), dtype)
        if shard is not None:
            shard(model)
        return model

    def load_config(self) -> PreTrainedConfig:
        """Return the configuration that the arguments describe."""
        return AutoConfig.for_model(self.model_type, **self.config)

    def build_empty(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """Return the model on the meta device, without values."""
        with torch.device("meta"):
            return self._random(config or self.load_config(), torch.get_default_dtype())

    def _random(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        options = {}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        with torch.random.fork_rng(devices=own_gpu()):
            torch.manual_seed(self.seed)
            build: Any = transformers.AutoModelForCausalLM.from_config
            model: PreTrainedModel = build(config, dtype=dtype, **options)
        if self.resize_embeddings:
            _add_rows(model, self)
        return model

    def _tokenizer_source(self) -> ModelSource | None:
        return Pretrained(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer


def _add_rows(model: PreTrainedModel, source: ModelSource) -> None:
    # Imported here, as it imports what trains models.
    from lit_ft.models.new_tokens import add_rows

    add_rows(model, source.load_tokenizer())


def _reads(config: Any, name: str) -> bool:
    """Return whether the code of a model reads a value that its configuration class does not name.

    An example is the `head_dim` of Qwen3's mixture of experts.
    """
    from lit_ft.models.load_sharded import causal_lm_class

    model = causal_lm_class(config, config.model_type, trust_remote_code=False, revision=None)
    code = inspect.getsource(sys.modules[model.__module__])
    return re.search(rf"\b{re.escape(name)}\b", code) is not None


def dtype_named(name: str) -> torch.dtype:
    """Return torch's floating-point dtype of this name; raise ValueError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype={name}: not a floating-point type of torch; try bfloat16 or float32."
        )
    return dtype
