"""GaLore on two FSDP2 ranks does what it does on one: law 3, with sharded weights."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_ft.callbacks import GaLore
from lit_ft.loss import ModelLoss
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.projectors import Oja, SubspaceIteration
from lit_ft.tensors.sharding import full_tensor
from tests.support.ranks import WORLD, average
from tests.support.tiny_module import trainer_of

pytestmark = pytest.mark.slow

STEPS, ROWS = 4, 8

SIZES = {  # odd ones: two ranks do not hold as many rows of each matrix
    "llama": {
        "vocab_size": 301,
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "vocab_size": 301,
        "n_embd": 26,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 37,
        "tie_word_embeddings": False,
    },
}

PROJECTORS = {"oja": Oja(every=1), "staggered": SubspaceIteration(every=2)}


def world():
    return (dist.get_rank(), WORLD) if dist.is_initialized() else (0, 1)


def whole_tensors(module):
    return {name: full_tensor(t).clone() for name, t in module.state_dict().items()}


def train(model_type, side, projector):
    """A loop of one's own: micro-batches, clipping, and the model sharded block by block."""
    rank, size = world()
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES[model_type], pad_token_id=0, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    layers = inject(model, rank=4, side=side)
    if size > 1:
        for block in getattr(model.base_model, "layers", None) or model.base_model.h:
            fully_shard(block)
        fully_shard(model)
    model.double()  # as Lightning's precision plugins do: behind the sharding
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps = SubspaceUpdater(layers, PROJECTORS[projector], all_reduce=average if size > 1 else None)
    steps.attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(3, 300, (ROWS, 10), generator=generator)
        starts = torch.randint(1, 8, (ROWS, 1), generator=generator)
        labels = ids.masked_fill(torch.arange(10) < starts, IGNORE_INDEX)
        targets = (labels[:, 1:] != IGNORE_INDEX).sum()
        # The same micro-batches on one rank as on two: transformers' norms and losses compute in
        # float32, and near directions magnify what other cuts would round otherwise.
        for rows in torch.arange(ROWS).chunk(size)[rank].chunk(2 * WORLD // size):
            loss = ModelLoss()(model, {"input_ids": ids[rows]}, labels[rows])
            (loss * size / targets).backward()  # FSDP averages
        steps.before_step(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        steps.begin_accumulation()
    assert full_tensor(norm) > 0.1  # clipped, by the norm of what all ranks hold
    return whole_tensors(model)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", SIZES)
def test_a_sharded_model_trains_as_in_one_process(on_both, model_type, side, projector):
    one = train(model_type, side, projector)
    first, second = on_both(train, model_type, side, projector)
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-9, msg=name)


class Rounded(nn.Module):
    """bfloat16 weights of more rows than one stream of random bits rounds, and few parameters."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 2500, bias=False)
        self.down = nn.Linear(2500, 16, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


def train_in_bfloat16(side):
    rank, size = world()
    torch.manual_seed(0)
    model = Rounded().bfloat16()
    layers = inject(model, rank=4, side=side)
    if size > 1:
        fully_shard(model)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    SubspaceUpdater(layers, SubspaceIteration(every=10**6)).attach(optimizer)
    for layer in layers.values():
        layer.delta.grad = torch.ones_like(layer.delta)
    optimizer.step()
    return whole_tensors(model)


@pytest.mark.parametrize("side", ["right", "left"])
def test_shards_take_the_random_bits_of_the_whole_weight(on_both, side):
    one = train_in_bfloat16(side)
    for other in on_both(train_in_bfloat16, side):
        for name, value in one.items():
            assert torch.equal(other[name], value), name


class Sharding(LightningModule):
    """Shards in a hook of its own (the way that needs nothing from lit_ft), or injects itself."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 33), nn.GELU(), nn.Linear(33, 8)).double()
        if self.way == "injects":
            inject(self.net, rank=4)
        if self.device_mesh is not None:
            self.shard_model() if self.way == "hook" else self._shard()

    def shard_model(self):
        self._shard()

    def _shard(self):
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=3e-3)


def fit(way, folder, *, rank=4, steps=STEPS, load=None, save=None, **strategy_options):
    number, size = world()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 32, generator=generator, dtype=torch.float64)
    micro_batches = [part.chunk(size)[number] for part in x.chunk(2)]
    strategy = ModelParallelStrategy(
        **{"data_parallel_size": size, "tensor_parallel_size": 1, **strategy_options}
    )
    trainer = trainer_of(
        folder,
        strategy=strategy if size > 1 else "auto",
        devices=size,
        max_steps=steps,
        accumulate_grad_batches=2,
        callbacks=[GaLore(rank=rank)],
        use_distributed_sampler=False,
    )
    module = Sharding(way)
    batches = [(rows, rows[:, :8].sin()) for rows in micro_batches] * STEPS
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    return whole_tensors(module)


@pytest.mark.parametrize("way", ["hook", "injects"])
def test_a_module_that_shards_trains_as_on_one_device(on_both, tmp_path, way):
    one = fit(way, tmp_path)
    first, second = on_both(fit, way, tmp_path)
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("in_shards", [True, False])
def test_a_sharded_run_that_stops_and_resumes_is_the_uninterrupted_one(
    on_both, tmp_path, in_shards
):
    """Law 4: bit for bit, over a move of the basis."""
    straight, _ = on_both(fit, "hook", tmp_path)
    options = {"save_distributed_checkpoint": in_shards}
    on_both(fit, "hook", tmp_path, steps=2, save=tmp_path / "two.ckpt", **options)
    resumed, _ = on_both(fit, "hook", tmp_path, load=tmp_path / "two.ckpt", **options)
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"way": "unaware"}, "shard_model"),
        ({"way": "injects", "rank": 5}, "rank=5"),
        (
            {"way": "hook", "data_parallel_size": 1, "tensor_parallel_size": 2},
            "FSDP2Strategy",
        ),
    ],
)
def test_what_cannot_work_is_refused(on_both, tmp_path, options, named):
    with pytest.raises(Exception, match=named) as raised:
        on_both(fit, folder=tmp_path, **options)
    assert type(raised.value).__name__ == "Misconfiguration"
