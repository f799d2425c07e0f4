"""What is said of a layer by what it received in validation: explanations and remedies of flags."""

from __future__ import annotations

from lightning_bnmonitor.diagnosis import rules
from lightning_bnmonitor.diagnosis.evidence import Evidence
from lightning_bnmonitor.diagnosis.sentences import OF_COPIES, RECALIBRATE, RECALIBRATE_CALL

_ALONE = f"If the model was loaded, load its running statistics, too, or recompute them ({RECALIBRATE_CALL})."


def _moves(evidence: Evidence) -> bool:
    """Whether what the layer receives moved in training, so that what it is after the last step is not known."""
    return max(evidence.get("drift_error", 0.0), evidence.get("walk_error", 0.0)) > 0


def explain_shift(evidence: Evidence) -> list[str]:
    """Explain ``domain-shift``."""
    sentence = (
        "What it receives in validation"
        + (" (loader {val_loader}, counted from 0)" if "val_loader" in evidence else "")
        + " is {val_shift} off what it receives in training (chance explains {val_noise}, in {val_batches} batches)"
    )
    error = "Its running statistics are {val_error} off what it receives there."
    if evidence.get("val_spoiled_before"):
        return [
            f"{sentence}. A layer before it is normalised by its batches in training, as eval() cannot do it (its own "
            "verdict and flags say why): that alone can make such a difference, with the same data.",
            error,
        ]
    if evidence.get("val_shifted_before"):
        return [f"{sentence}, as in a layer before it.", error]
    if evidence.get("val_layers_before"):
        by_weights = "weights that moved in the last steps (a high learning rate), " if _moves(evidence) else ""
        return [
            f"{sentence}, and no layer before it shows that: {by_weights}dropout, augmentation or normalising by small "
            "batches before it in training, other frequencies of classes, overfitting, or the inputs.",
            error,
        ]
    return [f"{sentence}. It is the first BatchNorm layer: the inputs differ.", error]


def cure_shift(evidence: Evidence) -> list[str]:
    """What to do about ``domain-shift``."""
    if evidence.get("val_spoiled_before"):
        return ["Begin with that layer."]
    if evidence.get("val_shifted_before"):
        return ["Begin with the first layer that has this flag."]
    prepare = (
        "Prepare validation data as training data. If they are what the model will be given, recompute the running "
        "statistics from data of that kind (`lightning_bnmonitor.recalibrate(model, evaluation_loader)`)."
    )
    if evidence.get("val_layers_before"):
        by_weights = (
            "Evaluate training data in the same way (`trainer.validate(model, train_loader)`). If it is as far off "
            f"there, {RECALIBRATE}. If not:"
        )
        return [
            *([by_weights] if _moves(evidence) else []),
            "Put dropout behind this layer rather than before it.",
            prepare,
            "Where only classes are more or less frequent, leave it.",
        ]
    return [prepare]


def explain_other_weights(evidence: Evidence) -> list[str]:
    """Explain ``other-weights``."""
    error = "its running statistics are {val_error} off what it receives in validation (chance explains "
    error += "{val_error_noise})"
    if evidence.get("averaged"):
        return [f"{error[0].upper()}{error[1:]}: averaged weights need statistics of their own."]
    if rules.was_called(evidence):
        return [
            "Validation ran with other weights or running statistics than training ended with (averaged or swapped "
            f"weights: EMA, SWA, `WeightAveraging`, schedule-free optimizers): {error}."
        ]
    return [f"It is called in validation and was not called in training: {error}."]


def cure_other_weights(evidence: Evidence) -> list[str]:
    """What to do about ``other-weights``."""
    if rules.was_called(evidence) or evidence.get("averaged"):
        return [
            "Add `PreciseBatchNorm(restore=True)` to the Trainer's callbacks (to weights that `validation_step` itself "
            f"puts in place it comes too early); or, with those weights in the model, {RECALIBRATE}."
        ]
    return [OF_COPIES, _ALONE]


def explain_unexplained(evidence: Evidence) -> list[str]:
    """Explain ``unexplained-error``."""
    if evidence.get("val_alone"):
        return [
            "Its running statistics are {val_error} off what it receives here (chance explains {val_error_noise}): "
            "these data are other than those it was trained with, or its running statistics do not belong to its "
            "weights."
        ]
    return [
        "In validation eval() is off by {val_error}, more than chance explains ({val_error_noise}). The cause is not "
        "known: neither this layer nor one before it has shown anything that explains it.",
        "Against what it receives in training, its running statistics are off by {eval_error}.",
    ]


def cure_unexplained(evidence: Evidence) -> list[str]:
    """What to do about ``unexplained-error``."""
    if evidence.get("val_alone"):
        return [
            "Evaluate training data in the same way (`trainer.validate(model, train_loader)`). If it is as far off "
            f"there, load the running statistics that belong to the weights, or recompute them ({RECALIBRATE_CALL}). "
            "If not, the data differ: prepare them as training data."
        ]
    return [
        "See whether better running statistics help: `print(lightning_bnmonitor.attribute_eval_gap(model, loader, "
        f"loss))`. If so, {RECALIBRATE}."
    ]


def cure_never_updated(evidence: Evidence) -> list[str]:
    """What to do about ``never-updated``."""
    return [_ALONE] if evidence.get("val_alone") else [OF_COPIES, _ALONE]
