"""The verdicts: one object each, in the order in which they are tried. The first whose rule holds is the layer's.

To add one, add an object to the table below; its rule lives in :mod:`.rules`, words that depend on numbers in
:mod:`.wording`. By simulation, 0 of 1500 stationary layers get a verdict that needs attention (below 0.2 %), and
clear-cut cases of each kind all get theirs.

*Not established:* where nothing is known of what the model is given, whether ``ordered-batches`` comes from sorted data
or from weights that move back and forth, and whether ``grouped-batches`` comes from the data: the explanations say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_bnmonitor.diagnosis import rules, wording
from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence
from lightning_bnmonitor.diagnosis.sentences import RECALIBRATE, Statement

Attention = Literal["always", "if wrong", "never"]
"""Whether a verdict needs attention: "if wrong" where ``eval_error`` exceeds 0.1."""


@dataclass(frozen=True, kw_only=True)
class Verdict(Statement):
    """What can be the matter with a layer, in a word, and everything that is known of that."""

    letter: str
    """What stands for it in figures."""
    color: str
    """Its colour there. Those of two verdicts are told apart with any colour vision, in most cases; letters in all."""
    attention: Attention
    is_judged: bool = True
    """Whether it says how good or bad the layer is."""
    rule: Callable[[Circumstances, Evidence], bool]
    """Whether it holds, if none before it does."""

    def needs_attention(self, eval_error: float) -> bool:
        """Whether something should be done about a layer with this ``eval_error``."""
        return self.attention == "always" or (self.attention == "if wrong" and eval_error > WARNING)


_TABLE = (
    Verdict(
        name="non-finite",
        letter="X",
        color="#000000",
        attention="always",
        rule=lambda _, evidence: bool(evidence.get("non_finite_channels")),
        explanation=wording.explain_non_finite,
        remedy=wording.cure_non_finite,
    ),
    Verdict(
        name="trained-in-eval",
        letter="E",
        color="#AA4499",
        attention="always",
        rule=rules.is_trained_in_eval,
        explanation=wording.explain_trained_in_eval,
        remedy=wording.cure_trained_in_eval,
    ),
    Verdict(
        name="averaged",
        letter="A",
        color="#999999",
        attention="never",
        is_judged=False,
        rule=lambda _, evidence: "averaged" in evidence,
        explanation=wording.explain_averaged,
    ),
    Verdict(
        name="unused",
        letter="U",
        color="#999999",
        attention="never",
        is_judged=False,
        rule=lambda layer, _: not layer.was_called,
        explanation=wording.explain_unused,
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
        name="own-forward",
        letter="Y",
        color="#999999",
        attention="never",
        is_judged=False,
        rule=lambda layer, _: layer.own_forward,
        explanation=(
            "Not judged: its class has a `forward` of its own, in which no BatchNorm kernel makes the output. How it "
            "uses its running statistics is not known; they are {eval_error} off BatchNorm's.",
        ),
    ),
    Verdict(
        name="stale",
        letter="S",
        color="#661100",
        attention="if wrong",
        rule=lambda layer, evidence: rules.is_not_updated(layer, evidence) and layer.training_calls > 0,
        explanation=(
            "It normalises by the batch in training, while its running statistics stay as they are. eval() uses those.",
            "Against what the layer receives in training, that is an error of {eval_error}.",
        ),
        remedy=(
            f"If they are only outdated, {RECALIBRATE}.",
            "If it is to learn them, set `layer.track_running_stats = True` and a `layer.momentum` above zero. If it "
            "is to keep them, call `layer.eval()` after every `model.train()`.",
        ),
    ),
    Verdict(
        name="frozen",
        letter="F",
        color="#44AA99",
        attention="if wrong",
        rule=rules.is_not_updated,
        explanation=wording.explain_frozen,
        remedy=wording.cure_frozen,
    ),
    Verdict(
        name="insufficient-data",
        letter="?",
        color="#999999",
        attention="never",
        is_judged=False,
        rule=rules.has_few_batches,
        explanation=wording.explain_insufficient,
        remedy=wording.cure_insufficient,
    ),
    Verdict(
        name="tiny-batch",
        letter="T",
        color="#882255",
        attention="always",
        rule=rules.is_tiny,
        explanation=wording.explain_tiny,
        remedy=wording.cure_tiny,
    ),
    Verdict(
        name="ordered-batches",
        letter="O",
        color="#117733",
        attention="always",
        rule=rules.is_ordered,
        explanation=wording.explain_ordered,
        remedy=wording.cure_order,
    ),
    Verdict(
        name="grouped-batches",
        letter="G",
        color="#999933",
        attention="always",
        rule=rules.is_grouped,
        explanation=wording.explain_grouped,
        remedy=wording.cure_order,
    ),
    Verdict(
        name="warming-up",
        letter="W",
        color="#E69F00",
        attention="always",
        rule=rules.is_warming_up,
        explanation=wording.explain_warming_up,
        remedy=wording.cure_warming_up,
    ),
    Verdict(
        name="misfit",
        letter="M",
        color="#8C510A",
        attention="always",
        rule=rules.does_not_fit,
        explanation=(
            "Its running statistics are {eval_error} off what it receives, by more than chance explains"
            " (their sampling noise is {noise_error}, that of these data {now_error}).",
            "Whether they lag behind the weights, belong to other weights, or come from other data or with dropout, "
            "which is off here, one pass does not tell.",
        ),
        remedy=(
            f"{RECALIBRATE[0].upper()}{RECALIBRATE[1:]}.",
            "If training brings it back, `BatchNormMonitor()` among the Trainer's callbacks tells why.",
        ),
    ),
    Verdict(
        name="lagging",
        letter="L",
        color="#D55E00",
        attention="always",
        rule=rules.is_lagging,
        explanation=wording.explain_lagging,
        remedy=wording.cure_lagging,
    ),
    Verdict(
        name="noisy",
        letter="N",
        color="#CC79A7",
        attention="always",
        rule=rules.is_noisy,
        explanation=wording.explain_noisy,
        remedy=wording.cure_noisy,
    ),
    Verdict(
        name="drifting",
        letter="D",
        color="#56B4E9",
        attention="never",
        rule=rules.is_moving,
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
        explanation=wording.explain_healthy,
    ),
)

VERDICTS: Mapping[str, Verdict] = {verdict.name: verdict for verdict in _TABLE}
"""All verdicts by name, in the order in which they are tried."""


def verdict_on(layer: Circumstances, evidence: Evidence) -> Verdict:
    """The first verdict whose rule holds; if none does, the weights of the batches are not known: too little is."""
    return next((verdict for verdict in _TABLE if verdict.rule(layer, evidence)), VERDICTS["insufficient-data"])
