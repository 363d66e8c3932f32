"""The remedies that refusals share, each worded for Python and for the command line."""

from __future__ import annotations

from collections.abc import Sequence

from lit_ft.compat.refusal import Remedy

# For each choice of `optim=`: the class that it builds, and the remedy in Python.
OPTIMIZERS = {
    "adafactor": (
        "lit_ft.optim.adafactor.RelativeStepAdafactor",
        "use lit_ft.optim.adafactor.RelativeStepAdafactor",
    ),
    "adafactor_fixed": (
        "lit_ft.optim.adafactor.Adafactor",
        "use lit_ft.optim.adafactor.Adafactor with scale_parameter=False, relative_step=False and "
        "a learning rate",
    ),
    "adamw": ("torch.optim.adamw.AdamW", "use AdamW"),
    "adamw_8bit": ("bitsandbytes.optim.adamw.AdamW8bit", "use bitsandbytes' AdamW8bit"),
    "adamw_8bit_torchao": (
        "lit_ft.optim.adamw_8bit.RowwiseAdamW8bit",
        "use lit_ft.optim.RowwiseAdamW8bit",
    ),
    "sgd": ("torch.optim.sgd.SGD", "use SGD"),
}
# For each preset of `optim=` with GaLore: its optimizer, and its choice of `galore=`.
PRESETS = {
    "galore": ("adamw", "iteration"),
    "galore_subspace": ("adamw", "online"),
    "galore_subspace_8bit": ("adamw_8bit", "online"),
    "galore_svd": ("adamw", "svd"),
}


def optimizer(choice: str, *, galore: str | None = None) -> Remedy:
    """Return the remedy of using another optimizer.

    Args:
        choice: The choice of `optim=` to use.
        galore: The choice of `galore=` that the run keeps; None if it has none. Presets of `optim=`
            bring their own choice.
    """
    if choice in PRESETS:
        base, projector = PRESETS[choice]
        return Remedy(f"{OPTIMIZERS[base][1]} with GaLore ({projector})", {"optim": choice})
    settings = {"optim": choice} if galore is None else {"optim": choice, "galore": galore}
    return Remedy(OPTIMIZERS[choice][1], settings)


def shorter_rows(tokens: int) -> Remedy:
    """Return the remedy of limiting an example to this many tokens."""
    return Remedy(f"set max_length={tokens}", {"data.max_length": str(tokens)})


EVERY_LINEAR_LAYER = "all-linear"  # peft's word


def exported_model(folder: str) -> Remedy:
    """Return the remedy that takes the model that a run has exported to a folder."""
    return Remedy(f"take the model in {folder}", {"model.name_or_path": folder})


def layer_names(setting: str, names: Sequence[str]) -> list[Remedy]:
    """Return the remedies for names in an adapter's configuration that match nothing.

    Args:
        setting: The setting that has the names, such as "target_modules".
        names: The names that match, or look like those that were given.
    """
    if setting == "target_modules":
        value = {f"adapter.{setting}": EVERY_LINEAR_LAYER}
        otherwise = Remedy(f'use {setting}="{EVERY_LINEAR_LAYER}"', value)
        value = {f"adapter.{setting}": f"[{','.join(names)}]"}
    else:  # the YAML does not have it
        otherwise = Remedy(f"leave {setting} out")
        value = {f"+adapter.{setting}": f"[{','.join(names)}]"}
    return [*([Remedy(f"use {setting}={list(names)}", value)] if names else []), otherwise]


NO_GALORE = Remedy("leave GaLore out", {"galore": "none"})
ADAPTER_NONE = Remedy("train without the adapter", {"adapter": "none"})
LORA = Remedy("use a plain LoraConfig", {"adapter": "lora"})

DDP = Remedy('use Trainer(strategy="ddp")', {"strategy": "ddp"})
FSDP = Remedy("use FSDP2Strategy()", {"strategy": "fsdp"})
HSDP = Remedy('use FSDP2Strategy(data_parallel_replicate_size="auto")', {"strategy": "hsdp"})
ONE_DEVICE = Remedy("use Trainer(devices=1)", {"strategy": "single_gpu"})
MORE_DEVICES = Remedy("set Trainer(devices=...)", advice="set trainer.devices")
FEWER_DEVICES = Remedy(
    "set Trainer(devices=...) to a divisor", advice="set trainer.devices to a divisor"
)

