"""Adapters on FSDP2 ranks: what one process trains, saves and exports."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel
from torch import distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lit_ft import CausalLMModule
from lit_ft.callbacks import AtomicCheckpointIO, SampleGenerations
from lit_ft.distributed import FSDP2Strategy
from lit_ft.models import FromConfig, Pretrained, add_adapter, export_model
from lit_ft.models.export.whole import merged
from lit_ft.tensors.sharding import full_tensor, is_sharded
from tests.support.allocations import watched
from tests.support.joining import joined
from tests.support.ranks import WORLD
from tests.support.sharded_training import (
    LARGER,
    LLAMA,
    OPTIMIZERS,
    batches,
    load,
    save_llama,
    train,
)
from tests.support.tiny_module import trainer_of

pytestmark = pytest.mark.slow


def lora(**options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    return LoraConfig(task_type="CAUSAL_LM", **options)


LORA, RSLORA, DORA = lora(), lora(use_rslora=True), lora(use_dora=True)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"adapter": LORA, "optimizer": "adamw_fused", "accumulate": 2, "clip": 0.5},
        {"adapter": LORA, "optimizer": "sgd", "layerwise": True},
        {"adapter": RSLORA, "layerwise": True, "accumulate": 2},
        {"adapter": RSLORA, "optimizer": "adamw_8bit", "cpu_offload": True, "clip": 0.5},
        {"adapter": DORA, "activation_checkpointing": True, "clip": 0.5},
        {"adapter": DORA, "optimizer": "adafactor_fixed", "layerwise": True},
        {"adapter": lora(use_dora=True, init_lora_weights=False), "cpu_offload": True},
        {"adapter": lora(init_lora_weights="orthogonal", target_modules=["q_proj", "up_proj"])},
    ],
)
def test_two_ranks_train_what_one_does(options, tied, folder, tmp_path, on_both):
    model = folder / f"tied_{tied}"
    weights, _, loss = train(model, tmp_path / "one", sharded=False, **options)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).state_dict()
    both = on_both(train, model, tmp_path / "two", sharded=True, **options)
    for theirs, held, their_loss in both:
        assert set(held.values()) == {"DTensor"}
        assert_close(theirs, weights)
        assert their_loss == pytest.approx(loss, rel=1e-9)
        for name, weight in theirs.items():
            assert weight.equal(both[0][0][name])
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if plain in base:  # frozen
                assert weight.equal(base[plain]), name
            else:
                assert weight.any(), name  # B too, which starts at zero
    assert any("lora_B" in name for name in weights)


def test_two_replicas_of_two_ranks_train_what_one_does(folder, tmp_path, four_ranks):
    model, options = folder / "tied_True", {"adapter": DORA, "accumulate": 2, "clip": 0.5}
    weights, _, _ = train(model, tmp_path / "one", sharded=False, **options)
    four = four_ranks(train, model, tmp_path / "four", sharded=True, replicas=2, **options)
    for theirs, _, _ in four:
        assert_close(theirs, weights)
        assert all(theirs[name].equal(four[0][0][name]) for name in theirs)


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head", "q_proj"], ["c_attn", "c_proj"]])
@pytest.mark.parametrize("dora", [False, True])
def test_other_layers_than_linear_ones_are_adapted_too(targets, dora, tmp_path, on_both):
    """Embedding and head, which are in no block, and GPT-2's layers, whose weights lie across."""
    if "lm_head" in targets:
        save_llama(tmp_path / "model", tie_word_embeddings=False)
    else:
        sizes = {"vocab_size": 301, "n_embd": 24, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
        still = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0, "eos_token_id": 2}
        config = AutoConfig.for_model("gpt2", **sizes, **still)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    options = {"adapter": lora(target_modules=targets, use_dora=dora), "export": "float64"}
    weights, _, _ = train(tmp_path / "model", tmp_path / "one", sharded=False, **options)
    for theirs, _, _ in on_both(
        train, tmp_path / "model", tmp_path / "two", sharded=True, **options
    ):
        assert_close(theirs, weights)
    exports = [
        AutoModelForCausalLM.from_pretrained(tmp_path / n / "export") for n in ("one", "two")
    ]
    assert_close(exports[1].state_dict(), exports[0].state_dict())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_trains_as_on_one_and_resumes(precision, folder, tmp_path, on_both):
    model, options = folder / "tied_True", {"precision": precision, "adapter": DORA}
    alone, _, loss = train(model, tmp_path / "one", sharded=False, **options)
    (weights, _, its_loss), _ = on_both(train, model, tmp_path / "two", sharded=True, **options)
    assert its_loss["train_loss"] == pytest.approx(loss["train_loss"], rel=3e-3)
    assert {n: w.dtype for n, w in weights.items()} == {n: w.dtype for n, w in alone.items()}
    on_both(train, model, tmp_path / "part", sharded=True, steps=6, **options)
    options["resume"] = str(tmp_path / "part" / "checkpoints" / "last.ckpt")
    (resumed, _, _), _ = on_both(train, model, tmp_path / "rest", sharded=True, **options)
    assert all(resumed[name].equal(weight) for name, weight in weights.items())


