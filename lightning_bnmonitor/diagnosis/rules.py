"""When a verdict holds: its rule asks how a layer was called, and for its numbers.

Rules ask for distances in standard deviations of the normalised activation (0.1 is worth a warning) and compare with
chance: see :mod:`lightning_bnmonitor.statistics.analysis` for how the numbers are computed.
"""

from __future__ import annotations

import math

from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence
from lightning_bnmonitor.statistics.probe import LIMIT
from lightning_bnmonitor.statistics.random_walk import WALK_SPREAD

SERIOUS = 0.2
"""An error in validation from which on it needs attention, whatever the reason."""
OF_OTHER_WEIGHTS = 0.15
"""From which on it needs attention where weights or running statistics are not known to be those of training."""
_CHANCE = 3  # times its noise floor, or its standard error, that a number must exceed
_MIN_BATCHES, _MIN_DOF = 8, 4
_FAR, _FLOORS = 0.2, 3  # from which error on, and from how many times its floor, running statistics are certainly wrong
_TINY = 4  # values per channel in a batch
_FEW_SAMPLES = 4  # in a batch, each of several positions
_FEW_VALUES = 10  # independent ones in a batch
_SATURATED = math.sqrt(1.5 / 8)  # the jitter of 8 independent values
_WORTH_DROPPING = 0.08  # of the noise that a small last batch adds
_CALL_SHIFT = 0.05  # from which on it is said
_PADDING_SHIFT = 0.05  # likewise
_SEVERAL = 1.25  # calls of a layer for each of its model's
_OFTEN = 0.1  # share of calls that are not finite from which on it needs attention though they are undone
_SHARE = 0.02  # of a channel's variance, that the order or the making of batches must explain to count
_SMOOTH = 0.6  # share of a movement from which on it may be that of the weights


