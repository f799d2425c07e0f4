"""The moments of an input by passes over it: exact at any mean, and as fast as its memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bnmonitor.compat import batch_norm_stats

_SERIAL = 128  # values that are added one by one, in float32 if they are that
_SMALL = 16384  # values up to which it takes longer to call all the operations than to run PyTorch's reduction


@torch.no_grad()
def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance of ``x``, ``(N, C, *)``, not empty: ``(C,)`` each, float64 where the device has it.

    About a centre :math:`c` near the mean :math:`\mu`, :math:`\mu = c + E(x - c)` and
    :math:`\sigma^2 = E(x - c)^2 - (E(x - c))^2`. The difference of two floats that are close is exact, so that no digit
    is lost however large the mean is beside the standard deviation. The centre is the mean of a part of the values.
    That of any share :math:`s` of them, whichever, is within :math:`\sigma\sqrt{(1 - s)/s}` of :math:`\mu`: with a
    sixteenth at most four standard deviations, so that at most a factor of 16 is lost in the variance. It is taken from
    all over the batch, so that it is near, also where one sample is unlike all others.

    On the CPU the sums are of short rows in float32, added in float64: as exact as PyTorch's reductions, which run at a
    twentieth of the memory's speed there. Elsewhere, and of small inputs, PyTorch's fastest reduction for the layout is
    taken. Which is which depends on device, layout and size, never on data.
    """
    values = x.movedim(1, -1).flatten(0, -2)[..., None] if _has_channels_inside(x) else _with_positions(x)
    half = x.dtype not in (torch.float32, torch.float64)
    centre = _part_of(values).mean((0, 2), dtype=torch.float32 if half else None)
    if x.device.type == "cpu" and x.numel() > _SMALL:
        deviation = values.float().sub_(centre[:, None]) if half else values - centre[:, None]
        num = deviation.numel() // len(centre)
        first = _sums(deviation) / num
        second = _sums(deviation.square_()) / num
        return first + centre.double(), second.sub_(first.square()).clamp_min_(0)
    deviation = x - centre.view(-1, *[1] * (x.ndim - 2))
    is_channels_last = x.ndim == 4 and deviation.is_contiguous(memory_format=torch.channels_last)
    if x.is_cuda and is_channels_last and batch_norm_stats is not None:
        # BatchNorm's own, which is made for this layout. (With an eps of 0, it gives 0 for the inverse of 0.)
        first, invstd = batch_norm_stats(deviation, 1e-30)
        var = invstd.pow(-2)
    else:
        var, first = torch.var_mean(deviation, [dim for dim in range(x.ndim) if dim != 1], correction=0)
    if x.device.type == "mps":  # which has no float64
        return first + centre, var
    return first.double().add_(centre), var


@torch.no_grad()
def masked_moments_of(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many values per channel a mask lets count, and their mean and biased variance.

    The others may be anything, NaN too. The sums are those of :func:`moments_of`, the second about the mean.

    Args:
        x: ``(N, C, *positions)``, not empty.
        mask: Bool, ``(N, *positions)``, or of size 1 where all are alike.

    Returns:
        ``()``, ``(C,)`` and ``(C,)``, float64 (float32 on MPS, which has none); 0 each if none counts.
    """
    mask = mask.expand(x.shape[0], *x.shape[2:])
    if _has_channels_inside(x):
        values, mask = x.movedim(1, -1).flatten(0, -2)[..., None], mask.reshape(-1, 1, 1)
    else:
        values, mask = _with_positions(x), mask.reshape(x.shape[0], 1, -1)
    values = values if x.dtype in (torch.float32, torch.float64) else values.float()
    count = mask.sum(dtype=_double(x))
    num = count.clamp_min(1)
    kept = torch.where(mask, values, 0)
    centre = (_sums(kept) / num).to(kept.dtype)
    kept.sub_(centre[:, None]).mul_(mask)
    first = _sums(kept) / num
    second = _sums(kept.square_()) / num
    return count, first + centre, second.sub_(first.square()).clamp_min_(0)


def _double(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _with_positions(x: Tensor) -> Tensor:
    """``(N, C, P)``."""
    return x[..., None] if x.ndim == 2 else x.flatten(2)


def _part_of(values: Tensor) -> Tensor:
    """A sixteenth of the values of ``(N, C, P)``, or more of few: of samples from all over, the first positions."""
    num, _, positions = values.shape
    samples = 4 if num >= 4 and positions >= 4 else 16 if num >= 4 else 1
    return values[::samples, :, : -(-positions * samples // 16)]


def _has_channels_inside(x: Tensor) -> bool:
    """Whether the values of all channels at one position lie side by side in memory."""
    return x.ndim > 2 and x.shape[1] > 1 and x.stride(1) == 1


def _sums(values: Tensor) -> Tensor:
    """Sums of ``(N, C, P)`` per channel, ``(C,)`` float64, of parts that are added in the dtype of the values."""
    num, channels, positions = values.shape
    if positions >= num:
        return (
            values.sum(2).to(_double(values)).sum(0)
        )  # rows lie in memory as they are: PyTorch adds these in a cascade
    rows = values.reshape(num, channels * positions)
    whole = num - num % _SERIAL
    sums = rows[whole:].sum(0).to(_double(values))
    if whole:
        sums += rows[:whole].view(whole // _SERIAL, _SERIAL, channels * positions).sum(1).to(sums.dtype).sum(0)
    return sums.view(channels, positions).sum(1)
