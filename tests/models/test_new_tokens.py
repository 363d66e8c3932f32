"""Tokens that have no row in the embedding: refused, or given one that is trained and exported."""

import json
from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from peft import IA3Config, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_ft.compat.refusal import Refusal
from lit_ft.models import FromConfig, Pretrained, add_adapter, load_sharded
from tests.support.running import run_job
from tests.support.tiny_model import tiny_model
from tests.support.tokenizer import byte_level_tokenizer

ROWS = 300


def write(tmp_path: Path, *, tied: bool) -> tuple[Path, Path]:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([f"<|other_{i}|>" for i in range(ROWS - len(tokenizer))])
    tokenizer.add_tokens([f"<|speaker_{name}|>" for name in "abcd"])
    folder, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    row = {"prompt": "Who?", "completion": "<|speaker_a|> hello <|speaker_b|>"}
    rows.write_text(f"{json.dumps(row)}\n" * 20)
    return folder, rows


def job(speakers: tuple[Path, Path], name: str, *overrides: str) -> dict:
    model, rows = speakers
    return run_job(
        rows.parent / name,
        "model=pretrained",
        f"model.name_or_path={model}",
        f"data.path={rows}",
        "strategy=cpu",
        "logger=none",
        "~callbacks.samples",
        "trainer.max_steps=2",
        "optim.lr=1e-2",
        "schedule=constant",
        "schedule.warmup=0",
        *overrides,
    )


WAYS = {
    "full": ["optim=adamw"],
    "galore": ["galore.targets=[embeddings,head]", "galore.rank=8"],
    "lora": ["adapter=lora"],
    "dora": ["adapter=dora"],
    "qlora": ["adapter=qlora"],
}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "tied"),
    [
        ("full", True),
        pytest.param("full", False, marks=slow),
        pytest.param("galore", True, marks=slow),
        pytest.param("lora", True, marks=slow),
        pytest.param("lora", False, marks=slow),
        pytest.param("dora", True, marks=slow),
        pytest.param("dora", False, marks=slow),
        pytest.param("qlora", True, marks=slow),
        pytest.param("qlora", False, marks=slow),
    ],
)
def test_new_rows_are_trained_exported_and_loaded_by_transformers_alone(way, tied, tmp_path):
    speakers = write(tmp_path, tied=tied)
    resized = "model.resize_embeddings=true"
    straight = job(speakers, "straight", *WAYS[way], resized)
    folder = Path(straight["export_path"])
    exported = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert exported.config.vocab_size == len(tokenizer) == ROWS + 4
    started = Pretrained(str(speakers[0]), resize_embeddings=True).load_model(torch.float32)
    used = tokenizer.convert_tokens_to_ids(["<|speaker_a|>", "<|speaker_b|>"])
    for table in ("get_input_embeddings", "get_output_embeddings"):
        new, old = getattr(exported, table)().weight, getattr(started, table)().weight
        for row in used:
            assert (new[row] - old[row]).abs().max() > 1e-3, (table, row)
    assert tied == (exported.lm_head.weight is exported.model.embed_tokens.weight)

    job(speakers, "parts", *WAYS[way], resized, "trainer.max_steps=1")
    resumed = job(speakers, "parts", *WAYS[way], resized, "resume=auto")
    again = AutoModelForCausalLM.from_pretrained(resumed["export_path"])
    for name, weight in exported.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_ids_without_a_row_are_refused_before_the_model_loads(tmp_path, monkeypatch):
    speakers = write(tmp_path, tied=True)
    monkeypatch.setattr(Pretrained, "load_model", None)  # it is not called
    told = r"(?s)40 token ids have no row.* has 300; the largest is 301, '<\|speaker_b\|>'.*"
    with pytest.raises(CompactHydraException, match=rf"{told}model\.resize_embeddings=true"):
        job(speakers, "run")


