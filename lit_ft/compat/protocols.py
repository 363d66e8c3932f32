"""What lit_ft asks of modules, data modules, optimizers and layers that others write.

An object follows a protocol by having its methods and attributes; there is nothing to inherit. If
they are missing, lit_ft does without them or raises an error that names them. `CausalLMModule` and
`InstructionDataModule` follow all protocols for a module and a data module.

Three more protocols are defined elsewhere: `lit_ft.loss.TokenLoss`, `lit_ft.models.ModelSource` and
`lit_ft.data.formats.Format`.
"""

# Methods and plain attributes are looked for with `isinstance`. A module's `model` is not: from
# Python 3.12 on `isinstance` does not see what torch keeps in a module's dictionaries.

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    NamedTuple,
    Protocol,
    TypedDict,
    TypeVar,
    runtime_checkable,
)

if TYPE_CHECKING:
    from torch import Tensor

Hook = TypeVar("Hook", bound=Callable[..., Any])

# Asked of a LightningModule


class HasModel(Protocol):
    """A module whose network is `model`; without it the module itself is the network.

    `GaLore` injects its layers into the network, and `StartTable` and `ThroughputMonitor` count its
    weights. `SampleGenerations` needs `model.generate`, `ExportHF` needs `model.save_pretrained`,
    and `AutoBatchSize` needs `model.get_input_embeddings`.

    Attributes:
        model: The network; None until `configure_model` has made it.
    """

    model: Any


class HasTokenizer(Protocol):
    """A module with the tokenizer of its model.

    `SampleGenerations` uses it to generate text, and `ExportHF` saves it. `InstructionDataModule`
    encodes with it if no other tokenizer was given.

    Attributes:
        tokenizer: A fast tokenizer from transformers, or None.
    """

    tokenizer: Any


@runtime_checkable
class Named(Protocol):
    """The `source` of a module's model, if it has a human-readable name.

    `StartTable` and `summary.json` show the name; without it they show the class.

    Attributes:
        name: The name to show, such as the name of a repository on the Hugging Face Hub.
    """

    @property
    def name(self) -> str: ...  # noqa: D102


@runtime_checkable
class Quantizes(Protocol):
    """The `source` of a module's model, if it can load the weights quantised.

    `CausalLMModule` reads the attribute before the weights are loaded, to refuse settings that do
    not work with quantised weights.

    Attributes:
        quantization_config: A quantization config of transformers, or None for unquantised weights.
    """

    quantization_config: Any


@runtime_checkable
class ShardsModel(Protocol):
    """A module that shards its model over the ranks in its method `shard_model`.

    `GaLore` injects its layers just before this method runs, because layers cannot be replaced once
    they are sharded.
    """

    def shard_model(self) -> None:
        """Shard the model over the ranks; the module's `configure_model` calls this."""


@runtime_checkable
class LoadsAfterSharding(Protocol):
    """A module that shards its model on the meta device, and reads the weights after that.

    `GaLore` may then inject its layers while the weights have no values. With other modules it
    refuses to do so.

    Attributes:
        loads_after_sharding: Whether the weights are read after `shard_model`.
    """

    loads_after_sharding: bool


class SumsLoss(Protocol):
    """A module that can compute the loss of a batch outside a training step.

    `AutoBatchSize` calls `loss_sum` to measure the memory that a batch takes.
    """

    def loss_sum(self, batch: Any) -> tuple[Tensor, int]:
        """Return the loss summed over the batch's target tokens, and their number."""


@runtime_checkable
class PlansAhead(Protocol):
    """A module or callback that can say what it will do before the model is loaded.

    `lit_ft.distributed.plan` calls `plan_facts`, so that combinations that cannot work are refused
    early.
    """

    def plan_facts(self, trainer: Any, module: Any) -> Mapping[str, Any]:
        """Return values for fields of `lit_ft.compat.plan.Plan`, keyed by field name."""


def clips_as_lightning_does(hook: Hook) -> Hook:
    """Mark a `configure_gradient_clipping` that clips by the trainer's settings and logs the norm.

    `LayerwiseUpdate` may replace a marked hook: it clips during backward and logs `grad_norm`
    itself. It refuses a hook without the mark, which may clip in another way. The mark is on the
    function and not on the module, so a subclass that overrides the hook does not inherit it.
    """
    hook.clips_as_lightning_does = True  # type: ignore[attr-defined]
    return hook


