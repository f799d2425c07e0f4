"""The numbers that a verdict rests on: their names, and how they are taken from a window's analysis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.statistics import divergence
from lightning_bnmonitor.statistics.analysis import Analysis
from lightning_bnmonitor.statistics.call_contrasts import CallContrasts, call_shifts
from lightning_bnmonitor.statistics.channel_layout import BoolArray, ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.padding import Padding

Evidence = Mapping[str, float]
"""Numbers by name, as in :data:`EVIDENCE`; what could not be told is absent."""

WARNING = 0.1
"""The error of the normalised activation in ``eval()`` from which on it is worth a warning."""
ALERT = 0.25
"""From which on it is an alert: for a mean, 10 % of the signs before a ReLU flip."""
METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
"""The distances of running statistics that are summarised in one number for each layer."""

EVIDENCE: Mapping[str, str] = {
    "calls_saved": "calls whose batch moments were read off the kernel",
    "calls_traced": "calls whose batch moments were computed in a compiled graph",
    "calls_pass": "calls whose batch moments were computed by a pass over the input",
    "calls_skipped": "calls that could not be looked at and do not count: within a transform of torch.func (vmap, "
    "grad), while tracing, while a CUDA graph is captured, of fake tensors, of anything but (N, C, *)",
    "calls_not_updating": "calls in training mode that left the running statistics as they were",
    "num_features": "channels",
    "momentum": "the module's momentum",
    "keras_momentum": "1 less the module's momentum, where that may have been meant in the convention of Keras",
    "effective_momentum": "the momentum of the last call, all its updates together",
    "updates_per_call": "updates of the running statistics for each call that was to update them (1; 2 under "
    "activation checkpointing)",
    "updates_of_repeated": "the same for the calls that activation checkpointing repeats, where it repeats only some",
    "parts_per_call": "into how many parts a `forward` of its own takes a batch apart, each of which updates the "
    "running statistics",
    "assumed_updates_per_call": "what updates_per_call was assumed to be, where that was wrong",
    "eval_error": "RMS error of the normalised activation in eval(), with the weights at the window's end",
    "act_rmse": "RMS error that eval() would have made on the values of the whole window",
    "mean_shift": "RMS distance of the running mean, in population standard deviations",
    "log_var_ratio": "mean magnitude of the log of running over exact variance",
    "noise_error": "the part of eval_error that is sampling noise of the running statistics: the floor that is reached "
    "however long one trains",
    "now_error": "the part of eval_error that is noise of the present statistics, against which it is measured",
    "warmup_error": "the part of eval_error that is what is left of the initial zeros and ones",
    "lag_error": "the part of eval_error that comes from running statistics of earlier weights or data, chance taken "
    "off; 0 where it may be chance",
    "drift_error": "RMS error of the window's statistics against the present ones, chance taken off; 0 where it may "
    "be chance",
    "unseen_error": "the part of eval_error that running statistics which follow everything would have: they average "
    "the variances of batches, without the variance between these",
    "walk_error": "RMS error of running statistics with this momentum behind inputs that move at random as these do, "
    "chance taken off; 0 where it may be chance. The last batches, which eval_error is measured by, may not show it",
    "initial_weight": "weight of the initial zeros and ones in the running statistics",
    "z_mean": "RMS of the layer's z_mean: about 1 if only chance is at work",
    "z_var": "RMS of the layer's z_var: about 1 if only chance is at work",
    "max_score": "largest deviation of any channel in any of the tests, on the scale of a standard normal variable: an "
    "effect in few channels shows here",
    "batches": "batches that updated the running statistics",
    "samples_per_batch": "values per channel in such a batch",
    "batch_size": "samples in such a batch",
    "degrees_of_freedom": "of the variance between batches",
    "drift_per_batch": "how far mean and variance of the inputs move per batch",
    "jitter": "by how much mean and variance of a batch differ by sampling noise",
    "severity": "eval_error squared over jitter squared: m / (2 - m) is what momentum m makes by itself, above 1 the "
    "last batch's statistics would serve better",
    "batch_jitter": "RMS difference between an activation normalised by its batch, as in training, and by all "
    "values of the window: better running statistics do not repair it",
    "independent_values": "independent values in a batch, as the scatter of batch means shows",
    "last_batch_samples": "values per channel in the last batch of the window",
    "last_batch_share": "share of the last batch in the squared noise_error",
    "noise_without_last_batch": "what noise_error would be without the last batch",
    "call_shift": "RMS distance of the call of a step that differs most from all calls of that step",
    "call_shift_index": "which call of a step that is, counted from 1; 4 for all from the fourth on",
    "call_shift_before": "call_shift of the window before",
    "calls_per_step": "calls of the layer in a training step, where there are several",
    "calls_per_model_call": "calls of the layer for each of the outermost module around it: above 1 it stands at "
    "several places",
    "calls_in_eval_mode": "calls with gradients while the whole model was in eval mode",
    "windows": "how many windows, this one the last, the verdict rests on, if several",
    "batches_before": "those of batches that came in windows before this one",
    "least_error": "by all batches that the verdict rests on: the smaller of eval_error and act_rmse",
    "reference_error": "the part of least_error that is chance in what the layer received",
    "initial_distance": "the RMS error that the initial zeros and ones would make",
    "steps_in_eval_mode": "optimizer steps while the whole model was in eval mode",
    "ordering_ratio": "variance between parts of the window over that expected from neighbouring batches",
    "ordering_limit": "up to where chance explains ordering_ratio",
    "ordering_share": "share of the variance that lies between parts of the window",
    "smooth_share": "the part of ordering_share that is a smooth movement, as weights make it: a cubic in time",
    "border_jump": "1 if the inputs jump where this window begins, as weights do not",
    "grouping_ratio": "variance of batch means over that of as many independent samples",
    "grouping_limit": "up to where chance explains grouping_ratio",
    "grouping_share": "share of the variance by which batches differ more than by chance",
    "order_score": "by how much parts of the window differ in random projections of what the model was given, on the "
    "scale of a standard normal variable: chance explains up to 2",
    "group_score": "by how much batches differ in them more than batches of independent samples do, on that scale",
    "groups": "groups of batches that it received, as they were named: at most 8, and all others as one",
    "group_shift": "RMS error of the normalised activation that the statistics of all batches make on those of the "
    "group that differs most",
    "group_noise": "the part of group_shift that is chance; absent where groups came one after another, or with few "
    "batches: weights that move may be the reason then",
    "dead_channels": "channels whose variance is at most a thousandth of eps",
    "non_finite_channels": "channels with a value or a running statistic that is not finite, or a running variance "
    "below zero",
    "non_finite_running_stats": "channels with a running statistic that is not finite, or a running variance below "
    "zero",
    "first_bad_batch": "the first call in the window with a value that is not finite, counted from 1",
    "bad_windows_ago": "how many windows ago that was, if it is what the running statistics are still not finite of",
    "guarded_calls": "calls with a value that is not finite, of all ranks, that the guard has undone: nothing counts "
    "them",
    "first_bad_channel": "the first channel with such a value in it, counted from 0",
    "padding_batches": "calls whose mask tells what padding does, of all ranks",
    "padding_share": "share of the values in them that are padding",
    "padding_scatter": "standard deviation of that share from call to call",
    "padding_shift": "by how much padding moves, from call to call, the statistics that training normalises by, as an "
    "RMS error of the normalised activation, chance taken off; 0 where it may be chance",
    "padding_noise": "the part of that which is chance",
    "padding_offset": "RMS error of the normalised activation that statistics with padding make on the values that "
    "are none",
    "constant_ends": "share of the positions of what the model is given that lie at the end of samples and are alike "
    "there in all channels, if that looks like padding and no mask tells",
    "ranks": "how many ranks the window is of, if several",
    "one_pass": "1 if what the layer received is that of one pass of given data, at fixed weights",
    "num_updates": "updates of its running statistics so far, as it has counted them: of one pass",
    "rank_error": "RMS error that comes from rank 0's data differing from all ranks', chance taken off; 0 where it may "
    "be chance",
    "recommended_momentum": "the momentum that the remedy names",
    "recommended_error": "eval_error predicted with recommended_momentum",
    "recommended_batch_size": "the batch size that the remedy names",
    "compensated_momentum": "the momentum that has, with several updates a call, the effect of the module's",
    "dimensions": "dimensions of what it receives besides samples and channels: 2 for images",
    "batches_to_go": "batches until the initial values no longer matter",
    "val_error": "RMS error of the normalised activation that the running statistics, as they were in validation, made "
    "on what the layer received there",
    "val_error_noise": "the part of val_error that is chance",
    "added_error": "what the running statistics of this layer and of those before it are off by themselves, chance "
    "taken off: the root of the sum of the squares",
    "val_shift": "RMS over channels of the layer's val_shift",
    "val_noise": "the part of val_shift that is chance",
    "val_scatter": "RMS distance of the means of batches in validation from the mean of all, in standard deviations, "
    "of a layer that eval() normalises by the batch",
    "train_scatter": "what that is at most of random batches of the size of those of training",
    "val_non_finite": "channels that received a value in validation that is not finite",
    "val_batches": "calls in validation that were looked at",
    "val_layers_before": "BatchNorm layers before it that were called in validation",
    "val_shifted_before": "those of them for which validation differs from training, too",
    "val_alone": "1 if no layer was called in training: there was an evaluation alone",
    "val_spoiled_before": "layers before it that training normalises by what evaluation does not have: few samples, "
    "groups, parts of an order, the calls of a step",
    "averaged": "1 if it is of the averaged weights that validation had, which were not trained",
    "val_loader": "the validation loader that val_shift is of, counted from 0, if there are several",
}
"""Every number that a verdict, an explanation or a remedy may rest on, and what it is.

