"""The fit that a memory plan is made of, on real tensors."""

from __future__ import annotations

from collections.abc import Callable

from hydra.utils import instantiate
from lightning.pytorch import Trainer

from lit_ft.run.arguments import composed
from lit_ft.run.fake_run import _batch, _built

SMALL = [
    "model=tiny",
    "strategy=cpu",
    "model.config.vocab_size=4096",
    "data.max_length=96",
    "trainer.precision=32-true",
    "logger=none",
]


class _Once:
    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield dict(self.batch)


def planned_fit(arguments: list[str]) -> tuple[Trainer, Callable[[], None]]:
    """Return the trainer of the fit that `plan_run` plans, and the function that fits."""
    config = composed(arguments)
    source = instantiate(config["model"], _convert_="all")
    loss = instantiate(config["loss"], _convert_="all")
    module, trainer = _built(config, source, source.load_config(), loss, None, "cpu")
    module.source = source
    data = config["data"]
    rows, length = data["batch_size"], data["max_length"]
    batch = _batch(rows, length, packed=data["packing"])
    val_batch = _batch(rows, length, packed=False)
    return trainer, lambda: trainer.fit(module, _Once(batch), _Once(val_batch))
