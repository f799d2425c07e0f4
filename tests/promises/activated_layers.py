"""BatchNorm layers that do more than normalise, written as public libraries write theirs, and small networks of them.

The input is the kernel's, the output is not: an activation, dropout, pooling or another shape comes after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.promises.architectures import ARCHITECTURES
from tests.promises.recorded_training import Inputs

Network = tuple[nn.Module, Inputs]


def normalised(layer: Any, x: Tensor) -> Tensor:
    """What the base class does, with the counting and the choice of statistics written out, as in timm."""
    factor = 0.0 if layer.momentum is None else layer.momentum
    if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            factor = 1.0 / float(layer.num_batches_tracked)
    uses_batch = layer.training or (layer.running_mean is None and layer.running_var is None)
    has_stats = not layer.training or layer.track_running_stats
    return F.batch_norm(
        x,
        layer.running_mean if has_stats else None,
        layer.running_var if has_stats else None,
        layer.weight,
        layer.bias,
        uses_batch,
        factor,
        layer.eps,
    )


class Activated(nn.Module):
    """What :class:`BatchNormAct2d` and its like have beside a BatchNorm: dropout, then an activation."""

    def __init__(self, num_features: int, act: nn.Module | None = None, drop: nn.Module | None = None, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        x = normalised(self, x)
        x = self.drop(x)
        return self.act(x)


class BatchNormAct1d(Activated, nn.BatchNorm1d):
    pass


class BatchNormAct2d(Activated, nn.BatchNorm2d):
    pass


class BatchNormAct3d(Activated, nn.BatchNorm3d):
    pass


class SyncBatchNormAct(nn.SyncBatchNorm):
    """What timm converts its layers to: the base class, and what the layer had."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if hasattr(self, "drop"):
            x = self.drop(x)
        if hasattr(self, "act"):
            x = self.act(x)
        return x


class FrozenBatchNormAct2d(nn.Module):
    """No BatchNorm, but four buffers and arithmetic."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return self.act(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))


class SplitBatchNorm2d(nn.BatchNorm2d):
    """The first part of a batch for itself, each other for a layer of its own (AdvProp)."""

    def __init__(self, num_features: int, num_splits: int) -> None:
        super().__init__(num_features)
        self.num_splits = num_splits
        self.aux_bn = nn.ModuleList([nn.BatchNorm2d(num_features) for _ in range(num_splits - 1)])

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        split_input = input.split(input.shape[0] // self.num_splits)
        x = [super().forward(split_input[0])]
        for i, aux in enumerate(self.aux_bn):
            x.append(aux(split_input[i + 1]))
        return torch.cat(x, dim=0)


class BatchNormThen2d(nn.BatchNorm2d):
    """The base class, and whatever comes after it: how activations are bolted on in most other places."""

    def __init__(self, num_features: int, *after: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_features)
        self.modules_after = nn.ModuleList([each for each in after if isinstance(each, nn.Module)])
        self.after = after

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input)
        for each in self.after:
            x = each(x)
        return x


class DropBlock2d(nn.Module):
    """Drops squares of 3 by 3, and scales what is left by how much that is."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        dropped = F.max_pool2d(torch.empty_like(x).bernoulli_(self.drop_prob / 9), 3, stride=1, padding=1)
        kept = 1 - dropped
        return x * (kept * (kept.numel() / kept.sum().add(1e-6)))


class DropPath(nn.Module):
    """Drops the branch of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty((len(x), 1, 1, 1)).bernoulli_(0.8).div_(0.8)


class SqueezeExcite(nn.Module):
    """Weighs channels by what they have on average."""

    def __init__(self, channels: int, gate: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.gate = gate
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


Act = Callable[[], nn.Module]


def conv(
    channels: int, out: int, size: int = 3, stride: int = 1, groups: int = 1, act: Act | None = None, **kwargs: Any
) -> nn.Sequential:
    """A convolution and its layer."""
    convolution = nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, BatchNormAct2d(out, act() if act else None, **kwargs))


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


class Sum(nn.Module):
    """What comes out of all branches, added and activated: the second is the shortcut."""

    def __init__(self, *branches: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branches, self.act = nn.ModuleList(branches), nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        first, second = (branch(x) for branch in self.branches)
        first += second
        return self.act(first)


class Concatenation(nn.Module):
    """What comes out of all branches, side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Aggregation(nn.Module):
    """The input and what comes out of each module in a chain, side by side."""

    def __init__(self, *chain: nn.Module) -> None:
        super().__init__()
        self.chain = nn.ModuleList(chain)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for each in self.chain:
            features.append(each(features[-1]))
        return torch.cat(features, dim=1)


