"""What lit_ft asks of modules, data modules, optimizers and layers that others write.

An object offers one of these by having its methods and attributes. There is nothing to inherit, and
what an object does not offer is done without, or refused with the name of what is missing.
`CausalLMModule` and `InstructionDataModule` offer all that is asked of a module and a data module.

Protocols that have a home of their own: `lit_ft.loss.TokenLoss`, `lit_ft.models.ModelSource` and
`lit_ft.data.formats.Format`.
"""

# Methods and plain attributes are looked for with `isinstance`. A module's `model` is not: from
# Python 3.12 on `isinstance` does not see what torch keeps in a module's dictionaries.

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypedDict, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Hook = TypeVar("Hook", bound=Callable[..., Any])

# Asked of a LightningModule


class HasModel(Protocol):
    """A module whose network is `model`; without it the module itself is the network.

    `GaLore` injects its layers there, and `StartTable` and `ThroughputMonitor` count there.
    `SampleGenerations` needs `model.generate`, `ExportHF` needs `model.save_pretrained`, and
    `AutoBatchSize` needs `model.get_input_embeddings`.

    Attributes:
        model: The network; None until `configure_model` has made it.
    """

    model: Any


class HasTokenizer(Protocol):
    """A module with the tokenizer of its model.

    `SampleGenerations` writes with it, `ExportHF` saves it, and `InstructionDataModule` encodes
    with it where it was given none.

    Attributes:
        tokenizer: A fast tokenizer of transformers, or None.
    """

    tokenizer: Any


@runtime_checkable
class Named(Protocol):
    """A source of a model, a module's `source`, that has a name for people.

    `StartTable` and `summary.json` show the name; without it they show the class.

    Attributes:
        name: The name, such as that of a repository on the hub.
    """

    @property
    def name(self) -> str: ...  # noqa: D102


@runtime_checkable
class Quantizes(Protocol):
    """A source of a model that can load its weights in few bits.

    `CausalLMModule` asks before the weights are loaded, to refuse what does not go with them.

    Attributes:
        quantization_config: A configuration of transformers, or None for weights as they are.
    """

    quantization_config: Any


@runtime_checkable
class ShardsModel(Protocol):
    """A module that spreads its model over ranks in a method of its own.

    `GaLore` injects its layers when the method is called, just before it runs: layers cannot be
    changed once they are sharded.
    """

    def shard_model(self) -> None:
        """Shard the model; `configure_model` calls this."""


@runtime_checkable
class LoadsAfterSharding(Protocol):
    """A module that shards its model on the meta device, and reads the weights after that.

    `GaLore` then injects into weights without values, which it refuses of other modules.

    Attributes:
        loads_after_sharding: Whether the weights come after `shard_model`.
    """

    loads_after_sharding: bool


class SumsLoss(Protocol):
    """A module that computes the loss of any batch, outside a training step too.

    `AutoBatchSize` measures the memory that this takes.
    """

    def loss_sum(self, batch: Any) -> tuple[Tensor, int]:
        """Return the loss summed over the batch's target tokens, and their number."""


@runtime_checkable
class PlansAhead(Protocol):
    """A module or callback that knows before the model is loaded what it will do.

    `lit_ft.distributed.plan` asks, so that what does not go together is refused at once.
    """

    def plan_facts(self, trainer: Any, module: Any) -> Mapping[str, Any]:
        """Return fields of `lit_ft.compat.plan.Plan` by name."""


def clips_as_lightning_does(hook: Hook) -> Hook:
    """Mark a `configure_gradient_clipping` that clips by the trainer's settings and logs the norm.

    `LayerwiseUpdate` may take the hook's place: it clips in backward, and logs `grad_norm`. It
    refuses a hook without the mark, which may clip in another way. The mark is on the function and
    not on the module, so that a subclass with a hook of its own does not inherit it.
    """
    hook.clips_as_lightning_does = True  # type: ignore[attr-defined]
    return hook


def is_usual_clipping(hook: Callable[..., Any]) -> bool:
    """Whether `clips_as_lightning_does` has marked the hook."""
    return hasattr(hook, "clips_as_lightning_does")


# Asked of a data module


@runtime_checkable
class OffersPrompts(Protocol):
    """A data module that chooses prompts. `SampleGenerations` asks where it was given none."""

    def sample_prompts(self, n: int) -> list[Any]:
        """Return up to n prompts: texts, or chats as lists of `{"role": ..., "content": ...}`."""


@runtime_checkable
class ReportsData(Protocol):
    """A data module that says what it has read. `StartTable` shows it.

    Attributes:
        reports: By the name of a split, anything that prints.
    """

    reports: Mapping[str, Any]


@runtime_checkable
class CountsRows(Protocol):
    """A data module with batches of one size.

    `StartTable` says with it how far a run goes through the data.

    Attributes:
        batch_size: The rows of a micro-batch on one rank.
    """

    batch_size: int


class BoundsBatches(CountsRows, Protocol):
    """A data module that takes another batch size, and knows how long a row can be.

    `AutoBatchSize` measures batches of the longest rows, and sets the size that fits.

    Attributes:
        max_length: The largest number of tokens in a row.
    """

    max_length: int


class TokenBatch(TypedDict, total=False):
    """A batch of token ids: what `Collator` makes, and `CausalLMModule` and the monitors read.

    `ThroughputMonitor` takes the counts from the tensors where a batch does not bring them, and
    `CausalLMModule` needs `input_ids` and `labels` only.

    Attributes:
        input_ids: [B, T].
        labels: [B, T], not shifted; -100 is no target.
        attention_mask: [B, T], 1 for tokens and 0 for padding; left out where nothing is padded.
        position_ids: [B, T], from 0 in each example of a packed row.
        num_tokens: The tokens that are not padding.
        num_targets: The labels that count after the shift.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    num_tokens: int
    num_targets: int


# Asked of an optimizer's class and of a layer


class WrapsOptimizer(Protocol):
    """A class of optimizers that wraps another.

    `lit_ft.compat.optimizers` looks up the wrapped class for what a step depends on.

    Attributes:
        wrapped_class: The class that the optimizer had before.
    """

    wrapped_class: ClassVar[type]


@runtime_checkable
class SumsCrossEntropy(Protocol):
    """An output head that computes the loss from hidden states itself, as one in a subspace does.

    `ChunkedCrossEntropy` asks, so that no tensor of the size [vocabulary, d] is formed.
    """

    def summed_cross_entropy(self, hidden: Tensor, labels: Tensor, *, chunk_tokens: int) -> Tensor:
        """Return the next-token cross-entropy, summed over the target positions.

        Args:
            hidden: The last hidden states [B, T, d].
            labels: The token ids [B, T], not shifted; -100 is no target.
            chunk_tokens: The largest number of target tokens whose logits exist at a time.
        """
