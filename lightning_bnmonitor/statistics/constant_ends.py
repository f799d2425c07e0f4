"""Whether what a model is given looks padded: samples that end in positions which are all alike.

Of sequences ``(B, C, T)``, ``(B, T, C)`` or token ids ``(B, T)``, at most 16 samples and 8 channels of each are looked
at, in the first two batches of a window. A sample's *end* is the run of last positions that have, in all channels,
the values of the very last one, its *beginning* likewise. They look padded if, on average over batches, the ends are at
least a tenth of the positions and four times as much as the beginnings (empty borders are alike on both sides), three
positions or more in half of the samples, and of lengths that scatter by a thirtieth of T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BATCHES, _SAMPLES, _CHANNELS = 2, 16, 8
_MIN_SHARE, _MIN_RATIO, _MIN_SAMPLES, _MIN_SCATTER = 0.1, 4.0, 0.5, 1 / 30
_MIN_RUN = 3  # positions of an end
_MIN_POSITIONS = 8
_TOKENS = (torch.int32, torch.int64)


class ConstantEnds:
    """What the first batches of a window look like."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def reset(self) -> None:
        """Begin a window."""
        self._seen = []

    @property
    def is_due(self) -> bool:
        """Whether the next batch would be looked at."""
        return len(self._seen) < _BATCHES

    @torch.no_grad()
    def see(self, inputs: Sequence[Tensor]) -> None:
        """Look at the first of a batch's inputs, if it is of sequences and one is due."""
        if self.is_due and inputs and inputs[0].numel() and (_is_tokens(inputs[0]) or inputs[0].ndim == 3):
            self._seen.append(_ends_of(inputs[0]))

    def share(self) -> float | None:
        """Share of the positions that lie in ends, if these look padded."""
        if not self._seen:
            return None
        every = torch.stack([ends.cpu() for ends in self._seen]).mean(0)  # by dimension
        for share, beginning, samples, scatter in every.tolist():
            is_end = share >= max(_MIN_SHARE, _MIN_RATIO * beginning)
            if is_end and samples >= _MIN_SAMPLES and scatter >= _MIN_SCATTER:
                return float(share)
        return None


def _is_tokens(x: Tensor) -> bool:
    """Whether these are token ids ``(B, T)``."""
    return x.ndim == 2 and x.dtype in _TOKENS


def _ends_of(x: Tensor) -> Tensor:
    """Of the last dimension and, if there are three, of the second, ``(2, 4)`` float32.

    The share of the positions in ends, that in beginnings, the share of samples with an end of three positions or more,
    and by how much (standard deviation) the share scatters over samples.
    """
    x = x[:_SAMPLES]
    by_time = [x[:, None], x[:, None]] if x.ndim == 2 else [x, x.mT]
    found = []
    for values in by_time:
        values = values[:, :: -(-values.shape[1] // _CHANNELS)]
        ends, beginnings = _run(values.flip(2)), _run(values)
        share = ends / values.shape[2]
        is_long = (ends >= _MIN_RUN).float().mean() * (values.shape[2] >= _MIN_POSITIONS)
        found.append(torch.stack([share.mean(), beginnings.mean() / values.shape[2], is_long, share.std(correction=0)]))
    return torch.stack(found)


def _run(values: Tensor) -> Tensor:
    """First positions of ``(B, C, T)`` that are alike in all channels, ``(B,)`` float32."""
    same = (values == values[:, :, :1]).all(1)
    return same.float().cumprod(1).sum(1)
