"""A window in which the weights stayed as they were: when a batch came says nothing, so all batches make one block."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from lightning_bnmonitor.statistics.segments import FloatArray
from lightning_bnmonitor.statistics.window import Blocks

Part = Literal["none", "average"]
"""What the batches are in the running statistics: nothing, or all there is, as the plain average."""


def as_one_block(blocks: Blocks, part: Part) -> Blocks:
    """The batches that updated no running statistics (there are no others) as if they had had a part in them.

    With ``"none"``, the running statistics are what they were before; their noise is that of earlier batches. With
    ``"average"`` they are the average of all values: the weight of a batch of n values is n / N in the mean, and
    (n - 1) / (N - T) in the variance of N values in T batches.
    """

    def first(values: FloatArray) -> FloatArray:
        padded: FloatArray = np.zeros(blocks.num_batches.shape)
        padded[:, 0] = values
        return padded

    def first_row(values: FloatArray) -> FloatArray:
        padded: FloatArray = np.zeros(blocks.value.shape)
        padded[0] = values
        return padded

    used = blocks.aside_batches > 0
    averaged = part == "average"
    degrees = np.stack([blocks.aside_samples, blocks.aside_samples - blocks.aside_batches])
    noise: FloatArray = np.divide(float(averaged), degrees, out=np.zeros_like(degrees), where=degrees > 0)
    nothing: dict[str, Any] = {
        name: np.zeros_like(getattr(blocks, name))
        for name in ("aside_batches", "aside_samples", "aside_value", "aside_m2")
    }
    return blocks._replace(
        num_batches=first(blocks.aside_batches),
        num_samples=first(blocks.aside_samples),
        batch_size=first(blocks.aside_size),
        weight=first(np.where(used & averaged, 1.0, 0.0)),
        noise=np.stack([first(of_buffer) for of_buffer in noise]),
        value=first_row(blocks.aside_value),
        m2=first_row(blocks.aside_m2),
        decay=np.full_like(blocks.decay, float(not averaged)),
        rounding=np.zeros_like(blocks.rounding),
        **nothing,
    )
