"""The flags that can stand beside a verdict: one object each.

To add one, add an object to the table below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_bnmonitor.diagnosis import rules, validation_words
from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence
from lightning_bnmonitor.diagnosis.sentences import RECALIBRATE, Statement


@dataclass(frozen=True, kw_only=True)
class Flag(Statement):
    """Something that can be said of a layer besides its verdict."""

    rule: Callable[[Circumstances, Evidence], bool] | None
    """Whether it holds; None if the window alone does not tell (see :mod:`.validation`)."""
    attention: Callable[[Evidence], bool] = lambda _: False
    """Whether something should be done about it, whatever the verdict."""


def _explain_last_batch(evidence: Evidence) -> list[str]:
    sentences = [
        "The last batch is small: {last_batch_samples} values per channel, where the mean is {samples_per_batch}."
    ]
    if rules.is_noisy_at_last(evidence):
        sentences.append(
            "It weighs as much as any other, so that sampling noise is an error of {noise_error}; without it, of "
            "{noise_without_last_batch}."
        )
    if rules.is_tiny_at_last(evidence):
        sentences.append("Normalised by so few, its gradients spoil the weights, too.")
    return sentences


def _explain_repeats(evidence: Evidence) -> list[str]:
    if "updates_of_repeated" in evidence:
        return [
            "Activation checkpointing repeats some of its calls, which update the running statistics "
            "{updates_of_repeated} times, and others once: {updates_per_call} times on average."
        ]
    why = "activation checkpointing repeats it"
    if "parts_per_call" in evidence:
        why = "its own `forward` normalises the batch in parts"
    return [
        f"Each call updates the running statistics {{updates_per_call}} times, as {why}: the momentum acts as "
        "{effective_momentum}."
    ]


def _compensate(evidence: Evidence) -> list[str]:
    if "recommended_momentum" in evidence or "updates_of_repeated" in evidence:
        return []  # it takes the updates into account; there is no momentum for calls that update unequally often
    return ["Set `momentum={compensated_momentum}` to get the effect of {momentum}."]


def explain_calls(evidence: Evidence) -> list[str]:
    """Explain ``calls-differ``."""
    which = {1: "the first is", 2: "the second is", 3: "the third is"}
    named = which.get(int(evidence["call_shift_index"]), "those from the fourth on are")
    if evidence["calls_per_step"] == 2:
        named = "each is"
    several = "those between two optimizer steps" if evidence["calls_per_step"] < 2 else "{calls_per_step} a step"
    differ = f"of {several}, {named} {{call_shift}} standard deviations off the mean of all"
    if rules.is_at_several_places(evidence):
        return [
            "The model calls it {calls_per_model_call} times, at several places, and its calls differ by more than "
            f"chance explains: {differ}. One set of running statistics serves all of them in eval().",
        ]
    return [
        f"The calls of a training step differ by more than chance explains: {differ}. Training normalises each call by "
        "itself, eval() all alike: a network can come to rely on the difference, and better running statistics do not "
        "repair that.",
        "In the window before it was {call_shift_before}.",
    ]


def cure_calls(evidence: Evidence) -> list[str]:
    """What to do about ``calls-differ``."""
    if rules.is_at_several_places(evidence):
        return ["Give each place a BatchNorm layer of its own; the weights around it may stay shared."]
    return [
        "Give the model all that belongs to a step in one call: `model(torch.cat([a, b]))`. If the kinds must stay "
        "apart, give each a BatchNorm layer of its own. If only one of them will be evaluated, "
        f"{RECALIBRATE} from a loader of that kind."
    ]


def _cure_guarded(evidence: Evidence) -> list[str]:
    if evidence.get("non_finite_channels"):
        return []  # the verdict says it
    return [
        "Find what made the values (`torch.autograd.detect_anomaly`; often the learning rate, half precision without "
        "loss scaling, or the data): the guard keeps them out of the running statistics, not out of the weights."
    ]


_TABLE = (
    Flag(
        name="calls-differ",
        rule=rules.has_unlike_calls,
        attention=rules.is_spoiled_by_calls,
        explanation=explain_calls,
        remedy=cure_calls,
    ),
    Flag(
        name="dead-channels",
        rule=lambda _, evidence: bool(evidence.get("dead_channels")),
        explanation=("{dead_channels} of {num_features} channels are dead: what they receive is constant.",),
    ),
    Flag(
        name="domain-shift",
        rule=None,
        attention=lambda evidence: rules.net_error(evidence) > rules.SERIOUS,
        explanation=validation_words.explain_shift,
        remedy=validation_words.cure_shift,
    ),
    Flag(
        name="double-update",
        rule=lambda layer, _: layer.updates_twice,
        explanation=_explain_repeats,
        remedy=_compensate,
    ),
    Flag(
        name="errors-add-up",
        rule=None,
        attention=lambda _: True,
        explanation=(
            "The running statistics of this layer and of those before it are behind the weights, by {added_error} all "
            "together, and each layer enlarges what the one before it has wrong: in validation eval() is off by "
            "{val_error} (chance explains {val_error_noise}).",
        ),
        remedy=(
            "Add `PreciseBatchNorm(restore=True)` to the Trainer's callbacks, or "
            f"{RECALIBRATE} before you evaluate. A lower learning rate towards the end of training does the same.",
        ),
    ),
    Flag(
        name="evaluated-by-batch",
        rule=None,
        attention=lambda _: True,
        explanation=(
            "Batches of validation are other than those of training, and eval() normalises each by itself: their means "
            "are {val_scatter} standard deviations off the mean of all, those of random batches of training at most "
            "{train_scatter}.",
        ),
        remedy=(
            "Evaluate shuffled batches that are as large as those of training; or make the layer with "
            "`track_running_stats=True`, so that eval() does not depend on the batch, and train anew.",
        ),
    ),
    Flag(
        name="guarded",
        rule=lambda _, evidence: "guarded_calls" in evidence,
        attention=rules.is_often_guarded,
        explanation=(
            "{guarded_calls} of its calls had NaN or Inf in them, or values whose variance overflows, first in batch "
            "{first_bad_batch} of this window, channel {first_bad_channel}: the guard has put the running statistics "
            "back as they were before, and nothing that is said here counts these calls.",
        ),
        remedy=_cure_guarded,
    ),
    Flag(
        name="half-frozen",
        rule=lambda layer, evidence: layer.has_frozen_weights and bool(evidence.get("batches")),
        explanation=(
            "Its weights do not train (`requires_grad=False`, no gradient, or in no optimizer), while its running "
            "statistics go over to the present data: what was trained with the old ones no longer works in eval().",
        ),
        remedy=("To keep it as it was, call `layer.eval()` after every `model.train()`.",),
    ),
    Flag(
        name="interrupted-batch",
        rule=lambda layer, _: layer.interrupted,
        explanation=(
            "The window was resumed from a state that was saved in the middle of a training step: what was run again "
            "of it counts twice, as it does in the running statistics.",
        ),
    ),
    Flag(
        name="maybe-padded",
        rule=rules.may_be_padded,
        explanation=(
            "What the model is given may be padded: a share of {constant_ends} of its positions, at the end of "
            "samples, is alike in all channels. What that does to the layer is not known.",
        ),
        remedy=(
            "To know, tell which positions count: `BatchNormMonitor(mask=fn)`, where `fn(batch)` returns a bool tensor "
            "(B, T), True where a position counts.",
        ),
    ),
    Flag(
        name="missed-calls",
        rule=lambda layer, _: layer.updates_per_call > 1 and not layer.weights_known and not layer.updates_twice,
        explanation=(
            "The running statistics were updated {updates_per_call} times for each call that was seen: the layer is "
            "also called where it is not monitored (while the model or the tracker pauses).",
        ),
        remedy=("Keep the layer from being called in training mode where the monitor does not count.",),
    ),
    Flag(
        name="never-updated",
        rule=rules.is_never_updated,
        attention=lambda _: True,
        explanation=(
            "Its running statistics were never updated: they are the initial zeros and ones (`num_batches_tracked` is "
            "zero), {val_error} off what it receives in validation (chance explains {val_error_noise}).",
        ),
        remedy=validation_words.cure_never_updated,
    ),
    Flag(
        name="non-finite-validation",
        rule=None,
        attention=lambda _: True,
        explanation=(
            "In validation {val_non_finite} of {num_features} channels received a value that is not finite: what is "
            "evaluated is NaN, whatever the running statistics. It begins at this layer: in the data of validation, or "
            "in what precedes it.",
        ),
        remedy=(
            "Look for it in what the model is given: `torch.isfinite(x).all()` for each batch of validation. If all "
            "are, it is in the layers before this one.",
        ),
    ),
    Flag(
        name="not-updating",
        rule=lambda _, evidence: "calls_not_updating" in evidence,
        explanation=("{calls_not_updating} calls in training mode left the running statistics as they were.",),
    ),
    Flag(
        name="other-weights",
        rule=None,
        attention=lambda evidence: rules.net_error(evidence) > rules.OF_OTHER_WEIGHTS,
        explanation=validation_words.explain_other_weights,
        remedy=validation_words.cure_other_weights,
    ),
    Flag(
        name="padded",
        rule=rules.is_moved_by_padding,
        attention=rules.is_spoiled_by_padding,
        explanation=(
            "Padding is a share of {padding_share} of the values that it receives, and that share varies from batch to "
            "batch by {padding_scatter} (standard deviation). This alone moves the mean and variance by which training "
            "normalises, by {padding_shift} (chance explains {padding_noise}): in training a sample's activations "
            "depend on how much padding is beside it, in eval() they do not.",
            "Statistics with padding are {padding_offset} off those without.",
        ),
        remedy=(
            "Normalise by the values that count: with x (B, C, T), a bool mask (B, T) and an `nn.BatchNorm1d`, "
            "`y = torch.zeros_like(x); y.mT[mask] = bn(x.mT[mask])` in the place of `y = bn(x)`. Or put sequences of "
            "like length into a batch, or use `nn.LayerNorm` over the channels, which sees no other position "
            "(`nn.GroupNorm` does).",
        ),
    ),
    Flag(
        name="rank-0-only",
        rule=lambda _, evidence: evidence.get("rank_error", 0.0) > WARNING,
        attention=lambda _: True,
        explanation=(
            "What rank 0 received is {rank_error} off what all {ranks} ranks received: the running statistics that are "
            "saved (and given to all ranks, with DistributedDataParallel) are those of rank 0's data alone.",
        ),
        remedy=(
            "Give all ranks data of one kind (shuffle before they are split, as `DistributedSampler(shuffle=True)` "
            "does), or convert the model with `nn.SyncBatchNorm.convert_sync_batchnorm`, or "
            f"{RECALIBRATE} over all ranks' data before you evaluate.",
        ),
    ),
    Flag(
        name="small-last-batch",
        rule=rules.has_small_last_batch,
        attention=rules.is_spoiled_by_last,
        explanation=_explain_last_batch,
        remedy=("Leave it out: `DataLoader(..., drop_last=True)`.",),
    ),
    Flag(
        name="unexplained-error",
        rule=None,
        attention=lambda _: True,
        explanation=validation_words.explain_unexplained,
        remedy=validation_words.cure_unexplained,
    ),
    Flag(
        name="updated-in-validation",
        rule=None,
        attention=lambda _: True,
        explanation=(
            "Validation has updated its running statistics: it ran in training mode and normalised by its own batches, "
            "so that its loss is not that of eval(). What is said here is of the running statistics before it.",
        ),
        remedy=(
            "Look for what calls `train()` in validation (`validation_step`, a hook, an `on_validation_model_eval` of "
            "your own). To have dropout on alone: "
            "`for m in model.modules(): m.training = isinstance(m, nn.modules.dropout._DropoutNd)`.",
        ),
    ),
    Flag(
        name="written-outside",
        rule=lambda layer, _: layer.written_outside or layer.updates_per_call < 0,
        explanation=(
            "Something else wrote the running statistics (recalibration, SWA, a loaded checkpoint, a reset, validation "
            "in training mode, forward passes in training mode outside the training steps): what they are made of is "
            "known from there on only.",
        ),
    ),
)

FLAGS: Mapping[str, Flag] = {flag.name: flag for flag in _TABLE}
"""All flags by name, in the order of the alphabet."""
