"""Exact statistics of every BatchNorm layer's inputs beside its running statistics, in TensorBoard."""

from lightning_bnmonitor.alarm import UnhealthyBatchNormError
from lightning_bnmonitor.attribution import Attribution, attribute_eval_gap
from lightning_bnmonitor.callback import BatchNormMonitor
from lightning_bnmonitor.layer_report import LayerReport
from lightning_bnmonitor.moments import ChannelMoments, Moments
from lightning_bnmonitor.precise import PreciseBatchNorm
from lightning_bnmonitor.recalibration import Recalibration, recalibrate
from lightning_bnmonitor.report import Report
from lightning_bnmonitor.tracker import BatchNormTracker

__version__ = "0.1.0"
__all__ = [
    "Attribution",
    "BatchNormMonitor",
    "BatchNormTracker",
    "ChannelMoments",
    "LayerReport",
    "Moments",
    "PreciseBatchNorm",
    "Recalibration",
    "Report",
    "UnhealthyBatchNormError",
    "attribute_eval_gap",
    "recalibrate",
]
