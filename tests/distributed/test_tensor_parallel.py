"""Two ranks that share every layer train what one process does; what cannot be cut is refused."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.optim import SGD, AdamW
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_ft import CausalLMModule
from lit_ft.callbacks import (
    ExportHF,
    GaLore,
    LastCheckpoint,
    LayerwiseUpdate,
    SampleGenerations,
    ThroughputMonitor,
)
from lit_ft.distributed import TensorParallelStrategy
from lit_ft.distributed.ranks import data_parallel_rank
from lit_ft.distributed.tensor_parallel import tensor_parallel_model
from lit_ft.models import FromConfig, Pretrained
from lit_ft.optim import MuonAdamW, stochastically_rounded
from lit_ft.optim.adafactor import RelativeStepAdafactor
from lit_ft.tensors.sharding import full_tensor
from tests.support.sharded_training import LLAMA, STEPS, batches, save_llama
from tests.support.tiny_module import trainer_of

pytestmark = pytest.mark.slow

SIZES = {
    **LLAMA,
    "num_key_value_heads": 2,
    "attention_bias": True,  # of layers cut by columns and by rows
    "mlp_bias": True,
}
# transformers' norms and softmax are in float32 in a float64 model too: where the processor sums
# parts in another order than the whole (AVX2), AdamW makes up to 2e-7 of it, SGD 2e-10.
TOLERANCE = {"adamw": 1e-6, "adamw_foreach": 1e-6, "sgd": 1e-8}
OPTIMIZERS = {
    "adamw": partial(AdamW, lr=1e-3),
    "adamw_foreach": partial(AdamW, lr=1e-3, foreach=True),  # what a GPU takes
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models as from_pretrained finds them: with tied weights and without."""
    parent = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        save_llama(parent / f"tied_{tied}", **SIZES, tie_word_embeddings=tied)
    return parent


def train(
    source,
    run_dir,
    *,
    ranks,
    optimizer="adamw",
    accumulate=1,
    clip=None,
    steps=STEPS,
    resume=None,
    export=None,
    tokenizer=None,
    layerwise=False,
    precision="32-true",
    **options,
):
    """Train in one process or on all ranks, which get the same rows; return what came of it."""
    throughput = ThroughputMonitor()
    callbacks = [LastCheckpoint(Path(run_dir) / "checkpoints", every_n_steps=100), throughput]
    if layerwise:
        callbacks.append(LayerwiseUpdate(min_grad_bytes=0))
    if export is not None:
        callbacks.append(ExportHF(Path(run_dir) / "export", dtype=export))
    samples = SampleGenerations(["the user"], every_n_steps=5, max_new_tokens=6)
    if tokenizer is not None:
        callbacks.append(samples)
    if not hasattr(source, "load_model"):
        dtype = "float64" if precision == "32-true" else None
        source = Pretrained(str(source), dtype=dtype, attn_implementation="eager")
    module = CausalLMModule(source, optimizer=OPTIMIZERS[optimizer], **options)
    vars(module)["tokenizer"] = tokenizer
    parallel = {"strategy": TensorParallelStrategy(), "devices": ranks}
    trainer = trainer_of(
        run_dir,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=callbacks,
        enable_checkpointing=True,
        precision=precision,
        use_distributed_sampler=False,
        **(parallel if ranks > 1 else {}),
    )
    data = StatefulDataLoader(batches(accumulate, 0, 1), batch_size=None)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, ckpt_path=resume)
    assert data_parallel_rank(trainer) == (0, 1)
    held = (
        {n: (p.to_local().shape, p.placements) for n, p in module.named_parameters()}
        if (ranks > 1)
        else {}
    )
    weights = {n: full_tensor(p.detach()).clone() for n, p in module.model.state_dict().items()}
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    logged = {name: value for name, value in logged.items() if name != "tok/s"}
    logged["tokens"] = throughput.tokens
    return weights, held, logged, [sample["text"] for sample in samples.generations]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw_foreach", "accumulate": 2, "clip": 0.5},
        {"optimizer": "sgd", "layerwise": True, "activation_checkpointing": True},
        {"optimizer": "adamw", "layerwise": True, "accumulate": 2},
    ],
)
def test_two_ranks_train_what_one_does(options, tied, folder, tmp_path, on_both):
    model = folder / f"tied_{tied}"
    weights, _, logged, _ = train(model, tmp_path / "one", ranks=1, **options)
    both = on_both(train, model, tmp_path / "two", ranks=2, **options)
    for theirs, held, their_log, _ in both:
        shape, placements = held["model.model.layers.0.mlp.down_proj.weight"]
        assert placements == (Shard(1),) and shape[1] < SIZES["intermediate_size"]
        assert held["model.model.norm.weight"][1] == (Replicate(),)
        assert theirs.keys() == weights.keys()
        atol = TOLERANCE[options["optimizer"]]
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=atol, msg=name)
        assert their_log == pytest.approx(logged, rel=1e-7)  # losses, norm, tokens
    for name in weights:
        assert both[0][0][name].equal(both[1][0][name])


def test_a_model_with_values_is_cut_as_one_without(tmp_path, on_both):
    source = FromConfig("llama", {**SIZES, "tie_word_embeddings": True})
    options = {"clip": 0.5, "steps": 5, "optimizer": "sgd"}
    weights, _, _, _ = train(source, tmp_path / "one", ranks=1, **options)
    for theirs, _, _, _ in on_both(train, source, tmp_path / "two", ranks=2, **options):
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-6, msg=name)


