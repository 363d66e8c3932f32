"""The names that other trainers give to settings, and what they are here.

One table, from which the command line and the files of `--config` are translated, and from which
docs/coming-from.md is written. A name is translated only where it means exactly the same. Otherwise
`Name.why` says what to type instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ANY = "*"
"""In `Name.values`, the key that stands for every value."""


@dataclass(frozen=True)
class Name:
    """A name of another trainer.

    Args:
        theirs: The name there.
        here: The settings that mean the same, with `{}` for the value; empty if there are none.
        brings: The settings that the name implies there. They give way to what the user sets.
        values: The settings that single values mean, before `here` is asked. An empty text means
            that there is nothing to set.
        why: What to type instead, or what differs, as the end of a sentence that begins "here:".
        is_list: Whether a comma separates several values.
        is_whole: Whether the value is a whole number here, also if it is written as 3.0.
    """

    theirs: str
    here: str = ""
    brings: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    is_list: bool = False
    is_whole: bool = False


def _if_true(settings: str, otherwise: str = "") -> dict[str, str]:
    return {"true": settings, "false": otherwise}


_LORA = "adapter=lora"
_CUT = "data.overlong=cut"
_SCHEDULES = {
    "linear": "schedule=linear",
    "cosine": "schedule=cosine schedule.schedule.min_lr_rate=0.0",
    "constant": "schedule=constant schedule.warmup=0",
    "constant_with_warmup": "schedule=constant",
}
_OPTIMIZERS = {
    "adamw_torch": "optim=adamw",
    "adamw_torch_fused": "optim=adamw",
    "adamw_hf": "optim=adamw",
    "adamw_8bit": "optim=adamw_8bit",
    "adamw_bnb_8bit": "optim=adamw_8bit",
    "paged_adamw_8bit": "optim=adamw_8bit_paged",
    "lion_8bit": "optim=lion_8bit",
    "galore_adamw": "optim=galore_svd",
}
_EVALUATION = (
    "`trainer.val_check_interval`, which counts micro-batches: optimizer steps times "
    "`trainer.accumulate_grad_batches`"
)
_LAYERWISE = "nothing: GaLore's gradients are small here without it"
_NOTHING = {ANY: ""}

NAMES: Mapping[str, tuple[Name, ...]] = {
    "Trainer's TrainingArguments": (
        Name("output_dir", "run_dir={}"),
        Name("overwrite_output_dir", "overwrite={}"),
        Name("do_train", values={"true": ""}, why="`validate_only=true`"),
        Name("do_eval", values=_NOTHING, why="nothing: a run validates before and after training"),
        Name("learning_rate", "optim.lr={}", why="`optim=adafactor` sets its own"),
        Name("weight_decay", "optim.weight_decay={}", why="for matrices only"),
        Name("adam_beta1", why="`+optim.betas=[0.9,0.95]`"),
        Name("adam_beta2", why="`+optim.betas=[0.9,0.95]`"),
        Name("adam_epsilon", "++optim.eps={}"),
        Name(
            "lr_scheduler_type", values=_SCHEDULES, why="`schedule=linear`, `cosine` or `constant`"
        ),
        Name("warmup_ratio", "schedule.warmup={}", why="a fraction of the run"),
        Name("warmup_steps", "schedule.warmup={}", why="from 1 on a number of steps"),
        Name("max_steps", "trainer.max_steps={}"),
        Name("num_train_epochs", "trainer.max_epochs={}", is_whole=True),
        Name("per_device_train_batch_size", "data.batch_size={}"),
        Name("per_device_eval_batch_size", "data.val_batch_size={}"),
        Name("gradient_accumulation_steps", "trainer.accumulate_grad_batches={}"),
        Name("gradient_checkpointing", "module.activation_checkpointing={}"),
        Name("max_grad_norm", "trainer.gradient_clip_val={}"),
        Name("bf16", values={**_if_true("trainer.precision=bf16-mixed"), "auto": ""}),
        Name("fp16", values=_if_true("trainer.precision=16-mixed")),
        Name("use_cpu", values=_if_true("strategy=cpu")),
        Name("torch_compile", "module.compile={}"),
        Name("group_by_length", "data.group_by_length={}"),
        Name("logging_steps", "trainer.log_every_n_steps={}"),
        Name("eval_steps", why=_EVALUATION),
        Name("eval_strategy", why=_EVALUATION),
        Name("save_steps", "checkpoint.every_n_steps={}"),
        Name("save_strategy", values={"steps": ""}, why="`checkpoint.every_n_steps`"),
        Name(
            "save_only_model",
            values={"false": "", "true": "checkpoint.save_optimizer=false"},
        ),
        Name("save_total_limit", "checkpoint.keep={}"),
        Name("resume_from_checkpoint", "resume={}", values=_if_true("resume=auto")),
        Name(
            "report_to",
            values={one: f"logger={one}" for one in ("none", "tensorboard", "wandb")},
            why="`logger=wandb`, `tensorboard`, `csv` or `none`",
        ),
        Name("push_to_hub", values={"false": ""}, why="`callbacks.export.push_to_hub=USER/NAME`"),
        Name("hub_model_id", why="`callbacks.export.push_to_hub=USER/NAME`"),
        Name("dataloader_num_workers", "data.num_workers={}"),
        Name(
            "optim",
            "optim={}",
            values=_OPTIMIZERS,
            why="Trainer's adafactor is `optim=adafactor_fixed`",
        ),
        Name("seed", "seed={}"),
        Name("optim_args", why="`galore.rank`, `galore.scale` and `galore.refresh.every`"),
        Name("optim_target_modules", why="`galore.targets=[attention,mlp]`"),
        Name("use_liger_kernel", values=_NOTHING, why="nothing: the loss never forms all logits"),
        Name("fsdp", why="`strategy=fsdp`"),
        Name("deepspeed", why="`strategy=fsdp`, or `strategy=fsdp_offload`"),
        Name("ddp_timeout", values=_NOTHING, why="nothing"),
    ),
    "TRL's SFTConfig, ModelConfig and ScriptArguments": (
        Name("model_name_or_path", "model.name_or_path={}", "model=pretrained"),
        Name("model_revision", "model.revision={}"),
        Name("dtype", "model.dtype={}", values={"auto": ""}),
        Name("torch_dtype", "model.dtype={}", values={"auto": ""}),
        Name("attn_implementation", "model.attn_implementation={}"),
        Name("trust_remote_code", "model.trust_remote_code={}", values={"false": ""}),
        Name(
            "model_init_kwargs", why="`model.attn_implementation`, `model.dtype`, `model.revision`"
        ),
        Name("dataset_name", "data.path={}"),
        Name("dataset_config", "++data.source_options.name={}"),
        Name("dataset_train_split", "++data.source_options.split={}"),
        Name("dataset_text_field", "data/format=text data.format.text={}"),
        Name("max_length", "data.max_length={}", _CUT),
        Name("max_seq_length", "data.max_length={}", _CUT),
        Name("packing", "data.packing={}"),
        Name("completion_only_loss", values={"true": ""}, why="`data.train_on=all`"),
        Name("assistant_only_loss", values={"true": ""}, why="`data.train_on=all`"),
        Name("chat_template_path", "data.chat_template={}"),
        Name("use_peft", brings=_LORA, values=_if_true(_LORA)),
        Name("lora_r", "adapter.r={}", _LORA),
        Name("lora_alpha", "adapter.lora_alpha={}", _LORA),
        Name("lora_dropout", "++adapter.lora_dropout={}", _LORA),
        Name(
            "lora_target_modules",
            "adapter.target_modules={}",
            _LORA,
            is_list=True,
        ),
        Name("use_dora", values=_if_true("adapter=dora")),
        Name("use_rslora", values=_if_true("adapter=rslora")),
        Name("load_in_4bit", values=_if_true("adapter=qlora")),
        Name("load_in_8bit", values={"false": ""}, why="`adapter=qlora`, which has 4 bits"),
    ),
    "LLaMA-Factory's YAML": (
        Name("stage", values={"sft": ""}, why="nothing: answers are all that is learnt"),
        Name(
            "finetuning_type",
            brings=_LORA,
            values={"full": "adapter=none", "lora": _LORA},
            why="`adapter=lora`",
        ),
        Name("lora_rank", "adapter.r={}", _LORA),
        Name(
            "lora_target",
            "adapter.target_modules={}",
            _LORA,
            values={"all": "adapter.target_modules=all-linear"},
            is_list=True,
        ),
        Name("quantization_bit", values={"4": "adapter=qlora"}, why="`adapter=qlora`, with 4 bits"),
        Name("dataset", "data.path={}", why="a file or hub dataset, no name in dataset_info.json"),
        Name("dataset_dir", why="`data.path`, the file itself"),
        Name(
            "template",
            why="nothing: the tokenizer's own is used; `data.chat_template` replaces it",
        ),
        Name("cutoff_len", "data.max_length={}", _CUT),
        Name("max_samples", "data.max_train_examples={}"),
        Name("val_size", "data.val_fraction={}", why="a share of the rows"),
        Name("mix_strategy", why="`data=mix` and `data.sources`"),
        Name("interleave_probs", why="`data=mix` and `data.sources`"),
        Name("streaming", "data.streaming={}"),
        Name(
            "flash_attn",
            values={
                "auto": "",
                "disabled": "model.attn_implementation=eager",
                "sdpa": "model.attn_implementation=sdpa",
                "fa2": "model.attn_implementation=flash_attention_2",
            },
            why="`model.attn_implementation`",
        ),
        Name("pure_bf16", values=_if_true("trainer.precision=bf16-true")),
        Name("use_galore", why="`optim=galore_svd`, or `optim=galore_subspace`, which is faster"),
        Name("galore_rank", "galore.rank={}"),
        Name("galore_update_interval", "galore.refresh.every={}"),
        Name("galore_scale", "galore.scale={}"),
        Name("galore_target", why="`galore.targets=[attention,mlp]`"),
        Name("galore_layerwise", why=_LAYERWISE),
        Name("use_badam", why="`update=blocks`"),
        Name("badam_switch_interval", "callbacks.blocks.every={}", "update=blocks"),
        Name(
            "badam_switch_mode",
            brings="update=blocks",
            values={
                order: f"callbacks.blocks.order={order}"
                for order in ("ascending", "descending", "random")
            },
        ),
        Name("overwrite_cache", values=_NOTHING, why="nothing: what is cached has a checksum"),
        Name("preprocessing_num_workers", values=_NOTHING, why="nothing: it is chosen"),
        Name("plot_loss", values=_NOTHING, why="nothing: TensorBoard shows it"),
    ),
    "axolotl's YAML": (
        Name("base_model", "model.name_or_path={}", "model=pretrained"),
        Name("datasets", why="`data.path=my.jsonl`, or `data=mix` and `data.sources`"),
        Name("sequence_len", "data.max_length={}", why="longer rows are left out, as there"),
        Name("sample_packing", "data.packing={}"),
        Name("micro_batch_size", "data.batch_size={}"),
        Name("num_epochs", "trainer.max_epochs={}", is_whole=True),
        Name("optimizer", values=_OPTIMIZERS, why="`optim=adamw`, `adamw_8bit`, ..."),
        Name("lr_scheduler", values=_SCHEDULES, why="`schedule=linear`, `cosine` or `constant`"),
        Name("val_set_size", "data.val_fraction={}", why="a share of the rows"),
        Name(
            "lora_target_linear",
            brings=_LORA,
            values=_if_true("adapter.target_modules=all-linear"),
        ),
        Name(
            "flash_attention",
            values=_if_true("model.attn_implementation=flash_attention_2"),
        ),
        Name("train_on_inputs", values=_if_true("data.train_on=all")),
        Name("wandb_project", "logger.wandb.project={}", "logger=wandb"),
        Name("saves_per_epoch", why="`checkpoint.every_n_steps`"),
        Name("evals_per_epoch", why=_EVALUATION),
        Name(
            "early_stopping_patience",
            why="`callbacks=early_stopping` and `callbacks.early_stopping.patience`",
        ),
        Name("wandb_name", "++logger.wandb.name={}", "logger=wandb"),
        Name("wandb_entity", "++logger.wandb.entity={}", "logger=wandb"),
        Name(
            "dataset_prepared_path", values=_NOTHING, why="nothing: rows are cached by themselves"
        ),
        Name("strict", values=_NOTHING, why="nothing: names that are not known are refused"),
        Name("special_tokens", why="nothing: the tokenizer's own are used"),
    ),
    "Unsloth": (
        Name("model_name", "model.name_or_path={}", "model=pretrained"),
        Name("r", "adapter.r={}", _LORA),
        Name(
            "use_gradient_checkpointing",
            "module.activation_checkpointing={}",
            values={"unsloth": "module.activation_checkpointing=true"},
        ),
        Name("save_path", why="`callbacks.export.folder`, which is `run_dir/export`"),
    ),
}
"""The names of each trainer. Those of TrainingArguments hold for the other trainers too."""

BY_NAME: Mapping[str, Name] = {one.theirs: one for names in NAMES.values() for one in names}
"""The same, keyed by name."""
