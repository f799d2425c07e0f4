"""What is kept of one call of a layer, and how a call that is like the last one is known without looking closer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bnmonitor.capture.batch_moments import BatchMoments, Path, saves_moments


class Kind(NamedTuple):
    """All of a call but its moments: usually that of a layer's last call, too."""

    path: Path
    """As in :class:`~lightning_bnmonitor.capture.batch_moments.BatchMoments`, like all that follow up to ``eps``."""
    num_samples: int
    batch_size: int
    serial: bool
    num_ranks: int
    eps: float | None
    width: int
    """Channels."""
    nbytes: int
    """Bytes of each of the moments."""
    momentum: float | None
    """The layer's."""
    training: bool
    """Whether the layer was in training mode."""
    updating: bool
    """Whether BatchNorm counted the call in ``num_batches_tracked``."""


Call = tuple[Tensor, Tensor, int, Kind]
"""One call of a layer that waits for the next update: ``mean`` and ``spread`` as in
:class:`~lightning_bnmonitor.capture.batch_moments.BatchMoments`, training steps that had ended before, and all else."""


class Usual(NamedTuple):
    """What a call has to have in common with the last one to be of the same kind, and for its moments to be saved."""

    limit: int = 0
    """Calls that may wait; none may if no call is like it."""
    shape: torch.Size | None = None
    """That of the output."""
    node_type: type | None = None
    """Of the output's node."""
    contiguous: bool | None = None
    """Whether the input was; None if that tells nothing."""
    nbytes: int = 0
    """As in :class:`Kind`, like all that follow: it tells when there are none, or in another precision."""
    eps: float | None = None
    momentum: float | None = None
    training: bool = False
    updating: bool = False
    plain: type | None = None
    """The layer's class if it has PyTorch's own ``forward``, within which nothing intercepts what autograd saves."""
    kind: Any = None
    """The :class:`Kind`."""


UNKNOWN = Usual()
_OWN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def kind_of(moments: BatchMoments, module: _BatchNorm, training: bool, updating: bool) -> Kind:
    """What kind of call it was of ``module`` that these are the moments of."""
    mean = moments.mean
    return Kind(
        path=moments.path,
        num_samples=moments.num_samples,
        batch_size=moments.batch_size,
        serial=moments.serial,
        num_ranks=moments.num_ranks,
        eps=moments.eps,
        width=mean.numel(),
        nbytes=mean.numel() * mean.element_size(),
        momentum=module.momentum,
        training=training,
        updating=updating,
    )


def usual_of(kind: Kind, limit: int, module: _BatchNorm, x: Tensor, output: object) -> Usual:
    """What a call had, whose moments the kernel saved; :data:`UNKNOWN` if another with the same can be different."""
    if kind.path != "saved" or kind.eps != module.eps or not isinstance(output, Tensor) or x.shape != output.shape:
        return UNKNOWN
    if not saves_moments(type(output.grad_fn)):
        return UNKNOWN
    contiguous = x.is_contiguous() if kind.num_samples != kind.batch_size else None
    modes = kind.eps, kind.momentum, kind.training, kind.updating
    plain = type(module) if type(module).forward in _OWN_FORWARDS else None
    return Usual(limit, output.shape, type(output.grad_fn), contiguous, kind.nbytes, *modes, plain, kind)