Errors are RMS errors of the normalised activation (whose standard deviation is 1) in ``eval()``, over the channels.
"""

_WITHOUT_BATCHES = (  # what is known of a layer that no batch updated
    *("batches", "dead_channels", "non_finite_channels", "non_finite_running_stats"),
    *("first_bad_batch", "first_bad_channel"),
)


def distances(
    population: Tensor, now: Tensor, running: Tensor, eps: Tensor, layout: ChannelLayout, comparable: BoolArray
) -> dict[str, FloatArray]:
    """:data:`METRICS` of all layers at once, ``(L,)`` each: the RMS over channels (``log_var_ratio``: mean magnitude).

    Args:
        population: Mean and unbiased variance, ``(2, C)``.
        now: The same at the end of the window, ``(2, C)``.
        running: Running statistics, ``(2, C)``.
        eps: Of each channel's layer, ``(C,)``.
        layout: Which channels are whose.
        comparable: Whether a layer was called and has running statistics, ``(L,)``.

    Returns:
        NaN where nothing can be compared; an infinite ``eval_error`` where running statistics are not finite.
    """
    mean, var = population
    exact = divergence.act_rmse(mean, var, running[0], running[1], eps)
    error = divergence.act_rmse(now[0], now[1], running[0], running[1], eps).numpy()
    shift = divergence.mean_shift(mean, var, running[0], eps).numpy()
    ratio = divergence.log_var_ratio(var, running[1], eps).numpy()
    broken = (layout.count(_is_broken(running, eps)) > 0) & comparable
    with np.errstate(all="ignore"):
        return {
            "eval_error": np.where(broken, np.inf, np.sqrt(layout.mean(error**2))),
            "act_rmse": np.sqrt(layout.mean(exact.numpy() ** 2)),
            "mean_shift": np.sqrt(layout.mean(shift**2)),
            "log_var_ratio": layout.mean(abs(ratio)),
        }


def of_several_windows(
    judged: Analysis, last: Analysis, windows: FloatArray, now: Tensor, running: Tensor, eps: Tensor
) -> Iterator[dict[str, float]]:
    """What is known of each layer by all windows that its verdict rests on: a part of its evidence.

    Args:
        judged: Of all these windows.
        last: Of the last one.
        windows: How many there are, ``(L,)``.
        now: Mean and unbiased variance at the end of the last one, by that alone, ``(2, C)``.
        running: Running statistics, ``(2, C)``.
        eps: Of each channel's layer, ``(C,)``.
    """
    layout = judged.layout
    present = torch.where(torch.from_numpy(layout.spread(windows)) > 1, torch.from_numpy(judged.now), now)
    with np.errstate(all="ignore"):
        of_all, of_now = (
            np.sqrt(layout.mean(divergence.act_rmse(mean, var, running[0], running[1], eps).numpy() ** 2))
            for mean, var in (torch.from_numpy(judged.population), present)
        )
    least, before = np.fmin(of_all, of_now), judged.num_batches - last.num_batches
    for error, num, batches in zip(least.tolist(), windows.tolist(), before.tolist(), strict=True):
        known = {"least_error": error} if math.isfinite(error) else {}
        yield known | ({"windows": num, "batches_before": batches} if num > 1 else {})


def observations(
    analysis: Analysis, population: Tensor, running: Tensor, has_running_stats: BoolArray, eps: Tensor
) -> Iterator[dict[str, float]]:
    """What a window's numbers say of each layer: a part of its evidence.

    Args:
        analysis: Of the window.
        population: Mean and unbiased variance, ``(2, C)``.
        running: Running statistics, ``(2, C)``.
        has_running_stats: Whether a layer has them, ``(L,)``.
        eps: Of each channel's layer, ``(C,)``.
    """
    layout = analysis.layout
    # A guard leaves bad batches out: the population is that of the others then, if there are any.
    bad_values = np.isfinite(analysis.first_bad) & ~torch.isfinite(population).all(dim=0).numpy()
    with np.errstate(all="ignore"):
        bad_running = _is_broken(running, eps) & (layout.spread(has_running_stats) > 0)
        columns = {
            "batches": analysis.num_batches,
            "samples_per_batch": analysis.samples_per_batch,
            "batch_size": analysis.batch_size,
            "degrees_of_freedom": analysis.dof,
            "initial_weight": analysis.initial_weight,
            "noise_error": analysis.noise_error,
            "now_error": analysis.now_error,
            "warmup_error": analysis.warmup_error,
            "lag_error": analysis.lag_error,
            "drift_error": analysis.drift_error,
            "unseen_error": analysis.unseen_error,
            "walk_error": analysis.walk_error,
            "z_mean": np.sqrt(layout.mean(analysis.z[0] ** 2)),
            "z_var": np.sqrt(layout.mean(analysis.z[1] ** 2)),
            "max_score": analysis.max_score,
            "drift_per_batch": analysis.slope,
            "reference_error": analysis.reference_error,
            "initial_distance": analysis.initial_distance,
            "jitter": analysis.jitter,
            "last_batch_samples": analysis.last_batch.num_samples,
            "last_batch_share": analysis.last_batch.share,
            "noise_without_last_batch": analysis.last_batch.without,
            **analysis.batching._asdict(),
            "dead_channels": layout.count(divergence.is_dead(population[1], eps).numpy()),
            "non_finite_channels": layout.count(bad_values | bad_running),
            "non_finite_running_stats": layout.count(bad_running),
        }
        first, channel = layout.first(analysis.first_bad)
    table = np.array(list(columns.values()))
    where = zip(np.isfinite(table).all(axis=0).tolist(), first.tolist(), channel.tolist(), strict=True)
    for values, (is_complete, batch, bad_channel) in zip(table.T.tolist(), where, strict=True):
        known = dict(zip(columns, values, strict=True))
        if not is_complete:
            known = {name: value for name, value in known.items() if math.isfinite(value)}
        if batch < math.inf:
            known |= {"first_bad_batch": batch, "first_bad_channel": bad_channel}
        if not known["batches"]:
            known = {name: value for name, value in known.items() if name in _WITHOUT_BATCHES}
        yield known


def _is_broken(running: Tensor, eps: Tensor) -> BoolArray:
    """Of which channels running statistics make NaN or a constant of what is normalised by them, ``(C,)``."""
    broken: BoolArray = (~torch.isfinite(running).all(dim=0) | (running[1] + eps < 0)).numpy()
    return broken


def of_padding(padding: Padding) -> Iterator[dict[str, float]]:
    """What padding does to each layer: a part of its evidence."""
    names = ("batches", "share", "scatter", "shift", "noise", "offset")
    for values in zip(*(getattr(padding, name).tolist() for name in names), strict=True):
        known = {f"padding_{name}": value for name, value in zip(names, values, strict=True) if math.isfinite(value)}
        yield known


def calls_apart(contrasts: CallContrasts | None, scaled: Tensor, layout: ChannelLayout) -> list[dict[str, float]]:
    """How far the calls of a step are apart, of each layer: a part of its evidence.

    Args:
        contrasts: Of those layers that are called several times in a step, with several ranks those of rank 0; None if
            there are none.
        scaled: Population variance plus ``eps``, ``(C,)``.
        layout: Which channels are whose.
    """
    evidence: list[dict[str, float]] = [{} for _ in range(layout.num_layers)]
    if contrasts is None:
        return evidence
    own = ChannelLayout(layout.widths[contrasts.layers])
    channels = layout.columns(np.array(contrasts.layers))
    shift, kind, calls = call_shifts(contrasts, own, scaled.numpy()[channels])
    for layer, *values in zip(contrasts.layers, shift.tolist(), kind.tolist(), calls.tolist(), strict=True):
        if math.isfinite(values[0]):
            evidence[layer] = dict(zip(("call_shift", "call_shift_index", "calls_per_step"), values, strict=True))
    return evidence
