"""The verdicts: one object each, in the order in which they are tried. The first whose rule holds is the layer's.

To add one, add an object to the table below. Rules ask for distances in standard deviations of the normalised
activation (0.1 is worth a warning) and compare with chance: see :mod:`lightning_bnmonitor.statistics.analysis` for how
the numbers are computed. By simulation, 0 of 1500 stationary layers get a verdict that needs attention with these rules
(below 0.2 %), and clear-cut cases of each kind all get theirs.

*Not established:* whether ``ordered-batches`` comes from sorted data or from weights that move back and forth, and
whether ``grouped-batches`` comes from the data: the explanations say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence
from lightning_bnmonitor.diagnosis.sentences import RECALIBRATE, Statement

Attention = Literal["always", "if wrong", "never"]
"""Whether a verdict needs attention: "if wrong" where ``eval_error`` exceeds 0.1."""

_MIN_BATCHES, _MIN_DOF = 8, 4
_TINY = 4  # values per channel in a batch
_SHARE = 0.02  # of a channel's variance, that the order or the making of batches must explain to count


@dataclass(frozen=True, kw_only=True)
class Verdict(Statement):
    """What can be the matter with a layer, in a word, and everything that is known of that."""

    letter: str
    """What stands for it in figures."""
    color: str
    """Its colour there. Those of two verdicts are told apart with any colour vision, in most cases; letters in all."""
    attention: Attention
    rule: Callable[[Circumstances, Evidence], bool]
    """Whether it holds, if none before it does."""

    def needs_attention(self, eval_error: float) -> bool:
        """Whether something should be done about a layer with this ``eval_error``."""
        return self.attention == "always" or (self.attention == "if wrong" and eval_error > WARNING)


# Rules.
def _has_few_batches(_: Circumstances, evidence: Evidence) -> bool:
    return evidence["batches"] < _MIN_BATCHES or evidence["degrees_of_freedom"] < _MIN_DOF


def _is_not_updated(layer: Circumstances, evidence: Evidence) -> bool:
    return not evidence["batches"] or layer.updates_per_call == 0


def _is_ordered(_: Circumstances, evidence: Evidence) -> bool:
    # Of batches that repeat each other exactly there is no ratio, and in one block no order.
    above = evidence.get("ordering_ratio", math.inf) > evidence.get("ordering_limit", math.inf)
    return above and evidence.get("ordering_share", 0.0) > _SHARE and evidence["trend_share"] < 0.5


def _is_grouped(_: Circumstances, evidence: Evidence) -> bool:
    above = evidence.get("grouping_ratio", 0) > evidence["grouping_limit"]
    return above and evidence["grouping_share"] > _SHARE


def _is_behind(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether what the running statistics have of earlier values is more than a warning, and than their noise."""
    largest = max(evidence.get("warmup_error", 0.0), evidence.get("lag_error", 0.0))
    is_large = largest > max(WARNING, evidence.get("noise_error", 0.0))
    # Both are linear in the buffers and overestimate what is large: the error itself has to be worth a warning, too.
    return layer.weights_known and is_large and evidence.get("eval_error", math.inf) > WARNING


def _is_warming_up(layer: Circumstances, evidence: Evidence) -> bool:
    return _is_behind(layer, evidence) and evidence.get("warmup_error", 0.0) > evidence.get("lag_error", 0.0)


def _is_noisy(layer: Circumstances, evidence: Evidence) -> bool:
    return layer.weights_known and evidence.get("noise_error", 0.0) > WARNING


def _is_moving(layer: Circumstances, evidence: Evidence) -> bool:
    return layer.weights_known and evidence.get("drift_error", 0.0) > WARNING


def _is_lagging(layer: Circumstances, evidence: Evidence) -> bool:
    if _is_behind(layer, evidence):
        return True
    chance = math.hypot(evidence.get("noise_error", 0.0), evidence.get("now_error", 0.0))
    follows = evidence.get("eval_error", 0.0) <= math.hypot(WARNING, chance)
    return _is_moving(layer, evidence) and not _is_noisy(layer, evidence) and not follows


# Words that depend on the evidence.
def _explain_non_finite(evidence: Evidence) -> list[str]:
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


def _cure_non_finite(evidence: Evidence) -> list[str]:
    sentences = []
    if "first_bad_batch" in evidence:
        sentences.append(
            "Find what made the values (`torch.autograd.detect_anomaly`; often the learning rate, half precision "
            "without loss scaling, or the data)."
        )
    if evidence.get("non_finite_running_stats"):
        sentences.append(f"Call `layer.reset_running_stats()` and {RECALIBRATE}: no later batch repairs them.")
    return sentences


def _explain_insufficient(evidence: Evidence) -> list[str]:
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


