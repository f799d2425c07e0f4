"""One BatchNorm call and the batch moments of what it received, in the cheapest way that is exact.

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

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

Path = Literal["saved", "traced", "pass"]
PATHS: tuple[Path, ...] = ("saved", "traced", "pass")


class BatchMoments(NamedTuple):
    """Moments of one batch per channel."""

    path: Path
    """How they were obtained."""
    num_samples: int
    """Values per channel: batch size times the number of positions."""
    mean: Tensor
    """Mean, ``(C,)``, float32 or float64."""
    spread: Tensor
    """Biased variance, ``(C,)``; if ``eps`` is given, (var + eps)^-1/2 instead."""
    eps: float | None
    """The ``eps`` within ``spread``, None if that is the variance."""
    channels_last: bool = False
    """Whether a kernel saved them that summed values which are not contiguous: its mean then is less exact."""


def saved_moments(module: _BatchNorm, output: object) -> BatchMoments | None:
    """What the kernel that produced ``output`` saved for its backward, without a kernel of our own.

    Args:
        module: The BatchNorm layer.
        output: What it returned, ``(N, C, *)``.

    Returns:
        None if nothing usable was saved: no graph (``no_grad``, or nothing that requires grad), the layer normalised by
        its running statistics, the output is not the kernel's own (a subclass with an activation), the module computes
        in half precision and saved in it. None also while saved-tensor hooks are active (activation checkpointing,
        ``save_on_cpu``): reading would run them, and under checkpointing a whole recomputation.
    """
    if not isinstance(output, Tensor) or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    node = output.grad_fn
    if node is None or "BatchNorm" not in type(node).__name__:
        return None
    mean, invstd = getattr(node, "_saved_result1", None), getattr(node, "_saved_result2", None)
    if not isinstance(mean, Tensor) or not isinstance(invstd, Tensor):
        return None
    num_channels = output.shape[1]
    if (
        mean.numel() != num_channels
        or invstd.numel() != num_channels
        or mean.dtype not in (torch.float32, torch.float64)
    ):
        return None
    count = output.numel() // num_channels
    return BatchMoments("saved", count, mean, invstd, module.eps, channels_last=not output.is_contiguous())


def traced_moments(x: Tensor) -> BatchMoments:
    """Moments of ``x``, ``(N, C, *)``, in code that ``torch.compile`` traces.

    This is, to the letter, the expression that BatchNorm itself is decomposed into: the compiler finds that it has it
    already, and generates for all the rest what it would have generated without us. (Without ``keepdim``, or with a
    shift, it is another reduction, which is then fused with BatchNorm's, and the training is no longer bit-identical.)
    """
    x = _at_least_float32(x.detach())
    var, mean = torch.var_mean(x, _all_but_channels(x), correction=0, keepdim=True)
    return BatchMoments("traced", x.numel() // x.shape[1], mean.flatten(), var.flatten(), None)


@torch.no_grad()
def pass_moments(x: Tensor) -> BatchMoments | None:
    """Moments of ``x``, ``(N, C, *)``, by a pass over it in at least float32. None if ``x`` is empty.

    Each channel is shifted by its first value, and the shift is added back in float64: the difference of two floats
    that are close is exact, so that no digit is lost however large the mean is beside the standard deviation.
    """
    if x.numel() == 0:
        return None
    x = _at_least_float32(x.detach())
    origin: tuple[int | slice, ...] = (0, slice(None), *[0] * (x.ndim - 2))
    shift = x[origin]
    centred = x - shift.view(-1, *[1] * (x.ndim - 2))
    var, mean = torch.var_mean(centred, _all_but_channels(x), correction=0)
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    return BatchMoments("pass", x.numel() // x.shape[1], mean.to(wide) + shift.to(wide), var, None)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]
