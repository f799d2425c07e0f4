"""When training is over."""

from __future__ import annotations

from lightning.pytorch import Trainer


def is_training_over(trainer: Trainer, epoch_ended: bool) -> bool:
    """Whether no training batch of this ``fit`` will follow.

    It is over after ``max_epochs`` or ``max_steps``, or when it was told to stop; told so before ``min_epochs`` or
    ``min_steps``, it goes on until then. An epoch whose last batch has ended counts, whether or not it was validated.

    Args:
        trainer: It has ended a training batch.
        epoch_ended: Whether that was the last batch of its epoch.
    """
    num_epochs, num_steps = trainer.current_epoch + epoch_ended, trainer.global_step
    if trainer.max_steps != -1 and num_steps >= trainer.max_steps:
        return True
    if trainer.max_epochs is not None and -1 < trainer.max_epochs <= num_epochs:
        return True
    may_stop = num_epochs >= (trainer.min_epochs or 0) and num_steps >= (trainer.min_steps or 0)
    return trainer.should_stop and may_stop
