"""Ways in which a layer's own forward may use BatchNorm's, so that its output is not what the kernel returned."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

C = 4


class Layer(nn.BatchNorm2d):
    """A layer whose forward is a function that may be exchanged at any time."""

    def __init__(self, forward_as: Callable[[Layer, Tensor], Any], has_inner: bool = False, **kwargs: Any) -> None:
        super().__init__(C, **kwargs)
        self.forward_as = forward_as
        self.received: list[Tensor] = []  # by the kernel, in the last call
        self.mix = nn.Conv2d(C, C, 1)
        self.slope = nn.Parameter(torch.full((C,), 0.3))
        self.inner = nn.BatchNorm2d(C, momentum=0.3) if has_inner else None

    def norm(self, x: Tensor) -> Tensor:
        """BatchNorm's forward."""
        self.received.append(x.detach().clone())
        return super().forward(x)

    def forward(self, x: Tensor) -> Any:
        self.received.clear()
        return self.forward_as(self, x)


class Rectify(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (y > 0)


class RectifyInPlace(Rectify):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.clamp_(min=0))
        return x


class Scale(Function):
    """Of two inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, factor = ctx.saved_tensors
        return grad * factor.view(1, -1, 1, 1), (grad * x).sum((0, 2, 3))


class Token:
    """Something whose life can be watched."""


class Watched(Function):
    """An activation whose node tells when it is freed."""

    tokens: ClassVar[list[weakref.ref[Token]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        Watched.tokens.append(weakref.ref(ctx.token))
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class BatchNormBackwardLookalike(Function):
    """An activation whose node has the name of a kernel's, and what is read off one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx._saved_result1, ctx._saved_result2 = torch.full((C,), 7.0), torch.full((C,), 0.7)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def many_activations(layer: Layer, x: Tensor) -> Tensor:
    x = layer.norm(x)
    for _ in range(6):
        x = F.leaky_relu(F.silu(x), 0.9)
    return x


def many_views(layer: Layer, x: Tensor) -> Tensor:
    shape, x = x.shape, layer.norm(x)
    for _ in range(6):
        x = x.flatten(1).view(shape)
    return x


def a_part_in_place(layer: Layer, x: Tensor) -> Tensor:
    x = layer.norm(x)
    x[:, :2].relu_()
    return x


def a_part_of_the_batch(layer: Layer, x: Tensor) -> Tensor:
    """All others are returned as they are."""
    return torch.cat([layer.norm(x[:2]), x[2:]])


def two_parts_of_the_batch(layer: Layer, x: Tensor) -> Tensor:
    return torch.cat([layer.norm(x[:2]), layer.norm(x[2:])])