def test_what_two_ranks_save_goes_on_on_both_and_on_one(folder, tmp_path, on_both):
    model, options = folder / "tied_True", {"accumulate": 2, "clip": 0.5}
    weights, _, _, _ = train(model, tmp_path / "one", ranks=1, **options)
    on_both(train, model, tmp_path / "part", ranks=2, steps=6, **options)
    options["resume"] = str(tmp_path / "part" / "checkpoints" / "last.ckpt")
    ends = on_both(train, model, tmp_path / "two", ranks=2, **options)
    ends.append(train(model, tmp_path / "rest", ranks=1, **options))
    for theirs, *_ in ends:
        for name, weight in weights.items():
            atol = TOLERANCE["adamw"]
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_and_the_samples_are_the_trained_models(
    tied, folder, tmp_path, on_both, tokenizer: PreTrainedTokenizerFast
):
    model = folder / f"tied_{tied}"
    options = {"steps": 5, "tokenizer": tokenizer}
    _, _, _, texts = train(model, tmp_path / "one", ranks=1, **options)
    (weights, _, _, its_texts), _ = on_both(
        train, model, tmp_path, ranks=2, export="float64", **options
    )
    assert its_texts == texts
    assert tied or any(texts)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert exported.state_dict().keys() == weights.keys()
    for name, weight in exported.state_dict().items():
        assert weight.equal(weights[name]), name


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_trains_as_on_one(precision, folder, tmp_path, on_both):
    options = {"precision": precision, "clip": 0.5}
    _, _, logged, _ = train(folder / "tied_True", tmp_path / "one", ranks=1, **options)
    both = on_both(train, folder / "tied_True", tmp_path / "two", ranks=2, **options)
    for _, _, their_log, _ in both:
        assert their_log["train_loss"] == pytest.approx(logged["train_loss"], rel=3e-3)
    for name, weight in both[0][0].items():
        assert both[1][0][name].equal(weight), name  # rounded alike where it is whole


def round_columns():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    tensor_parallel_model(model, mesh)
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data.fill_(1)
    optimizer = stochastically_rounded(SGD([weight], lr=1.0), seed=0)
    weight.grad = torch.full_like(weight, 2**-9)
    optimizer.step()
    return weight.to_local().detach()


def test_ranks_round_their_columns_by_bits_of_their_own(on_both):
    first, second = on_both(round_columns)
    assert 0.1 < (first != 1).float().mean() < 0.9
    assert not first.equal(second)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": partial(RelativeStepAdafactor)}, "optim=adamw"),
        ({"optimizer": partial(MuonAdamW)}, "optim=adamw.*strategy=fsdp"),
        ({"adapter": LoraConfig(task_type="CAUSAL_LM")}, "adapter.*strategy=ddp"),
        ({"compile": True}, "module.compile=false.*strategy=ddp"),
    ],
)
def test_what_needs_weights_whole_is_refused_before_the_model_loads(options, named, tmp_path):
    module = CausalLMModule(
        Pretrained(str(tmp_path)), **{"optimizer": OPTIMIZERS["adamw"], **options}
    )
    module.trainer = trainer_of(tmp_path, strategy=TensorParallelStrategy(), devices=2)
    with pytest.raises(MisconfigurationException) as raised:
        module.setup("fit")
    assert re.search(named, raised.value.on_command_line)


@pytest.mark.parametrize(("where", "named"), [({"num_nodes": 2}, "hsdp"), ({}, "two devices")])
def test_where_it_does_not_help_is_refused_before_ranks_meet(where, named, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda _: pytest.fail("met"))
    strategy = TensorParallelStrategy()
    trainer_of(tmp_path, strategy=strategy, devices=1 + len(where), **where)
    with pytest.raises(MisconfigurationException) as raised:
        strategy.setup_environment()
    assert named in raised.value.on_command_line


def refused(model_type, **config):
    """Return what a rank is told about a model without values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, vocab_size=64, **config)
        )
    try:
        tensor_parallel_model(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    except MisconfigurationException as error:
        return error.on_command_line
    return "nothing"


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"model_type": "gpt2", "n_layer": 1}, "no tensor-parallel plan for GPT2LMHeadModel"),
        ({"model_type": "qwen3", "num_hidden_layers": 1}, "replicated_with_grad_allreduce"),
        (
            {**SIZES, "model_type": "llama", "num_key_value_heads": 1},
            "num_key_value_heads=1, which 2 devices",
        ),
        ({**SIZES, "model_type": "llama", "attention_dropout": 0.1}, "dropout"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_without_values(model, named, on_both):
    model = {name: value for name, value in model.items() if name != "vocab_size"}
    for message in on_both(refused, **model):
        assert named in message
        assert re.search("[Uu]se strategy=fsdp", message)


def with_galore(model_folder):
    module = CausalLMModule(Pretrained(str(model_folder)), optimizer=OPTIMIZERS["adamw"])
    vars(module)["tokenizer"] = None
    strategy = {"strategy": TensorParallelStrategy(), "devices": 2, "precision": "bf16-true"}
    trainer = trainer_of(model_folder, callbacks=[GaLore(rank=4)], **strategy)
    try:
        trainer.fit(module, StatefulDataLoader(batches(1, 0, 1), batch_size=None))
    except MisconfigurationException as error:
        return error.on_command_line, module.model is None
    return "nothing", False


def test_galore_is_refused_before_the_model_loads(folder, on_both):
    for message, not_loaded in on_both(with_galore, folder / "tied_True"):
        assert "strategy=fsdp" in message and "galore=none" in message
        assert not_loaded
