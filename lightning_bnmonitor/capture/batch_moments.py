"""The batch moments of one call of a BatchNorm layer, and the ways to them, of which the cheapest exact one is taken.

==========  ==================================================  =================================================
path        when                                                how
==========  ==================================================  =================================================
``saved``   eager, training mode, autograd graph recorded       the kernel has computed mean and inverse standard
                                                                deviation for its backward: read them off the
                                                                node, :mod:`.saved`
``traced``  under ``torch.compile``                             ``var_mean`` in the graph, where the compiler fuses
                                                                it with BatchNorm's own reduction
``pass``    otherwise, and on request                           sums over the input, :mod:`.reduction`
==========  ==================================================  =================================================

The choice depends on modes, types and shapes, never on data: nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_bnmonitor.capture.reduction import moments_of

CaptureMode = Literal["auto", "pass"]
Path = Literal["saved", "traced", "pass"]
PATHS: tuple[Path, ...] = ("saved", "traced", "pass")
FULL_PRECISION = (torch.float32, torch.float64)


class BatchMoments(NamedTuple):
    """Moments of one batch per channel."""

    path: Path
    """How they were obtained."""
    num_samples: int
    """Values per channel: batch size times the number of positions."""
    batch_size: int
    """Samples, ``x.shape[0]``."""
    mean: Tensor
    """Mean, ``(C,)``, float32 or float64."""
    spread: Tensor
    """Biased variance, ``(C,)``; if ``eps`` is given, (var + eps)^-1/2 instead."""
    eps: float | None
    """The ``eps`` within ``spread``, None if that is the variance."""
    serial: bool = False
    """Whether a kernel saved them that, on the CPU, sums value by value in float32: they then are less exact."""
    negated: bool = False
    """Whether mean and spread have the opposite sign: see :func:`traced_moments`."""
    num_ranks: int = 1
    """Over how many ranks SyncBatchNorm has taken them. Counts then are those of this rank times that number."""


def owned(moments: Sequence[BatchMoments]) -> list[BatchMoments]:
    """Traced moments as they are, in memory that no CUDA graph will write to at its next replay.

    Copied all at once: a copy for each layer would be a kernel to launch for each.
    """
    taken = [_turned(each) if each.negated else each for each in moments]
    by_device: dict[torch.device, list[int]] = {}
    for index, each in enumerate(moments):
        if each.mean.is_cuda and not each.negated:
            by_device.setdefault(each.mean.device, []).append(index)
    for indices in by_device.values():
        shared = [part for index in indices for part in (taken[index].mean, taken[index].spread)]
        copies = iter(torch.split(torch.cat(shared), [len(part) for part in shared]))
        for index in indices:
            path, num_samples, batch_size, *_ = taken[index]
            taken[index] = BatchMoments(path, num_samples, batch_size, next(copies), next(copies), None)
    return taken


def _turned(moments: BatchMoments) -> BatchMoments:
    return moments._replace(mean=-moments.mean, spread=-moments.spread, negated=False)


def traced_moments(x: Tensor) -> BatchMoments:
    """Moments of ``x``, ``(N, C, *)``, in code that ``torch.compile`` traces.

    This is, to the letter, the expression that BatchNorm itself is decomposed into: the compiler finds that it has it
    already, and generates for all the rest what it would have generated without us. (Without ``keepdim``, or with a
    shift, it is another reduction, which is then fused with BatchNorm's, and the training is no longer bit-identical.)

    So it is also BatchNorm's own memory, which the compiled backward pass may overwrite (it takes what the forward pass
    has saved for it to be its own). Therefore what is left behind is something else: in double precision, or, if that
    is what there is, with the opposite sign. A plain copy is found to be superfluous by the compiler.
    """
    x = _at_least_float32(x.detach())
    var, mean = torch.var_mean(x, [dim for dim in range(x.ndim) if dim != 1], correction=0, keepdim=True)
    mean, var = mean.flatten(), var.flatten()
    negated = x.dtype == torch.float64 or x.device.type == "mps"  # which has no float64
    mean, var = (-mean, -var) if negated else (mean.double(), var.double())
    return BatchMoments("traced", x.numel() // x.shape[1], x.shape[0], mean, var, None, negated=negated)


def pass_moments(x: Tensor) -> BatchMoments:
    """Moments of ``x``, ``(N, C, *)``, not empty, by a pass over it in at least float32."""
    mean, var = moments_of(x)
    return BatchMoments("pass", x.numel() // x.shape[1], len(x), mean, var, None)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in FULL_PRECISION else x.float()