WHOLE_UPDATE = Remedy("leave LayerwiseUpdate out", {"update": "whole"})
NO_BLOCKS = Remedy("leave BlockUpdate out", {"update": "whole"})
CORRECT_ALWAYS = Remedy(
    "correct always: an entry is embeddings, head, or a regular expression that is found in the "
    "names of parameters",
    advice="correct callbacks.blocks.always: an entry is embeddings, head, or a regular expression "
    "that is found in the names of parameters",
)
FEWER_ALWAYS = Remedy(
    "take entries out of always", advice="take entries out of callbacks.blocks.always"
)
FEWER_ACTIVE = Remedy("lower active", advice="lower callbacks.blocks.active")
FREEZE_UNUSED = Remedy(
    "freeze the parameters that the loss does not depend on, with requires_grad_(False)"
)
KEPT_STATE = Remedy('use BlockUpdate(state="keep")', {"callbacks.blocks.state": "keep"})
NO_CLIPPING = Remedy("set Trainer(gradient_clip_val=None)", {"trainer.gradient_clip_val": "null"})

BF16_TRUE = Remedy('use precision="bf16-true"', {"trainer.precision": "bf16-true"})
BF16_MIXED = Remedy('use precision="bf16-mixed"', {"trainer.precision": "bf16-mixed"})
FP16_MIXED = Remedy(
    'use precision="16-mixed", which keeps the weights in float32',
    {"trainer.precision": "16-mixed"},
)
NOT_COMPILED = Remedy("do not compile the model", {"module.compile": "false"})
RENEWED_BASES = Remedy("use SubspaceIteration()", {"galore": "iteration"})
SMALL_MOVES = Remedy("use Oja()", {"galore": "online"})
NOT_ADAPTIVE = Remedy("leave adaptive out", {"galore.refresh.adaptive": "false"})
NO_DECAY = Remedy("set weight_decay=0", {"optim.weight_decay": "0"})
LOWER_RATE = Remedy("lower the learning rate", advice="lower optim.lr")
LOOK_AT_ROWS = Remedy(
    "look at these rows", advice="look at the rows with `python -m lit_ft.preview`"
)
CLIPPING = Remedy(
    "clip the gradient more (gradient_clip_val)", advice="set a smaller trainer.gradient_clip_val"
)
WIDER_PRECISION = Remedy("train in a wider precision", advice="set a wider trainer.precision")
AGAINST_NON_FINITE = (LOWER_RATE, LOOK_AT_ROWS, CLIPPING, WIDER_PRECISION)
STOP_AT_FIRST = Remedy('use StopOnNonFinite(action="stop")', {"nonfinite": "stop"})

