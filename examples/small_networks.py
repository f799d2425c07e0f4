"""A small network and the data that it is trained with, and what can be wrong with them: for ``pathologies.py``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FEATURES, CLASSES, GROUPS = 16, 8, 64
SOURCES = ("day", "dusk", "dawn", "night")


class Net(nn.Module):
    """Three linear layers with a BatchNorm after each of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.norm1 = nn.Linear(FEATURES, 32), nn.BatchNorm1d(32)
        self.linear2, self.norm2 = nn.Linear(32, 32), nn.BatchNorm1d(32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes), of features (N, F)."""
        x = torch.relu(self.norm1(self.linear1(x)))
        x = torch.relu(self.norm2(self.linear2(x)))
        return self.classifier(x)


class Checkpointed(Net):
    """The same with activation checkpointing of both normalised layers."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes), of features (N, F)."""
        x = checkpoint(lambda x: torch.relu(self.norm1(self.linear1(x))), x, use_reentrant=False)
        x = checkpoint(lambda x: torch.relu(self.norm2(self.linear2(x))), x, use_reentrant=False)
        return self.classifier(x)


class Pruned(Net):
    """The same with a quarter of the first units switched off."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes), of features (N, F)."""
        kept = (torch.arange(32) % 4 > 0).float()
        x = torch.relu(self.norm1(self.linear1(x) * kept))
        x = torch.relu(self.norm2(self.linear2(x)))
        return self.classifier(x)


class Stateless(Net):
    """The same, the first normalisation without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm1d(32, track_running_stats=False)


class Bypassed(Net):
    """The same, but for a layer that is there and never called."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes), of features (N, F)."""
        x = torch.relu(self.linear1(x))
        x = torch.relu(self.norm2(self.linear2(x)))
        return self.classifier(x)


class Dividing(nn.BatchNorm1d):
    """Divides by the standard deviation and subtracts no mean, without a kernel of BatchNorm's."""

    def forward(self, x: Tensor) -> Tensor:
        """Scaled features, (N, F)."""
        var = self.running_var
        if self.training:
            var = x.var(0)
            self.running_var.lerp_(var.detach(), self.momentum)
            self.num_batches_tracked += 1
        return x * self.weight / (var + self.eps).sqrt() + self.bias


class WithoutMean(Net):
    """The same, with another kind of normalisation in the first place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = Dividing(32)


class AlwaysInTraining(Net):
    """The same, but ``eval()`` leaves it in training mode: somebody wanted dropout in validation."""

    def train(self, mode: bool = True) -> AlwaysInTraining:
        """In training mode, whatever is asked for."""
        return super().train()


class Segmenting(Net):
    """Tells what is in each pixel of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.norm1 = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.linear2, self.norm2 = nn.Conv2d(12, 12, 5, padding=2), nn.BatchNorm2d(12)
        self.classifier = nn.Conv2d(12, 2, 1)


class NormalisedByImage(Segmenting):
    """The same, normalised by the image in ``eval()``, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.InstanceNorm2d(12, affine=True), nn.InstanceNorm2d(12, affine=True)


class Listening(Net):
    """Tells what a sequence is of; the first channel of what it is given is 1 where the sequence is, and then 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Conv1d(4, 32, 5, padding=2), nn.Conv1d(32, 32, 5, padding=2)

    def normalised(self, norm: nn.BatchNorm1d, x: Tensor, mask: Tensor) -> Tensor:
        """Normalised features, (N, C, T), where ``mask``, (N, T), tells what counts."""
        return norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes), of sequences (N, 1 + 4, T)."""
        mask, x = x[:, 0] > 0, x[:, 1:]
        x = torch.relu(self.normalised(self.norm1, self.linear1(x), mask))
        x = torch.relu(self.normalised(self.norm2, self.linear2(x), mask))
        return self.classifier((x * mask[:, None]).sum(2) / mask.sum(1, keepdim=True))


class ListeningToWhatCounts(Listening):
    """The same, normalised by the values that count."""

    def normalised(self, norm: nn.BatchNorm1d, x: Tensor, mask: Tensor) -> Tensor:
        """Normalised features, (N, C, T), zero where there is padding."""
        y = torch.zeros_like(x)
        y.mT[mask] = norm(x.mT[mask])
        return y


class Averaged(Net):
    """The same beside a moving average of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = list(self.parameters())
        self.average = [parameter.detach().clone() for parameter in self.trained]


class WithTeacher(Averaged):
    """The same with a copy that answers in ``eval()``, whose parameters are the average."""

    def __init__(self) -> None:
        super().__init__()
        teacher = Net()
        teacher.load_state_dict(self.state_dict())
        self.teacher = teacher
        self.average = list(teacher.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes), of features (N, F)."""
        return super().forward(x) if self.training else self.teacher(x)


@dataclass
class Data:
    """Classified features, or images whose pixels are."""

    x: Tensor
    y: Tensor
    group: Tensor

    @classmethod
    def sample(cls, num: int, generator: torch.Generator, between_groups: float = 0.0) -> Data:
        """Clusters, one for each class, in groups that may differ from one another."""
        centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
        y = torch.randint(CLASSES, (num,), generator=generator)
        group = torch.randint(GROUPS, (num,), generator=generator)
        offsets = between_groups * torch.randn(GROUPS, FEATURES, generator=generator)
        return cls(1 + centres[y] + torch.randn(num, FEATURES, generator=generator) + offsets[group], y, group)

    @classmethod
    def from_sources(cls, num: int, generator: torch.Generator, offset: float) -> Data:
        """The same clusters from four sources, of which all features of one, the last, are larger."""
        data = cls.sample(num, generator)
        source = data.group % len(SOURCES)
        is_last = (source == len(SOURCES) - 1).float()
        return replace(data, x=data.x + offset * is_last[:, None], group=source)

    @classmethod
    def images(cls, num: int, generator: torch.Generator, between_images: float) -> Data:
        """Bright regions, each image with a brightness and a contrast of its own."""
        brightness, contrast = between_images * torch.randn(2, num, 1, 1, 1, generator=generator)
        y = (nn.functional.avg_pool2d(torch.randn(num, 1, 20, 20, generator=generator), 9, 1) > 0).float()
        x = y + 0.4 * torch.randn(y.shape, generator=generator)
        return cls(2 * brightness + contrast.exp() * x, y[:, 0].long(), torch.arange(num))

    @classmethod
    def sequences(cls, num: int, generator: torch.Generator, offset: float) -> Data:
        """A few that are long, and many that are short, padded with zeros. In each a motif of its class comes again."""
        motifs = torch.randn(CLASSES, 4, 10, generator=torch.Generator().manual_seed(1))
        y = torch.randint(CLASSES, (num,), generator=generator)
        lengths = (20 - 25 * torch.rand(num, generator=generator).log()).long().clamp_max(200)
        mask = (torch.arange(200) < lengths[:, None]).float()[:, None]
        x = offset + torch.randn(num, 4, 200, generator=generator) + motifs[y].repeat(1, 1, 20)
        return cls(torch.cat([mask, mask * x], dim=1), y, torch.arange(num))
