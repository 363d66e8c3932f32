"""The table of recommended settings in docs/which-method.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from support.results import ROOT

MODELS = {
    "llama_3_2_1b": "Llama 3.2 1B",
    "llama_3_1_8b": "Llama 3.1 8B",
    "qwen3_32b": "Qwen3 32B",
}
CARDS = ("8GB", "12GB", "16GB", "24GB", "48GB", "80GB", "2x24GB", "8x80GB")
PAGE = ROOT / "docs" / "which-method.md"
_BEGIN, _END = "<!-- recommended: begin -->\n", "<!-- recommended: end -->\n"
_WORDS = {
    "module.activation_checkpointing=true": "checkpointing",
    "data.batch_size=1": "rows one by one",
    "trainer.precision=bf16-true": "weights in bfloat16",
}
# Settings that follow from others, or that only the command needs.
_LEFT_OUT = ("trainer.accumulate", "trainer.gradient_clip_val", "optim=adamw_lora")


def with_table(page: str, models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the text of a page with the table in place of an earlier one.

    Args:
        page: The text, with the two marks between which the table stands.
        models: The advice for each of `CARDS`, keyed by model.
    """
    before, _, rest = page.partition(_BEGIN)
    table = "".join(f"{line}\n" for line in _lines(models))
    return before + _BEGIN + table + _END + rest.partition(_END)[2]


def _lines(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    known = [model for model in MODELS if model in models]
    yield f"| Card | {' | '.join(MODELS[model] for model in known)} |"
    yield "| --- |" + " --- |" * len(known)
    for number, card in enumerate(CARDS):
        cells = [_cell(models[model][number]["recipes"]) for model in known]
        yield f"| {card.replace('x', ' × ').replace('GB', ' GB')} | {' | '.join(cells)} |"


def _cell(recipes: Sequence[Mapping[str, Any]]) -> str:
    if not recipes:
        return "–"
    best = recipes[0]
    settings = [one for one in best["settings"] if not one.startswith(_LEFT_OUT)]
    named = [_WORDS.get(one, f"`{one}`") for one in settings]
    return f"{', '.join(named)}: {best['peak_bytes'] / 2**30:.1f} GiB"
