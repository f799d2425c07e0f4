"""The diagnosis of a layer: from how it was called, its numbers and its distances to a verdict with flags."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_bnmonitor.diagnosis.advice import advice
from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.evidence import Evidence
from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.groups import GroupShift, evidence_of, sentence_on
from lightning_bnmonitor.diagnosis.one_pass import in_words
from lightning_bnmonitor.diagnosis.rules import is_noisy_by_calls, moves_with_weights, updates_nothing
from lightning_bnmonitor.diagnosis.sentences import Statement
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS, verdict_on

_UNSEEN = Statement(
    name="unseen calls",
    explanation=(
        "{calls_skipped} calls could not be looked at (within transforms of torch.func, while tracing or "
        "capturing a CUDA graph, or of other shapes than (N, C, *)).",
    ),
)

_WITH_WEIGHTS = Statement(
    name="moves with the weights",
    explanation=(
        "Its inputs move with the weights, or by what is drawn for a whole batch: what the model is given is in random "
        "order ({order_score} and {group_score} standard deviations from it, where chance explains two).",
    ),
)

_LARGE_MOMENTUM = 0.9  # from which on it may have been meant as Keras means it


@dataclass(frozen=True)
class Diagnosis:
    """What is the matter with one layer in one window."""

    verdict: str
    """One of :data:`~lightning_bnmonitor.diagnosis.verdicts.VERDICTS`."""
    flags: tuple[str, ...]
    """Of :data:`~lightning_bnmonitor.diagnosis.flags.FLAGS`, in the order of the alphabet."""
    needs_attention: bool
    """Whether something should be done."""
    evidence: Mapping[str, float]
    """The numbers it rests on, by their names in :data:`~lightning_bnmonitor.diagnosis.evidence.EVIDENCE`."""
    groups: tuple[GroupShift, ...] = ()
    """The groups of batches that the layer received, in the order in which they were first told of."""

    @property
    def cause(self) -> str:
        """What is the matter in a word: the verdict, unless that needs none or a flag tells more."""
        if self.verdict == "noisy" and "calls-differ" in self.flags and is_noisy_by_calls(self.evidence):
            return "calls-differ"
        if self.verdict == "warming-up" and "never-updated" in self.flags:
            return "never-updated"
        if not self.needs_attention or VERDICTS[self.verdict].needs_attention(self.evidence.get("eval_error", 0.0)):
            return self.verdict
        return next((flag for flag in self.flags if FLAGS[flag].attention(self.evidence)), self.verdict)

    @property
    def is_judged(self) -> bool:
        """Whether it is known how good or bad the layer is: by its training, or by what it was evaluated with."""
        return VERDICTS[self.verdict].is_judged or self.needs_attention or "val_error" in self.evidence

    @property
    def notes(self) -> str:
        """Why it could not be judged, if so, what its flags say, and what to do about that."""
        said = [*([] if self.is_judged else [VERDICTS[self.verdict]]), *(FLAGS[flag] for flag in self.flags)]
        texts = (text for each in said for text in (self._explained(each), self._prescribed(each)))
        return self._for_this_layer(_joined(texts))

    @property
    def explanation(self) -> str:
        """What was found and what it means, with this layer's numbers, all of which are in :attr:`evidence`.

        The cause comes first, also if it is a flag.
        """
        flags = self._cause_first([FLAGS[flag] for flag in self.flags])
        texts = [self._explained(flag) for flag in flags]
        texts.insert(int(self.cause in self.flags), self._explained_verdict())
        return _joined(texts)

    def _explained_verdict(self) -> str:
        added = [_UNSEEN] if self.evidence.get("calls_skipped") else []
        added += [_WITH_WEIGHTS] if moves_with_weights(self.evidence) else []
        of_groups = sentence_on(self.groups) if self.verdict in ("grouped-batches", "ordered-batches") else ""
        text = _joined([self._explained(VERDICTS[self.verdict]), of_groups, *map(self._explained, added)])
        windows = self.evidence.get("windows", 1)
        return f"Over the last {windows:.0f} windows: {text[0].lower()}{text[1:]}" if windows > 1 else text

    @property
    def remedy(self) -> str:
        """What to do about it; empty if there is nothing to do."""
        verdict = VERDICTS[self.verdict]
        statements: list[Statement] = [FLAGS[flag] for flag in self.flags]
        # "Nothing to do" is not said beside a flag that tells what to do.
        is_flagged = any(FLAGS[flag].attention(self.evidence) for flag in self.flags)
        if {"always": True, "if wrong": self.needs_attention, "never": not is_flagged}[verdict.attention]:
            statements.insert(0, verdict)
        return self._for_this_layer(_joined(map(self._prescribed, self._cause_first(statements))))

    def _cause_first(self, statements: Sequence[Statement]) -> list[Statement]:
        return sorted(statements, key=lambda statement: statement.name != self.cause)

    def _explained(self, statement: Statement) -> str:
        return in_words(statement, self.evidence).explain(self.evidence)

    def _prescribed(self, statement: Statement) -> str:
        return in_words(statement, self.evidence).prescribe(self.evidence)

    def _for_this_layer(self, remedy: str) -> str:
        is_left_alone = updates_nothing(self.evidence)
        return re.sub(r"(\.recalibrate\(\w+, \w+)\)", r"\1, frozen=True)", remedy) if is_left_alone else remedy


def diagnose(
    layer: Circumstances, observed: Evidence, metrics: Evidence, groups: tuple[GroupShift, ...] = ()
) -> Diagnosis:
    """The verdict on one layer.

    Args:
        layer: How it was called.
        observed: What :func:`~lightning_bnmonitor.diagnosis.evidence.observations` says of it; for a layer that was
            never called, what is known of that.
        metrics: Its :data:`~lightning_bnmonitor.diagnosis.evidence.METRICS`.
        groups: The groups of batches that it received.
    """
    evidence = {name: value for name, value in metrics.items() if value == value}
    evidence |= observed
    evidence |= evidence_of(groups)
    evidence |= _of_calls(layer, evidence)
    if math.isfinite(metrics["eval_error"]) and evidence.get("jitter"):
        evidence["severity"] = (metrics["eval_error"] / evidence["jitter"]) ** 2
    verdict = verdict_on(layer, evidence)
    flags = [flag for flag in FLAGS.values() if flag.rule is not None and flag.rule(layer, evidence)]
    evidence |= advice(verdict.name, layer, evidence)
    needs_attention = verdict.needs_attention(metrics["eval_error"]) or any(flag.attention(evidence) for flag in flags)
    return Diagnosis(verdict.name, tuple(flag.name for flag in flags), needs_attention, evidence, groups)


def _of_calls(layer: Circumstances, evidence: Evidence) -> dict[str, float]:
    """What the calls of a layer add to its evidence."""
    effective, updates = layer.effective_momentum, layer.updates_per_call
    if layer.momentum is not None and layer.updates_twice and not layer.weights_known:
        effective = 1 - (1 - layer.momentum) ** updates
    numbers = {f"calls_{path}": float(count) for path, count in layer.calls.items()}
    numbers["num_features"] = float(layer.num_features)
    if layer.momentum is not None:
        numbers["momentum"] = layer.momentum
        if layer.momentum >= _LARGE_MOMENTUM:
            numbers["keras_momentum"] = 1 - layer.momentum
    if effective is not None:
        numbers["effective_momentum"] = effective
    if updates >= 0 or layer.updates_nothing:
        numbers["updates_per_call"] = 0.0 if layer.updates_nothing else updates
    if "one_pass" in evidence and layer.num_tracked is not None:
        numbers["num_updates"] = float(layer.num_tracked)
    if layer.updates_twice and not math.isclose(layer.updates_of_repeated, updates):
        numbers["updates_of_repeated"] = layer.updates_of_repeated
    if layer.updates_twice and not layer.checkpointed:
        numbers["parts_per_call"] = updates
    if "ranks" in evidence and not layer.was_called:  # on rank 0: what it has is against what the others received
        numbers["rank_error"] = evidence.get("eval_error", 0.0)
    batches = evidence.get("batches", 0.0) - evidence.get("batches_before", 0.0)
    unmoved = layer.training_calls - batches
    if 0 <= updates < 1:
        unmoved += batches * (1 - updates)
    if layer.calls_in_eval_mode and layer.steps_in_eval_mode:
        numbers["calls_in_eval_mode"] = float(layer.calls_in_eval_mode)
        numbers["steps_in_eval_mode"] = float(layer.steps_in_eval_mode)
    if layer.has_initial_stats and not evidence.get("batches"):
        numbers["initial_weight"] = 1.0
    if unmoved and layer.has_running_stats and "one_pass" not in evidence:
        numbers["calls_not_updating"] = unmoved
    if "call_shift" in evidence:
        of_calls = {name: getattr(layer, name) for name in ("call_shift_before", "calls_per_model_call")}
        numbers |= {name: value for name, value in of_calls.items() if not math.isnan(value)}
    bad = layer.bad_before
    if bad is not None and bad.windows_ago and evidence.get("non_finite_running_stats"):
        numbers |= {"first_bad_batch": bad.number, "first_bad_channel": bad.channel, "bad_windows_ago": bad.windows_ago}
    if layer.left_out and "guarded_calls" not in evidence:
        numbers["guarded_calls"] = float(layer.left_out)
    if not layer.weights_known:
        numbers["assumed_updates_per_call"] = float(layer.assumed_updates)
    return numbers


def _joined(texts: Iterable[str]) -> str:
    return " ".join(text for text in texts if text)
