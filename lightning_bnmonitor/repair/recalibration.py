"""The repair: the exact statistics of given data, at fixed weights, written into the running statistics."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bnmonitor.arguments import as_patterns, check_positive_or_auto
from lightning_bnmonitor.compat import BatchNorm
from lightning_bnmonitor.repair.fixed_weights import NumBatches, OnePass, agreement, without_gradients
from lightning_bnmonitor.repair.passes import Forward, forward_of, run, training_only
from lightning_bnmonitor.repair.selection import (
    UNUSED,
    Selection,
    check_initialised,
    misfits_in,
    select,
    warn_of_misfits,
)
from lightning_bnmonitor.report.layer_report import LayerReport, jsonable
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.buffers import History, SavedBuffers, write_stats
from lightning_bnmonitor.tracking.discovery import find_layers
from lightning_bnmonitor.tracking.recorder import recorders_of


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    num_batches: NumBatches = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    frozen: bool = False,
    all_ranks: bool = True,
) -> Recalibration:
    r"""Replace the running statistics of a model's BatchNorm layers by the exact statistics of data.

    One pass over the data, at fixed weights and without gradients, all layers at once: BatchNorm normalises by the
    batch, as in training, and everything else is in eval mode (dropout is off). What is compiled runs eagerly.

    **What is written** is the mean and the unbiased variance of all values that a layer receives, from all batches
    pooled,

    .. math:: \mu = \frac1N \sum_t n_t \mu_t, \qquad
        \sigma^2 = \frac1{N-1} \Big(\sum_t (n_t - 1) v_t + \sum_t n_t (\mu_t - \mu)^2\Big),

    with :math:`n_t` values of mean :math:`\mu_t` and unbiased variance :math:`v_t` in batch t and :math:`N = \sum n_t`
    (merged as by Chan, Golub and LeVeque, 1983, in float64). It is not the mean of the batch variances, which BatchNorm
    itself and ``torch.optim.swa_utils.update_bn`` average: ``eval()`` normalises single values, and their variance
    includes that between batches, which those leave out. So it does not depend on how the data are split into batches,
    as far as the first layers of a network go.

    **How exact** ``eval()`` then is: for a layer that no other BatchNorm precedes, up to the rounding of the buffers
    (6e-8 of \|mean\|/std in float32). One that follows others has received activations that were normalised by the
    batch, in this pass as in training, while in ``eval()`` they are normalised by the statistics of all: that
    difference falls with the number of values per channel in a batch, and larger batches than in training do no harm.

    Nothing else changes: modes, momentum, ``num_batches_tracked``, ``requires_grad`` and random states are as before,
    and on any error, or an interrupt, so is every buffer, to the bit. Monitors that are attached do not count these
    calls, and know where the running statistics come from. (Between a forward pass and its backward pass it is too
    early: autograd finds that the running statistics have changed.)

    Args:
        model: The root module.
        batches: What to pass through the model, a ``DataLoader`` say: training data, shuffled, in batches of the size
            of training, or larger. Iterated once.
        forward: Called with the model and a batch, to run it. By default ``model(batch)`` for a tensor or an object,
            ``model(batch[0])`` for a tuple or list (inputs first, as ``update_bn`` does), ``model(**batch)`` for a
            mapping, all moved to the model's device. Mixed precision: run the model under ``torch.autocast`` in it.
        num_batches: At most so many batches; None for all; ``"auto"`` for as many as it takes until chance in the
            statistics makes an error of at most 0.01 in every layer, as in :func:`~lightning_bnmonitor.examine`: how
            many that were, and what was reached, is printed.
        include: ``fnmatch`` patterns of the names of layers to recalibrate; None for all.
        exclude: ``fnmatch`` patterns of the names of layers to leave alone, in eval mode.
        frozen: Whether to recalibrate frozen layers, too: those in eval mode while the model is in training mode, and
            stale ones, which update no running statistics in training (``track_running_stats=False``,
            ``momentum=0``). If not, a warning names those that are off by more than 0.1. In a model that is in eval
            mode as a whole frozen layers cannot be told apart, and are recalibrated: use ``exclude``.
        all_ranks: Whether all ranks of the default process group of ``torch.distributed``, if there is one, call this
            together, each with its own data: statistics are merged, and the same on all. That takes six collectives,
            whose size grows with channels, and six each time that ``"auto"`` looks; with ``SyncBatchNorm`` each rank
            needs as many batches, too.

    Returns:
        Where the running statistics stood against these data, where they stand now, and the way back.

    Raises:
        ValueError: If ``num_batches`` is not a positive integer, ``"auto"`` or None, there is no batch at all, a layer
            has not been initialised (lazy ones, before the first call), or what a layer receives, or its variance in
            the precision of its buffers, is not finite.
        TypeError: If ``include`` or ``exclude`` is neither None nor strings.
        RuntimeError: If the model cannot take a batch, with its own error as the cause, or a layer receives something
            else than ``(N, C, *)``; or another rank has failed.

    Example::

        >>> import torch
        >>> from lightning_bnmonitor import recalibrate
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        >>> batches = torch.tensor([[[1.0, 5.0], [3.0, 5.0]], [[2.0, 5.0], [2.0, 5.0]]])
        >>> result = recalibrate(model, batches)
        >>> model[0].running_mean, model[0].running_var
        (tensor([2., 5.]), tensor([0.6667, 0.0000]))
        >>> result.restore()
        >>> model[0].running_mean
        tensor([0., 0.])
    """
    names = as_patterns("include", include), as_patterns("exclude", exclude)
    found = find_layers(model, *names)
    in_eval = {layer for layer in found.values() if model.training and not layer.training}
    selection = select(found, in_eval, frozen)
    result = recalibrate_layers(model, batches, forward or forward_of, num_batches, selection, all_ranks)
    result.tell_trackers()
    if not all_ranks or collectives.rank() == 0:
        call = "recalibrate(model, loader, frozen=True)"
        warn_of_misfits("recalibrate", result.misfits, result.left_alone, call)
    return result


class Recalibration:
    """What :func:`recalibrate` has done. Printed, it is a table.

    Attributes:
        before: The running statistics as they were, against the data: one report of all ranks, as that of
            :func:`~lightning_bnmonitor.examine`, of the layers that were left alone, too.
        after: The running statistics as they were written, against the same data.
        num_batches: Batches that were run, on this rank.
        left_alone: Layers whose running statistics are as they were, by name, and why: ``"frozen"`` (in eval mode in
            training), ``"stale"`` (it normalises by the batch in training and updates nothing), ``"unused"`` (not
            called in the pass), ``"no running statistics"``.
        misfits: ``eval_error`` of the frozen and stale ones of these that are off by more than 0.1, and than chance,
            against what they received in the same pass, in eval mode.
    """

    def __init__(
        self,
        before: Report,
        after: Report,
        num_batches: int,
        left_alone: Mapping[str, str],
        misfits: Mapping[str, float],
        old: SavedBuffers,
        histories: Mapping[BatchNorm, History | None],
        precision: str = "",
    ) -> None:
        self.before = before
        self.after = after
        self.num_batches = num_batches
        self.left_alone = dict(left_alone)
        self.misfits = dict(misfits)
        self._old = old
        self._histories = dict(histories)
        self._precision = precision
        self._told = False

    def tell_trackers(self) -> None:
        """Tell attached trackers that the new running statistics stay, and what they are made of."""
        self._told = True
        for recorder in recorders_of(self._histories):
            recorder.rewritten(self._histories)

    def tell_trackers_of_loan(self) -> None:
        """Tell attached trackers between two windows what is evaluated: training goes on from what was there before."""
        for recorder in recorders_of(self._histories):
            if recorder.is_closed:
                recorder.rewritten(self._histories)

    def restore(self) -> None:
        """Put the old running statistics back, to the bit, whatever has been written since."""
        self._old.restore()
        for recorder in recorders_of(self._histories) if self._told else ():
            recorder.rewritten(dict.fromkeys(self._histories))

    def to_dict(self) -> dict[str, Any]:
        """What was done, in JSON's types: the attributes by their names."""
        done: dict[str, Any] = jsonable(
            {"num_batches": self.num_batches, "left_alone": self.left_alone, "misfits": self.misfits}
        )
        return {**done, "before": self.before.to_dict(), "after": self.after.to_dict()}

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = []
        for name, after in self.after.items():
            if name not in self.left_alone:
                before = self.before[name]
                errors = [f"{layer.summary()['eval_error']:.4f}" for layer in (before, after)]
                noise = after.evidence.get("noise_error", float("nan"))
                rows.append([name, before.verdict, *errors, f"{noise:.4f}", after.verdict, str(after.num_samples)])
        of = "" if self._precision else f" on {self.num_batches} batch{'es' * (self.num_batches != 1)}"
        done = f"{len(rows)} BatchNorm layer{'s' * (len(rows) != 1)} recalibrated{of}. {self._precision}"
        parts = [textwrap.fill(done, 120, break_long_words=False)]
        if rows:
            headers = ["layer", "before", "eval_error", "after", "noise", "now", "samples"]
            align = ("left", "left", "right", "right", "right", "left", "right")
            parts.append(tabulate(rows, headers=headers, disable_numparse=True, colalign=align))
        if self.left_alone:
            off = {name: f", eval_error {error:.4f}" for name, error in self.misfits.items()}
            listed = ", ".join(f"{name} ({why}{off.get(name, '')})" for name, why in self.left_alone.items())
            parts.append(textwrap.fill(f"Left alone: {listed}.", 120, break_long_words=False))
        return "\n\n".join(parts)