def _cure_insufficient(evidence: Evidence) -> list[str]:
    if "assumed_updates_per_call" in evidence:
        return []
    return ["Take longer windows: more batches in an epoch, or a larger `every_n_epochs`."]


def _explain_unused(evidence: Evidence) -> list[str]:
    if evidence.get("calls_skipped"):
        return ["No call of it was counted in this window."]
    return ["It was not called in this window while the model was in training mode."]


def _explain_noisy(evidence: Evidence) -> list[str]:
    if "momentum" not in evidence:
        return [
            "The running statistics are the plain average of batches with {samples_per_batch} values per channel, of "
            "too few yet: sampling noise is an error of {noise_error}, which falls as training goes on."
        ]
    return [
        "The running statistics follow the last batches too closely: with an effective momentum of "
        "{effective_momentum} and {samples_per_batch} values per channel in a batch, sampling noise alone is an error "
        "of {noise_error}, however long one trains."
    ]


def _cure_noisy(evidence: Evidence) -> list[str]:
    larger = f"use a batch size of {{recommended_batch_size}}, or {RECALIBRATE} before you evaluate."
    if "momentum" not in evidence:
        return [f"Train on, or {larger}"]
    momentum = (
        "set `momentum={recommended_momentum}` (the noise falls with the root of m/(2-m); predicted error "
        "{recommended_error}), or "
    )
    return _with_momentum(momentum, larger, evidence)


def _cure_warming_up(evidence: Evidence) -> list[str]:
    momentum = (
        "set `momentum={recommended_momentum}` (batches then leave a weight of (1-m)^batches to what was before them; "
        "predicted error {recommended_error}), or "
    )
    others = (
        "train on for {batches_to_go} batches, or set `momentum=None` (the plain average of all batches), or "
        f"{RECALIBRATE} before you evaluate."
    )
    return _with_momentum(momentum, others, evidence)


def _cure_lagging(evidence: Evidence) -> list[str]:
    momentum = (
        "set `momentum={recommended_momentum}` (the best for a drift d a batch and a variance V of batches solves "
        "m^3 = d^2/V (1-m) (2-m)^2; predicted error {recommended_error}), or "
    )
    return _with_momentum(momentum, f"{RECALIBRATE} before you evaluate.", evidence)


def _with_momentum(momentum: str, others: str, evidence: Evidence) -> list[str]:
    remedy = momentum + others if "recommended_momentum" in evidence else others
    return [remedy[0].upper() + remedy[1:]]


