"""What is said of a layer with a verdict where that depends on its numbers: explanations and remedies."""

from __future__ import annotations

import math

from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence
from lightning_bnmonitor.diagnosis.rules import (
    differs_by_calls,
    has_unlike_groups,
    is_noisy_at_last,
    is_noisy_by_calls,
    is_of_few_samples,
    is_outrun,
    moves_with_weights,
    net_error,
)
from lightning_bnmonitor.diagnosis.sentences import OF_COPIES, RECALIBRATE

_BY_CALLS = (
    "The calls of a step differ, and the running statistics average the variances of calls, without what lies between "
    "them: eval() is off by {eval_error}, and with any momentum by about {unseen_error}."
)


def explain_non_finite(evidence: Evidence) -> list[str]:
    """Explain ``non-finite``."""
    sentences = []
    if "bad_windows_ago" in evidence:
        sentences.append(
            "It received NaN or Inf, or values whose variance overflows, {bad_windows_ago} windows ago: first in batch "
            "{first_bad_batch} of that, channel {first_bad_channel}."
        )
    elif "first_bad_batch" in evidence:
        sentences.append(
            "It received NaN or Inf, or values whose variance overflows: first in batch {first_bad_batch} of this "
            "window, channel {first_bad_channel}."
        )
    if evidence.get("non_finite_running_stats"):
        sentences.append(
            "The running statistics of {non_finite_running_stats} of {num_features} channels are not finite, or their "
            "variance is below zero: eval() returns NaN or a constant there, and stays so until they are reset."
        )
    return sentences


def cure_non_finite(evidence: Evidence) -> list[str]:
    """What to do about ``non-finite``."""
    sentences = []
    if "first_bad_batch" in evidence:
        sentences.append(
            "Find what made the values (`torch.autograd.detect_anomaly`; often the learning rate, half precision "
            "without loss scaling, or the data)."
        )
    if evidence.get("non_finite_running_stats"):
        is_updated = evidence.get("batches", 1.0) and evidence.get("updates_per_call", 1.0)
        remedy = f"Call `layer.reset_running_stats()` and {RECALIBRATE}" if is_updated else _as_sentence(RECALIBRATE)
        sentences.append(f"{remedy}: no later batch repairs them.")
    return sentences


def explain_insufficient(evidence: Evidence) -> list[str]:
    """Explain ``insufficient-data``."""
    if "assumed_updates_per_call" not in evidence:
        return [
            "With {batches} batches that updated the running statistics, chance and trouble cannot be told apart.",
            "They are {act_rmse} off this window's statistics.",
        ]
    unknown = (
        "Calls updated the running statistics {updates_per_call} times each, where {assumed_updates_per_call} was "
        "assumed: how much each batch weighs in them is not known in this window."
    )
    if "updates_per_call" not in evidence:
        unknown = (
            "The running statistics were reset within this window: how much each batch weighs in them is not known."
        )
    return [unknown, "They are {eval_error} off the present statistics."]


def cure_insufficient(evidence: Evidence) -> list[str]:
    """What to do about ``insufficient-data``."""
    if "assumed_updates_per_call" in evidence:
        return []
    return ["Train on: short windows are judged together, as soon as they have enough batches."]


def explain_averaged(evidence: Evidence) -> list[str]:
    """Explain ``averaged``."""
    sentences = ["These are the averaged weights: those that validation has, and that are saved."]
    if net_error(evidence) <= WARNING:
        sentences.append(
            "The running statistics beside them are {val_error} off what the layer received there, where chance "
            "explains {val_error_noise}."
        )
    return sentences


def explain_unused(evidence: Evidence) -> list[str]:
    """Explain ``unused``."""
    if evidence.get("calls_skipped"):
        return ["No call of it was counted in this window."]
    if evidence.get("val_alone"):
        return ["No training was seen."]
    return ["It was not called in this window while the model was in training mode."]