def ghost_batches(layer: Layer, x: Tensor) -> Tensor:
    """Half the channels of a batch of twice the size: as many channels as the layer has, but of others' values."""
    n, c, h, w = x.shape
    return F.relu(layer.norm(x.reshape(n * 2, c // 2, h, w).repeat(1, 2, 1, 1))).view(n, 2, c, h, w).sum(1)


def split_channels(layer: Layer, x: Tensor) -> Tensor:
    """The batch in two parts, side by side, as if they were other channels (MoCo)."""
    x = x[: len(x) // 2 * 2]
    two = [None if value is None else value.repeat(2) for value in (layer.weight, layer.bias)]
    y = F.batch_norm(x.reshape(-1, 2 * C, *x.shape[2:]), None, None, *two, True, 0.1, layer.eps)
    return F.relu(y.view(x.shape))


def after_the_running_statistics(layer: Layer, x: Tensor) -> Tensor:
    """Normalised by the running statistics, which are then updated by a call whose output nobody needs."""
    layer.train(False)
    y = layer.norm(x)
    layer.train(True)
    layer.norm(2 * x)
    return F.relu(y)


def by_the_running_statistics(layer: Layer, x: Tensor) -> Tensor:
    y = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)
    return F.relu(y)


def by_hand(layer: Layer, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return F.relu((x - mean) * (var + layer.eps).rsqrt() * layer.weight.view(1, -1, 1, 1))


def straight_through(layer: Layer, x: Tensor) -> Tensor:
    y = layer.norm(x)
    return y + (y.round() - y).detach()


def conditional(layer: Layer, x: Tensor) -> Tensor:
    """With an affine part of its own."""
    y = F.batch_norm(x, layer.running_mean, layer.running_var, None, None, True, 0.1, layer.eps)
    return layer.slope.view(1, -1, 1, 1) * y + layer.bias.view(1, -1, 1, 1)


BEHIND: dict[str, Callable[[Layer, Tensor], Any]] = {
    "nothing": lambda layer, x: layer.norm(x),
    "in place": lambda layer, x: F.relu_(layer.norm(x)),
    "identity": lambda layer, x: nn.Identity()(layer.norm(x)),
    "dropout": lambda layer, x: F.dropout(layer.norm(x), 0.3),
    "function": lambda layer, x: Rectify.apply(layer.norm(x)),
    "function in place": lambda layer, x: RectifyInPlace.apply(layer.norm(x)),
    "function of two inputs": lambda layer, x: Scale.apply(layer.norm(x), layer.slope),
    "function named like a kernel": lambda layer, x: BatchNormBackwardLookalike.apply(layer.norm(x)),
    "many activations": many_activations,
    "many views": many_views,
    "a part in place": a_part_in_place,
    "PReLU": lambda layer, x: F.prelu(layer.norm(x), layer.slope),
    "gated": lambda layer, x: (y := layer.norm(x)) * y.sigmoid(),
    "residual": lambda layer, x: F.relu(layer.norm(x) + x),
    "affine": conditional,
    "straight-through": straight_through,
    "fewer samples": lambda layer, x: F.relu(layer.norm(x)[:2]),
    "fewer channels": lambda layer, x: F.glu(layer.norm(x), 1),
    "fewer positions": lambda layer, x: F.max_pool2d(layer.norm(x), 2),
    "more positions": lambda layer, x: F.pad(layer.norm(x), (1, 1)),
    "more channels": lambda layer, x: torch.cat([layer.norm(x), torch.zeros_like(x)], 1),
    "transposed": lambda layer, x: layer.norm(x).permute(2, 1, 0, 3),
    "samples in reverse": lambda layer, x: F.relu(layer.norm(x.flip(0)).flip(0)),
}
"""BatchNorm's forward of what the layer received (or of the same values), and then something."""

BEFORE: dict[str, Callable[[Layer, Tensor], Any]] = {
    "twice": lambda layer, x: F.relu(layer.norm(layer.norm(x))),
    "twice, activated in between": lambda layer, x: F.relu(layer.norm(F.relu(layer.norm(x)))),
    "scaled": lambda layer, x: F.relu(layer.norm(2 * x)),
    "scaled, behind an identity": lambda layer, x: layer.norm(2 * x).view_as(x),
    "scaled copy in place": lambda layer, x: F.relu(layer.norm(x.clone().mul_(2))),
    "activated": lambda layer, x: F.relu(layer.norm(F.relu(x))),
    "no gradient": lambda layer, x: F.relu(layer.norm(2 * x.detach())),
    "convolved": lambda layer, x: F.relu(layer.norm(layer.mix(x))),
    "convolved without gradient": lambda layer, x: F.relu(layer.norm(F.conv2d(x, layer.mix.weight.detach()))),
    "channels in reverse": lambda layer, x: F.relu(layer.norm(x.flip(1))),
    "other numbers": lambda layer, x: F.relu(layer.norm(torch.linspace(0, 1, x.numel()).view(x.shape))),
    "a part of the batch": a_part_of_the_batch,
    "a part of the batch, activated": lambda layer, x: F.relu(a_part_of_the_batch(layer, x)),
    "twice, and no more": lambda layer, x: layer.norm(layer.norm(x)),
    "scaled, and no more": lambda layer, x: layer.norm(2 * x),
    "scaled in between, and no more": lambda layer, x: layer.norm(3 * layer.norm(x) + 1),
    "activated, and no more": lambda layer, x: layer.norm(F.relu(x)),
    "convolved, and no more": lambda layer, x: layer.norm(layer.mix(x)),
    "channels in reverse, and no more": lambda layer, x: layer.norm(x.flip(1)),
    "some samples, and no more": lambda layer, x: layer.norm(x[:2]),
    "another layer before": lambda layer, x: F.relu(layer.norm(layer.inner(x))),
    "two parts of the batch": two_parts_of_the_batch,
    "some samples": lambda layer, x: F.relu(layer.norm(x[:2])),
    "some positions": lambda layer, x: F.relu(layer.norm(x[:, :, 1:])),
    "ghost batches": ghost_batches,
    "split channels": split_channels,
    "after the running statistics": after_the_running_statistics,
    "by the running statistics": by_the_running_statistics,
    "by hand": by_hand,
    "only an activation": lambda layer, x: F.leaky_relu(x * 1, 0.1),
    "only a view": lambda layer, x: x.view_as(x) if x.requires_grad else layer.norm(x),
    "of no importance": lambda layer, x: F.relu(x + 0 * layer.norm(2 * x).detach()),
    "branches": lambda layer, x: F.relu(layer.norm(x) + layer.norm(2 * x)),
}
"""The kernel receives something else than the layer does, or what comes out has nothing to do with it."""

INNER: dict[str, Callable[[Layer, Tensor], Any]] = {
    "another layer behind": lambda layer, x: F.relu(layer.inner(layer.norm(x))),
    "another layer instead": lambda layer, x: F.relu(layer.inner(x)),
    "another layer instead, of other values": lambda layer, x: F.relu(layer.inner(2 * x)),
    "another layer beside": lambda layer, x: F.relu(layer.norm(x)) + layer.inner(2 * x),
    "another layer beside, in eval mode": lambda layer, x: F.relu(layer.inner.eval()(layer.norm(x))),
}
"""With another BatchNorm within the forward."""


OUTPUTS: dict[str, Callable[[Layer, Tensor], Any]] = {
    "tuple": lambda layer, x: (F.relu(layer.norm(x)), 0),
    "list": lambda layer, x: [F.relu(layer.norm(x))],
    "dictionary": lambda layer, x: {"y": F.silu(layer.norm(x)), "shape": x.shape},
    "none": lambda layer, x: None if layer.norm(x) is not None else 0,
    "number": lambda layer, x: layer.norm(x).relu().sum().item(),
    "scalar": lambda layer, x: layer.norm(x).relu().sum(),
    "view": lambda layer, x: F.relu(layer.norm(x))[:, 1:],
    "detached": lambda layer, x: F.relu(layer.norm(x)).detach(),
    "integers": lambda layer, x: F.relu(layer.norm(x)).int(),
    "parameter": lambda layer, x: layer.weight if layer.norm(x) is not None else 0,
}
"""What else a forward may return."""


class Front(nn.Module):
    """What comes before a layer, and the layer."""

    def __init__(self, norm: nn.Module, *front: nn.Module) -> None:
        super().__init__()
        self.front, self.norm = nn.Sequential(*front), norm

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.front(x))


class Pair(nn.Module):
    """A layer that receives two tensors from one node, and normalises the second."""

    def __init__(self, parted: Callable[[Tensor], Sequence[Tensor]], activated: bool) -> None:
        super().__init__()
        self.parted, self.mix, self.norm = parted, nn.Conv2d(C, C, 1), OfTheSecond(C)
        self.norm.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.parted(self.mix(x))
        return self.norm(first, second)


class OfTheSecond(nn.BatchNorm2d):
    activated = True

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        y = super().forward(second)
        return F.relu(y) if self.activated else y.add(0)


class TokensLast(nn.BatchNorm1d):
    """Of ``(N, L, C)``, with channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x.transpose(1, 2)).transpose(1, 2))


USUAL_FRONTS = ["a leaf", "of a convolution", "of another layer"]
FRONTS: dict[str, Callable[[], list[nn.Module]]] = {
    "a leaf": lambda: [],
    "a leaf that requires grad": lambda: [],
    "of a convolution": lambda: [nn.Conv2d(C, C, 1)],
    "a view": lambda: [nn.Conv2d(C, C, 1), nn.Flatten(2), nn.Unflatten(2, (5, 6))],
    "of another layer": lambda: [nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)],
    "of another layer in eval mode": lambda: [nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), _Frozen(C)],
    "of another activated layer": lambda: [nn.Conv2d(C, C, 1), Layer(BEHIND["in place"])],
    "of another layer and an activation": lambda: [nn.BatchNorm2d(C), nn.ReLU(inplace=True)],
}
"""Where a layer's input comes from."""


class _Frozen(nn.BatchNorm2d):
    """Stays in eval mode, with statistics that are not those of what it receives."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.running_mean.fill_(0.5)
        self.running_var.fill_(3.0)

    def train(self, mode: bool = True) -> _Frozen:
        return super().train(False)


def recomputed(use_reentrant: bool, activated: bool) -> Callable[[Layer, Tensor], Any]:
    """With activation checkpointing of the kernel alone, or of the activation, too."""

    def forward(layer: Layer, x: Tensor) -> Any:
        if activated:
            return checkpoint(lambda x: F.relu(layer.norm(x)), x, use_reentrant=use_reentrant)
        return F.relu(checkpoint(layer.norm, x, use_reentrant=use_reentrant))

    return forward


@contextlib.contextmanager
def unpacked_once() -> Iterator[None]:
    """What autograd saves may be asked for once: afterwards it is nothing."""
    kept: list[Tensor | None] = []

    def pack(tensor: Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    def unpack(index: int) -> Tensor | None:
        tensor, kept[index] = kept[index], None
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def around_the_kernel(layer: Layer, x: Tensor) -> Tensor:
    with unpacked_once():
        y = layer.norm(x)
    return F.silu(y)


def around_the_activation(layer: Layer, x: Tensor) -> Tensor:
    y = layer.norm(x)
    with unpacked_once():
        return F.silu(y)


def around_both(layer: Layer, x: Tensor) -> Tensor:
    with unpacked_once():
        return F.silu(layer.norm(x))


def batches(step: int) -> dict[str, Tensor]:
    """Of two sizes, and unlike along each dimension, so that what is left out or exchanged is noticed."""
    x = torch.randn(4 + step // 3 % 2, C, 5, 6)
    for dim, length in enumerate(x.shape):
        shape = [1] * 4
        shape[dim] = length
        x = x + torch.linspace(0, 1.5, length).view(shape)
    return {"x": x * torch.linspace(0.5, 2, C).view(1, -1, 1, 1)}


def batches_that_require_grad(step: int) -> dict[str, Tensor]:
    return {"x": batches(step)["x"].requires_grad_()}