def recalibrate_layers(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    num_batches: NumBatches,
    selection: Selection,
    all_ranks: bool,
) -> Recalibration:
    """:func:`recalibrate` of selected layers."""
    check_positive_or_auto("num_batches", num_batches, or_none=True)
    layers, left_alone, aside, unchanging = selection
    check_initialised(layers)
    old = SavedBuffers(layers.values())
    if not layers and not aside:
        return Recalibration(Report([]), Report([]), 0, left_alone, {}, old, {})
    together = all_ranks and collectives.num_ranks() > 1
    seen = OnePass(model, {**layers, **aside}, unchanging, together)
    with without_gradients(model):
        with agreement(together), training_only(model, layers.values()), seen.counting():
            count = run(model, seen.steps(batches, num_batches), forward)
            seen.check_complete(layers)
        before = seen.report()
        used = {name: layers[name] for name, layer in before.items() if name in layers and layer.num_samples}
        if not count and not any(layer.num_samples for layer in before.values()):
            raise ValueError("`batches` gave no batch: nothing was measured, and nothing changed.")
        new = {layer: _new_stats(layer, before[name]) for name, layer in used.items()}
        with old.restored_on_error():
            for layer, stats in new.items():
                write_stats(layer, stats)
            after = _only(seen.report_of_averages(bool(used)), layers)
            if isinstance(num_batches, int) and count < num_batches:
                warnings.warn(
                    f"`batches` gave {count} batches, not the {num_batches} of `num_batches`: the running statistics "
                    "are those of what it gave.",
                    stacklevel=3,
                )
    histories: dict[BatchNorm, History | None] = {layer: _history(before[name]) for name, layer in used.items()}
    reasons = {**left_alone, **{name: UNUSED for name in layers if name not in used}}
    misfits = misfits_in(_only(before, aside))
    precision = seen.precision_of(before) if num_batches == "auto" else ""
    return Recalibration(before, after, count, reasons, misfits, old.of(used.values()), histories, precision)