class Model(nn.Module):
    """Modules in a row, called with ``x``."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def arrays(*shape: int) -> Inputs:
    """Batches of unequal sizes."""
    return lambda step: {"x": torch.randn(4 + step % 3, *shape)}


def on_images(*modules: nn.Module) -> Network:
    return Model(*modules), arrays(3, 12, 12)


def residual(inplace: bool) -> Network:
    """ResNet: the last layer of a block has no activation of its own."""

    def act() -> nn.Module:
        return nn.ReLU(inplace=inplace)

    def block(channels: int, out: int, stride: int) -> nn.Module:
        bottleneck = nn.Sequential(
            conv(channels, 4, 1, act=act), conv(4, 4, 3, stride, act=act), conv(4, out, 1, act=nn.Identity)
        )
        return Sum(bottleneck, conv(channels, out, 1, stride, act=nn.Identity), act=act())

    return on_images(conv(3, 8, act=act), block(8, 8, 1), block(8, 12, 2), head(12))


def efficientnet() -> Network:
    def act() -> nn.Module:
        return nn.SiLU(inplace=True)

    def inverted(channels: int) -> nn.Module:
        wide = 2 * channels
        branch = nn.Sequential(
            conv(channels, wide, 1, act=act),
            conv(wide, wide, groups=wide, act=act),
            SqueezeExcite(wide),
            conv(wide, channels, 1, act=nn.Identity),
            DropPath(),
        )
        return Sum(branch, nn.Identity())

    return on_images(conv(3, 6, stride=2, act=act), inverted(6), conv(6, 8, act=act), inverted(8), head(8))


def mobilenet_v3() -> Network:
    def act() -> nn.Module:
        return nn.Hardswish(inplace=True)

    def block(channels: int, out: int, act: Act) -> nn.Module:
        return nn.Sequential(
            conv(channels, 8, 1, act=act),
            conv(8, 8, 5, groups=8, act=act),
            SqueezeExcite(8, F.hardsigmoid),
            conv(8, out, 1, act=nn.Identity, eps=1e-3),
        )

    return on_images(conv(3, 6, stride=2, act=act), block(6, 8, nn.ReLU), block(8, 6, act), nn.Hardswish(), head(6))


def darknet() -> Network:
    def act() -> nn.Module:
        return nn.LeakyReLU(0.1, inplace=True)

    crossing = Concatenation(conv(8, 4, 1, act=act), nn.Sequential(conv(8, 4, 1, act=act), conv(4, 4, act=act)))
    return on_images(conv(3, 8, act=act), nn.MaxPool2d(2), crossing, conv(8, 8, act=act, momentum=0.03), head(8))


def convolutional_stem() -> Network:
    """Of a transformer: patches, then tokens."""
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(9, 5), nn.GELU(), nn.Flatten(), nn.Linear(40, 3))
    return on_images(conv(3, 6, stride=2, act=nn.GELU), conv(6, 8, stride=2, act=lambda: nn.GELU("tanh")), tokens)


def drop_block() -> Network:
    return on_images(
        conv(3, 8, drop=DropBlock2d(0.1)), conv(8, 8, drop=DropBlock2d(0.2), act=nn.SiLU), conv(8, 6), head(6)
    )


def dropout_2d() -> Network:
    def layer(channels: int) -> nn.Module:
        return BatchNormThen2d(channels, nn.Dropout2d(0.1))

    return on_images(nn.Conv2d(3, 8, 3), layer(8), nn.ReLU(), nn.Conv2d(8, 6, 3), layer(6), nn.ReLU(), head(6))


def inception() -> Network:
    branches = Concatenation(
        conv(6, 4, 1, eps=1e-3),
        nn.Sequential(conv(6, 4, 1, eps=1e-3), conv(4, 4, 3, eps=1e-3), conv(4, 4, 3, eps=1e-3)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(6, 4, 1, eps=1e-3)),
    )
    return on_images(conv(3, 6, stride=2), branches, conv(12, 6), head(6))


def vovnet() -> Network:
    chain = Aggregation(conv(6, 4), conv(4, 4), conv(4, 4))
    return on_images(conv(3, 6, stride=2), chain, conv(18, 8, 1), SqueezeExcite(8, F.hardsigmoid), head(8))


def densenet() -> Network:
    """The layer first, then the convolution, on features that others look at, too."""

    def grown(channels: int) -> nn.Module:
        chain = nn.Sequential(
            BatchNormAct2d(channels), nn.Conv2d(channels, 8, 1, bias=False),
            BatchNormAct2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False),
        )  # fmt: skip
        return Aggregation(chain)

    return on_images(conv(3, 8, stride=2), grown(8), grown(12), grown(16), BatchNormAct2d(20), head(20))


def regnet() -> Network:
    def block(channels: int, out: int) -> nn.Module:
        branch = nn.Sequential(
            conv(channels, out, 1), conv(out, out, 3, 2, groups=out // 4), SqueezeExcite(out),
            conv(out, out, 1, act=nn.Identity),
        )  # fmt: skip
        return Sum(branch, conv(channels, out, 1, 2, act=nn.Identity), act=nn.ReLU(inplace=True))

    return on_images(conv(3, 8), block(8, 8), block(8, 12), head(12))


class UNet(nn.Module):
    """With its way up, and layers whose momentum is that of a cumulative average."""

    def __init__(self) -> None:
        super().__init__()

        def act() -> nn.Module:
            return nn.LeakyReLU(inplace=True)

        self.first = conv(3, 6, act=act, momentum=None, drop=nn.Dropout(0.1))
        self.down = conv(6, 8, stride=2, act=act, momentum=None)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.last = nn.Sequential(conv(12, 6, act=nn.ELU), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, self.up(self.down(x))], dim=1))


def video() -> Network:
    model = Model(
        nn.Conv3d(2, 6, 3), BatchNormAct3d(6), nn.Conv3d(6, 6, (1, 3, 3)), BatchNormAct3d(6, nn.ELU(inplace=True)),
        nn.Conv3d(6, 4, 2), BatchNormAct3d(4, nn.Mish(), nn.Dropout3d(0.2)), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    return model, arrays(2, 6, 6, 6)


def rows() -> Network:
    """A perceptron on a table, whose columns are normalised first: that layer's input requires no gradient."""
    model = Model(
        nn.BatchNorm1d(6), nn.Linear(6, 8), BatchNormAct1d(8, drop=nn.Dropout(0.2)), nn.Linear(8, 8),
        BatchNormAct1d(8, nn.SELU(), affine=False), nn.Linear(8, 2),
    )  # fmt: skip
    return model, lambda step: {"x": torch.randn(12 + step % 3, 6) * 2 + 1}