# The table.
_TABLE = (
    Verdict(
        name="non-finite",
        letter="X",
        color="#000000",
        attention="always",
        rule=lambda _, evidence: bool(evidence.get("non_finite_channels")),
        explanation=_explain_non_finite,
        remedy=_cure_non_finite,
    ),
    Verdict(
        name="unused",
        letter="U",
        color="#999999",
        attention="never",
        rule=lambda layer, _: not layer.was_called,
        explanation=_explain_unused,
    ),
    Verdict(
        name="no-running-stats",
        letter="B",
        color="#999999",
        attention="never",
        rule=lambda layer, _: not layer.has_running_stats,
        explanation=(
            "It has no running statistics: eval() normalises by the batch, as training does, so that a prediction "
            "depends on what else is in its batch.",
        ),
        remedy=("Make it with `track_running_stats=True` if predictions must not depend on the batch.",),
    ),
    Verdict(
        name="stale",
        letter="S",
        color="#661100",
        attention="if wrong",
        rule=lambda layer, evidence: _is_not_updated(layer, evidence) and layer.training_calls > 0,
        explanation=(
            "It normalises by the batch in training, while its running statistics stay as they are. eval() uses those.",
            "Against what the layer receives in training, that is an error of {eval_error}.",
        ),
        remedy=(
            "If it is to learn them, set `track_running_stats=True` and a momentum above zero. If it is to keep them, "
            f"call `layer.eval()` in training, too. If they are only outdated, {RECALIBRATE}.",
        ),
    ),
    Verdict(
        name="frozen",
        letter="F",
        color="#44AA99",
        attention="if wrong",
        rule=_is_not_updated,
        explanation=(
            "It is in eval mode in training, too: it normalises by its running statistics, which stay as they are.",
            "Against the statistics of what it receives, that is an error of {eval_error}. Training and eval() agree; "
            "what the next layer receives is not normalised by that much.",
        ),
        remedy=(
            f"If what it receives is no longer what its statistics are from, {RECALIBRATE} with this layer in training "
            "mode, or let it train (`layer.train()`).",
        ),
    ),
    Verdict(
        name="insufficient-data",
        letter="?",
        color="#999999",
        attention="never",
        rule=_has_few_batches,
        explanation=_explain_insufficient,
        remedy=_cure_insufficient,
    ),
    Verdict(
        name="tiny-batch",
        letter="T",
        color="#882255",
        attention="always",
        rule=lambda _, evidence: evidence["samples_per_batch"] <= _TINY,
        explanation=(
            "A batch has {samples_per_batch} values per channel. Statistics of so few values jump from batch to batch "
            "(by {jitter} standard deviations), and training normalises by them: the network learns under a noise that "
            "eval() does not have.",
            "The running statistics have an error of {noise_error} by sampling noise alone; better ones would not "
            "repair the rest.",
        ),
        remedy=(
            "Put more samples (or positions) in a batch: at least sixteen values per channel. Where memory forbids "
            "that: `nn.SyncBatchNorm` over several devices, or `nn.GroupNorm`, which does not depend on the batch; for "
            "fine-tuning, freeze the layer (`layer.eval()` in training, too).",
        ),
    ),
    Verdict(
        name="ordered-batches",
        letter="O",
        color="#117733",
        attention="always",
        rule=_is_ordered,
        explanation=(
            "The batch means of different parts of the window differ {ordering_ratio} times as much as neighbouring "
            "batches do (chance explains up to {ordering_limit}), which is {ordering_share} of the variance, and a "
            "steady movement explains but {trend_share} of that.",
            "Either the data come sorted, and the running statistics are those of the last part; or the weights have "
            "moved back and forth, as after a restart of the learning rate: the inputs alone do not tell.",
        ),
        remedy=(
            "Shuffle the data (`DataLoader(shuffle=True)`; for iterable data sets a buffer that spans the sources). "
            f"If they are shuffled, wait until the weights settle, or {RECALIBRATE} before you evaluate.",
        ),
    ),
    Verdict(
        name="grouped-batches",
        letter="G",
        color="#999933",
        attention="always",
        rule=_is_grouped,
        explanation=(
            "Batch means vary {grouping_ratio} times as much as those of {batch_size} independent samples would "
            "(chance explains up to {grouping_limit}), by {grouping_share} of the variance. The samples of a batch "
            "resemble each other (from one video, patient, class or augmentation), and normalising by the batch "
            "removes what they have in common, which eval() does not. Whether it is the data or something random that "
            "a whole batch shares in the network, the inputs alone do not tell.",
        ),
        remedy=(
            "Mix the sources within each batch: shuffle samples rather than groups, and draw random augmentations per "
            "sample. If a batch must come from one source: `nn.GroupNorm`, or freeze the layer (`layer.eval()`).",
        ),
    ),
    Verdict(
        name="warming-up",
        letter="W",
        color="#E69F00",
        attention="always",
        rule=_is_warming_up,
        explanation=(
            "The initial zeros and ones still have a weight of {initial_weight} in the running statistics: eval() is "
            "off by {eval_error}, where sampling noise explains {noise_error}.",
        ),
        remedy=_cure_warming_up,
    ),
    Verdict(
        name="lagging",
        letter="L",
        color="#D55E00",
        attention="always",
        rule=_is_lagging,
        explanation=(
            "The running statistics are those of earlier batches, from which the layer's inputs have moved away: "
            "eval() is off by {eval_error}, where sampling noise explains {noise_error}. Whether the weights or the "
            "data have moved, or the running statistics came from other data, the inputs alone do not tell.",
        ),
        remedy=_cure_lagging,
    ),
    Verdict(
        name="noisy",
        letter="N",
        color="#CC79A7",
        attention="always",
        rule=_is_noisy,
        explanation=_explain_noisy,
        remedy=_cure_noisy,
    ),
    Verdict(
        name="drifting",
        letter="D",
        color="#56B4E9",
        attention="never",
        rule=_is_moving,
        explanation=(
            "The layer's inputs move so fast that the statistics of the whole window are {drift_error} off those at "
            "its end. The running statistics follow: they are {eval_error} off what they should be now.",
        ),
        remedy=(
            "Nothing to do: judge the layer by `eval_error`, not by `act_rmse`, or take shorter windows "
            "(`every_n_train_batches`).",
        ),
    ),
    Verdict(
        name="healthy",
        letter="H",
        color="#0072B2",
        attention="never",
        rule=lambda layer, _: layer.weights_known,
        explanation=(
            "The running statistics are right up to chance: {eval_error} off the present ones, where their sampling "
            "noise explains {noise_error} and that of the present ones {now_error}.",
        ),
    ),
)

VERDICTS: Mapping[str, Verdict] = {verdict.name: verdict for verdict in _TABLE}
"""All verdicts by name, in the order in which they are tried."""


def verdict_on(layer: Circumstances, evidence: Evidence) -> Verdict:
    """The first verdict whose rule holds; if none does, the weights of the batches are not known: too little is."""
    return next((verdict for verdict in _TABLE if verdict.rule(layer, evidence)), VERDICTS["insufficient-data"])