def explain_trained_in_eval(evidence: Evidence) -> list[str]:
    """Explain ``trained-in-eval``."""
    return [
        "It was trained in eval mode: of this window's calls {calls_in_eval_mode} came with gradients while the whole "
        "model was in eval mode, with {steps_in_eval_mode} optimizer steps, and none in training mode. It normalised "
        "by its running statistics, and these learned nothing.",
        *_still_initial(evidence),
        "They are {val_error} off what it receives in validation.",
    ]


def cure_trained_in_eval(evidence: Evidence) -> list[str]:
    """What to do about ``trained-in-eval``."""
    call = "Call `model.train()` after the code that calls `model.eval()` (often a hook that predicts or draws)"
    if _still_initial(evidence):
        return [f"{call}, and train anew: better running statistics afterwards do not help."]
    return [f"{call}, unless it is meant to keep its running statistics."]


def explain_frozen(evidence: Evidence) -> list[str]:
    """Explain ``frozen``."""
    return [
        "It normalises by its running statistics in training, too (eval mode), and these stay as they are.",
        *_still_initial(evidence),
        "Against the statistics of what it receives, that is an error of {eval_error}. Training and eval() agree; "
        "what the next layer receives is not normalised by that much.",
    ]


def cure_frozen(evidence: Evidence) -> list[str]:
    """What to do about ``frozen``."""
    if _still_initial(evidence):
        return [
            "If it is to learn, call `layer.train()` and train anew: better running statistics afterwards do not help.",
            OF_COPIES,
        ]
    return [
        f"If what it receives is no longer what its statistics are from, {RECALIBRATE} and train on, as what follows "
        "has learned with the present ones, or let it learn them (`layer.train()`)."
    ]


def explain_tiny(evidence: Evidence) -> list[str]:
    """Explain ``tiny-batch``."""
    if is_of_few_samples(evidence):
        alone = evidence["batch_size"] == 1
        who = "each sample" if alone else "batches of {batch_size} samples"
        return [
            f"Training normalises {who} alone, which takes out what {'its' if alone else 'their'} values have in "
            "common, such as brightness and contrast. The network comes to rely on that, and eval() does not do it: "
            "activations differ by {batch_jitter} standard deviations. Better running statistics do not repair that."
        ]
    return [
        "A batch has {samples_per_batch} values per channel. Their statistics jump from batch to batch (by "
        "{batch_jitter} standard deviations), and training normalises by them: the network learns under a noise that "
        "eval() does not have.",
        "The running statistics are {noise_error} off by chance alone; better ones would not repair the rest.",
    ]


def cure_tiny(evidence: Evidence) -> list[str]:
    """What to do about ``tiny-batch``."""
    if is_of_few_samples(evidence) and evidence["batch_size"] == 1:
        return [
            "Train with `nn.InstanceNorm{dimensions}d(channels, affine=True)` in its place, which does in eval() what "
            "this layer does in training (its weight and bias fit), or with `nn.GroupNorm`, or put more samples in a "
            "batch; for fine-tuning, freeze it (`layer.eval()` after every `model.train()`)."
        ]
    return [
        "Put more samples in a batch: at least sixteen values per channel. Where memory forbids that: "
        "`nn.SyncBatchNorm` over several devices, or `nn.GroupNorm`, which does not depend on the batch; for "
        "fine-tuning, freeze it (`layer.eval()` after every `model.train()`)."
    ]


_PARTS_DIFFER = (
    "its batch means differ {ordering_ratio} times as much between parts of the window as between neighbouring batches "
    "(chance explains up to {ordering_limit}), by {ordering_share} of the variance"
)
_BATCHES_DIFFER = (
    "its batch means vary {grouping_ratio} times as much as those of {batch_size} independent samples would (chance "
    "explains up to {grouping_limit}), by {grouping_share} of the variance"
)


