"""The figures of against_hf_trainer.py for people: a table and a page."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

LIT_FT, SAME, RANDOM = "lit_ft", "Trainer, same batches", "Trainer, random batches"


def rows(sides: dict[str, Any]) -> list[list[str]]:
    """Return the table's cells, one row for each side."""
    return [
        [
            name,
            f"{side['tokens_per_second']['median']:.1f}",
            f"{side['tokens_per_second']['min']:.0f}-{side['tokens_per_second']['max']:.0f}",
            f"{side['lit_ft_ratio']:.3f}",
            f"{side['runs'][0]['tokens'] / side['runs'][0]['padded_tokens']:.0%}",
            f"{side['runs'][0]['losses'][0]:.4f}",
            f"{side['runs'][0]['losses'][-1]:.4f}",
        ]
        for name, side in sides.items()
    ]


HEADINGS = ["", "tokens/s", "range", "lit_ft / this", "not padding", "first loss", "last loss"]


def as_markdown(found: dict[str, Any]) -> str:
    """Return the page."""
    settings, machine, packages = found["settings"], found["hardware"], found["versions"]
    ours = found["sides"][LIT_FT]["runs"][0]
    lines = [
        "# lit_ft against transformers' Trainer",
        "",
        f"Full fine-tuning of {settings['model']} with fused AdamW in {settings['dtype']}, batches "
        f"of {settings['batch_size']}, {settings['steps'] - settings['skipped_steps']} timed steps "
        f"after {settings['skipped_steps']}, median of {len(found['sides'][LIT_FT]['runs'])} runs "
        "in turn. Tokens are those that are not padding.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in [HEADINGS, ["---"] + ["---:"] * 6]),
        *("| " + " | ".join(cells) + " |" for cells in rows(found["sides"])),
        "",
        "*Same batches*: the Trainer reads lit_ft's examples in the order of its sampler (rows "
        "of similar length share a batch), so the first two rows compute the same thing. *Random "
        "batches*: the Trainer as it comes, with other batches and more padding.",
        "",
        f"Of the {ours['tokens']:,} tokens timed, {ours['targets'] / ours['tokens']:.0%} are "
        "targets: lit_ft computes the output head and its gradient on these alone, a chunk at a "
        "time; the Trainer's loss writes the logits of all tokens.",
        "",
        f"- Hardware: {', '.join(machine['gpus']) or machine['cpu']}, {found['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; load average before: "
        f"{found['load_average_before']}",
        "- Versions: "
        + ", ".join(
            f"{name} {packages[name]}"
            for name in ("python", "torch", "lightning", "transformers", "accelerate")
        ),
        f"- Command: `{found['command']}`",
    ]
    return "\n".join(lines) + "\n"


def show(sides: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="Full fine-tuning, fused AdamW, float32")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for cells in rows(sides):
        table.add_row(*cells)
    Console().print(table)
