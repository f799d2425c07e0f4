"""What the running statistics of layers are, as an evaluation begins: those of training, exact ones, or others."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bnmonitor.diagnosis.validation import Standing
from lightning_bnmonitor.tracking.affine import AffineWeights
from lightning_bnmonitor.tracking.buffers import Snapshot, snapshots
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer


class Standings:
    """With which weights a window has ended, and running statistics were written since: what others are told from."""

    def __init__(self) -> None:
        self._of_training: AffineWeights | None = None
        self._of_repair: AffineWeights | None = None
        self.are_averaged = False  # whether averaged weights are in the model in the present validation

    def forget(self) -> None:
        """A window begins: nothing is known until it has ended."""
        self._of_training = self._of_repair = None

    def window_ended(self, layers: Sequence[TrackedLayer]) -> None:
        """Take note of the weights that training has left."""
        self._of_training = AffineWeights([layer.module for layer in layers])

    def rewritten(self, layers: Sequence[TrackedLayer]) -> None:
        """Take note of the weights that these layers have, whose running statistics we have just written."""
        self._of_repair = AffineWeights([layer.module for layer in layers])

    def are_others(self) -> bool:
        """Whether weights are in the model that training has not left, and that nothing was written for."""
        changed = self._of_training.changed() if self._of_training is not None else set()
        return bool(changed if self._of_repair is None else changed & self._of_repair.changed())

    def keep(self, layers: Sequence[TrackedLayer]) -> None:
        """Keep the running statistics of layers, as an evaluation begins with them, and what they are."""
        modules = [layer.module for layer in layers]
        changed = self._of_training.changed() if self._of_training is not None else set()
        swapped = self._of_repair.changed() if self._of_repair is not None else set()
        has_trained_weights = self._of_training is not None and self._of_training.is_known and not changed
        for layer, now in zip(layers, snapshots(modules), strict=True):
            layer.val_running = now.buffers
            standing = _standing(layer, now, has_trained_weights, layer.module in changed, layer.module in swapped)
            if self.are_averaged and standing in (Standing.TRAINED, Standing.REWRITTEN):
                standing = Standing.OTHER
            layer.val_standing = standing


def _standing(
    layer: TrackedLayer, now: Snapshot, has_trained_weights: bool, is_changed: bool, is_swapped: bool
) -> Standing:
    """What the running statistics of a layer are.

    Args:
        layer: The layer.
        now: Its running statistics.
        has_trained_weights: Whether weight and bias of all layers are those that training has left.
        is_changed: Whether its own are others.
        is_swapped: Whether its own are others than those with which we have last written running statistics.
    """
    if now.buffers is None:
        return Standing.ABSENT
    if now.is_initial:
        return Standing.INITIAL
    if layer.written is not None and layer.written.has_same_buffers(now):
        return Standing.OTHER if is_swapped else Standing.REPAIRED
    is_rewritten = layer.gate.is_closed and layer.end is not None and not layer.end.has_same_buffers(now)
    if is_changed or (is_rewritten and not has_trained_weights):
        return Standing.OTHER
    return Standing.REWRITTEN if is_rewritten else Standing.TRAINED
