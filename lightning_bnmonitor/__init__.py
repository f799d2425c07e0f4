"""Exact statistics of every BatchNorm layer's inputs beside its running statistics, in TensorBoard."""

from lightning_bnmonitor.callbacks.monitor import BatchNormMonitor
from lightning_bnmonitor.callbacks.precise import PreciseBatchNorm
from lightning_bnmonitor.callbacks.unhealthy import UnhealthyBatchNormError
from lightning_bnmonitor.repair.attribution import Attribution, attribute_eval_gap
from lightning_bnmonitor.repair.recalibration import Recalibration, recalibrate
from lightning_bnmonitor.report.layer_report import LayerReport
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.statistics.moments import ChannelMoments, Moments
from lightning_bnmonitor.tracking.tracker import BatchNormTracker

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
