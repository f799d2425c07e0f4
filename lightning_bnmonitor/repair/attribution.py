"""What a loss that is worse in ``eval()`` than in training mode comes from, and which layer's running statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_bnmonitor.compat import BatchNorm
from lightning_bnmonitor.repair.eval_gap import (
    BY_BATCH,
    MODULES,
    OTHER_DATA,
    OTHER_STATS,
    Attribution,
    Contribution,
    Part,
    is_cause,
)
from lightning_bnmonitor.repair.paired_losses import Loss, PairedLosses, difference_of_samples
from lightning_bnmonitor.repair.passes import Forward, forward_of, generators_as_before
from lightning_bnmonitor.repair.recalibration import Recalibration, recalibrate_layers
from lightning_bnmonitor.repair.selection import STALE, Selection, check_initialised, select
from lightning_bnmonitor.tracking.buffers import SavedBuffers
from lightning_bnmonitor.tracking.discovery import find_layers

_NEGLIGIBLE = 0.01  # share of the gap that is not taken apart further


def attribute_eval_gap(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    forward: Forward | None = None,
    progress: bool = True,
    evaluation: Iterable[Any] | None = None,
) -> Attribution:
    """What a loss that is worse in eval mode than it should be comes from, and how much of it from which layer.

    The gap is the loss in eval mode as it is, less that in eval mode with exact statistics of the same data (see
    :func:`~lightning_bnmonitor.recalibrate`) in all layers. To take it apart, exact statistics are put into one layer
    after another, the one with the largest ``eval_error`` first, and stay there, until the layers that are left explain
    less than 1 % of the gap: a pass over the data for each. What a layer explains is therefore given those before it.
    A gap that may be chance (up to two standard errors), or is less than 2 % of the loss, is not taken apart.

    What no running statistics explain is told by more passes: in eval mode with dropout on, with BatchNorm normalising
    by the batch and all else in eval mode, and in training mode. With ``evaluation``, losses in eval mode are those of
    these data, and what they cost is told apart: with exact statistics of ``batches``, with their own, and ``batches``
    themselves. Without, it takes training data to find the running statistics' part: on validation data alone, that
    includes what running statistics of training data cannot fit.

    Losses are compared batch by batch, or sample by sample, so that standard errors are those of the differences (and
    of the losses' rounding: one unit in their last place). What differs between evaluation data and ``batches`` cannot
    be compared in pairs: its standard error is that of both.

    All is left as it was, to the bit: buffers, modes, random states. On several ranks each is on its own.

    Args:
        model: The root module. Frozen layers (in eval mode while the model is in training mode) keep their statistics.
        batches: What to pass through the model. It is iterated several times and has to give the same batches in the
            same order, which a ``DataLoader`` does here, shuffling or not; what can be iterated only once is kept.
        loss: Called with the model's output and the batch: a scalar, the mean of the batch (then batches count alike),
            or a loss for each sample, ``(N,)`` (then samples do).
        forward: Called with the model and a batch, to run it; by default as in
            :func:`~lightning_bnmonitor.recalibrate`.
        progress: Whether to show a progress bar.
        evaluation: The data on which eval mode is bad, if they are not ``batches``: validation data, say.

    Returns:
        Losses, and the layers' contributions.

    Raises:
        ValueError: If there is no batch, or only one and no loss of each sample (it would have no standard error), if
            the loss has two dimensions or more, the number of losses changes from pass to pass, or a layer has not been
            initialised (lazy ones, before the first call).
        RuntimeError: If the model cannot take a batch or the loss cannot be computed, with the error as the cause.

    Example::

        >>> import torch
        >>> from lightning_bnmonitor import attribute_eval_gap
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        >>> data = [(torch.randn(32, 4) + 3, torch.zeros(32, 1)) for _ in range(8)]
        >>> loss = lambda output, batch: (output - batch[1]).square().mean(dim=1)
        >>> attribute_eval_gap(model, data, loss, progress=False).worst
        '0'
    """
    found = find_layers(model, None, None)
    check_initialised(found)
    in_eval = {layer for layer in found.values() if model.training and not layer.training}
    selection = select({name: layer for name, layer in found.items() if layer not in in_eval}, (), frozen=True)
    layers, how = selection.layers, forward or forward_of
    seen = PairedLosses(model, batches, loss, how, progress, "batches")
    evaluated = seen if evaluation is None else PairedLosses(model, evaluation, loss, how, progress, "evaluation")
    old = SavedBuffers(layers.values())
    with old.restored_at_end():
        losses, new, done = _measure(model, selection, seen, evaluated, old)
        errors = {name: report.summary()["eval_error"] for name, report in done.before.items()}
        repaired = {name: error for name, error in errors.items() if name not in done.left_alone}
        gap = evaluated.difference(losses.as_is, losses.exact)
        is_the_cause = is_cause(*gap, float(losses.as_is.mean()))
        apart = _take_apart(evaluated, layers, new, repaired, losses) if is_the_cause else ((), None)
    reasons = select(found, in_eval, frozen=False).left_alone
    has_stale = any(reasons.get(name) == STALE for name in repaired)
    return Attribution(
        eval_loss=float(losses.as_is.mean()),
        dropout_loss=float(losses.with_dropout.mean()),
        exact_loss=float(losses.exact.mean()),
        own_loss=float(losses.own.mean()),
        exact_train_loss=float(losses.exact_in_training.mean()),
        batch_loss=float(losses.by_batch.mean()),
        train_loss=float(losses.training.mean()),
        gap=gap[0],
        gap_stderr=gap[1],
        contributions=apart[0],
        rest=apart[1],
        remaining=tuple(_remaining(losses, seen, evaluated)),
        has_evaluation=evaluation is not None,
        repair=f"lightning_bnmonitor.recalibrate(model, loader{', frozen=True' if has_stale else ''})",
    )


class _Losses(NamedTuple):
    """Losses of all batches or samples, in float64; in eval mode of the evaluation data."""

    as_is: Tensor
    with_dropout: Tensor
    exact: Tensor
    own: Tensor
    exact_in_training: Tensor
    by_batch: Tensor
    training: Tensor


def _measure(
    model: nn.Module, selection: Selection, seen: PairedLosses, evaluated: PairedLosses, old: SavedBuffers
) -> tuple[_Losses, SavedBuffers, Recalibration]:
    """All passes but those that take the gap apart.

    Returns:
        The losses, the exact statistics of the training data, and how they were found. The layers have the old ones.
    """
    in_training = [module for module in model.modules() if module.training or not model.training]
    as_is = evaluated.losses("eval mode")
    with_dropout = evaluated.losses(
        "eval mode with dropout on", [module for module in in_training if not isinstance(module, BatchNorm)]
    )
    training = seen.losses("training mode", in_training)
    by_batch, done = _with_exact(model, selection, seen, "exact statistics")
    new = SavedBuffers(selection.layers.values())
    exact = own = evaluated.losses("eval mode, exact statistics")
    exact_in_training = exact
    if evaluated is not seen:
        exact_in_training = seen.losses("training data, exact statistics")
        _with_exact(model, selection, evaluated, "statistics of the evaluation data")
        own = evaluated.losses("eval mode, their own statistics")
    old.restore()
    return _Losses(as_is, with_dropout, exact, own, exact_in_training, by_batch, training), new, done


def _with_exact(
    model: nn.Module, selection: Selection, passes: PairedLosses, label: str
) -> tuple[Tensor, Recalibration]:
    """Give layers the exact statistics of the data. Returns the losses in that pass, which normalises by the batch."""
    by_batch: list[Tensor] = []
    with generators_as_before(passes.batches):
        measured = passes.measured(label, by_batch)
        done = recalibrate_layers(model, measured, passes.run_model, None, selection, all_ranks=False)
    return passes.joined(by_batch) if selection.layers else passes.losses(label), done


def _remaining(losses: _Losses, seen: PairedLosses, evaluated: PairedLosses) -> Iterable[Part]:
    """What lies between eval mode with exact statistics and training mode."""
    if evaluated is not seen:
        yield Part(OTHER_STATS, *evaluated.difference(losses.exact, losses.own))
        yield Part(OTHER_DATA, *difference_of_samples(losses.own, losses.exact_in_training))
    yield Part(BY_BATCH, *seen.difference(losses.exact_in_training, losses.by_batch))
    yield Part(MODULES, *seen.difference(losses.by_batch, losses.training))


def _take_apart(
    passes: PairedLosses,
    layers: Mapping[str, BatchNorm],
    new: SavedBuffers,
    errors: Mapping[str, float],
    losses: _Losses,
) -> tuple[tuple[Contribution, ...], Contribution | None]:
    """Put exact statistics into one layer after another, until what is left of the gap is negligible.

    Args:
        passes: Of the evaluation data.
        layers: The layers by name, with the running statistics as they were.
        new: The exact statistics.
        errors: ``eval_error`` of the layers whose running statistics the gap is due to.
        losses: With none of them, and with all.

    Returns:
        The contributions of layers, and that of the layers that are left together, None if none is.
    """
    exact = losses.exact
    gap, _ = passes.difference(losses.as_is, exact)
    scale = gap if math.isfinite(gap) else float(exact.mean())
    order = sorted(errors, key=errors.__getitem__, reverse=True)
    contributions: list[Contribution] = []
    present, left = losses.as_is, gap
    while order and not (contributions and abs(left) < _NEGLIGIBLE * abs(scale)):
        name = order.pop(0)
        new.of([layers[name]]).restore()
        following = passes.losses(f"eval mode, exact in {name}, too") if order else exact
        contributions.append(Contribution(name, errors[name], *passes.difference(present, following)))
        present = following
        left, _ = passes.difference(present, exact)
    if not order:
        return tuple(contributions), None
    what = f"{len(order)} other layer{'s' * (len(order) > 1)}"
    return tuple(contributions), Contribution(what, errors[order[0]], *passes.difference(present, exact))