def is_usual_clipping(hook: Callable[..., Any]) -> bool:
    """Whether `clips_as_lightning_does` has marked the hook."""
    return hasattr(hook, "clips_as_lightning_does")


# Asked of a data module


@runtime_checkable
class OffersPrompts(Protocol):
    """A data module that offers prompts, which `SampleGenerations` uses if it was given none."""

    def sample_prompts(self, n: int) -> list[Any]:
        """Return up to n prompts: texts, or chats as lists of `{"role": ..., "content": ...}`."""


@runtime_checkable
class ReportsData(Protocol):
    """A data module that reports what it has read, for `StartTable` to show.

    Attributes:
        reports: The report of each split, keyed by the split's name; `str` of it is shown.
    """

    reports: Mapping[str, Any]


@runtime_checkable
class CountsRows(Protocol):
    """A data module with batches of one size.

    `StartTable` uses the size to show how much of the data a run will read.

    Attributes:
        batch_size: The number of rows in a micro-batch on one rank.
    """

    batch_size: int


class BoundsBatches(CountsRows, Protocol):
    """A data module whose batch size can be changed, and that knows how long a row can be.

    `AutoBatchSize` measures batches of the longest rows, and sets `batch_size` to what fits.

    Attributes:
        max_length: The largest number of tokens in a row.
    """

    max_length: int


class IdsBeyond(NamedTuple):
    """Token ids in the data for which a model has no row.

    Args:
        number: The number of such ids.
        largest: The largest of them.
        token: The text of the largest, if the tokenizer is known.
    """

    number: int
    largest: int
    token: str | None = None


@runtime_checkable
class KnowsExamples(Protocol):
    """A data module that knows, once it is set up, what its examples need of a model.

    `CausalLMModule` then refuses examples that the model has no room for before it loads the model.
    """

    def ids_beyond(self, rows: int) -> IdsBeyond | None:
        """Return the ids in the examples, and of padding, from `rows` on; None if there are none.

        Examples that are not encoded yet, as in a stream, are left out.
        """

    def longest_example(self) -> int:
        """Return the largest number of tokens that an example has, or can have in a stream."""


@runtime_checkable
class NamesValidation(Protocol):
    """A data module with several validation loaders, which have names.

    `CausalLMModule` logs the loss of each loader under its name; without names, under its number.

    Attributes:
        val_names: The names of the loaders that `val_dataloader` returns, in their order.
    """

    @property
    def val_names(self) -> list[str]: ...  # noqa: D102


class TokenBatch(TypedDict, total=False):
    """A batch of token ids, as `Collator` makes it and `CausalLMModule` and the monitors read it.

    `CausalLMModule` needs only `input_ids` and `labels`. `ThroughputMonitor` counts the tokens in
    the tensors if the batch has no `num_tokens`.

    Attributes:
        input_ids: The token ids [B, T].
        labels: The token ids to predict [B, T], not shifted; -100 marks positions without a target.
        attention_mask: The mask [B, T], 1 for tokens and 0 for padding; absent if nothing is
            padded.
        position_ids: The positions [B, T], which start from 0 in each example of a packed row.
        num_tokens: The number of tokens that are not padding.
        num_targets: The number of targets after the shift.
        origins: The place of each example in its source, such as `my.jsonl:57`, for error messages.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    num_tokens: int
    num_targets: int
    origins: list[str]


# Asked of an optimizer's class and of a layer


class WrapsOptimizer(Protocol):
    """An optimizer class that wraps another optimizer class.

    `lit_ft.compat.optimizers` looks up the properties of the wrapped class.

    Attributes:
        wrapped_class: The optimizer class that is wrapped.
    """

    wrapped_class: ClassVar[type]


@runtime_checkable
class SumsCrossEntropy(Protocol):
    """An output head that computes the loss from hidden states itself, as heads in subspaces do.

    `ChunkedCrossEntropy` leaves the loss to such a head, so that no gradient of size [vocabulary,
    d] is formed.
    """

    def summed_cross_entropy(self, hidden: Tensor, labels: Tensor, *, chunk_tokens: int) -> Tensor:
        """Return the next-token cross-entropy, summed over the target positions.

        Args:
            hidden: The hidden states of the last layer [B, T, d].
            labels: The token ids [B, T], not shifted; -100 marks positions without a target.
            chunk_tokens: The largest number of target tokens whose logits are in memory at once.
        """