def _only(report: Report, names: Container[str]) -> Report:
    """The reports of the layers with these names."""
    return Report([layer for name, layer in report.items() if name in names], report.rank, report.remarks)


def _new_stats(layer: BatchNorm, report: LayerReport) -> list[Tensor]:
    """The running mean and variance to write, in the buffers' precision. Raises ValueError if one is not finite."""
    new = []
    for name, values in (("running_mean", report.population_mean), ("running_var", report.population_var)):
        written = values.to(getattr(layer, name).dtype)
        bad = (~torch.isfinite(written)).nonzero().flatten().tolist()
        if bad:
            why = f"{float(values[bad[0]]):.3g} is beyond {written.dtype}"
            if report.num_samples == 1:
                why = "one value has no variance"
            elif "first_bad_batch" in report.evidence:
                channel, call = (int(report.evidence[f"first_bad_{what}"]) for what in ("channel", "batch"))
                why = f"it received what is not finite or overflows, first in call {call}, channel {channel}"
            raise ValueError(f"`{name}` of layer {report.name!r} would not be finite: {why}. Nothing was changed.")
        new.append(written)
    return new


def _history(report: LayerReport) -> History:
    """What running statistics are made of if they are those of all values together."""
    num_batches = report.evidence["batches"]  # of all ranks
    return History(0.0, 1 / report.num_samples, 1 / max(report.num_samples - num_batches, 1))
