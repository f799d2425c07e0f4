"""Diagnoses by hand: what makes each verdict, and the numbers in what is said of it."""

from __future__ import annotations

import math
import re
from collections import ChainMap

from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis, diagnose

NAN, INF = math.nan, math.inf
BELOW, ABOVE = -INF, INF  # neighbours of a threshold, towards these

CALLED = Circumstances(
    num_features=64,
    momentum=0.1,
    effective_momentum=0.1,
    has_running_stats=True,
    calls={"saved": 100, "traced": 0, "pass": 0, "skipped": 0},
    training_calls=100,
    updates_per_call=1.0,
    updates_of_repeated=1.0,
    assumed_updates=1,
    checkpointed=False,
    written_outside=False,
    has_frozen_weights=False,
    own_forward=False,
    interrupted=False,
)
NEVER_CALLED = {"saved": 0, "traced": 0, "pass": 0, "skipped": 0}
OBSERVED = {
    "batches": 100.0,
    "samples_per_batch": 32.0,
    "batch_size": 32.0,
    "degrees_of_freedom": 87.0,
    "initial_weight": 0.01,
    "noise_error": 0.05,
    "now_error": 0.06,
    "warmup_error": 0.01,
    "lag_error": 0.0,
    "drift_error": 0.0,
    "unseen_error": 0.01,
    "walk_error": 0.0,
    "z_mean": 1.0,
    "z_var": 1.1,
    "max_score": 2.5,
    "drift_per_batch": 0.0,
    "jitter": 0.2,
    "batch_jitter": 0.19,
    "independent_values": 31.0,
    "last_batch_samples": 32.0,
    "last_batch_share": 0.1,
    "noise_without_last_batch": 0.049,
    "ordering_ratio": 1.1,
    "ordering_limit": 2.5,
    "ordering_share": 0.001,
    "smooth_share": 0.3,
    "grouping_ratio": 1.05,
    "grouping_limit": 1.6,
    "grouping_share": 0.002,
    "dead_channels": 0.0,
    "non_finite_channels": 0.0,
    "non_finite_running_stats": 0.0,
}
METRICS = {"eval_error": 0.07, "act_rmse": 0.08, "mean_shift": 0.03, "log_var_ratio": 0.09}

# What makes a verdict: circumstances, observations and metrics that differ from those of a healthy layer.
SYMPTOMS: dict[str, dict] = {
    "non-finite": {"non_finite_channels": 2.0, "first_bad_batch": 7.0, "first_bad_channel": 3.0},
    "trained-in-eval": {
        **{"calls": NEVER_CALLED, "training_calls": 0, "batches": 0.0, "effective_momentum": None},
        **{"calls_in_eval_mode": 20, "steps_in_eval_mode": 10},
    },
    "averaged": {"averaged": 1.0, "val_error": 0.06, "val_error_noise": 0.05},
    "unused": {"calls": NEVER_CALLED, "training_calls": 0, "batches": 0.0, "effective_momentum": None},
    "no-running-stats": {"has_running_stats": False, "batches": 0.0, "effective_momentum": None},
    "own-forward": {"own_forward": True},
    "stale": {"batches": 0.0, "effective_momentum": None, "eval_error": 0.5},
    "frozen": {"batches": 0.0, "effective_momentum": None, "training_calls": 0, "eval_error": 0.5},
    "insufficient-data": {"batches": 7.0, "degrees_of_freedom": 3.0},
    "tiny-batch": {"samples_per_batch": 3.0},
    "ordered-batches": {"ordering_ratio": 3.0, "ordering_share": 0.3, "smooth_share": 0.2},
    "grouped-batches": {"grouping_ratio": 2.0, "grouping_share": 0.1},
    "warming-up": {"warmup_error": 0.5, "initial_weight": 0.3, "eval_error": 0.45},
    "misfit": {"one_pass": 1.0, "lag_error": 0.4, "eval_error": 0.35},
    "lagging": {"lag_error": 0.4, "eval_error": 0.35},
    "noisy": {"noise_error": 0.2},
    "drifting": {"drift_error": 0.3},
    "healthy": {},
}


def diagnosed(*symptoms: dict) -> Diagnosis:
    """The diagnosis of a healthy layer with these symptoms; what the first of them say holds."""
    changed = ChainMap(*symptoms)
    if "updates_per_call" in changed:
        changed = changed.new_child()
        changed.setdefault("updates_of_repeated", changed["updates_per_call"])
    layer = CALLED._replace(**{field: changed[field] for field in CALLED._fields if field in changed})
    metrics = {metric: changed.get(metric, value) for metric, value in METRICS.items()}
    known = {*CALLED._fields, *METRICS}
    observed = OBSERVED | {name: value for name, value in changed.items() if name not in known}
    return diagnose(layer, {name: value for name, value in observed.items() if value is not None}, metrics)


def beside(threshold: float, towards: float) -> float:
    return math.nextafter(threshold, towards)


NUMBER = re.compile(r"(?<![\w^.])-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf|nan)(?![\w])")


def numbers(text: str) -> list[str]:
    """The numbers in a text, as they are printed."""
    return NUMBER.findall(text)


def printed(value: float) -> str:
    """A count in full, anything else with three digits."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.3g}"


def words_are_sound(diagnosis: Diagnosis) -> None:
    """Every number is in the evidence, nothing is left to fill in, and sentences are sentences."""
    known = {printed(value) for value in diagnosis.evidence.values()}
    assert diagnosis.explanation
    for text in (diagnosis.explanation, diagnosis.remedy):
        assert set(numbers(text)) <= known, (text, diagnosis.evidence)
        assert not re.search(r"\(unknown\)|[{}]|\bnan\b|None(?!`)|  ", text), text
        for sentence in filter(None, re.split(r"(?<=[.:;])\s", text)[:1]):
            assert sentence[0].isupper(), text
        assert not text or text.endswith("."), text


def telling_evidence() -> dict[str, float]:
    """Evidence in which no two numbers are printed alike."""
    names = [*OBSERVED, *METRICS, "num_features", "momentum", "effective_momentum", "updates_per_call"]
    names += ["severity", "calls_saved", "calls_not_updating", "compensated_momentum", "recommended_momentum"]
    names += ["recommended_error", "recommended_batch_size", "batches_to_go"]
    names += ["constant_ends"]
    names += [f"padding_{of}" for of in ("share", "scatter", "shift", "noise", "offset")]
    return {name: 1.01 + 0.01 * index for index, name in enumerate(names)}


def squared_error(momentum, drift: float, jitter: float, walk: float = 0.0):
    """Of a running average with this momentum behind a drifting mean that walks, in the mean over time."""
    lag = (drift / momentum) ** 2 + walk**2 / (momentum * (2 - momentum))
    return lag * (1 - momentum) ** 2 + jitter**2 * momentum / (2 - momentum)
