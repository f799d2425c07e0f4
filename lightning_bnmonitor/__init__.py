"""Exact statistics of every BatchNorm layer's inputs beside its running statistics, in TensorBoard.

Three ways in: :class:`BatchNormMonitor`, a callback for Lightning's Trainer; :class:`BatchNormTracker`, for any loop;
:func:`examine`, :func:`recalibrate` and :func:`attribute_eval_gap`, for a model and data. A :class:`Report` maps the
names of layers to :class:`LayerReport`, values per channel and a verdict. :class:`ChannelMoments` is the exact
streaming metric alone, a ``torchmetrics.Metric`` for ``(N, C, *)`` tensors of any length.

**How the moments are taken.** BatchNorm's kernel has computed the mean and the inverse standard deviation of the batch,
and autograd keeps them for the backward pass. A forward hook reads these two small tensors and puts them aside: no
kernel, no wait for the device. After 36 to 72 steps, as many as memory allows (half of that in float64, or where passes
are made), one fused update merges what was put aside, for the channels of all layers at once, in float64. A window is
kept as at most 16 blocks of consecutive batches, so that state and work do not grow with the number of batches.
``LayerReport.evidence`` counts the calls by path:

- ``calls_saved``: read off the autograd node, in eager training, be it the output's or up to six steps behind it (where
  a layer's ``forward`` has an activation, dropout, a residual connection).
- ``calls_traced``: BatchNorm's own reduction in the graph, under ``torch.compile``, which the compiler then shares.
- ``calls_pass``: a pass over the input: no graph, frozen layers, half-precision modules on the CPU, activation
  checkpointing and other saved-tensor hooks (before torch 2.10 any layer with a ``forward`` of its own), a mean above
  100 standard deviations (10 in channels-last or ``(N, C)``), ``capture="pass"``.
- ``calls_skipped``: not counted: within transforms of ``torch.func`` (``vmap``, ``grad``), while tracing or capturing a
  CUDA graph (whose replays run no hooks), or of inputs that are not ``(N, C, *)``.

**What the model is given** is looked at, too, to tell data that come in an order from weights that move: two to four
operations on 16 random projections of at most 64 samples and 256 values of each (token ids are looked up), in each of
the first 64 steps of a window, and in 16 of each doubling of their number from then on. In Lightning that is the batch
of ``on_train_batch_start``, otherwise what the root module is called with; a loop that calls parts of the model can
tell by :meth:`BatchNormTracker.see_inputs`. On several ranks it is rank 0's. What mixes or augments the batch within
the model or ``training_step`` comes later and is not seen.

**Padding** is a part of what BatchNorm normalises by, as of the population. With ``mask=`` the statistics of the values
that count are kept beside, by three passes over each input, and ``LayerReport.evidence`` says how far padding moves
those of the batches (``padding_shift``). Where no mask is given, two batches of a window are looked at for samples that
end in positions which are all alike (flag ``maybe-padded``): only of sequences ``(B, C, T)``, ``(B, T, C)`` or token
ids, and for ``BatchNorm1d``. What is compared of validation is with padding. With ``SyncBatchNorm``, whose batches are
those of all ranks, the movement is that of one rank's part: more than that of the whole.

**Several ranks** exchange in a process group of our own (gloo, on the CPU). A rank that has died gives an error; one
that never joins, the timeout of that group (30 minutes). Lightning itself has rank 0 broadcast before each batch: where
ranks have different numbers of batches, that waits for its timeout, with or without us. With FSDP, running statistics
are not shared between ranks, and those of rank 0 are judged. ``SyncBatchNorm`` on ranks with unequal batches has its
noise computed as if they were equal.

**Compiled models.** Give :class:`BatchNormTracker` what ``torch.compile`` returned, not the module inside. Attaching
compiles once more what was compiled before. What is compiled takes the moments in its graph also with
``capture="pass"``. A compiled *function* (not a module) that calls a layer several times in a step makes one graph per
call. While attached, ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`` is set, so that compiled
activation checkpointing keeps its graph. Before torch 2.10 there is no such setting: compiled activation checkpointing
is then trained otherwise while hooks are on, and refused where both can be seen (wrappers, the switches of transformers
and timm; a call of ``torch.utils.checkpoint`` in a ``forward`` cannot).

**What counts twice or differently.** A batch that was interrupted after its forward and is run again after a resume
counts twice, as it does in the running statistics (flag ``interrupted-batch``). A subclass of BatchNorm that transforms
its input before ``super().forward``, or normalises a part of the batch, reports what the kernel received, which is what
its running statistics are made of (of a ``forward`` that runs it twice, the last), and :func:`recalibrate` takes the
same; but by a pass, in compiled code, in validation and without padding it is what the module received. Copies of a
monitored model keep an inert hook. On MPS, which has no float64, state is kept on the CPU, which makes updates wait.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bnmonitor.callbacks.monitor import BatchNormMonitor
    from lightning_bnmonitor.callbacks.precise import PreciseBatchNorm
    from lightning_bnmonitor.callbacks.unhealthy import UnhealthyBatchNormError
    from lightning_bnmonitor.repair.attribution import attribute_eval_gap
    from lightning_bnmonitor.repair.eval_gap import Attribution
    from lightning_bnmonitor.repair.examination import examine
    from lightning_bnmonitor.repair.recalibration import Recalibration, recalibrate
    from lightning_bnmonitor.report.layer_report import LayerReport
    from lightning_bnmonitor.report.report import Report
    from lightning_bnmonitor.statistics.moments import ChannelMoments, Moments
    from lightning_bnmonitor.tracking.tracker import BatchNormTracker

__version__ = "0.7.0"
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
    "examine",
    "recalibrate",
]

_ROOMS = {
    "Attribution": "repair.eval_gap",
    "BatchNormMonitor": "callbacks.monitor",
    "BatchNormTracker": "tracking.tracker",
    "ChannelMoments": "statistics.moments",
    "LayerReport": "report.layer_report",
    "Moments": "statistics.moments",
    "PreciseBatchNorm": "callbacks.precise",
    "Recalibration": "repair.recalibration",
    "Report": "report.report",
    "UnhealthyBatchNormError": "callbacks.unhealthy",
    "attribute_eval_gap": "repair.attribution",
    "examine": "repair.examination",
    "recalibrate": "repair.recalibration",
}

if not TYPE_CHECKING:  # or else it would take any name to be there
    # Looked up when they are first used: what TensorBoard loads of us needs no torch, nor does the command.
    def __getattr__(name: str) -> Any:
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
