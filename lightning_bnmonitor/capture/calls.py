"""What is kept of one call of a BatchNorm layer until it is merged."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bnmonitor.capture.batch_moments import BatchMoments, Path
from lightning_bnmonitor.capture.saved import Kernel, Way, enters_no_context
from lightning_bnmonitor.compat import BatchNorm, batch_norm_kernel, shape_of_output

_SETTINGS = "training", "track_running_stats", "eps", "momentum"
settings_of = itemgetter(*_SETTINGS)
"""What is compared of a layer's ``__dict__``, where a property would not be seen."""


class CallKind(NamedTuple):
    """All of a call but its moments. As a rule the next call of the layer is the same in all of it."""

    eps: float | None
    """The layer's ``eps`` if the kernel gave (var + eps)^-1/2, None if the moments have the variance itself."""
    momentum: float | None
    """The layer's."""
    training: bool
    """Whether the layer normalised by the batch, as far as is known: whether it was in training mode."""
    updating: bool
    """Whether BatchNorm counted the call in ``num_batches_tracked``."""
    path: Path
    """How the moments were obtained."""
    num_samples: int
    """Values per channel."""
    batch_size: int
    """Samples."""
    serial: bool
    """Whether the kernel sums value by value in float32, so that what it saves is less exact."""
    num_ranks: int
    """Over how many ranks SyncBatchNorm has taken the moments."""
    width: int
    """Channels."""
    intercepted: bool
    """Whether what autograd saves was intercepted, as by activation checkpointing, which makes the call again."""


class Signature(NamedTuple):
    """What tells that a call whose moments were read off the kernel's node is like an earlier one of the layer."""

    settings: tuple[Any, ...]
    """The layer's: those of :data:`settings_of`."""
    running_mean: Tensor
    """The layer's buffer itself: while it is the same object, device and precision of what is saved are, too."""
    on_cuda: bool
    """Whether that is on a GPU, where a graph may be captured."""
    shape: torch.Size
    """Of the output."""
    node_type: type
    """Of the output's autograd node."""
    contiguous: bool | None
    """Whether the input was; None if that tells nothing."""
    plain_class: type | None
    """The layer's class if it has PyTorch's own ``forward``, within which nothing intercepts what autograd saves, and
    the output is the kernel's."""
    way: Way
    """From the output's node to the kernel's."""


Call = tuple[Tensor, Tensor, int, CallKind]
"""One call of a layer that waits to be merged: the batch's mean, ``(C,)``, its variance or (var + eps)^-1/2, ``(C,)``,
where in training it was made (``Gate.mark``), and all else."""


def kind_of(
    moments: BatchMoments, module: BatchNorm, training: bool, updating: bool, intercepted: bool = False
) -> CallKind:
    """The kind of the call of ``module`` that these are the moments of."""
    return CallKind(
        eps=moments.eps,
        momentum=module.momentum,
        training=training,
        updating=updating,
        path=moments.path,
        num_samples=moments.num_samples,
        batch_size=moments.batch_size,
        serial=moments.serial,
        num_ranks=moments.num_ranks,
        width=moments.mean.numel(),
        intercepted=intercepted,
    )


def signature_of(kind: CallKind, module: BatchNorm, x: Tensor, output: Any, kernel: Kernel) -> Signature | None:
    """What tells that another call is of that kind; None if one can have all of that and be of another."""
    running_mean = module.running_mean
    is_plain = batch_norm_kernel(kernel.node.__class__) == "plain"
    is_same = kind.path == "saved" and kind.eps == module.eps and output.shape == shape_of_output(kernel.node)
    if not is_plain or not is_same or running_mean is None or not vars(module).keys() >= set(_SETTINGS):
        return None
    return Signature(
        settings=settings_of(vars(module)),
        running_mean=running_mean,
        on_cuda=running_mean.is_cuda,
        shape=output.shape,
        node_type=type(output.grad_fn),
        contiguous=x.is_contiguous() if kind.num_samples != kind.batch_size else None,
        plain_class=type(module) if not kernel.way.steps and enters_no_context(module) else None,
        way=kernel.way,
    )
