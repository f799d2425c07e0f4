"""Every verdict and flag that one process can produce, by a training that deserves it, and what the remedy does.

Each training is that of one small network on synthetic data; one thing is wrong with it. The verdict is that of its
last epoch. Then the training is repeated with the remedy that the report gave (where it states a momentum, with that
number), or the running statistics are recomputed at its end. Losses are those of ``eval()`` on data held out.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report, recalibrate
from lightning_bnmonitor.callbacks.dashboard import Dashboard
from lightning_bnmonitor.report.history import History

FEATURES, CLASSES, GROUPS = 16, 8, 64
NUM_TRAIN, NUM_EVAL = 2048, 1024
RESUMED_AT = 3 * 64 + 20  # batches; in the fourth epoch
_TOLERANCE = 0.05  # by which the loss of two trainings may differ for no reason


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


@dataclass
class Training:
    """What is done, and what is wrong with it."""

    net: type[Net] = Net
    each_epoch: Callable[[Net, int], None] = lambda net, epoch: None
    """Done to the network before each epoch."""
    step: Callable[[Net, Tensor, BatchNormTracker], Tensor] = lambda net, x, tracker: net(x)
    """From a batch to logits."""
    disturb: Callable[[Tensor, int, float], Tensor] = lambda x, epoch, time: x
    """Done to each batch, from its epoch and from how much of it is over, 0 to 1; what is evaluated on comes last."""
    recalibrate: bool = False
    """Make the running statistics exact at the end. The report is then that of one more epoch without learning."""
    finish: Callable[[Net, Sequence[Tensor]], None] | None = None
    """Done to the network at the end, with training batches. The last report is then that of evaluation, too."""
    data: Callable[[int, torch.Generator, float], Data] = Data.sample
    """So many samples, and how much they differ between groups."""
    mask: Callable[[Tensor], Tensor] | None = None
    """From a batch to what counts of it."""
    num_train: int = NUM_TRAIN
    order: str = "shuffled"
    batch_size: int = 32
    epochs: int = 4
    lr: float = 0.05
    between_groups: float = 0.0
    momentum: float | None = 0.1
    drop_last: bool = True

    def run(self, seed: int) -> tuple[list[Report], float]:
        """The reports of all epochs, and the loss in eval mode."""
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        train, held_out = (self.data(n, generator, self.between_groups) for n in (self.num_train, NUM_EVAL))
        net = self.net()
        for norm in (net.norm1, net.norm2):
            norm.momentum = self.momentum
        optimizer = torch.optim.SGD(net.parameters(), lr=self.lr, momentum=0.9)
        reports = []
        with BatchNormTracker(net, mask=self.mask) as tracker:
            tracker.close()
            for epoch in range(self.epochs + self.recalibrate):
                if epoch == self.epochs:
                    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
                    recalibrate(net, [self.disturb(x, epoch, 1.0) for x, _ in self._batches(train, generator)])
                self.each_epoch(net, epoch)
                tracker.reset()
                batches = list(self._batches(train, generator))
                for i, (x, y) in enumerate(batches):
                    optimizer.zero_grad()
                    logits = self.step(net, self.disturb(x, epoch, i / len(batches)), tracker)
                    loss = nn.functional.cross_entropy(logits, y)
                    if torch.isfinite(loss):
                        loss.backward()
                        optimizer.step()
                    tracker.step()  # tells where a batch ends
                reports.append(tracker.close())
            if self.finish is not None:
                self.finish(net, [x for x, _ in batches])
                tracker.start_validation()
            net.eval()
            with torch.no_grad():
                logits = net(self.disturb(held_out.x, self.epochs, 1.0))
            if self.finish is not None:
                reports[-1] = tracker.validation_report()
        return reports, float(nn.functional.cross_entropy(logits, held_out.y))

    def _batches(self, data: Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of batches, in the order that was asked for."""
        order = torch.randperm(len(data.y), generator=generator)
        if self.order == "sorted":
            order = order[data.y[order].argsort(stable=True)]
        elif self.order == "grouped":
            rank = torch.randperm(GROUPS, generator=generator)
            order = order[rank[data.group[order]].argsort(stable=True)]
        for indices in order.split(self.batch_size):
            if len(indices) == self.batch_size or not self.drop_last:
                yield data.x[indices], data.y[indices]


