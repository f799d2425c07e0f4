"""What is kept of one call of a BatchNorm layer until it is merged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bnmonitor.capture.batch_moments import BatchMoments, Path
from lightning_bnmonitor.capture.saved import Kernel, Way, enters_no_context
from lightning_bnmonitor.compat import BatchNorm, batch_norm_kernel, shape_of_output

_ASKED_FOR = {"eps", "momentum", "training"}  # of a module's ``__dict__``, where a property would not be seen


class RepeatableCall(NamedTuple):
    """All of a call but its moments. As a rule the next call of the layer is the same in all of it.

    What tells that comes first. ``shape`` and what follows up to ``plain_class`` are None if no other call is taken to
    be the same, as its moments were not read off the kernel's node.
    """

    eps: float | None
    """The layer's ``eps`` if the kernel gave (var + eps)^-1/2, None if the moments have the variance itself."""
    momentum: float | None
    """The layer's."""
    training: bool
    """Whether the layer normalised by the batch, as far as is known: whether it was in training mode."""
    updating: bool
    """Whether BatchNorm counted the call in ``num_batches_tracked``."""
    nbytes: int
    """Bytes of each of the moments: it tells when there are none, or in another precision."""
    shape: torch.Size | None
    """Of the output."""
    node_type: type | None
    """Of the output's autograd node."""
    contiguous: bool | None
    """Whether the input was; None also if that tells nothing."""
    plain_class: type | None
    """The layer's class if it has PyTorch's own ``forward``, within which nothing intercepts what autograd saves, and
    the output is the kernel's."""
    way: Way
    """From the output's node to the kernel's."""
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


Call = tuple[Tensor, Tensor, int, RepeatableCall]
"""One call of a layer that waits to be merged: the batch's mean, ``(C,)``, its variance or (var + eps)^-1/2, ``(C,)``,
where in training it was made (``Gate.mark``), and all else."""


def call_of(
    moments: BatchMoments, module: BatchNorm, training: bool, updating: bool, intercepted: bool = False
) -> RepeatableCall:
    """The call of ``module`` that these are the moments of."""
    mean = moments.mean
    return RepeatableCall(
        eps=moments.eps,
        momentum=module.momentum,
        training=training,
        updating=updating,
        nbytes=mean.nbytes,
        shape=None,
        node_type=None,
        contiguous=None,
        plain_class=None,
        way=Way(),
        path=moments.path,
        num_samples=moments.num_samples,
        batch_size=moments.batch_size,
        serial=moments.serial,
        num_ranks=moments.num_ranks,
        width=mean.numel(),
        intercepted=intercepted,
    )


def repeatable(
    call: RepeatableCall, module: BatchNorm, x: Tensor, output: Any, kernel: Kernel
) -> RepeatableCall | None:
    """The call with what tells that another is the same; None if one can have all of that and be different."""
    is_plain = batch_norm_kernel(kernel.node.__class__) == "plain"
    is_same = call.path == "saved" and call.eps == module.eps and output.shape == shape_of_output(kernel.node)
    if not is_plain or not is_same or not vars(module).keys() >= _ASKED_FOR:
        return None
    return call._replace(
        shape=output.shape,
        node_type=type(output.grad_fn),
        contiguous=x.is_contiguous() if call.num_samples != call.batch_size else None,
        plain_class=type(module) if not kernel.way.steps and enters_no_context(module) else None,
        way=kernel.way,
    )
