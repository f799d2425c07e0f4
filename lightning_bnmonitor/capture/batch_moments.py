"""One call of a BatchNorm layer and the batch moments of what it received, in the cheapest way that is exact.

==========  ==================================================  =================================================
path        when                                                how
==========  ==================================================  =================================================
``saved``   eager, training mode, autograd graph recorded       the kernel has computed mean and inverse standard
                                                                deviation for its backward: read them off the node
``traced``  under ``torch.compile``                             ``var_mean`` in the graph, where the compiler fuses
                                                                it with BatchNorm's own reduction
``pass``    otherwise, and on request                           ``var_mean`` of the input
==========  ==================================================  =================================================

The choice depends on modes, types and shapes, never on data: nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bnmonitor.compat import (
    SAVED_INVSTD,
    SAVED_MEAN,
    BatchNorm,
    batch_norm_kernel,
    has_unpack_hooks,
    saved_by_synchronised,
    top_saved_tensor_hooks,
)

CaptureMode = Literal["auto", "pass"]
Path = Literal["saved", "traced", "pass"]
PATHS: tuple[Path, ...] = ("saved", "traced", "pass")
_FULL_PRECISION = (torch.float32, torch.float64)
_MAX_SERIAL = 4096  # values per channel that a serial float32 sum may have and still be exact enough


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


def owned(moments: BatchMoments) -> BatchMoments:
    """Moments as they are, whose memory no CUDA graph will write to at its next replay."""
    if moments.negated:
        return moments._replace(mean=-moments.mean, spread=-moments.spread, negated=False)
    if not moments.mean.is_cuda:
        return moments
    mean, spread = torch.stack([moments.mean, moments.spread])
    return moments._replace(mean=mean, spread=spread)


def saved_moments(module: BatchNorm, x: Tensor, output: object) -> BatchMoments | None:
    """What the kernel that produced ``output`` saved for its backward, without a kernel of our own.

    Args:
        module: The BatchNorm layer.
        x: What it received, ``(N, C, *)``. Only its layout matters.
        output: What it returned, ``(N, C, *)``.

    Returns:
        None if nothing usable was saved: no graph (``no_grad``, or nothing that requires grad), the layer normalised by
        its running statistics, the output is not the kernel's own (a subclass with an activation), the module computes
        in half precision and saved in it. None also if saved-tensor hooks were active (activation checkpointing,
        ``save_on_cpu``): reading would run them, and under checkpointing a whole recomputation. And None for a large
        batch that the CPU's kernel sums value by value in float32, as it does with one position a sample and if ``x``
        is not contiguous (channels-last, slices): the error grows with the root of the number of values.
    """
    if not isinstance(output, Tensor) or is_intercepted(output):
        return None
    node: Any = output.grad_fn
    kernel = batch_norm_kernel(node.__class__)
    if kernel != "plain":
        return _synchronised_moments(module, output) if kernel == "synchronised" else None
    mean, invstd = getattr(node, SAVED_MEAN), getattr(node, SAVED_INVSTD)
    num_channels = module.num_features
    if mean.numel() != num_channels or mean.dtype not in _FULL_PRECISION:
        return None
    shape = output.shape
    batch_size, num_samples = shape[0], shape.numel() // num_channels
    serial = num_samples == batch_size or not x.is_contiguous()
    if serial and num_samples > _MAX_SERIAL and x.device.type == "cpu":
        return None
    return BatchMoments("saved", num_samples, batch_size, mean, invstd, module.eps, serial)


def _synchronised_moments(module: BatchNorm, output: Tensor) -> BatchMoments | None:
    """What SyncBatchNorm's forward on several ranks saved: the moments of the batches of all these ranks together.

    How many values the other ranks had is on the device; each is taken to have had as many as this one.
    """
    mean, invstd, group = saved_by_synchronised(output.grad_fn)
    if mean.numel() != module.num_features or mean.dtype not in _FULL_PRECISION:
        return None
    num_ranks = dist.get_world_size(group)
    num_samples = output.numel() // module.num_features * num_ranks
    batch_size = len(output) * num_ranks
    return BatchMoments("saved", num_samples, batch_size, mean, invstd, module.eps, num_ranks=num_ranks)


def is_intercepted(output: object) -> bool:
    """Whether something intercepts what autograd saves, or has for ``output``: checkpointing, ``save_on_cpu``."""
    if top_saved_tensor_hooks(True) is not None:
        return True
    node: Any = getattr(output, "grad_fn", None)
    return batch_norm_kernel(node.__class__) is not None and has_unpack_hooks(node)


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
    var, mean = torch.var_mean(x, _all_but_channels(x), correction=0, keepdim=True)
    mean, var = mean.flatten(), var.flatten()
    negated = x.dtype == torch.float64 or x.device.type == "mps"  # which has no float64
    mean, var = (-mean, -var) if negated else (mean.double(), var.double())
    return BatchMoments("traced", x.numel() // x.shape[1], x.shape[0], mean, var, None, negated=negated)


@torch.no_grad()
def pass_moments(x: Tensor) -> BatchMoments:
    """Moments of ``x``, ``(N, C, *)``, not empty, by a pass over it in at least float32.

    Two passes, in fact: the first finds a mean that float32 has rounded, the second the moments about it, and the two
    means are added in float64. The difference of two floats that are close is exact, so that no digit is lost however
    large the mean is beside the standard deviation.
    """
    x = _at_least_float32(x.detach())
    dims = _all_but_channels(x)
    centre = x.mean(dims, keepdim=True)
    var, rest = torch.var_mean(x - centre, dims, correction=0)
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    mean = rest.to(wide) + centre.flatten().to(wide)
    return BatchMoments("pass", x.numel() // x.shape[1], len(x), mean, var, None)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in _FULL_PRECISION else x.float()


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]
