"""What is said otherwise where what a layer receives is known from one pass of given data at fixed weights.

There is no window then, nothing moves, and training is not seen: its batches are taken to be like these.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bnmonitor.diagnosis import flags, rules, wording
from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence
from lightning_bnmonitor.diagnosis.sentences import RECALIBRATE, RECALIBRATE_CALL, Statement

_RECALIBRATE = f"{RECALIBRATE[0].upper()}{RECALIBRATE[1:]}."
_ATTRIBUTE_CALL = "`print(lightning_bnmonitor.attribute_eval_gap(model, loader, loss))`"
_WITH_THOSE_OF_TRAINING = "If training has other batches, give these, shuffled and of the same size, and look again."


def in_words(statement: Statement, evidence: Evidence) -> Statement:
    """A verdict or flag in the words that fit where its numbers come from."""
    if not rules.is_of_one_pass(evidence):
        return statement
    if statement.name == "misfit" and rules.differs_by_calls(evidence) and _is_unseen(evidence):
        return _MISFIT_OF_CALLS
    return _WORDS.get(statement.name, statement)


def _is_unseen(evidence: Evidence) -> bool:
    """Whether most of an error is what no running average sees."""
    return evidence.get("unseen_error", 0.0) ** 2 > evidence.get("eval_error", 0.0) ** 2 / 2


def _explain_non_finite(evidence: Evidence) -> list[str]:
    return [
        "It received NaN or Inf, or values whose variance overflows: first in batch {first_bad_batch} (counted "
        "from 1), channel {first_bad_channel}.",
        *wording.explain_non_finite({name: evidence[name] for name in evidence if name == "non_finite_running_stats"}),
    ]


def _cure_non_finite(evidence: Evidence) -> list[str]:
    sentences = []
    if "first_bad_batch" in evidence:
        sentences.append(
            "See whether the data are finite (`torch.isfinite(x).all()` for each batch). If they are, a layer before "
            "this one makes it: by its weights, by its running statistics, or in half precision."
        )
    return [*sentences, *([_RECALIBRATE] if evidence.get("non_finite_running_stats") else [])]


def _explain_unused(evidence: Evidence) -> list[str]:
    if evidence.get("calls_skipped"):
        return ["No call of it was counted."]
    return ["It is not reached by any of these batches."]


def _explain_frozen(evidence: Evidence) -> list[str]:
    first, *_, last = wording.explain_frozen({**evidence, "batches": 0.0})
    return [
        first,
        *(["They are still the initial zeros and ones."] if evidence.get("initial_weight") == 1 else []),
        last,
    ]


def _explain_ordered(_: Evidence) -> list[str]:
    return [
        "The data come in an order: its batch means differ {ordering_ratio} times as much between parts of this pass "
        "as between neighbouring batches (chance explains up to {ordering_limit}), by {ordering_share} of the "
        "variance, while the weights stay. Trained with data in such an order, running statistics are those of the "
        "last part.",
        "Against all of these data they are {eval_error} off.",
    ]


def _cure_order(evidence: Evidence) -> list[str]:
    return [_WITH_THOSE_OF_TRAINING, wording.cure_order(evidence)[0]]


def _explain_warming_up(evidence: Evidence) -> list[str]:
    if evidence.get("initial_weight") == 1:
        said = "The initial zeros and ones are all that its running statistics are made of."
        return [] if rules.is_off(evidence) else [said]  # its flag says it
    explained = wording.explain_warming_up(evidence)[0]
    return [f"After {{num_updates}} updates with `momentum={{momentum}}`, t{explained[1:]}"]


def _cure_warming_up(evidence: Evidence) -> list[str]:
    if evidence.get("initial_weight") == 1:
        return [] if rules.is_off(evidence) else [_RECALIBRATE]  # likewise
    return [_RECALIBRATE, "In a training of as many batches, `momentum={recommended_momentum}` leaves nothing of them."]


def _explain_noisy(evidence: Evidence) -> list[str]:
    if rules.is_noisy_at_last(evidence) or rules.is_noisy_by_calls(evidence) or "momentum" not in evidence:
        return wording.explain_noisy(evidence)
    return [
        "Running statistics with `momentum={momentum}` follow the last batches too closely where a batch has "
        "{samples_per_batch} values per channel: sampling noise alone is an error of {noise_error}, however long one "
        "trains. These are {eval_error} off."
    ]


def _cure_noisy(evidence: Evidence) -> list[str]:
    if rules.is_noisy_by_calls(evidence):
        return []
    if rules.is_noisy_at_last(evidence) and not evidence["noise_without_last_batch"] > WARNING:
        return [_RECALIBRATE]
    return [
        _RECALIBRATE,
        "Train with `momentum={recommended_momentum}`: that leaves an error of {recommended_error} from noise, besides "
        "one from weights that still move, which one pass does not show.",
        "A batch size of {recommended_batch_size} helps, too.",
    ]


def _explain_half_frozen(evidence: Evidence) -> list[str]:
    frozen = "Its weights do not train (`requires_grad=False`), and it is in training mode"
    if rules.is_off(evidence):
        return [
            f"{frozen}: if the model was trained on other data like this, its running statistics have gone over to "
            "those, and what was trained with the old ones no longer works in eval()."
        ]
    return [
        f"{frozen}: where the model is trained on like this, its running statistics go over to the data of that, and "
        "what was trained with the old ones no longer works in eval()."
    ]


def _cure_half_frozen(evidence: Evidence) -> list[str]:
    call = "call `layer.eval()` after every `model.train()`."
    if rules.is_off(evidence):
        return [f"To keep what is recomputed, {call}", "What was trained on other data needs the present ones."]
    return [f"To keep it as it is, {call}"]


def _explain_last_batch(evidence: Evidence) -> list[str]:
    sentences = [
        "The last batch of these data is small: {last_batch_samples} values per channel, where the mean is "
        "{samples_per_batch}."
    ]
    if rules.is_noisy_at_last(evidence):
        sentences.append(
            "If an epoch of training ends with it, it weighs as much as any other there, so that sampling noise is an "
            "error of {noise_error}; without it, of {noise_without_last_batch}."
        )
    if rules.is_tiny_at_last(evidence):
        sentences.append("Trained with a batch normalised by so few values, the weights are spoilt by its gradients.")
    return sentences


def _explain_calls(evidence: Evidence) -> list[str]:
    return [*flags.explain_calls(evidence), "That is so if training makes the calls that are made here for a batch."]


def _explain_shift(evidence: Evidence) -> list[str]:
    sentence = "What it receives of the evaluation data is {val_shift} off what it receives of the training data "
    sentence += "(chance explains {val_noise}, in {val_batches} batches)"
    if evidence.get("val_spoiled_before"):
        why = (
            ". A layer before it is normalised by its batches, as eval() cannot do it (its own verdict and flags say "
            "why): that alone can make such a difference, with the same data."
        )
    elif evidence.get("val_shifted_before"):
        why = ", as in a layer before it."
    elif evidence.get("val_layers_before"):
        why = (
            ", and no layer before it shows that: augmentation, normalising by small batches, other frequencies of "
            "classes, overfitting, or the inputs."
        )
    else:
        why = ". It is the first BatchNorm layer: the inputs differ."
    return [sentence + why, "Its running statistics are {val_error} off what it receives there."]


def _cure_shift(evidence: Evidence) -> list[str]:
    left_alone = ", frozen=True" if rules.updates_nothing(evidence) else ""
    if evidence.get("val_spoiled_before"):
        return ["Begin with that layer."]
    if evidence.get("val_shifted_before"):
        return ["Begin with the first layer that has this flag."]
    return [
        "Prepare both in the same way. If data as in evaluation are what the model will be given, recompute the "
        f"running statistics from these (`lightning_bnmonitor.recalibrate(model, evaluation_loader{left_alone})`). "
        "Where only classes are more or less frequent, leave it."
    ]


_MISFIT_OF_CALLS = Statement(
    name="misfit",
    explanation=(
        "Its running statistics are {eval_error} off what it receives. The calls for a batch differ, and running "
        "statistics average the variances of calls, without what lies between them: with any momentum, that is an "
        "error of about {unseen_error}.",
    ),
    remedy=(_RECALIBRATE,),
)
_STATEMENTS = (
    Statement(name="non-finite", explanation=_explain_non_finite, remedy=_cure_non_finite),
    Statement(name="unused", explanation=_explain_unused),
    Statement(
        name="frozen",
        explanation=_explain_frozen,
        remedy=(
            f"If what it receives is no longer what its statistics are from, {RECALIBRATE} and train on, as what "
            "follows has learned with the present ones, or let it learn them (`layer.train()`).",
        ),
    ),
    Statement(
        name="insufficient-data",
        explanation=(
            "From {batches} batches chance and trouble cannot be told apart. Its running statistics are {eval_error} "
            "off what it received in them.",
        ),
        remedy=("Give eight batches or more.",),
    ),
    Statement(
        name="tiny-batch",
        explanation=wording.explain_tiny,
        remedy=lambda evidence: ["If training has larger batches, give these.", *wording.cure_tiny(evidence)],
    ),
    Statement(name="ordered-batches", explanation=_explain_ordered, remedy=_cure_order),
    Statement(name="grouped-batches", explanation=wording.explain_grouped, remedy=_cure_order),
    Statement(name="warming-up", explanation=_explain_warming_up, remedy=_cure_warming_up),
    Statement(name="noisy", explanation=_explain_noisy, remedy=_cure_noisy),
    Statement(
        name="healthy",
        explanation=(
            "The running statistics fit what it receives: they are {eval_error} off, where chance in these data alone "
            "explains {now_error}.",
        ),
    ),
    Statement(
        name="never-updated",
        explanation=(
            "Its running statistics were never updated: they are the initial zeros and ones (`num_batches_tracked` is "
            "zero), {eval_error} off what it receives.",
            "Either the weights came without their running statistics (averaged weights in a copy, a checkpoint that "
            "was loaded in part), or the model was in eval mode all the time it was trained, or it was not trained: "
            "one pass does not tell.",
        ),
        remedy=(
            "If the weights came without them, copy or load the buffers, too, or recompute them "
            f"({RECALIBRATE_CALL}). If it was trained in eval mode, that does not help: train anew, after "
            f"`model.train()`. Whether recomputed ones help, {_ATTRIBUTE_CALL} tells.",
        ),
    ),
    Statement(name="half-frozen", explanation=_explain_half_frozen, remedy=_cure_half_frozen),
    Statement(
        name="maybe-padded",
        explanation=flags.FLAGS["maybe-padded"].explanation,
        remedy=(
            "To know, tell which positions count: `examine(model, loader, mask=fn)`, where `fn(batch)` returns a bool "
            "tensor (B, T), True where a position counts.",
        ),
    ),
    Statement(
        name="small-last-batch",
        explanation=_explain_last_batch,
        remedy=("Leave it out in training: `DataLoader(..., drop_last=True)`.",),
    ),
    Statement(name="calls-differ", explanation=_explain_calls, remedy=flags.cure_calls),
    Statement(name="domain-shift", explanation=_explain_shift, remedy=_cure_shift),
    Statement(
        name="other-weights",
        explanation=(
            "The training data do not reach it, and the evaluation data do: its running statistics are {val_error} off "
            "what it receives there (chance explains {val_error_noise}).",
        ),
        remedy=(f"Give data that reach it, in training and to `recalibrate` ({RECALIBRATE_CALL}).",),
    ),
    Statement(
        name="unexplained-error",
        explanation=(
            "On the evaluation data eval() is off by {val_error}, more than chance explains ({val_error_noise}). The "
            "cause is not known: neither this layer nor one before it has shown anything that explains it.",
            "Against what it receives of the training data, its running statistics are off by {eval_error}.",
        ),
        remedy=(f"See whether better running statistics help: {_ATTRIBUTE_CALL}. If so, {RECALIBRATE}.",),
    ),
)
_WORDS: Mapping[str, Statement] = {statement.name: statement for statement in _STATEMENTS}