def test_a_padding_token_without_a_row_is_refused_too(tmp_path, monkeypatch):
    """A common way to make room for padding, and the examples do not show it."""
    folder, rows = write(tmp_path, tied=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|speaker_d|>"
    tokenizer.save_pretrained(folder)
    rows.write_text(rows.read_text().replace("<|speaker_a|>", "").replace("<|speaker_b|>", ""))
    with pytest.raises(CompactHydraException, match=r"1 token ids have no row.*speaker_d"):
        job((folder, rows), "run")


def test_tokens_that_the_data_does_not_use_need_no_row(tmp_path):
    folder, rows = write(tmp_path, tied=True)
    rows.write_text('{"prompt": "Who?", "completion": "hello"}\n' * 20)
    assert job((folder, rows), "run")["status"] == "completed"


def test_a_stream_is_refused_at_the_first_batch_with_such_an_id(tmp_path):
    folder, rows = write(tmp_path, tied=True)
    good = '{"prompt": "Who?", "completion": "hello"}\n'
    rows.write_text(good * 4 + rows.read_text())
    stream = ["data.streaming=true", "data.max_val_examples=4"]
    with pytest.raises(CompactHydraException, match=r"token ids have no row.*largest is 301"):
        job((folder, rows), "run", *stream)


def test_an_embedding_with_rows_to_spare_is_left_alone(tmp_path):
    folder, _ = write(tmp_path, tied=True)
    tiny_model("llama", vocab_size=512).save_pretrained(folder)
    model = Pretrained(str(folder), resize_embeddings=True).load_model(torch.float32)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 512


def test_rows_are_the_same_in_every_process_and_near_the_mean(tmp_path):
    folder, _ = write(tmp_path, tied=True)
    source = Pretrained(str(folder), resize_embeddings=True)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(source.load_model(torch.float32).model.embed_tokens.weight)
    assert torch.equal(*models)
    mean = models[0][:ROWS].mean(0)
    torch.testing.assert_close(models[0][ROWS:], mean.expand(4, -1), rtol=0, atol=1e-3)
    assert source.build_empty().model.embed_tokens.weight.shape == models[0].shape


def test_an_embedding_that_each_rank_reads_a_part_of_gets_no_rows(tmp_path, monkeypatch):
    folder, _ = write(tmp_path, tied=True)
    source = Pretrained(str(folder), resize_embeddings=True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(load_sharded, "from_pretrained_in_shards", lambda *_, **__: "in shards")
    with pytest.raises(Refusal, match="each rank reads a part of.*resize_token_embeddings"):
        source.load_model(torch.float32, shard=lambda model: None)
    tiny_model("llama", vocab_size=512).save_pretrained(folder)  # none are needed
    assert source.load_model(torch.float32, shard=lambda model: None) == "in shards"


def test_random_weights_get_rows_too(tmp_path):
    folder, _ = write(tmp_path, tied=True)
    sizes = {
        "vocab_size": ROWS,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    source = FromConfig("llama", sizes, tokenizer=str(folder), resize_embeddings=True)
    assert source.load_model(torch.float32).config.vocab_size == ROWS + 4
    assert source.build_empty().config.vocab_size == ROWS + 4


def test_an_adapter_that_cannot_train_single_rows_is_refused(tmp_path):
    folder, _ = write(tmp_path, tied=True)
    model = Pretrained(str(folder), resize_embeddings=True).load_model(torch.float32)
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(Refusal, match="IA3Config would leave the new rows"):
        add_adapter(model, config)


def test_the_adapter_apart_fits_the_original_weights_with_the_rows(tmp_path):
    speakers = write(tmp_path, tied=True)
    folder = Path(
        job(speakers, "run", "adapter=lora", "model.resize_embeddings=true")["export_path"]
    )
    base = AutoModelForCausalLM.from_pretrained(speakers[0])
    base.resize_token_embeddings(ROWS + 4)
    apart = PeftModel.from_pretrained(base, folder / "adapter")
    ids = torch.tensor([[5, 300, 7, 301]])
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(apart(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_list_of_saved_modules_is_left_to_the_user(tmp_path):
    folder, _ = write(tmp_path, tied=False)
    model = Pretrained(str(folder), resize_embeddings=True).load_model(torch.float32)
    saved = ["embed_tokens", "lm_head"]
    adapted = add_adapter(model, LoraConfig(target_modules=["q_proj"], modules_to_save=saved))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("embed_tokens.modules_to_save" in name for name in trained)