@dataclass
class Case:
    """Something wrong, what the report must say of it, and the remedy."""

    cause: str
    expected: str
    """The verdict, or the flag, on ``layer``."""
    training: Training
    remedy: str = "-"
    repaired: Callable[[Training, LayerReport], Training] | None = None
    """The training with the remedy, from the sick one and its report on ``layer``."""
    layer: str = "norm1"
    mended: tuple[str, ...] = ("healthy", "drifting")
    """What the verdict on ``layer`` may be after the remedy; "gone" if that takes its place."""
    loss_falls: bool = False
    """Whether the remedy must make the loss clearly better; else it must not make it worse."""


def stop_tracking(net: Net, epoch: int) -> None:
    """What Lightning's ``BaseFinetuning.freeze`` does to a BatchNorm layer."""
    net.norm2.track_running_stats = epoch == 0


def freeze_on_other_data(net: Net, epoch: int) -> None:
    """A layer that keeps the statistics of what it was pretrained on."""
    if epoch == 0:
        with torch.no_grad():
            net.norm1.running_mean.fill_(1.0)
            net.norm1.running_var.fill_(9.0)
    net.norm1.eval()


def pretrained_elsewhere(net: Net, epoch: int) -> None:
    """Running statistics of other data, and nothing else."""
    if epoch == 0:
        net.norm1.running_mean.add_(2.0)
        net.norm1.num_batches_tracked.fill_(10_000)


def stay_in_eval_mode(net: Net, epoch: int) -> None:
    """A hook that draws predictions and forgets to switch back."""
    net.eval()


def freeze_weights_alone(net: Net, epoch: int) -> None:
    """What freezes a pretrained layer by half."""
    net.norm1.requires_grad_(False)


def write_between_epochs(net: Net, epoch: int) -> None:
    """What stochastic weight averaging does before it recomputes statistics."""
    if epoch == 3:
        net.norm1.reset_running_stats()


def nan_once(x: Tensor, epoch: int, time: float) -> Tensor:
    """One batch with NaN, long before the last epoch."""
    return torch.full_like(x, torch.nan) if epoch == 1 and time == 0.5 else x


def ramp(x: Tensor, epoch: int, time: float) -> Tensor:
    """Data that move steadily within each epoch, as in a curriculum."""
    return x + 2 * time


