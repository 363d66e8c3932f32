"""Talk to a fine-tuned model: `python -m lit_ft.chat runs/r1`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.data.rendering import CostlyTemplate, bounded_rendering
from lit_ft.data.turns import end_tokens
from lit_ft.models.base import name_of_folder
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.files import read_summary
from lit_ft.run.verb_parser import whole_number
from lit_ft.storage.model_errors import model_errors_name
from lit_ft.terminal import stage, use_live_line

Message = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer each message that the user types, or only `--prompt`, token by token."""
    options = _parser().parse_args(arguments)
    use_live_line()
    quieten_libraries()
    try:
        folder = exported_folder(options.run_dir)
    except ValueError as error:
        sys.exit(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Stated, because transformers otherwise asks on the terminal whether to run the folder's code.
    trust = {"trust_remote_code": options.trust_remote_code}
    try:
        with stage("loading the model"), model_errors_name(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, **trust)
    except (ValueError, OSError) as error:
        sys.exit(message_on_command_line(error))
    try:
        _converse(model.to(device).eval(), tokenizer, folder, options)
    except (CostlyTemplate, TemplateError) as error:
        sys.exit(message_on_command_line(error))


def _converse(model: Any, tokenizer: Any, folder: Path, options: Any) -> None:
    """Answer the prompt, or what the user types until an empty line."""
    conversation: list[Message] = []
    if options.system:
        conversation.append({"role": "system", "content": options.system})
    if options.prompt is not None:
        reply(model, tokenizer, [*conversation, _user(options.prompt)], options)
        return
    name = name_of_folder(folder)
    print(f"{name}: an empty line ends, Ctrl-C cuts an answer short, /new starts afresh.")
    start = len(conversation)
    while text := _ask():
        if text == "/new":
            del conversation[start:]
            continue
        try:
            answer = reply(model, tokenizer, [*conversation, _user(text)], options)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print()
            continue
        # A template that puts a space before answers would double the answer's own space.
        conversation += [_user(text), {"role": "assistant", "content": answer.strip()}]


def reply(model: Any, tokenizer: Any, conversation: list[Message], options: Any) -> str:
    """Stream the model's answer to standard output and return it."""
    if tokenizer.chat_template is None:
        prompt = tokenizer(conversation[-1]["content"], return_tensors="pt")
    else:
        text = _rendered(conversation, tokenizer)
        # The template has written the special tokens.
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    sampling = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    output = model.generate(
        **prompt.to(model.device),
        max_new_tokens=options.max_new_tokens,
        # Not every folder's own settings know the marker that ends the template's turns.
        eos_token_id=end_tokens(tokenizer, model.generation_config.eos_token_id) or None,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    new_tokens = output[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True))


def _rendered(conversation: list[Message], tokenizer: Any) -> str:
    try:
        with bounded_rendering(tokenizer):
            text = tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
    except (CostlyTemplate, TemplateError):
        raise
    except Exception as error:  # of the template's own code, which can be anything
        said = f"{type(error).__name__}: {error}"
        raise TemplateError(f"The chat template cannot render this chat ({said}).") from error
    if not text:
        raise TemplateError("The chat template renders this chat as an empty text.")
    return str(text)


def exported_folder(run_dir: str | Path) -> Path:
    """Return the folder of a run's exported model, or `run_dir` itself if it is such a folder.

    Raises:
        ValueError: If `run_dir` is neither a run's folder nor a model folder, or if the run has
            exported no model. The message says what to do.
    """
    run_dir = Path(run_dir)
    if (run_dir / "config.json").is_file():
        return run_dir
    if (run_dir / "adapter_config.json").is_file():
        raise ValueError(
            f"{run_dir} is an adapter alone: give the folder of its run, which has the whole "
            "model if the run exported one."
        )
    summary = read_summary(run_dir)
    if summary is None:
        raise ValueError(
            f"{run_dir} is neither a run's folder nor a Hugging Face model: give the folder of "
            "one, such as runs/r1."
        )
    exported = run_dir / "export"
    if not (exported / "config.json").is_file():
        raise ValueError(
            f"{run_dir} ({summary['status']}) has no exported model. "
            f"To export its checkpoint: python -m lit_ft.export {run_dir}"
        )
    return exported


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lit_ft.chat", description=__doc__)
    parser.add_argument("run_dir", help="a run's folder, or any Hugging Face model folder")
    parser.add_argument("--prompt", help="answer this and stop")
    parser.add_argument("--system", help="the system message; the chat template's own if not given")
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="the most tokens of an answer (256)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the default, always takes the likeliest token",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code in the model's folder, for models that bring their own",
    )
    return parser


if __name__ == "__main__":
    outlive_terminal()
    main()
