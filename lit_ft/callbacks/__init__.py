"""Lightning callbacks that work in any project."""

from lit_ft.callbacks.batch_size import AutoBatchSize
from lit_ft.callbacks.blocks import BlockUpdate
from lit_ft.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from lit_ft.callbacks.export import ExportHF
from lit_ft.callbacks.forgetting import Forgetting
from lit_ft.callbacks.galore import GaLore
from lit_ft.callbacks.layerwise import LayerwiseUpdate
from lit_ft.callbacks.learning_rate import LearningRateMonitor
from lit_ft.callbacks.lm_eval import LMEval
from lit_ft.callbacks.memory import MemoryMonitor
from lit_ft.callbacks.not_finite import StopOnNonFinite
from lit_ft.callbacks.progress import LineProgress, ProgressBar, TerminalProgress
from lit_ft.callbacks.pruning import PruneTrial
from lit_ft.callbacks.refresh import SubspaceRefresh
from lit_ft.callbacks.samples import SampleGenerations
from lit_ft.callbacks.start_table import StartTable
from lit_ft.callbacks.stop import StopOnSignal
from lit_ft.callbacks.throughput import ThroughputMonitor
from lit_ft.storage.checkpoint_io import AtomicCheckpointIO

__all__ = [
    "AtomicCheckpointIO",
    "AutoBatchSize",
    "BestCheckpoint",
    "BlockUpdate",
    "ExportHF",
    "Forgetting",
    "GaLore",
    "LMEval",
    "LastCheckpoint",
    "LayerwiseUpdate",
    "LearningRateMonitor",
    "LineProgress",
    "MemoryMonitor",
    "ProgressBar",
    "PruneTrial",
    "SampleGenerations",
    "StartTable",
    "StopOnNonFinite",
    "StopOnSignal",
    "SubspaceRefresh",
    "TerminalProgress",
    "ThroughputMonitor",
]
