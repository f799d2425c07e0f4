"""Verdicts in words: what was found in a layer, and what to do about it, with its own numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from string import Formatter

_RECALIBRATE = "recompute its running statistics (`lightning_bnmonitor.recalibrate(model, loader)`)"

_EXPLANATIONS: dict[str, tuple[str, ...]] = {
    "unused": ("It was not called in this window while the model was in training mode.",),
    "no-running-stats": (
        "It has no running statistics: eval() normalises by the batch, as training does, so that a prediction depends "
        "on what else is in its batch.",
    ),
    "stale": (
        "It normalises by the batch in training, while its running statistics stay as they are. eval() uses those.",
        "Against what the layer receives in training, that is an error of {eval_error}.",
    ),
    "frozen": (
        "It is in eval mode in training, too: it normalises by its running statistics, which stay as they are.",
        "Against the statistics of what it receives, that is an error of {eval_error}. Training and eval() agree; what "
        "the next layer receives is not normalised by that much.",
    ),
    "insufficient-data": (
        "With {batches} batches that updated the running statistics, chance and trouble cannot be told apart.",
        "They are {act_rmse} off this window's statistics.",
    ),
    "tiny-batch": (
        "A batch has {samples_per_batch} values per channel. Statistics of so few values jump from batch to batch (by "
        "{jitter} standard deviations), and training normalises by them: the network learns under a noise that eval() "
        "does not have.",
        "The running statistics have an error of {noise_error} by sampling noise alone; better ones would not repair "
        "the rest.",
    ),
    "ordered-batches": (
        "The batch means of different parts of the window differ {ordering_ratio} times as much as neighbouring "
        "batches do (chance explains up to {ordering_limit}), which is {ordering_share} of the variance, and a steady "
        "movement explains but {trend_share} of that.",
        "Either the data come sorted, and the running statistics are "
        "those of the last part; or the weights have moved forth and back, as after a restart of the learning rate: "
        "the inputs alone do not tell.",
    ),
    "grouped-batches": (
        "Batch means vary {grouping_ratio} times as much as those of {batch_size} independent samples would (chance "
        "explains up to {grouping_limit}), by {grouping_share} of the variance. The samples of a batch resemble each "
        "other (from one video, patient, class or augmentation), and normalising by the batch removes what they have "
        "in common, which eval() does not. Whether it is the data or something random that a whole batch shares in the "
        "network, the inputs alone do not tell.",
    ),
    "warming-up": (
        "The initial zeros and ones still have a weight of {initial_weight} in the running statistics: eval() is off "
        "by {eval_error}, where sampling noise explains {noise_error}.",
    ),
    "lagging": (
        "The running statistics are those of earlier batches, from which the layer's inputs have moved away: eval() is "
        "off by {eval_error}, where sampling noise explains {noise_error}. Whether the weights or the data have moved, "
        "or the running statistics came from other data, the inputs alone do not tell.",
    ),
    "noisy": (
        "The running statistics follow the last batches too closely: with an effective momentum of "
        "{effective_momentum} and {samples_per_batch} values per channel in a batch, sampling noise alone is an error "
        "of {noise_error}, however long one trains.",
    ),
    "drifting": (
        "The layer's inputs move so fast that the statistics of the whole window are {drift_error} off those at its "
        "end. The running statistics follow: they are {eval_error} off what they should be now.",
    ),
    "healthy": (
        "The running statistics are right up to chance: {eval_error} off the present ones, where their sampling noise "
        "explains {noise_error} and that of the present ones {now_error}.",
    ),
}
_FLAGS = {
    "dead-channels": "{dead_channels} of {num_features} channels are dead: what they receive is constant.",
    "domain-shift": (
        "What it receives in validation is {val_shift} off what it receives in training (chance explains {val_noise}), "
        "while its running statistics and those of the layers before it fit training: the data differ, or something "
        "before it works otherwise in eval mode (dropout, augmentation, normalising by small batches)."
    ),
    "double-update": (
        "Each call updates the running statistics {updates_per_call} times, as activation checkpointing repeats it: "
        "the momentum acts as {effective_momentum}."
    ),
    "interrupted-batch": (
        "The window was resumed from a state that was saved in the middle of a training step: what was run again of it "
        "counts twice, as it does in the running statistics."
    ),
    "missed-calls": (
        "The running statistics were updated {updates_per_call} times for each call that was seen: the layer is also "
        "called where it is not monitored (while the model or the tracker pauses)."
    ),
    "not-updating": "{calls_not_updating} calls in training mode left the running statistics as they were.",
    "rank-0-only": (
        "What rank 0 received is {rank_error} off what all {ranks} ranks received: the running statistics that are "
        "saved (and given to all ranks, with DistributedDataParallel) are those of rank 0's data alone."
    ),
    "written-outside": (
        "Something else wrote the running statistics (recalibration, SWA, a loaded checkpoint, a reset): "
        "what they are made of is known from there on only."
    ),
}
_REMEDIES = {
    "no-running-stats": "Make it with `track_running_stats=True` if predictions must not depend on the batch.",
    "insufficient-data": "Take longer windows: more batches in an epoch, or a larger `every_n_epochs`.",
    "tiny-batch": (
        "Put more samples (or positions) in a batch: at least sixteen values per channel. Where memory forbids that: "
        "`nn.SyncBatchNorm` over several devices, or `nn.GroupNorm`, which does not depend on the batch; for fine-"
        "tuning, freeze the layer (`layer.eval()` in training, too)."
    ),
    "ordered-batches": (
        "Shuffle the data (`DataLoader(shuffle=True)`; for iterable data sets a buffer that spans the sources). "
        f"If they are shuffled, wait until the weights settle, or {_RECALIBRATE} before you evaluate."
    ),
    "grouped-batches": (
        "Mix the sources within each batch: shuffle samples rather than groups, and draw random augmentations per "
        "sample. If a batch must come from one source: `nn.GroupNorm`, or freeze the layer (`layer.eval()`)."
    ),
    "warming-up": (
        "train on for {batches_to_go} batches, or set `momentum=None` (the plain average of all batches), or "
        f"{_RECALIBRATE} before you evaluate."
    ),
    "lagging": f"{_RECALIBRATE} before you evaluate.",
    "noisy": f"use a batch size of {{recommended_batch_size}}, or {_RECALIBRATE} before you evaluate.",
    "drifting": (
        "Nothing to do: judge the layer by `eval_error`, not by `act_rmse`, or take shorter windows "
        "(`every_n_train_batches`)."
    ),
    "stale": (
        "If it is to learn them, set `track_running_stats=True` and a momentum above zero. If it is to keep them, call "
        f"`layer.eval()` in training, too. If they are only outdated, {_RECALIBRATE}."
    ),
    "frozen": (
        f"If what it receives is no longer what its statistics are from, {_RECALIBRATE} with this layer in training "
        "mode, or let it train (`layer.train()`)."
    ),
}
_MOMENTUM = {
    "warming-up": (
        "set `momentum={recommended_momentum}` (batches then leave a weight of (1-m)^batches to what was before them; "
        "predicted error {recommended_error}), or "
    ),
    "lagging": (
        "set `momentum={recommended_momentum}` (the best for a drift d a batch and a variance V of batches solves "
        "m^3 = d^2/V (1-m) (2-m)^2; predicted error {recommended_error}), or "
    ),
    "noisy": (
        "set `momentum={recommended_momentum}` (the noise falls with the root of m/(2-m); predicted error "
        "{recommended_error}), or "
    ),
}
_FLAG_REMEDIES = {
    "domain-shift": (
        "Prepare validation data as training data. If they are what the model will be given, recompute the running "
        "statistics from data of that kind (`lightning_bnmonitor.recalibrate(model, loader)`)."
    ),
    "double-update": "Set `momentum={compensated_momentum}` to get the effect of {momentum} (1 - (1 - m)^(1/updates)).",
    "rank-0-only": (
        "Give all ranks data of one kind (shuffle before they are split, as `DistributedSampler(shuffle=True)` does), "
        f"or convert the model with `nn.SyncBatchNorm.convert_sync_batchnorm`, or {_RECALIBRATE} over all ranks' data "
        "before you evaluate."
    ),
    "missed-calls": "Keep the layer from being called in training mode where the monitor does not count.",
}
_UNSEEN = (
    "{calls_skipped} calls could not be looked at (within transforms of torch.func, while tracing, or of other shapes "
    "than (N, C, *))."
)
_WITHOUT_WEIGHTS = (
    "Calls updated the running statistics {updates_per_call} times each, where {assumed_updates_per_call} was assumed: "
    "how much each batch weighs in them is not known in this window.",
    "They are {eval_error} off the present statistics.",
)
_AFTER_RESET = (
    "The running statistics were reset within this window: how much each batch weighs in them is not known.",
    "They are {eval_error} off the present statistics.",
)
_FEW_AVERAGED = (
    "The running statistics are the plain average of batches with {samples_per_batch} values per channel, of too few "
    "yet: sampling noise is an error of {noise_error}, which falls as training goes on."
)


def explain(verdict: str, flags: tuple[str, ...], evidence: Mapping[str, float]) -> str:
    """An explanation of a verdict and flags; all numbers in it are in ``evidence``, what is not known is left out."""
    sentences: Sequence[str]
    if verdict == "non-finite":
        sentences = _non_finite(evidence)
    elif verdict == "insufficient-data" and "assumed_updates_per_call" in evidence:
        sentences = _WITHOUT_WEIGHTS if "updates_per_call" in evidence else _AFTER_RESET
    elif verdict == "noisy" and "momentum" not in evidence:
        sentences = [_FEW_AVERAGED]
    elif verdict == "unused" and evidence.get("calls_skipped"):
        sentences = ["No call of it was counted in this window."]
    else:
        sentences = _EXPLANATIONS[verdict]
    unseen = [_UNSEEN] if evidence.get("calls_skipped") else []
    return _filled([*sentences, *unseen, *(_FLAGS[flag] for flag in flags)], evidence)


def prescribe(verdict: str, flags: tuple[str, ...], evidence: Mapping[str, float]) -> str:
    """What to do about a verdict and flags; empty if nothing."""
    sentences = [_REMEDIES[verdict]] if verdict in _REMEDIES else []
    if verdict == "noisy" and "momentum" not in evidence:
        return _filled([f"Train on, or {_REMEDIES[verdict]}"], evidence)
    if verdict == "non-finite":
        sentences = _after_non_finite(evidence)
    elif verdict == "insufficient-data" and "assumed_updates_per_call" in evidence:
        sentences = []
    elif verdict in _MOMENTUM:
        remedy = (_MOMENTUM[verdict] if "recommended_momentum" in evidence else "") + _REMEDIES[verdict]
        sentences = [remedy[0].upper() + remedy[1:]]
    sentences += [
        _FLAG_REMEDIES[flag]
        for flag in flags
        if flag in _FLAG_REMEDIES and not (flag == "double-update" and "recommended_momentum" in evidence)
    ]
    return _filled(sentences, evidence)


def _non_finite(evidence: Mapping[str, float]) -> list[str]:
    sentences = []
    if "first_bad_batch" in evidence:
        sentences.append(
            "It received NaN or Inf, or values whose variance overflows: first in batch {first_bad_batch} of this "
            "window, channel {first_bad_channel}."
        )
    if evidence.get("non_finite_running_stats"):
        sentences.append(
            "The running statistics of {non_finite_running_stats} of {num_features} channels are not finite: eval() "
            "returns NaN or a constant there, and stays so until they are reset."
        )
    return sentences


def _after_non_finite(evidence: Mapping[str, float]) -> list[str]:
    sentences = []
    if "first_bad_batch" in evidence:
        sentences.append(
            "Find what made the values (`torch.autograd.detect_anomaly`; often the learning rate, half precision "
            "without loss scaling, or the data)."
        )
    if evidence.get("non_finite_running_stats"):
        sentences.append(f"Call `layer.reset_running_stats()` and {_RECALIBRATE}: no later batch repairs them.")
    return sentences


def _filled(sentences: Sequence[str], evidence: Mapping[str, float]) -> str:
    numbers = {name: _number(value) for name, value in evidence.items() if not math.isnan(value)}
    fields = [{name for _, name, _, _ in Formatter().parse(sentence) if name} for sentence in sentences]
    known = [text for text, names in zip(sentences, fields, strict=True) if names <= numbers.keys()]
    filled = " ".join(known).format_map(numbers)
    filled = re.sub(r"(?<![\d.])1 (batch|call|time|channel)(es|s)\b", r"1 \1", filled)
    return re.sub(r"(?<![\d.])1 of (\d+) channels are dead", r"1 of \1 channels is dead", filled)


def _number(value: float) -> str:
    """Three digits, counts in full."""
    size = abs(value)
    is_count = size < 1e9 and value == int(value)
    return f"{value:.0f}" if is_count or 999.5 <= size < 1e6 else f"{value:.3g}"