def moving_weights(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """The bias before the first normalisation moves steadily, which changes nothing in training."""
    with torch.no_grad():
        net.linear1.bias += 0.02
    return net(x)


def second_pass_unseen(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """A second pass in training mode where nobody counts."""
    with tracker.paused():
        net(x + torch.randn_like(x))
    return net(x)


def second_pass_in_eval(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """The second pass in eval mode."""
    net.eval()
    net(x + torch.randn_like(x))
    net.train()
    return net(x)


def halves_in_calls_of_their_own(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """Two kinds of inputs, each normalised by itself."""
    half = len(x) // 2
    return torch.cat([net(x[:half]), net(2 * x[half:])])


def halves_in_one_call(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """The same inputs together."""
    half = len(x) // 2
    return net(torch.cat([x[:half], 2 * x[half:]]))


def padded_to_the_longest(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """Sequences, no longer than the longest of their batch."""
    x = x[..., x[:, 0].any(0)]
    tracker.see_inputs(x)
    return net(x)


def functional(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """A call with copies of the buffers in their place, as in meta-learning."""
    return torch.func.functional_call(net, {name: buffer.clone() for name, buffer in net.named_buffers()}, (x,))


def resumed_in_mid_step(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """A checkpoint that was saved after a forward pass, from which that batch is run again."""
    if net.norm1.num_batches_tracked == RESUMED_AT:
        net(x)
        tracker.load_state_dict(tracker.state_dict())
    return net(x)


def resumed_between_steps(net: Net, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """A checkpoint that was saved between two steps."""
    if net.norm1.num_batches_tracked == RESUMED_AT:
        tracker.load_state_dict(tracker.state_dict())
    return net(x)


def averaging(net: Averaged, x: Tensor, tracker: BatchNormTracker) -> Tensor:
    """A moving average of the parameters, and of nothing else."""
    get_ema_multi_avg_fn(0.995)(net.average, net.trained, None)
    return net(x)


def take_average(net: Averaged, batches: Sequence[Tensor]) -> None:
    """Averaged parameters, with the running statistics of those that were trained."""
    with torch.no_grad():
        for parameter, average in zip(net.trained, net.average, strict=True):
            parameter.copy_(average)


def take_average_and_recalibrate(net: Averaged, batches: Sequence[Tensor]) -> None:
    """Averaged parameters, with running statistics of their own."""
    take_average(net, batches)
    recalibrate(net, batches)


def take_teacher(net: WithTeacher, batches: Sequence[Tensor]) -> None:
    """The averaged copy as it is."""


def recalibrate_teacher(net: WithTeacher, batches: Sequence[Tensor]) -> None:
    """The averaged copy with running statistics of its own."""
    recalibrate(net.teacher, batches)


def with_recommended_momentum(training: Training, layer: LayerReport) -> Training:
    """The momentum that the remedy states."""
    return replace(training, momentum=layer.evidence["recommended_momentum"])


def recalibrated(training: Training, layer: LayerReport) -> Training:
    """Running statistics recomputed at the end."""
    return replace(training, recalibrate=True)


CASES = (
    Case("nothing is wrong", "healthy", Training()),
    Case("momentum 0.5", "noisy", Training(momentum=0.5), "recommended momentum", with_recommended_momentum),
    Case(
        *("momentum 0.001", "warming-up", Training(momentum=0.001)),
        *("recommended momentum", with_recommended_momentum),
    ),
    Case("momentum 0.001", "warming-up", Training(momentum=0.001), "recalibrate", recalibrated, layer="norm2"),
    Case(
        *("weights move, momentum 0.02", "lagging", Training(step=moving_weights, momentum=0.02)),
        *("recommended momentum", with_recommended_momentum),
    ),
    Case(
        *("statistics of other data, momentum 0.003", "lagging"),
        *(Training(each_epoch=pretrained_elsewhere, momentum=0.003), "recalibrate", recalibrated),
    ),
    Case("weights move, momentum 0.3", "drifting", Training(step=moving_weights, momentum=0.3)),
    Case("data move in each epoch", "ordered-batches", Training(disturb=ramp)),
    Case(
        *("batches of 4", "tiny-batch", Training(batch_size=4, lr=0.02)),
        *("batches of 32", lambda training, layer: replace(training, batch_size=32)),
    ),
    Case(
        *("data sorted by class", "ordered-batches", Training(order="sorted")),
        *("shuffle", lambda training, layer: replace(training, order="shuffled")),
    ),
    Case(
        *("batches from one source each", "grouped-batches", Training(order="grouped", between_groups=1.0)),
        *("mix sources", lambda training, layer: replace(training, order="shuffled")),
    ),
    Case(
        *("track_running_stats=False after an epoch", "stale", Training(each_epoch=stop_tracking)),
        *("track them", lambda training, layer: replace(training, each_epoch=Training().each_epoch), "norm2"),
    ),
    Case(
        *("eval mode with statistics of other data", "frozen", Training(each_epoch=freeze_on_other_data)),
        *("train it", lambda training, layer: replace(training, each_epoch=Training().each_epoch)),
    ),
    Case("one batch of NaN, epochs ago", "non-finite", Training(disturb=nan_once), "recalibrate", recalibrated),
    Case(
        *("made without running statistics", "no-running-stats", Training(net=Stateless)),
        *("with them", lambda training, layer: replace(training, net=Net)),
    ),
    Case(
        *("a layer that forward() forgets", "unused", Training(net=Bypassed)),
        *("call it", lambda training, layer: replace(training, net=Net)),
    ),
    Case(
        *("4 batches in an epoch", "warming-up", Training(batch_size=512)),
        *("more batches", lambda training, layer: replace(training, batch_size=64)),
    ),
    Case(
        *("activation checkpointing, momentum 0.3", "double-update", Training(net=Checkpointed, momentum=0.3)),
        *("compensated momentum",),
        lambda training, layer: replace(training, momentum=layer.evidence["compensated_momentum"]),
    ),
    Case(
        *("a second pass that is not monitored", "missed-calls", Training(step=second_pass_unseen)),
        *("second pass in eval mode", lambda training, layer: replace(training, step=second_pass_in_eval)),
    ),
    Case(
        *("functional_call with copied buffers", "not-updating", Training(step=functional)),
        *("call the module", lambda training, layer: replace(training, step=Training().step)),
    ),
    Case(
        *("resumed from the middle of a step", "interrupted-batch", Training(step=resumed_in_mid_step)),
        *("save between steps", lambda training, layer: replace(training, step=resumed_between_steps)),
    ),
    Case("buffers reset before the last epoch", "written-outside", Training(each_epoch=write_between_epochs)),
    Case(
        *("a quarter of the units switched off", "dead-channels", Training(net=Pruned)),
        *("keep them", lambda training, layer: replace(training, net=Net)),
    ),
    Case(
        *("the whole model in eval mode", "trained-in-eval", Training(each_epoch=stay_in_eval_mode)),
        *("model.train()", lambda training, layer: replace(training, each_epoch=Training().each_epoch)),
    ),
    Case(
        *("two kinds of inputs, a call for each", "calls-differ", Training(step=halves_in_calls_of_their_own)),
        *("one call for both", lambda training, layer: replace(training, step=halves_in_one_call)),
    ),
    Case(
        *("sequences of all lengths, padded", "padded"),
        replace(
            Training(net=Listening, data=Data.sequences, between_groups=2.0, num_train=1024, batch_size=8, lr=0.01),
            **{"step": padded_to_the_longest, "mask": lambda x: x[:, 0] > 0},
        ),
        *("normalise what counts", lambda training, layer: replace(training, net=ListeningToWhatCounts)),
    ),
    Case("requires_grad=False", "half-frozen", Training(each_epoch=freeze_weights_alone)),
    Case("another kind of normalisation", "own-forward", Training(net=WithoutMean)),
    Case(
        *("a last batch of 2", "small-last-batch", Training(batch_size=93, momentum=0.5, drop_last=False)),
        *("leave it out", lambda training, layer: replace(training, drop_last=True)),
        loss_falls=True,
    ),
    Case(
        *("images, one a batch", "tiny-batch"),
        Training(net=Segmenting, data=Data.images, num_train=256, between_groups=1.0, batch_size=1, lr=0.005),
        *("InstanceNorm2d", lambda training, layer: replace(training, net=NormalisedByImage)),
        mended=("gone",),
        loss_falls=True,
    ),
    Case(
        *("averaged weights", "other-weights", Training(net=Averaged, step=averaging, finish=take_average)),
        *("recalibrate", lambda training, layer: replace(training, finish=take_average_and_recalibrate)),
        loss_falls=True,
    ),
    Case(
        *("averaged copy", "never-updated"),
        *(Training(net=WithTeacher, step=averaging, finish=take_teacher), "recalibrate the copy"),
        *(lambda training, layer: replace(training, finish=recalibrate_teacher), "teacher.norm1"),
        mended=("unused",),
        loss_falls=True,
    ),
)


def main() -> None:
    """Print the table; exit with an error if a cause is not named or a remedy does not help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--explain", action="store_true", help="print each explanation and remedy, too")
    parser.add_argument(
        "--logdir", type=Path, help="log all epochs of all causes as layers of one model, for TensorBoard"
    )
    parser.add_argument("--figure", type=Path, help="draw the last epoch of all causes as layers of one model")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "No BatchNorm layer to monitor")  # where a remedy has replaced them all
    epochs: list[list[LayerReport]] = [[] for _ in range(Training.epochs)]
    rows, named, helped, remedies = [], 0, 0, 0
    for case in CASES:
        reports, loss = case.training.run(args.seed)
        layer = reports[-1][case.layer]
        for epoch, report in zip(epochs, reports, strict=True):
            epoch.append(
                replace(report[case.layer], name=case.cause if case.layer == "norm1" else f"{case.cause}, {case.layer}")
            )
        right = case.expected == layer.verdict or case.expected in layer.flags
        named += right
        row = [case.cause, case.layer, _words(layer), loss, case.remedy]
        if case.repaired is not None:
            remedies += 1
            (*_, repaired), loss_after = case.repaired(case.training, layer).run(args.seed)
            after = repaired.get(case.layer)
            is_mended = (after.verdict if after else "gone") in case.mended and not (after and after.needs_attention)
            helps = is_mended and not loss_after > loss + (-_TOLERANCE if case.loss_falls else _TOLERANCE)
            helped += helps
            row += [(_words(after) if after else "gone") + ("" if helps else " (NOT MENDED)"), loss_after]
        row[2] += "" if right else f" (NOT {case.expected})"
        rows.append(row)
        if args.explain:
            print(f"{layer.explanation}\n  -> {layer.remedy}\n")
    headers = ["cause", "layer", "verdict", "eval loss", "remedy", "verdict after", "eval loss after"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f", missingval="-"))
    print(f"\n{named} of {len(CASES)} causes are named, {helped} of {remedies} remedies help.")
    if args.figure is not None:
        draw(Report(epochs[-1]), args.figure)
    if args.logdir is not None:
        show(epochs, args.logdir)
    if named < len(CASES) or helped < remedies:
        raise SystemExit("A cause was not named, or a remedy did not help.")


def draw(report: Report, path: Path) -> None:
    """A picture of how a report is read: the causes as layers of one model."""
    fig, ax = report.plot()
    names = list(report)
    for name, text, where in (
        ("nothing is wrong", "right up to chance:\nat its grey bar, below 0.1", (-0.4, 6)),
        ("momentum 0.001", "far above its bar:\nthere is a cause", (7.2, 6)),
        ("one batch of NaN, epochs ago", "NaN in eval()", (13.5, 6)),
        ("activation checkpointing, momentum 0.3", "chance itself is too much:\nthe bar is above 0.1", (12.7, 0.45)),
    ):
        point = names.index(name), min(report[name].evidence["eval_error"], 10)
        style = {"arrowprops": {"arrowstyle": "->", "shrinkB": 7, "relpos": (0, 0)}, "fontsize": 9, "va": "center"}
        ax.annotate(text, point, xytext=where, **style)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)


def show(epochs: Sequence[Sequence[LayerReport]], logdir: Path) -> None:
    """Log what each epoch has shown of every cause as the monitor would."""
    logger, history = TensorBoardLogger(logdir, name="pathologies"), History()
    dashboard = Dashboard("bn", history)
    for number, layers in enumerate(epochs, start=1):
        report = Report(layers)
        logger.log_metrics({f"bn/{name}": value for name, value in report.summary().items()}, step=number)
        dashboard.tell([logger])
        history.add(report, number)
        dashboard.show([logger], report, number, per_layer=False)
    dashboard.finish([logger])
    logger.finalize("success")


def _words(layer: LayerReport) -> str:
    return ", ".join([layer.verdict, *layer.flags])


if __name__ == "__main__":
    main()
