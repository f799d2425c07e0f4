"""The examination of a model that is there: its running statistics against given data, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lightning_bnmonitor.arguments import as_patterns, check_callable_or_none, check_positive_or_auto
from lightning_bnmonitor.repair.fixed_weights import NumBatches, OnePass, agreement, without_gradients
from lightning_bnmonitor.repair.passes import Forward, forward_of, generators_as_before, run, training_only
from lightning_bnmonitor.repair.selection import FROZEN, check_initialised, select
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.discovery import find_layers


def examine(
    model: nn.Module,
    batches: Iterable[Any],
    evaluation: Iterable[Any] | None = None,
    forward: Forward | None = None,
    num_batches: NumBatches = "auto",
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    all_ranks: bool = True,
    mask: Callable[[Any], Any] | None = None,
) -> Report:
    r"""What is the matter with the BatchNorm layers of a model that is there: a trained one, an averaged one, any.

    One pass over ``batches`` at fixed weights and without gradients: BatchNorm normalises by the batch, as in training,
    and everything else is in eval mode (dropout is off). Every layer that the data reach is compared with the exact
    statistics of what it receives, those that are frozen, in eval mode or not updated, too; a layer that is frozen (in
    eval mode while the model is in training mode) normalises by its running statistics, as it does in training. With
    ``evaluation``, a pass over these in eval mode follows.

    **What it tells**: how far running statistics are off (``eval_error``), how much of that chance explains, and what
    is left in them of the initial zeros and ones (by ``momentum`` and ``num_batches_tracked``); whether a batch is too
    small (``batch_jitter``), the last one is, or the data come in an order or in groups; what is not finite; with
    ``evaluation``, what is off there (``val_error``) and whether these data differ (``val_shift``). Verdicts and
    remedies are those of a training as far as one pass can tell. Running statistics that are off for a reason which it
    cannot tell have the verdict ``misfit``. What it does not show is said at the end of the printed report.

    Nothing changes, to the bit: weights, buffers, modes, ``requires_grad``, random states (a ``DataLoader``'s
    generator, too), also after an error or an interrupt. Monitors that are attached do not count these calls. What is
    compiled runs eagerly.

    Args:
        model: The root module, in any mode. In eval mode as a whole, frozen layers cannot be told from others.
        batches: What to pass through it, a ``DataLoader`` say: training data, shuffled, in batches of the size of
            training. Iterated once. Several loaders: ``itertools.chain(*loaders)``.
        evaluation: What it is evaluated with: validation data, say. All of it is looked at: it must come to an end.
        forward: Called with the model and a batch, to run it; by default as in
            :func:`~lightning_bnmonitor.recalibrate`. What is then done as the remedies say needs it, too.
        num_batches: At most so many of ``batches``; None for all. ``"auto"`` for as many as it takes until chance in
            the exact statistics makes an error of at most 0.01 in every layer (looked at after 8 batches, and again as
            that promises), or 100 000 samples. How many that were is said in :attr:`Report.remarks`. With shuffled data
            the estimate of that error is within 20 % of the truth.
        include: ``fnmatch`` patterns of the names of layers to examine; None for all.
        exclude: ``fnmatch`` patterns of the names of layers to leave out: these are in eval mode.
        all_ranks: Whether all ranks of the default process group of ``torch.distributed``, if there is one, call this
            together, each with its own data, and get one report. That takes four collectives, four more with
            ``evaluation``, one with ``mask``, and six each time that ``"auto"`` looks.
        mask: Where inputs are padded: a function of each of ``batches`` that returns which positions count, a bool
            tensor ``(B, T)``, say. See :class:`~lightning_bnmonitor.BatchNormTracker`.

    Returns:
        The report. It is that of :attr:`Recalibration.before`, too.

    Raises:
        ValueError: If ``num_batches`` is none of these, there is no batch at all, or a layer has not been initialised
            (lazy ones, before the first call).
        TypeError: If ``include`` or ``exclude`` is neither None nor strings, or ``mask`` neither None nor a function.
        RuntimeError: If the model cannot take a batch, with its own error as the cause; or another rank has failed.

    Example::

        >>> import torch
        >>> from lightning_bnmonitor import examine
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        >>> report = examine(model, [torch.randn(512, 4) + 3 for _ in range(40)])
        >>> report["0"].flags, round(report["0"].evidence["eval_error"], 1)
        (('never-updated',), 3.0)
    """
    names = as_patterns("include", include), as_patterns("exclude", exclude)
    check_positive_or_auto("num_batches", num_batches, or_none=True)
    check_callable_or_none("mask", mask)
    found, how = find_layers(model, *names), forward or forward_of
    check_initialised(found)
    if not found:
        return Report([])
    in_eval = {layer for layer in found.values() if model.training and not layer.training}
    unchanging = select(found, in_eval, frozen=True).unchanging
    together = all_ranks and collectives.num_ranks() > 1
    seen = OnePass(model, found, unchanging, together, mask)
    in_training = [layer for name, layer in found.items() if unchanging.get(name) != FROZEN]
    with without_gradients(model):
        with agreement(together), training_only(model, in_training), generators_as_before(batches), seen.counting():
            count = run(model, seen.steps(batches, num_batches), how)
        report = seen.report()
        # Several ranks do the same, though they may not have as many batches.
        if not any(layer.num_samples for layer in report.values()) and (together or not count):
            raise ValueError("`batches` gave no batch that a BatchNorm layer received: nothing was examined.")
        if evaluation is not None:
            with agreement(together), training_only(model, ()), generators_as_before(evaluation), seen.evaluating():
                count = run(model, evaluation, how, "evaluation")
            report = seen.with_evaluation(report)
            if not count and not any("val_batches" in layer.evidence for layer in report.values()):
                raise ValueError("`evaluation` gave no batch: there is nothing to compare.")
    return report