MAX_STEPS = Remedy("set Trainer(max_steps=...)", advice="set trainer.max_steps")
MORE_STEPS = Remedy("raise max_steps of the Trainer", advice="raise trainer.max_steps")
VALIDATE_ONLY = Remedy(
    "validate alone, with Trainer.validate",
    advice="use validate_only=true, which measures the model, or give the run a length",
)
AFRESH = Remedy("start afresh", advice="start afresh, in another run_dir")
GO_ON = Remedy("go on with it", {"resume": "auto"}, "go on with it (resume=auto)")
REPLACE_RUN = Remedy("replace it", {"overwrite": "true"}, "replace it (overwrite=true)")
OTHER_FOLDER = Remedy("choose another folder", advice="choose another run_dir")
WAIT_FOR_RUN = Remedy("wait until it ends")
REPEATED_ARGUMENTS = Remedy(
    "repeat its run's own arguments (.hydra/overrides.yaml in its folder lists them)"
)
NEW_RUN = Remedy(
    "start a new run from the weights that it exported",
    advice="start a new run from its weights (python -m lit_ft.export RUN_DIR, and then "
    "model=pretrained model.name_or_path=RUN_DIR/export)",
)
SHORTER_WARMUP = Remedy(
    "lower warmup, or set it to a fraction such as 0.05",
    advice="lower schedule.warmup, or set it to a fraction such as 0.05",
)
SHORTER_ROWS = Remedy("lower max_length", advice="lower data.max_length")
LONGER_ROWS = Remedy("raise max_length", advice="raise data.max_length")
CUT_ROWS = Remedy('cut the rows with overlong="cut"', {"data.overlong": "cut"})
SPLIT_ROWS = Remedy('split the rows with overlong="split"', {"data.overlong": "split"})
CONTROL_TOKENS_AS_TEXT = Remedy(
    'use control_tokens="text", which encodes it as ordinary text', {"data.control_tokens": "text"}
)
OTHER_TEMPLATE = Remedy(
    "give a chat_template that renders it",
    advice="give a template that renders it (data.chat_template=template.jinja)",
)
DROP_UNRENDERED = Remedy(
    "train without it (drop_unrendered=True)", {"data.drop_unrendered": "true"}
)
RESIZED_EMBEDDINGS = Remedy(
    "set resize_embeddings=True on the model's source, which adds the rows",
    {"model.resize_embeddings": "true"},
)
MODELS_TOKENIZER = Remedy("encode the data with the model's own tokenizer")
RESIZED_BEFORE = Remedy(
    "call resize_token_embeddings on the model, save it with its tokenizer, and load that folder"
)
NO_STREAM = Remedy("set streaming=False", {"data.streaming": "false"})
NO_PACKING = Remedy("set packing=False", {"data.packing": "false"})
OTHER_ATTENTION = Remedy(
    "use another attn_implementation", advice="choose another model.attn_implementation"
)
ROW_BY_ROW = Remedy(
    "use flash attention with batch_size=1 and val_batch_size=1, which keeps examples apart",
    advice="use flash attention with data.batch_size=1 data.val_batch_size=1",
)
VALIDATE_ON_FIRST = Remedy(
    "set max_val_examples, to validate on the first examples",
    advice="set data.max_val_examples, to validate on the first examples",
)
VALIDATE_ON_LESS = Remedy("lower max_val_examples", advice="lower data.max_val_examples")
VALIDATE_ELSEWHERE = Remedy("give val_path", advice="give data.val_path")
NO_WORKERS = Remedy("set num_workers=0", {"data.num_workers": "0"})
NAMED_COLUMNS = Remedy(
    'name the columns, as in format=PromptCompletion(prompt="question", completion="answer")',
    advice="name the columns, as in data/format=prompt_completion data.format.prompt=question "
    "data.format.completion=answer",
)
TWO_FILES = Remedy(
    "name one file as path and another as val_path",
    advice="name one file as data.path and another as data.val_path",
)
SEVERAL_SOURCES = Remedy("set path=None with sources=[...]", {"data": "mix"})
OWN_DATA = Remedy('give path="my.jsonl"', {"data.path": "my.jsonl"})
THROUGH_DATASETS = Remedy(
    'give source_options={"split": "train"}, to read it through `datasets`',
    {"+data.source_options.split": "train"},
)
MARKED_TEMPLATE = Remedy(
    "give a chat_template that marks the assistant's turns with {% generation %} and "
    "{% endgeneration %}",
    advice="give a template that marks the assistant's turns with {% generation %} and "
    "{% endgeneration %} (data.chat_template=template.jinja)",
)
PLAIN_TEMPLATE = Remedy('use chat_template="plain"', {"data.chat_template": "plain"})
CHECKPOINTED = Remedy(
    "recompute activations in backward", {"module.activation_checkpointing": "true"}
)
GALORE_8BIT = Remedy("use an 8-bit AdamW with GaLore()", {"optim": "galore_subspace_8bit"})
LLAMA_CPP = Remedy(
    "convert the export with llama.cpp's convert_hf_to_gguf.py, which keeps the chat template"
)
INSTALL_LM_EVAL = Remedy("install it: `pip install 'lm_eval[hf]'`")
TASK_WITHOUT_NETWORK = Remedy(
    'use tasks=["docstring_choice"], which needs no network',
    advice="use eval.tasks=[docstring_choice], which needs no network",
)
FILL_CACHE = Remedy("load it once with a network, after which its data is in the cache")
FOLDER_OF_TASKS = Remedy(
    "give the folder of your own tasks as include_path",
    advice="give the folder of your own tasks as eval.include_path",
)
SCORE_EXPORT = Remedy(
    "score the exported model with `lm_eval --model hf --model_args pretrained=FOLDER`"
)
