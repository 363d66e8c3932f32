"""Generate text on the same prompts before, during and after training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_ft.callbacks._support.evaluating import evaluating, sharded_by
from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.compat.protocols import OffersPrompts
from lit_ft.compat.ranges import Count, WholeNumber
from lit_ft.data.rendering import bounded_rendering
from lit_ft.data.turns import end_tokens
from lit_ft.tensors.sharding import fsdp_root, is_model_sharded
from lit_ft.terminal import stage

Prompt = str | Sequence[dict[str, str]]


class SampleGenerations(Callback):
    """Generate greedily on fixed prompts with `pl_module.model` and `pl_module.tokenizer`.

    Training is bit for bit the same as without this callback, because the modules' modes and the
    random state are restored. Samples are kept in `generations`, and written as Markdown to every
    logger that takes text, such as TensorBoard. Rank 0 generates alone, except under FSDP2 and
    tensor parallelism, where all ranks take part. A checkpoint keeps the answers from before
    training, so a resumed run starts with them and does not generate them again.

    FSDP1 and DeepSpeed do not allow generation. There, and if generation fails, a warning is given
    and the run continues without samples. Only a RuntimeError with a sharded model ends the run,
    because the other ranks would wait forever.

    Args:
        prompts: The prompts: texts, or chats as lists of `{"role": ..., "content": ...}`. None
            takes them from the datamodule's `sample_prompts(num_prompts)`, and generates nothing if
            it has no such method. A text is sent as the user's message if the tokenizer has a chat
            template; otherwise the model continues it.
        num_prompts: The number of prompts to take from the datamodule if `prompts` is None.
        max_new_tokens: The largest number of tokens in an answer, which ends earlier where an
            answer of the exported model would.
        every_n_steps: The number of optimizer steps between samples during training; None generates
            only before and after training.

    Attributes:
        generations: The samples in the order in which they were generated, each a mapping with
            "step", "prompt" and "text".

    Example:
        >>> import lightning as L
        >>> samples = SampleGenerations(["What is a subspace?"], every_n_steps=200)
        >>> trainer = L.Trainer(callbacks=[samples], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        prompts: Sequence[Prompt] | None = None,
        num_prompts: WholeNumber = 2,
        max_new_tokens: Count = 64,
        every_n_steps: Count | None = None,
    ) -> None:
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.max_new_tokens = max_new_tokens
        self.generations: list[dict[str, Any]] = []
        self._every_n = None if every_n_steps is None else EveryNSteps(every_n_steps)
        self._fixed_prompts: list[Prompt] = []
        self._sampled_at: int | None = None
        self._from_checkpoint: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the first answer to each prompt."""
        first = self.generations[: len(self._fixed_prompts)]
        return {"generations": first} if first else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the first answer to each prompt."""
        self._from_checkpoint = list(state_dict.get("generations", []))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the prompts for the whole run, and generate before the first step.

        A resumed run generates here only if its checkpoint lacks the answers to its prompts.
        """
        self.generations, self._from_checkpoint = self._from_checkpoint, []
        self._sampled_at = None
        if self._every_n is not None:
            self._every_n.start(trainer)
        prompts = [] if _obstacle(trainer, pl_module) else self._find_prompts(trainer)
        self._fixed_prompts = trainer.strategy.broadcast(prompts)
        asked = [_shown(prompt) for prompt in self._fixed_prompts]
        has_first = trainer.strategy.broadcast([one["prompt"] for one in self.generations] == asked)
        if not has_first:
            self.generations = []
            self._sample(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Generate if `every_n_steps` steps have passed since the last time."""
        if self._every_n is not None and self._every_n.due(trainer):
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate with the trained model, unless this was done right after the last step."""
        if self._sampled_at != trainer.global_step:  # ranks without `generations` know it too
            self._sample(trainer, pl_module)

    def _find_prompts(self, trainer: Trainer) -> list[Prompt]:
        if self.prompts is not None:
            return list(self.prompts)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, OffersPrompts):
            return []
        return list(data.sample_prompts(self.num_prompts))

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._fixed_prompts:
            return
        if not trainer.is_global_zero and not is_model_sharded(pl_module.model):
            return  # a sharded model needs all ranks to generate
        self._sampled_at = trainer.global_step
        try:
            with stage("sampling answers"), trainer.precision_plugin.forward_context():
                texts = generate(
                    pl_module.model,
                    pl_module.tokenizer,
                    self._fixed_prompts,
                    max_new_tokens=self.max_new_tokens,
                )
        except (RuntimeError, ValueError, TemplateError) as error:
            if isinstance(error, RuntimeError) and is_model_sharded(pl_module.model):
                raise  # the other ranks wait for this one
            rank_zero_warn(f"No more samples: generation failed with {error!r}.")
            self._fixed_prompts = []
            return
        if trainer.is_global_zero:
            self._keep(trainer, texts)

    def _keep(self, trainer: Trainer, texts: list[str]) -> None:
        step = trainer.global_step
        for index, (prompt, text) in enumerate(zip(self._fixed_prompts, texts, strict=True)):
            shown = _shown(prompt)
            self.generations.append({"step": step, "prompt": shown, "text": text})
            for logger in trainer.loggers:
                add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
                if add_text is not None:
                    add_text(f"samples/{index}", as_markdown(shown, text), step)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int
) -> list[str]:
    """Return the model's answers to all prompts, generated greedily in one batch.

    The modes of the model's modules and the random state are left unchanged.

    Args:
        model: The transformers model, or a peft model around one.
        tokenizer: The model's tokenizer, which may lack a padding token.
        prompts: The prompts: texts, or chats as lists of `{"role": ..., "content": ...}`.
        max_new_tokens: The largest number of new tokens in an answer.

    Raises:
        ValueError: If a prompt is a chat and the tokenizer has no chat template.
    """
    rows = [torch.tensor(_encoded(tokenizer, prompt)) for prompt in prompts]
    # The tokens at which an export of the model stops.
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = end_tokens(tokenizer, own)
    padding = next(iter(ends), 0)
    ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    with evaluating(model):
        answers: Tensor = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,  # greedy decoding warns about the model's own sampling defaults
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=padding,
            synced_gpus=fsdp_root(model) is not None,
        )
    new = answers[:, ids.shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]


def as_markdown(prompt: str, text: str) -> str:
    """Return a prompt and its answer as fenced blocks, even if they contain backticks."""
    longest = max((len(run) for run in re.findall("`+", prompt + text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"**Prompt**\n\n{fence}\n{prompt}\n{fence}\n\n**Answer**\n\n{fence}\n{text}\n{fence}\n"


def _obstacle(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Return the reason why this run cannot generate, and give a warning; None if it can."""
    reason = sharded_by(trainer, getattr(pl_module, "model", None))
    if reason is None and not hasattr(getattr(pl_module, "model", None), "generate"):
        reason = f"{type(pl_module).__name__}.model has no generate()"
    if reason is None and getattr(pl_module, "tokenizer", None) is None:
        reason = f"{type(pl_module).__name__}.tokenizer is missing"
    if reason is not None:
        rank_zero_warn(f"No samples: {reason}.")
    return reason


def _shown(prompt: Prompt) -> str:
    """Return a prompt's text; of a chat, that of the last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _encoded(tokenizer: Any, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    with bounded_rendering(tokenizer):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template has written the special tokens.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
