"""Networks of the vision literature, as far as their BatchNorm layers are concerned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)),
        )
        projection = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity() if before == after else projection

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, 4 * width, H / stride, W / stride)."""
        return torch.relu_(self.body(x) + self.shortcut(x))


def resnet50(num_classes: int = 1000) -> nn.Sequential:
    """ResNet-50: 53 BatchNorm layers, 26560 channels."""
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    blocks, before = [], 64
    for width, repeats, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for number in range(repeats):
            blocks.append(Bottleneck(before, width, stride if number == 0 else 1))
            before = 4 * width
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm with SiLU inside, inplace, as timm's networks have it: what it returns is not the kernel's output."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return nn.functional.silu(super().forward(x), inplace=True)


class SqueezeExcite(nn.Module):
    """Channels weighted by what all positions have in common."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to the same."""
        pooled = nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * self.expand(pooled).sigmoid()


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = before * expansion
        expand = (nn.Conv2d(before, width, 1, bias=False), BatchNormAct2d(width)) if expansion > 1 else ()
        depthwise = nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
        self.body = nn.Sequential(
            *expand,
            *(depthwise, BatchNormAct2d(width), SqueezeExcite(width, max(before // 4, 1))),
            *(nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)),
        )
        self.has_shortcut = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, after, H / stride, W / stride)."""
        return self.body(x) + x if self.has_shortcut else self.body(x)


B0 = [(16, 1, 3, 1, 1), (24, 6, 3, 2, 2), (40, 6, 5, 2, 2), (80, 6, 3, 2, 3), (112, 6, 5, 1, 3), (192, 6, 5, 2, 4)]
B0 += [(320, 6, 3, 1, 1)]  # width, expansion, kernel, stride, repeats


def efficientnet(
    stem_stride: int = 2,
    stages: list[tuple[int, int, int, int, int]] = B0,
    stem: int = 32,
    head: int = 1280,
    num_classes: int = 1000,
) -> nn.Sequential:
    """EfficientNet, B0 by default: 49 BatchNorm layers, 33 of them with an activation inside. No dropout."""
    blocks, before = [], stem
    for width, expansion, kernel, stride, repeats in stages:
        for number in range(repeats):
            blocks.append(InvertedBottleneck(before, width, expansion, kernel, stride if number == 0 else 1))
            before = width
    return nn.Sequential(
        *(nn.Conv2d(3, stem, 3, stem_stride, 1, bias=False), BatchNormAct2d(stem), *blocks),
        *(nn.Conv2d(before, head, 1, bias=False), BatchNormAct2d(head)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, num_classes)),
    )


class Checkpointed(nn.Module):
    """A module under activation checkpointing: the backward pass computes it once more."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """What the module does."""
        return checkpoint(self.module, x, use_reentrant=False)


def checkpointed(model: nn.Sequential, block: type[nn.Module]) -> nn.Sequential:
    """The model with each of its blocks of a class under activation checkpointing."""
    return nn.Sequential(*(Checkpointed(part) if isinstance(part, block) else part for part in model))