def has_few_batches(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether there are too few batches to tell chance from trouble, and what is certain with any number is fine."""
    return _is_short(evidence) and not (_is_initial(layer, evidence) or is_far(layer, evidence))


def _is_short(evidence: Evidence) -> bool:
    return evidence["batches"] < _MIN_BATCHES or evidence["degrees_of_freedom"] < _MIN_DOF


def _is_of_one_window(evidence: Evidence) -> bool:
    """Whether the order and the making of its batches may be judged: over the border of two windows it is not known."""
    return not (_is_short(evidence) or evidence.get("windows", 1) > 1)


def _error(evidence: Evidence, unknown: float) -> float:
    """What has to be worth a warning: over several windows, whose last batches are few, not ``eval_error`` alone.

    Where calls differ, without what no running average sees: running statistics that follow everything have that, too.
    """
    error = evidence.get("eval_error", unknown)
    return _seen(evidence.get("least_error", error) if evidence.get("windows", 1) > 1 else error, evidence)


def _seen(error: float, evidence: Evidence) -> float:
    unseen = evidence.get("unseen_error", 0.0) if differs_by_calls(evidence) else 0.0
    return math.sqrt(max(error**2 - unseen**2, 0.0))


def _is_initial(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether the initial zeros and ones are certainly too much of the running statistics, however few the batches.

    Their weight is known exactly. False alarms by simulation: 0.4 to 1 % of layers whose true error is below 0.1.
    """
    weight, chance = evidence.get("initial_weight", 0.0), evidence.get("reference_error", math.inf)
    error = weight * evidence.get("initial_distance", 0.0)
    is_large = error**2 - (weight * chance) ** 2 > max(WARNING**2, (2 * weight * chance) ** 2)
    return layer.weights_known and is_large and evidence.get("least_error", 0.0) > WARNING


def is_far(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether the running statistics are so far from what the layer receives that a few batches suffice to tell.

    By 0.2, and by three times what chance explains in both.
    """
    chance = math.hypot(evidence.get("reference_error", math.inf), evidence.get("noise_error", 0.0))
    return layer.weights_known and _seen(evidence.get("least_error", 0.0), evidence) > max(_FAR, _FLOORS * chance)


def is_not_updated(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether no call has updated the running statistics."""
    return not evidence["batches"] or layer.updates_per_call == 0 or layer.updates_nothing


def is_trained_in_eval(layer: Circumstances, _: Evidence) -> bool:
    """Whether the model was trained while it was in eval mode as a whole, and not in training mode."""
    return not layer.was_called and layer.calls_in_eval_mode > 0 and layer.steps_in_eval_mode > 0


def is_moved_by_padding(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether padding moves what training normalises by, from batch to batch, by so much that it is to be known."""
    return layer.training_calls > 0 and evidence.get("padding_shift", 0.0) > _PADDING_SHIFT


def may_be_padded(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether it normalises batches of sequences, and what the model is given looks padded."""
    has_positions = evidence.get("samples_per_batch", 0.0) > evidence.get("batch_size", math.inf)
    return layer.training_calls > 0 and has_positions and "constant_ends" in evidence


def is_spoiled_by_padding(evidence: Evidence) -> bool:
    """Whether so much that it needs attention."""
    return evidence.get("padding_shift", 0.0) > WARNING


def net_error(evidence: Evidence) -> float:
    """``val_error`` with its noise taken off; 0 up to three times that."""
    return beyond_chance(evidence.get("val_error", 0.0), evidence.get("val_error_noise", math.inf))


def net_shift(evidence: Evidence) -> float:
    """``val_shift`` with its noise taken off; 0 up to three times that."""
    return beyond_chance(evidence.get("val_shift", 0.0), evidence.get("val_noise", math.inf))


def excess_scatter(evidence: Evidence) -> float:
    """By how much calls of evaluation are farther apart than those of training, of a layer that normalises by them."""
    scatter, of_training = evidence.get("val_scatter", 0.0), evidence.get("train_scatter", math.inf)
    return math.sqrt(max(scatter**2 - of_training**2, 0.0))


def is_ordered(_: Circumstances, evidence: Evidence) -> bool:
    """Whether parts of the window differ, because the data come in an order."""
    if is_of_one_pass(evidence):  # in which no weights move
        return _parts_differ(evidence)
    if "order_score" in evidence:
        # Where its parts do not differ, but its batches do, groups that the inputs show, too, are the better word.
        has_groups = not _parts_differ(evidence) and evidence.get("group_score", 0.0) > LIMIT
        return _batches_vary(evidence) and evidence["order_score"] > LIMIT and not has_groups
    is_smooth = evidence.get("smooth_share", 1.0) >= _SMOOTH and not evidence.get("border_jump")
    return _parts_differ(evidence) and not is_smooth


def is_grouped(_: Circumstances, evidence: Evidence) -> bool:
    """Whether the samples of a batch resemble each other, because that is how batches are made."""
    if has_unlike_groups(evidence):
        return True
    if "group_score" in evidence:
        return _batches_vary(evidence) and evidence["group_score"] > LIMIT
    return _batches_differ(evidence)


def has_unlike_groups(evidence: Evidence) -> bool:
    """Whether the groups that batches are of differ by so much that it is worth a warning."""
    return beyond_chance(evidence.get("group_shift", 0.0), evidence.get("group_noise", math.inf)) >= WARNING


def was_called(evidence: Evidence) -> bool:
    """Whether the layer was called in training in this window."""
    return any(evidence.get(f"calls_{path}") for path in ("saved", "traced", "pass"))


def updates_nothing(evidence: Evidence) -> bool:
    """Whether none of its calls updated its running statistics."""
    return was_called(evidence) and not (evidence.get("batches", 1.0) and evidence.get("updates_per_call", 1.0))


def moves_with_weights(evidence: Evidence) -> bool:
    """Whether batches vary more than by chance while the data are known to come in random order."""
    scores = evidence.get("order_score", math.inf), evidence.get("group_score", math.inf)
    return max(scores) <= LIMIT and _batches_vary(evidence) and not is_of_one_pass(evidence)


def is_of_one_pass(evidence: Evidence) -> bool:
    """Whether it is known from one pass of data at fixed weights."""
    return bool(evidence.get("one_pass"))


def is_off(evidence: Evidence) -> bool:
    """Whether the running statistics are off by more than a warning, chance in what they are compared with taken off.

    Of one pass, at the end of which they are what they are, whatever noise they were to have.
    """
    return beyond_chance(evidence.get("eval_error", 0.0), evidence.get("now_error", math.inf)) > WARNING


def is_never_updated(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether one pass shows running statistics that are off, as no batch has ever updated them."""
    is_initial = layer.has_initial_stats and not (layer.updates_nothing or layer.own_forward)
    return is_of_one_pass(evidence) and is_initial and is_off(evidence)


def does_not_fit(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether one pass shows running statistics that are off, neither by the initial values nor by their own noise."""
    is_known = is_of_one_pass(evidence) and layer.weights_known
    return is_known and (is_lagging(layer, evidence) or (is_off(evidence) and not is_noisy(layer, evidence)))


def _batches_vary(evidence: Evidence) -> bool:
    """Whether batch means vary more than by chance, in whatever way."""
    return _parts_differ(evidence) or _batches_differ(evidence)


def _parts_differ(evidence: Evidence) -> bool:
    # Of batches that repeat each other exactly there is no ratio, and in one block no order.
    above = evidence.get("ordering_ratio", math.inf) > evidence.get("ordering_limit", math.inf)
    return above and _is_of_one_window(evidence) and evidence.get("ordering_share", 0.0) > _SHARE


def _batches_differ(evidence: Evidence) -> bool:
    above = _is_of_one_window(evidence) and evidence.get("grouping_ratio", 0) > evidence["grouping_limit"]
    return above and evidence["grouping_share"] > _SHARE


def is_behind(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether what the running statistics have of earlier values is more than a warning, and than their noise."""
    earlier, noise = _part_of_earlier(evidence), evidence.get("noise_error", 0.0)
    # Both are linear in the buffers and overestimate what is large: the error itself has to be worth a warning, too.
    is_large = earlier > max(WARNING, noise) and _error(evidence, math.inf) > WARNING
    return layer.weights_known and (is_large or (_is_off(evidence) and earlier >= noise))


def _part_of_earlier(evidence: Evidence) -> float:
    return max(evidence.get("warmup_error", 0.0), evidence.get("lag_error", 0.0))


def _is_off(evidence: Evidence) -> bool:
    """Whether the error is worth a warning and no chance, though its parts are small: these are linear, it is not."""
    chance = math.hypot(evidence.get("noise_error", math.inf), evidence.get("now_error", math.inf))
    return _error(evidence, 0.0) > math.hypot(chance, max(WARNING, chance))


def is_warming_up(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether the initial values are the larger part of what the running statistics have of earlier values."""
    if _is_short(evidence):
        return _is_initial(layer, evidence)
    return is_behind(layer, evidence) and evidence.get("warmup_error", 0.0) > evidence.get("lag_error", 0.0)


def is_noisy(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether sampling noise is worth a warning: what it is expected to be, or what it happens to be."""
    noise = evidence.get("noise_error", 0.0)
    happens = _is_off(evidence) and noise > max(WARNING / 2, _part_of_earlier(evidence))
    is_expected = noise > WARNING and (is_off(evidence) or not is_of_one_pass(evidence))
    return layer.weights_known and (is_expected or happens)


def is_moving(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether the inputs move within the window."""
    return layer.weights_known and evidence.get("drift_error", 0.0) > WARNING


def is_lagging(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether the inputs have moved away from the running statistics."""
    if is_far(layer, evidence) or is_behind(layer, evidence):
        return True
    is_left_behind = not _seems_to_follow(evidence) or is_outrun(evidence)
    return is_moving(layer, evidence) and not is_noisy(layer, evidence) and is_left_behind


def _seems_to_follow(evidence: Evidence) -> bool:
    chance = math.hypot(evidence.get("noise_error", 0.0), evidence.get("now_error", 0.0))
    return _error(evidence, 0.0) <= math.hypot(WARNING, chance)


def is_outrun(evidence: Evidence) -> bool:
    """Whether inputs that move at random leave the running statistics behind, and the last batches do not show it.

    An average over these may be as old. By more than three standard errors of what makes an error worth a warning.
    """
    pairs = evidence.get("batches", 0.0) - evidence.get("degrees_of_freedom", math.inf) - 1  # of neighbouring blocks
    if pairs < 1:
        return False
    limit = WARNING * math.sqrt(1 + _CHANCE * WALK_SPREAD / math.sqrt(pairs))
    return evidence.get("walk_error", 0.0) > limit and _seems_to_follow(evidence)


def is_tiny(_: Circumstances, evidence: Evidence) -> bool:
    """Whether a batch has so few independent values per channel that normalising by it is something of its own."""
    return evidence["samples_per_batch"] <= _TINY or is_of_few_samples(evidence)


def is_of_few_samples(evidence: Evidence) -> bool:
    """Whether a batch has several positions, but of so few samples that what these have in common is normalised away.

    Not by the number of values, which resemble each other within a sample, nor by the jitter alone, which is no measure
    of harm: in small trainings this finds 34 of 44 layers where it costs more than 10 % of the loss, and 4 of 151 where
    it costs less than 5 %.
    """
    samples = evidence["batch_size"]
    if samples > _FEW_SAMPLES or evidence["samples_per_batch"] < 2 * samples:
        return False
    if evidence.get("independent_values", math.inf) <= _FEW_VALUES:
        return True
    return samples < 2 and evidence.get("batch_jitter", 0.0) >= _SATURATED


def has_small_last_batch(_: Circumstances, evidence: Evidence) -> bool:
    """Whether the last batch is so small that leaving it out would help: by its noise, or as it spoils the weights."""
    return is_tiny_at_last(evidence) or is_noisy_at_last(evidence)


def is_tiny_at_last(evidence: Evidence) -> bool:
    """Whether the last batch has so few values, and the others more."""
    return evidence.get("last_batch_samples", math.inf) <= _TINY < evidence["samples_per_batch"]


def is_spoiled_by_last(evidence: Evidence) -> bool:
    """Whether a last batch of so few values needs attention: of one pass, if the running statistics are off, too.

    Other data may end otherwise than those of training did.
    """
    return is_tiny_at_last(evidence) and (is_off(evidence) or not is_of_one_pass(evidence))


def is_noisy_at_last(evidence: Evidence) -> bool:
    """Whether the running statistics would be better by 0.08 without the last batch, which is small."""
    is_small = evidence.get("last_batch_samples", math.inf) <= evidence.get("samples_per_batch", 0.0) / 2
    noise, without = evidence.get("noise_error", 0.0), evidence.get("noise_without_last_batch", math.inf)
    return is_small and evidence.get("last_batch_share", 0.0) > 0.5 and noise**2 - without**2 > _WORTH_DROPPING**2


def differs_by_calls(evidence: Evidence) -> bool:
    """Whether the calls of a step differ by so much that it is worth a warning."""
    return evidence.get("call_shift", 0.0) >= WARNING


def is_noisy_by_calls(evidence: Evidence) -> bool:
    """Whether batches scatter as the calls of a step differ, and not by more than is tolerable without that.

    Contrasts of J calls sum to zero: if one of them is D, their variance is at least D squared over J - 1.
    """
    if not (differs_by_calls(evidence) and evidence.get("jitter")):
        return False
    of_calls = evidence["call_shift"] ** 2 / max(evidence["calls_per_step"] - 1, 1)
    rest = max(1 - of_calls / evidence["jitter"] ** 2, 0.0)
    return evidence.get("noise_error", 0.0) * math.sqrt(rest) <= WARNING


def is_often_guarded(evidence: Evidence) -> bool:
    """Whether the guard has undone more than a tenth of the calls: something is wrong beyond a batch now and then."""
    undone = evidence.get("guarded_calls", 0.0) / evidence.get("ranks", 1.0)
    counted = sum(evidence.get(f"calls_{path}", 0.0) for path in ("saved", "traced", "pass"))
    return undone > _OFTEN * (undone + counted)


def has_unlike_calls(layer: Circumstances, evidence: Evidence) -> bool:
    """Whether the calls of a step differ, each is normalised by itself in training, and all alike in eval mode."""
    normalises_by_batch = layer.training_calls > 0 and layer.has_running_stats and not layer.own_forward
    return normalises_by_batch and evidence.get("call_shift", 0.0) >= _CALL_SHIFT


def is_spoiled_by_calls(evidence: Evidence) -> bool:
    """Whether they differ by so much that it is worth a warning.

    One layer at several places did no harm in trials, unless eval() normalises all of them badly.
    """
    is_harmless = is_at_several_places(evidence) and evidence.get("unseen_error", 0.0) <= SERIOUS
    return differs_by_calls(evidence) and not is_harmless


def is_at_several_places(evidence: Evidence) -> bool:
    """Whether a layer is called more often than the model is."""
    return evidence.get("calls_per_model_call", 1.0) > _SEVERAL


def beyond_chance(distance: float, noise: float) -> float:
    """A distance with its noise taken off; 0 up to three times that."""
    return math.sqrt(distance**2 - noise**2) if distance > _CHANCE * noise else 0.0