def explain_ordered(evidence: Evidence) -> list[str]:
    """Explain ``ordered-batches``."""
    differ = _PARTS_DIFFER
    if _is_beyond_chance("grouping", evidence) and not _is_beyond_chance("ordering", evidence):
        differ = _BATCHES_DIFFER
    if "order_score" in evidence:
        return [
            f"The data come in an order, and the running statistics are those of the last part: {differ}, and so does "
            "what the model is given ({order_score} standard deviations from random order, where chance explains two)."
        ]
    return [
        f"{_as_sentence(differ)}, and a smooth movement explains but {{smooth_share}} of that.",
        "Either the data come sorted, and the running statistics are those of the last part; or the weights have moved "
        "back and forth, as after a restart of the learning rate: the layer's inputs alone do not tell.",
    ]


def explain_grouped(evidence: Evidence) -> list[str]:
    """Explain ``grouped-batches``."""
    vary = _BATCHES_DIFFER
    if _is_beyond_chance("ordering", evidence) and not _is_beyond_chance("grouping", evidence):
        vary = _PARTS_DIFFER
    if has_unlike_groups(evidence):
        who = "Each batch is of one of {groups} groups, and these differ"
        if evidence["groups"] < 2:
            who = "Batches of a group differ from the others"
        return [
            f"{who}: training normalises each batch by itself, and eval() all of them alike. That is an error of "
            "{group_shift} on the group that differs most, with perfect running statistics, too."
        ]
    removed = "Normalising by the batch removes what they have in common, which eval() does not."
    if "group_score" in evidence:
        return [
            "The samples of a batch resemble each other (from one video, patient, class or augmentation): "
            f"{vary}, and so does what the model is given ({{group_score}} standard deviations from random batches, "
            f"where chance explains two). {removed}"
        ]
    return [
        f"{_as_sentence(vary)}.",
        "Either the samples of a batch resemble each other (from one video, patient, class or augmentation), or they "
        f"share something random in the network: the layer's inputs alone do not tell. {removed}",
    ]


def _is_beyond_chance(ratio: str, evidence: Evidence) -> bool:
    return evidence.get(f"{ratio}_ratio", 0.0) > evidence.get(f"{ratio}_limit", math.inf)


def cure_order(evidence: Evidence) -> list[str]:
    """What to do about batches that are no random samples of the data."""
    if has_unlike_groups(evidence):
        return [
            "Mix the groups within each batch: one loader that draws from all of them, "
            "`DataLoader(ConcatDataset(datasets), batch_size, shuffle=True)`; an augmentation is drawn for each "
            "sample. If a batch must be of one group: BatchNorm layers of its own for each group, or `nn.GroupNorm`. "
            f"If one group alone will be evaluated, {RECALIBRATE} from a loader of that group."
        ]
    return [
        "Shuffle, so that each batch is a random sample of all data: `DataLoader(dataset, shuffle=True)`, samples "
        "rather than groups; for iterable data sets a buffer that spans the sources; random augmentations per sample. "
        "If a batch must come from one source: `nn.GroupNorm`, or freeze the layer (`layer.eval()`).",
        *(
            [f"If they are shuffled, wait until the weights settle, or {RECALIBRATE} before you evaluate."]
            if "order_score" not in evidence
            else []
        ),
    ]


def explain_noisy(evidence: Evidence) -> list[str]:
    """Explain ``noisy``."""
    if is_noisy_at_last(evidence):  # and the flag says the rest
        return ["Sampling noise alone is an error of {noise_error}."]
    if is_noisy_by_calls(evidence):
        follows = "The running statistics follow the last of a step's calls, which differ: an error of {noise_error}."
        return [follows, *([_BY_CALLS] if evidence.get("unseen_error", 0.0) > WARNING else [])]
    if "momentum" not in evidence:
        return [
            "The running statistics are the plain average of batches with {samples_per_batch} values per channel, of "
            "too few yet: sampling noise is an error of {noise_error}, which falls as training goes on."
        ]
    return [
        "The running statistics follow the last batches too closely: with an effective momentum of "
        "{effective_momentum} and {samples_per_batch} values per channel in a batch, sampling noise alone is an error "
        "of {noise_error}, however long one trains.",
        "In Keras and TensorFlow `momentum` is the weight of the old average: their {momentum} is {keras_momentum} "
        "here.",
    ]


