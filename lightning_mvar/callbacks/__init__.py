"""Lightning callbacks: checkpoints, samples, scores and throughput during training."""

from lightning_mvar.callbacks.checkpoint import BestCheckpoint, Checkpoint
from lightning_mvar.callbacks.fid import FIDCallback
from lightning_mvar.callbacks.interruption import InterruptionCallback
from lightning_mvar.callbacks.own_prefix import OwnPrefixCallback
from lightning_mvar.callbacks.progress import StepProgressBar
from lightning_mvar.callbacks.reconstruction import ReconstructionScoresCallback
from lightning_mvar.callbacks.samples import ReconstructionsCallback, SamplesCallback
from lightning_mvar.callbacks.snapshots import SnapshotCheckpoint
from lightning_mvar.callbacks.throughput import ThroughputCallback

__all__ = [
    "BestCheckpoint",
    "Checkpoint",
    "FIDCallback",
    "InterruptionCallback",
    "OwnPrefixCallback",
    "ReconstructionScoresCallback",
    "ReconstructionsCallback",
    "SamplesCallback",
    "SnapshotCheckpoint",
    "StepProgressBar",
    "ThroughputCallback",
]
