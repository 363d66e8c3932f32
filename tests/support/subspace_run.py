"""Training in subspaces by hand, without Lightning: a model, its optimizer, and one loop."""

import torch
from torch.optim import AdamW

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.subspace import Refresh, SubspaceUpdater, inject
from lit_ft.subspace.projectors import SVD, Oja, Online, Random, SubspaceIteration
from tests.support.tiny_model import tiny_model

NEVER = SubspaceIteration(every=10**6)

PROJECTORS = {
    "svd": SVD(every=3, rotates_moments=True),  # else the vectors' arbitrary signs would matter
    "subspace_iteration": SubspaceIteration(every=3),
    "online": Online(),
    "online paper": Online(starts_from_svd=True),
    "oja": Oja(every=1),
    "random": Random(every=3),
}


def batches(count, rows=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (count, rows, 10), generator=generator)
    lengths = torch.randint(1, 8, (count, rows, 1), generator=generator)
    return list(zip(ids, ids.masked_fill(torch.arange(10) < lengths, IGNORE_INDEX), strict=True))


class Run:
    """A model in subspaces, its optimizer, and what an engine does with them."""

    def __init__(self, projector, *, rank=4, optimizer=AdamW, stagger=False, model=None, **options):
        self.model = model or tiny_model("llama", tie_word_embeddings=True).double().eval()
        layers = inject(self.model, rank=rank, side=options.pop("side", "right"))
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        scale = options.pop("scale", "match_adamw")
        refresh = options.pop("refresh", Refresh(stagger=stagger))
        self.optimizer = optimizer(trainable, **{"lr": 1e-3, **options})
        self.steps = SubspaceUpdater(layers, projector, scale=scale, refresh=refresh)
        self.handle = self.steps.attach(self.optimizer)

    def step(self, ids, labels, micro_batches=1):
        targets = (labels[:, 1:] != IGNORE_INDEX).sum()
        for rows in torch.arange(len(ids)).tensor_split(micro_batches):
            loss = ChunkedCrossEntropy(chunk_tokens=64)(
                self.model, {"input_ids": ids[rows]}, labels[rows]
            )
            assert not any(layer.delta.any() for layer in self.steps.layers.values())
            (loss / targets).backward()
        self.steps.before_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, data, **options):
        for ids, labels in data:
            self.step(ids, labels, **options)
        return self

    @property
    def weights(self):
        small = {id(la.delta) for la in self.steps.layers.values()}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in small}


def assert_equal(run, other, **tolerance):
    assert run.weights.keys() == other.weights.keys()
    for name, weight in run.weights.items():
        torch.testing.assert_close(
            weight, other.weights[name], **{"rtol": 0, "atol": 0, **tolerance}, msg=name
        )
