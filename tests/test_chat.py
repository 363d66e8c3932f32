"""`python -m lit_ft.chat`: one prompt, or a conversation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from lit_ft.chat import main
from lit_ft.models import FromConfig, export_model
from tests.support.checkpoints import Poison
from tests.support.commands import TINY
from tests.support.running import run_job


@pytest.fixture
def folder(tokenizer, tmp_path):
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 4096,
    }
    torch.manual_seed(0)
    model = FromConfig("llama", config).load_model(torch.float32)
    return export_model(model, tokenizer, tmp_path / "model")


@pytest.fixture
def prompts(monkeypatch):
    """Collect the conversations that reach the tokenizer's chat template."""
    from transformers import PreTrainedTokenizerFast

    seen = []
    apply = PreTrainedTokenizerFast.apply_chat_template

    def record(self, conversation, *arguments, **options):
        seen.append([dict(message) for message in conversation])
        return apply(self, conversation, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", record)
    return seen


def typed(monkeypatch, *lines):
    answers = iter(lines)

    def type_next(prompt):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_next)


def test_one_prompt_is_answered_with_what_the_model_generates(folder, prompts, capsys):
    main([str(folder), "--prompt", "hello", "--max-new-tokens", "5", "--system", "Be brief."])
    said = capsys.readouterr().out
    assert said.strip()
    assert prompts == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    ]
    main([str(folder), "--prompt", "hello", "--max-new-tokens", "5", "--system", "Be brief."])
    assert capsys.readouterr().out == said  # greedy


def test_a_process_prints_nothing_but_the_answer(folder):
    command = ["-m", "lit_ft.chat", str(folder), "--prompt", "Hi", "--max-new-tokens=1"]
    said = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert said.stdout and not said.stderr


def test_the_tokenizer_may_take_the_memory_that_a_template_may_not(folder, monkeypatch):
    import resource

    from transformers import PreTrainedTokenizerFast

    limits = []
    call = PreTrainedTokenizerFast.__call__

    def tokenise(self, *arguments, **options):
        limits.append(resource.getrlimit(resource.RLIMIT_AS))
        return call(self, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", tokenise)
    main([str(folder), "--prompt", "one", "--max-new-tokens", "1"])
    assert set(limits) == {resource.getrlimit(resource.RLIMIT_AS)}


def test_a_conversation_remembers_until_new(folder, prompts, capsys, monkeypatch):
    typed(monkeypatch, "one", "two", "/new", "three", "")
    main([str(folder), "--max-new-tokens", "3", "--system", "S"])
    roles = [[message["role"] for message in conversation] for conversation in prompts]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert prompts[1][1]["content"] == "one" and prompts[2][1]["content"] == "three"
    assert prompts[1][2]["content"] in capsys.readouterr().out


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_end_it_without_a_traceback(folder, monkeypatch, end):
    def stop(prompt):
        raise end

    monkeypatch.setattr("builtins.input", stop)
    main([str(folder)])


def test_a_temperature_samples(folder, capsys):
    options = ["--prompt", "hello", "--max-new-tokens", "8", "--temperature", "2"]
    answers = set()
    for seed in range(3):
        torch.manual_seed(seed)
        main([str(folder), *options])
        answers.add(capsys.readouterr().out)
    assert len(answers) > 1


def test_ctrl_c_cuts_an_answer_short_and_the_conversation_goes_on(folder, prompts, monkeypatch):
    from transformers import LlamaForCausalLM

    generate = LlamaForCausalLM.generate

    def cut_short(self, *arguments, **options):
        monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "generate", cut_short)
    typed(monkeypatch, "one", "two")
    main([str(folder), "--max-new-tokens", "3"])
    assert [conversation[-1]["content"] for conversation in prompts] == ["one", "two"]
    assert len(prompts[1]) == 1


def test_a_model_without_a_template_continues_the_text(folder, tokenizer, capsys):
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    main([str(folder), "--prompt", "hello", "--max-new-tokens", "5"])
    assert capsys.readouterr().out.strip()


def test_a_finished_run_answers_with_its_export(tmp_path, capsys):
    run_job(tmp_path / "run", *TINY, "trainer.max_steps=1")
    capsys.readouterr()
    main([str(tmp_path / "run"), "--prompt", "hello", "--max-new-tokens", "3"])
    assert capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "export")
    with pytest.raises(SystemExit, match=r"python -m lit_ft\.export"):
        main([str(tmp_path / "run")])


def test_an_adapter_alone_is_told_apart_from_a_model(tmp_path):
    run_job(tmp_path / "run", *TINY, "adapter=lora", "+callbacks.export.merge=false",
            "trainer.max_steps=1")  # fmt: skip
    with pytest.raises(SystemExit, match=r"python -m lit_ft\.export"):
        main([str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="an adapter alone: give the folder of its run"):
        main([str(tmp_path / "run" / "export")])


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="neither a run's folder nor a Hugging Face model"):
        main([str(tmp_path)])


def test_an_answer_goes_back_without_the_space_that_a_template_puts_before_it(
    folder, prompts, monkeypatch
):
    typed(monkeypatch, "one", "two", "")
    monkeypatch.setattr("lit_ft.chat.reply", _says(" yes\n", prompts))
    main([str(folder)])
    assert [m["content"] for m in prompts[-1]] == ["one", "yes", "two"]


def test_an_answer_ends_with_its_turn_in_a_folder_that_does_not_say_so(
    folder, tokenizer, capsys, monkeypatch
):
    """A base model's folder with a chat template that was put there later."""
    from transformers import LlamaForCausalLM

    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    lengths, forward = [], LlamaForCausalLM.forward

    def always_the_end(self, input_ids=None, **options):
        lengths.append(input_ids.shape[1])
        output = forward(self, input_ids=input_ids, **options)
        output.logits.fill_(0)[..., tokenizer.convert_tokens_to_ids("<|endoftext|>")] = 1
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", always_the_end)
    main([str(folder), "--prompt", "hello", "--max-new-tokens", "5"])
    assert len(lengths) == 1


def _says(answer, seen):
    def reply(model, tokenizer, conversation, options):
        seen.append(conversation)
        return answer

    return reply


def test_weights_that_hold_code_are_refused_without_torchs_advice(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Poison(tmp_path / "marker")}, folder / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="names getattr, which is neither") as refused:
        main([str(folder), "--prompt", "Hi"])
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "marker").exists()


def test_a_conversation_is_with_the_run_that_has_exported_the_model(
    folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "summary.json").write_text('{"status": "completed", "config": {}}')
    folder.rename(tmp_path / "r1" / "export")
    typed(monkeypatch)
    main([str(tmp_path / "r1")])
    assert capsys.readouterr().out.startswith("r1: an empty line ends")