def series() -> Network:
    """Speech, as in an x-vector."""
    model = Model(
        nn.Conv1d(5, 8, 3), BatchNormAct1d(8), nn.Conv1d(8, 8, 3, dilation=2), BatchNormAct1d(8, nn.Mish(inplace=True)),
        nn.Conv1d(8, 6, 1), BatchNormAct1d(6, nn.Softplus(), nn.Dropout1d(0.1)), nn.Flatten(), nn.Linear(6 * 14, 3),
    )  # fmt: skip
    return model, arrays(5, 20)


def reshaped() -> Network:
    return on_images(
        nn.Conv2d(3, 4, 3, 3), BatchNormThen2d(4, lambda x: x.permute(0, 2, 3, 1)), nn.Linear(4, 6),
        nn.Flatten(1, 2), nn.Unflatten(1, (4, 4)), BatchNormThen2d(4, F.relu, lambda x: x.unsqueeze(1)),
        nn.Conv3d(1, 2, 3), nn.Flatten(1, 2), BatchNormThen2d(4, lambda x: x.flatten(1)), nn.Linear(32, 3),
    )  # fmt: skip


def pooled() -> Network:
    """Fewer values come out than go in."""
    return on_images(
        nn.Conv2d(3, 6, 3), BatchNormThen2d(6, nn.MaxPool2d(2), nn.ReLU(inplace=True)),
        nn.Conv2d(6, 6, 3), BatchNormThen2d(6, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(6, 3),
    )  # fmt: skip


class Tokens(nn.Module):
    """A linear map of tokens, normalised over all of them, as in LeViT."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, out, bias=False), BatchNormAct1d(out, nn.Hardswish(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def tokens() -> Network:
    return Model(Tokens(6, 8), Tokens(8, 8), nn.Linear(8, 2)), arrays(5, 6)


def synchronised() -> Network:
    """On one process, which synchronises nothing."""

    def layer(channels: int, act: nn.Module) -> nn.Module:
        made = SyncBatchNormAct(channels)
        made.act, made.drop = act, nn.Dropout2d(0.1)
        return made

    return on_images(
        nn.Conv2d(3, 6, 3), layer(6, nn.ReLU(inplace=True)), nn.Conv2d(6, 6, 3), layer(6, nn.SiLU()), head(6)
    )


def partly_frozen() -> Network:
    return on_images(
        nn.Conv2d(3, 6, 3), FrozenBatchNormAct2d(6), conv(6, 8), conv(8, 6, track_running_stats=False), head(6)
    )


FUSED = {nn.BatchNorm1d: BatchNormAct1d, nn.BatchNorm2d: BatchNormAct2d}


def fused(architecture: str, act: Act, drop: Act = nn.Identity) -> Callable[[], Network]:
    """An architecture that others wrote, each of its layers with an activation after it."""

    def build() -> Network:
        model, inputs = ARCHITECTURES[architecture]()
        for module in list(model.modules()):
            if type(module) in FUSED:
                module.__class__ = FUSED[type(module)]
                module.act, module.drop = act(), drop()
        return model.train(), inputs

    return build


NETWORKS: dict[str, Callable[[], Network]] = {
    "ResNet-like, in place": lambda: residual(inplace=True),
    "ResNet-like": lambda: residual(inplace=False),
    "EfficientNet-like": efficientnet,
    "MobileNetV3-like": mobilenet_v3,
    "DarkNet-like": darknet,
    "convolutional stem": convolutional_stem,
    "DropBlock": drop_block,
    "Dropout2d": dropout_2d,
    "Inception-like": inception,
    "VoVNet-like": vovnet,
    "DenseNet-like": densenet,
    "RegNet-like": regnet,
    "U-Net-like": lambda: (UNet(), arrays(3, 12, 12)),
    "video": video,
    "rows": rows,
    "series": series,
    "reshaped": reshaped,
    "pooled": pooled,
    "tokens": tokens,
    "synchronised": synchronised,
    "partly frozen": partly_frozen,
}
FUSED_ARCHITECTURES: dict[str, Callable[[], Network]] = {
    "ResNet, SiLU": fused("ResNet", nn.SiLU),
    "RegNet, GELU": fused("RegNet", nn.GELU),
    "MobileNetV2, hard-swish in place": fused("MobileNetV2", lambda: nn.Hardswish(inplace=True)),
    "EfficientNet, DropBlock": fused("EfficientNet", nn.Identity, lambda: DropBlock2d(0.1)),
    "LeViT, Mish": fused("LeViT", nn.Mish),
    "HGNetV2, Dropout2d and leaky ReLU": fused("HGNetV2", nn.LeakyReLU, lambda: nn.Dropout2d(0.1)),
}