def cure_noisy(evidence: Evidence) -> list[str]:
    """What to do about ``noisy``."""
    if is_noisy_by_calls(evidence) or (
        is_noisy_at_last(evidence) and not evidence["noise_without_last_batch"] > WARNING
    ):
        return []
    larger = f"{RECALIBRATE} before you evaluate."
    if "recommended_batch_size" in evidence:
        larger = f"use a batch size of {{recommended_batch_size}}, or {larger}"
    if "momentum" not in evidence:
        return [f"Train on, or {larger}"]
    momentum = "set `momentum={recommended_momentum}` (predicted error {recommended_error}), or "
    return _with_momentum(momentum, larger, evidence)


def explain_healthy(evidence: Evidence) -> list[str]:
    """Explain ``healthy``."""
    if differs_by_calls(evidence) and evidence.get("unseen_error", 0.0) > WARNING:
        return [_BY_CALLS]
    return [
        "The running statistics fit what it receives in training: {act_rmse} off all batches of the window (their own "
        "sampling noise is {noise_error}), and {eval_error} off the last ones, which are known to {now_error}.",
    ]


def explain_warming_up(evidence: Evidence) -> list[str]:
    """Explain ``warming-up``."""
    return [
        "The initial zeros and ones still have a weight of {initial_weight} in the running statistics: eval() is off "
        f"by {{eval_error}}{_where_noise_explains(evidence)}."
    ]


def explain_lagging(evidence: Evidence) -> list[str]:
    """Explain ``lagging``."""
    moved = "The running statistics are those of earlier batches, from which the layer's inputs have moved away"
    sentences = [f"{moved}: eval() is off by {{eval_error}}{_where_noise_explains(evidence)}."]
    if is_outrun(evidence):
        sentences = [
            f"{moved}: they move at random, and with an effective momentum of {{effective_momentum}} eval() is then "
            "off by {walk_error}, where sampling noise explains {noise_error}.",
            "Beside the last batches alone, whose average is as old, it seems to be off by {eval_error}.",
        ]
    if not moves_with_weights(evidence):
        sentences.append(
            "Whether the weights or the data have moved, or the running statistics came from other data, the inputs "
            "alone do not tell."
        )
    return sentences


def _where_noise_explains(evidence: Evidence) -> str:
    if "noise_error" in evidence:
        return ", where sampling noise explains {noise_error}"
    return " ({least_error} at least, where chance in the few batches seen explains {reference_error})"


def cure_warming_up(evidence: Evidence) -> list[str]:
    """What to do about ``warming-up``."""
    momentum = "set `momentum={recommended_momentum}` (predicted error {recommended_error}), or "
    others = f"train on for {{batches_to_go}} batches, or {RECALIBRATE} before you evaluate."
    return _with_momentum(momentum, others, evidence)


def cure_lagging(evidence: Evidence) -> list[str]:
    """What to do about ``lagging``."""
    momentum = "set `momentum={recommended_momentum}` (predicted error {recommended_error}), or "
    return _with_momentum(momentum, f"{RECALIBRATE} before you evaluate.", evidence)


def _with_momentum(momentum: str, others: str, evidence: Evidence) -> list[str]:
    remedy = momentum + others if "recommended_momentum" in evidence else others
    return [_as_sentence(remedy)]


def _as_sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _still_initial(evidence: Evidence) -> list[str]:
    if evidence.get("batches") or evidence.get("initial_weight") != 1:
        return []
    return ["They are still the initial zeros and ones: it has never normalised anything."]