def built(source, adapter, sharded=True, seed=0):
    """Return a model with an untrained adapter, on this process or spread over all ranks."""
    strategy = FSDP2Strategy() if sharded else None
    module = joined(source, strategy=strategy, adapter=adapter, seed=seed)
    module.configure_model()
    return module.model


def started(source, sharded=True, seed=0):
    """Return the model's whole weights before any step."""
    torch.manual_seed(dist.get_rank() + 1 if sharded else 0)  # which must not matter
    model = built(source, DORA, sharded, seed)
    return {name: full_tensor(p).clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("values_first", [True, False])
def test_an_adapter_starts_alike_whatever_ranks_have_drawn_before(values_first, folder, on_both):
    source = FromConfig("llama", LLAMA) if values_first else Pretrained(str(folder / "tied_False"))
    alone = started(source, sharded=False)
    for theirs in on_both(started, source):
        assert theirs.keys() == alone.keys()
        assert all(weight.equal(theirs[name]) for name, weight in alone.items())
    other = started(source, sharded=False, seed=1)
    drawn = [name for name in alone if not alone[name].equal(other[name])]
    assert drawn and all("lora_A" in name for name in drawn)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A model of another type than it is loaded in: else files would be mapped, read by nobody."""
    path = tmp_path_factory.mktemp("larger")
    config = AutoConfig.for_model("llama", **{**LLAMA, **LARGER})
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(path, max_shard_size="20MB")
    return path, 2 * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("adapter", [LORA, DORA])
def test_no_rank_ever_holds_the_whole_model(adapter, larger, on_both):
    path, size = larger
    for peak in on_both(load, path, adapter=adapter):
        assert 0.45 * size <= peak <= 0.7 * size  # a matrix of the head's size is 0.13
    assert load(path, sharded=False, adapter=adapter) > 0.95 * size  # so that it would be seen


def export_watched(path, target, sharded=True):
    """Export an untrained model; return the most bytes that this took beside the model."""
    model = built(Pretrained(str(path)), LORA, sharded)
    with torch.no_grad():
        for parameter in model.parameters():  # what is mapped becomes the process's own
            parameter.add_(1)
    with watched() as most:
        export_model(model, None, target)
    return most[0]


def test_no_rank_holds_the_whole_model_for_the_export(larger, tmp_path, four_ranks):
    path, size = larger
    for peak in four_ranks(export_watched, path, tmp_path / "four"):
        assert peak <= 0.6 * size  # a rank's part, merged, and what is written of it
    assert export_watched(path, tmp_path / "one", sharded=False) > 0.95 * size


@pytest.mark.parametrize("adapter", [LORA, DORA])
@pytest.mark.parametrize("saved_by", ["folder", "file", "one process"])
def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_anywhere(
    adapter, saved_by, folder, tmp_path, on_both, one_rank
):
    model, options = folder / "tied_True", {"adapter": adapter, "accumulate": 2, "clip": 0.5}
    weights, _, _ = train(model, tmp_path / "one", sharded=False, **options)
    if saved_by == "one process":
        train(model, tmp_path / "part", sharded=False, steps=6, **options)
    else:
        parts = {"parts": saved_by == "folder", "steps": 6}
        on_both(train, model, tmp_path / "part", sharded=True, **parts, **options)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert last.is_dir() is (saved_by == "folder")
    saved = AtomicCheckpointIO().load_checkpoint(last)["state_dict"]
    of_the_model = {name for name in saved if name.startswith("model.")}
    assert of_the_model == {f"model.{name}" for name in weights if "lora_" in name}
    options["resume"] = str(last)
    ends = [train(model, tmp_path / "rest", sharded=False, **options)]
    for ranks in (one_rank, on_both):
        ends += ranks(train, model, tmp_path / "rest", sharded=True, **options)
    for theirs, _, _ in ends:
        assert_close(theirs, weights)


def refusal(*args, **kwargs):
    try:
        train(*args, sharded=True, **kwargs)
    except (RuntimeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("parts", [True, False])
def test_a_checkpoint_of_another_adapter_is_refused_on_all_ranks(parts, folder, tmp_path, on_both):
    model, few = folder / "tied_True", lora(target_modules=["q_proj"])
    told = r"(in loading state_dict for|is of another model or adapter)(.|\n)*(?i:{})"
    for name, adapter in (("all", LORA), ("few", few)):
        on_both(train, model, tmp_path / name, sharded=True, steps=1, adapter=adapter, parts=parts)
    cases = [
        ("all", few, "unexpected"),
        ("few", LORA, "missing"),
        ("all", lora(r=2), "sizes?"),
        ("all", None, "unexpected|missing"),
    ]
    for name, adapter, named in cases:
        last = str(tmp_path / name / "checkpoints" / "last.ckpt")
        for said in on_both(refusal, model, tmp_path / "run", resume=last, adapter=adapter):
            assert re.search(told.replace("{}", named), said), (name, named)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [LORA, DORA])
def test_the_export_is_the_trained_model_and_the_adapter(adapter, tied, folder, tmp_path, on_both):
    model, options = folder / f"tied_{tied}", {"adapter": adapter, "steps": 3, "export": "float64"}
    (weights, _, _), _ = on_both(train, model, tmp_path, sharded=True, **options)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    trained = add_adapter(base, adapter)
    trained.load_state_dict(weights)
    expected = merged(trained).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert exported.config.architectures == ["LlamaForCausalLM"]
    found = exported.state_dict()
    assert found.keys() == expected.keys()
    assert all(weight.equal(expected[name]) for name, weight in found.items())
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    apart = PeftModel.from_pretrained(base, tmp_path / "export" / "adapter").state_dict()
    assert apart.keys() == weights.keys()
    assert all(weight.equal(apart[name]) for name, weight in weights.items())


def export_alone(path, target):
    export_model(built(Pretrained(str(path)), LORA), None, target, merge=False)


def test_without_merging_only_the_adapter_is_written(folder, tmp_path, on_both):
    on_both(export_alone, folder / "tied_True", tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def sample(path, run_dir, tokenizer, sharded=True):
    module = CausalLMModule(
        Pretrained(str(path), dtype="float64"), optimizer=OPTIMIZERS["adamw"], adapter=DORA
    )
    vars(module)["tokenizer"] = tokenizer
    samples = SampleGenerations(["the user"], every_n_steps=1, max_new_tokens=6)
    rank, size = (dist.get_rank(), WORLD) if sharded else (0, 1)
    strategy = {"strategy": FSDP2Strategy(), "devices": size} if sharded else {}
    trainer = trainer_of(run_dir, callbacks=[samples], use_distributed_sampler=False, **strategy)
    trainer.fit(module, StatefulDataLoader(batches(1, rank, size), batch_size=None))
    parameters = dict(module.model.named_parameters())
    assert all(is_sharded(p) is sharded for p in parameters.values())  # nothing stays gathered
    weights = {name: full_tensor(p).clone() for name, p in parameters.items()}
    return [each["text"] for each in samples.generations], weights


def test_samples_are_those_of_one_process(folder, tmp_path, tokenizer, on_both):
    texts, weights = sample(folder / "tied_False", tmp_path, tokenizer, sharded=False)
    assert len(texts) == 3 and any(texts)
    (first, theirs), (second, _) = on_both(sample, folder / "tied_False", tmp_path, tokenizer)
    assert (first, second) == (texts, [])
    assert_close(theirs, weights)


@pytest.mark.parametrize(
    ("adapter", "quantised", "named"),
    [
        (lora(init_lora_weights="pissa"), False, "init_lora_weights=pissa.*adapter=lora"),
        (lora(modules_to_save=["lm_head"]), False, r"modules_to_save.*adapter=lora"),
        (lora(bias="all"), False, r"bias.*strategy=ddp"),
        (lora(), True, "Quanti.ed weights.*adapter=lora"),
    ],
)
def test_what_does_not_work_is_refused_by_name_before_the_model_loads(
    adapter, quantised, named, tmp_path
):
    config = BitsAndBytesConfig(load_in_4bit=True) if quantised else None
    source = Pretrained(str(tmp_path / "none"), quantization_config=config)
    module = CausalLMModule(source, optimizer=OPTIMIZERS["adamw"], adapter=adapter)
    module.trainer = trainer_of(tmp_path, strategy=FSDP2Strategy(), devices=WORLD)
    with pytest.raises(MisconfigurationException) as raised:
        module.setup("fit")
    assert re.search(named, raised.value.on_command_line)


def test_an_adapter_on_one_of_two_tied_layers_is_refused(folder, tmp_path, on_both):
    adapter = lora(target_modules=["lm_head"])
    for said in on_both(refusal, folder / "tied_True", tmp_path, adapter=adapter):
        assert "lm_head is tied to another layer" in said and "target_modules" in said
