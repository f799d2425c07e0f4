"""Every verdict and flag that small trainings in one process give, by one that deserves it, and what the remedy does.

Each training is that of one small network on synthetic data; one thing is wrong with it. The verdict is that of its
last epoch, or of what comes after it: a validation, or a look at the trained network. Then the training is repeated
with the remedy that the report gave (where it states a momentum, with that number), or the running statistics are
recomputed at its end. Losses are those of ``eval()`` on data held out. It exits with an error if a verdict or flag has
no training, if one is not given, or if a remedy does not help.
"""

from __future__ import annotations

import argparse
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from small_networks import (
    GROUPS,
    SOURCES,
    AlwaysInTraining,
    Averaged,
    Bypassed,
    Checkpointed,
    Data,
    Listening,
    ListeningToWhatCounts,
    Net,
    NormalisedByImage,
    Pruned,
    Segmenting,
    Stateless,
    WithoutMean,
    WithTeacher,
)
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report, examine, recalibrate
from lightning_bnmonitor.callbacks.dashboard import Dashboard
from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.report.history import History

NUM_TRAIN, NUM_EVAL, EPOCHS = 2048, 1024, 4
RESUMED_AT = 3 * 64 + 20  # batches; in the fourth epoch
# Needs several processes; comes of many layers and a learning rate at the edge, and not in each such training.
WITHOUT_TRAINING = ("rank-0-only", "errors-add-up")
_TOLERANCE = 0.05  # by which the loss of two trainings may differ for no reason


@dataclass(frozen=True)
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
    finish: Callable[[Net, Sequence[Tensor]], object] = lambda net, batches: None
    """Done to the network at the end, with training batches."""
    seen: Literal["training", "validation", "averaged weights", "validation alone", "batches"] = "training"
    """What the last report is of. Averaged weights are told of before they come; batches are given to ``examine``."""
    data: Callable[[int, torch.Generator, float], Data] = Data.sample
    """So many samples, and how much they differ between groups."""
    mask: Callable[[Tensor], Tensor] | None = None
    """From a batch to what counts of it."""
    guard: bool = False
    num_train: int = NUM_TRAIN
    order: Literal["shuffled", "sorted", "grouped", "by source"] = "shuffled"
    """By source: each batch is of one, of which the monitor is told."""
    batch_size: int = 32
    evaluated_by: int = NUM_EVAL
    """Samples in a batch of what is held out."""
    epochs: int = EPOCHS
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
        with BatchNormTracker(net, mask=self.mask, guard=self.guard) as tracker:
            tracker.close()
            for epoch in range(self.epochs + self.recalibrate):
                if epoch == self.epochs:
                    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
                    recalibrate(net, [self.disturb(data.x, epoch, 1.0) for data in self._batches(train, generator)])
                self.each_epoch(net, epoch)
                tracker.reset()
                batches = list(self._batches(train, generator))
                self._train(net, optimizer, tracker, epoch, batches)
                reports.append(tracker.close())
            last, loss = self._evaluate(net, tracker, [data.x for data in batches], held_out)
        return [*reports[:-1], last or reports[-1]], loss

    def _train(
        self, net: Net, optimizer: torch.optim.Optimizer, tracker: BatchNormTracker, epoch: int, batches: list[Data]
    ) -> None:
        """One epoch."""
        for i, data in enumerate(batches):
            optimizer.zero_grad()
            x = self.disturb(data.x, epoch, i / len(batches))
            if self.order == "by source":
                tracker.see_inputs(x, SOURCES[data.group[0]])
            loss = nn.functional.cross_entropy(self.step(net, x, tracker), data.y)
            if torch.isfinite(loss):
                loss.backward()
                optimizer.step()
            tracker.step()  # tells where a batch ends

    def _evaluate(
        self, net: Net, tracker: BatchNormTracker, batches: Sequence[Tensor], held_out: Data
    ) -> tuple[Report | None, float]:
        """What is seen after training, if anything is, and the loss in eval mode."""
        if self.seen == "averaged weights":
            tracker.before_averaged()
        self.finish(net, batches)
        report = examine(net, batches) if self.seen == "batches" else None
        looks = BatchNormTracker(net).attach() if self.seen == "validation alone" else tracker
        looks.start_validation()
        net.eval()
        with torch.no_grad():
            batches = self.disturb(held_out.x, self.epochs, 1.0).split(self.evaluated_by)
            logits = torch.cat([net(x) for x in batches])
        validated = looks.validation_report()
        looks.detach()
        if report is None and self.seen != "training":
            report = validated
        return report, float(nn.functional.cross_entropy(logits, held_out.y))

    def _batches(self, data: Data, generator: torch.Generator) -> Iterator[Data]:
        """One epoch of batches, in the order that was asked for."""
        order = torch.randperm(len(data.y), generator=generator)
        if self.order == "sorted":
            order = order[data.y[order].argsort(stable=True)]
        elif self.order == "grouped":
            rank = torch.randperm(GROUPS, generator=generator)
            order = order[rank[data.group[order]].argsort(stable=True)]
        parts = order.split(self.batch_size)
        if self.order == "by source":
            of_sources = [order[data.group[order] == source] for source in range(len(SOURCES))]
            each = [part for of_one in of_sources for part in of_one.split(self.batch_size)]
            parts = tuple(each[index] for index in torch.randperm(len(each), generator=generator))
        for indices in parts:
            if len(indices) == self.batch_size or not self.drop_last:
                yield Data(data.x[indices], data.y[indices], data.group[indices])


@functools.cache
def run(training: Training, seed: int) -> tuple[list[Report], float]:
    """What a training gives. What several causes have in common, such as the one without a fault, is made once."""
    return training.run(seed)


@dataclass
class Case:
    """Something wrong, what the report must say of it, and the remedy."""

    cause: str
    expected: str
    """The verdict on ``layer``, or a flag, or several of these."""
    training: Training
    remedy: str = "-"
    repaired: Callable[[Training, LayerReport], Training] | None = None
    """The training with the remedy, from the sick one and its report on ``layer``."""
    layer: str = "norm1"
    mended: tuple[str, ...] = ("healthy", "drifting")
    """What the verdict on ``layer`` may be after the remedy; "gone" if that takes its place."""
    loss_falls: bool = False
    """Whether the remedy must make the loss clearly better; else it must not make it worse."""
    names: str = ""
    """The group of batches that the explanation must name first."""

    @property
    def title(self) -> str:
        """The cause, as a layer's name."""
        return self.cause if self.layer.startswith("norm1") else f"{self.cause}, {self.layer}"

    def is_right(self, layer: LayerReport) -> bool:
        """Whether a report says what it must."""
        said = {layer.verdict, *layer.flags}
        names_it = not self.names or f"By group: {self.names!r} is" in layer.explanation
        return said >= set(self.expected.split(", ")) and names_it

    def is_mended(self, layer: LayerReport | None) -> bool:
        """Whether it says after the remedy what it may; None if there is no such layer any more."""
        if layer is None:
            return "gone" in self.mended
        return layer.verdict in self.mended and not layer.needs_attention


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


def nan_in_the_last_epoch(x: Tensor, epoch: int, time: float) -> Tensor:
    """One batch with NaN, in the last epoch."""
    return torch.full_like(x, torch.nan) if epoch == EPOCHS - 1 and time == 0.5 else x


def nan_in_every_eighth(x: Tensor, epoch: int, time: float) -> Tensor:
    """One batch of eight with NaN, while there is training."""
    return torch.full_like(x, torch.nan) if epoch < EPOCHS and time % 0.125 == 0 else x


def nan_in_evaluation(x: Tensor, epoch: int, time: float) -> Tensor:
    """A sample with NaN in what is evaluated on."""
    return torch.cat([x[:-1], torch.full_like(x[-1:], torch.nan)]) if epoch == EPOCHS else x


def larger_in_evaluation(x: Tensor, epoch: int, time: float) -> Tensor:
    """What is evaluated on was not normalised as the training data were."""
    return 2 * x + 1 if epoch == EPOCHS else x


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


def recalibrate_teacher(net: WithTeacher, batches: Sequence[Tensor]) -> None:
    """The averaged copy with running statistics of its own."""
    recalibrate(net.teacher, batches)


def what_counts(x: Tensor) -> Tensor:
    """Of padded sequences."""
    return x[:, 0] > 0


def with_recommended_momentum(training: Training, layer: LayerReport) -> Training:
    """The momentum that the remedy states."""
    return replace(training, momentum=layer.evidence["recommended_momentum"])


def recalibrated(training: Training, layer: LayerReport) -> Training:
    """Running statistics recomputed at the end."""
    return replace(training, recalibrate=True)


def recalibrated_before_a_look(training: Training, layer: LayerReport) -> Training:
    """The same where what comes after training is looked at."""
    return replace(training, finish=recalibrate)


def with_mask_and_by_what_counts(training: Training, layer: LayerReport) -> Training:
    """Padding is told of, and left out."""
    return replace(training, mask=what_counts, net=ListeningToWhatCounts)


PADDED = replace(
    Training(net=Listening, data=Data.sequences, between_groups=2.0, num_train=1024, batch_size=8, lr=0.01),
    step=padded_to_the_longest,
)
OF_OTHER_DATA = Training(each_epoch=pretrained_elsewhere, momentum=0.003)


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
        *(OF_OTHER_DATA, "recalibrate", recalibrated),
    ),
    Case(
        *("statistics of other data, examined", "misfit"),
        *(replace(OF_OTHER_DATA, seen="batches"), "recalibrate", recalibrated_before_a_look),
        loss_falls=True,
    ),
    Case(
        *("statistics of other data, validate alone", "unused, unexplained-error"),
        *(replace(OF_OTHER_DATA, seen="validation alone"), "recalibrate", recalibrated_before_a_look),
        mended=("unused",),
        loss_falls=True,
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
        *("batches of one source each, with group=", "grouped-batches"),
        Training(data=Data.from_sources, order="by source", between_groups=2.0),
        *("mix sources", lambda training, layer: replace(training, order="shuffled")),
        loss_falls=True,
        names="night",
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
        *("one batch of NaN in this epoch", "non-finite", Training(disturb=nan_in_the_last_epoch)),
        *("guard=True", lambda training, layer: replace(training, guard=True)),
    ),
    Case(
        *("every eighth batch of NaN, guard=True", "guarded", Training(disturb=nan_in_every_eighth, guard=True)),
        *("no NaN", lambda training, layer: replace(training, disturb=Training().disturb)),
    ),
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
        *("a second pass that is not monitored", "insufficient-data, missed-calls"),
        Training(step=second_pass_unseen),
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
        *("sequences of all lengths, padded", "maybe-padded", PADDED),
        *("mask=, normalise what counts", with_mask_and_by_what_counts),
    ),
    Case(
        *("padded sequences, with mask=", "padded", replace(PADDED, mask=what_counts)),
        *("normalise what counts", with_mask_and_by_what_counts),
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
        *("validation data prepared otherwise", "domain-shift"),
        *(Training(disturb=larger_in_evaluation, seen="validation"), "prepare them alike"),
        lambda training, layer: replace(training, disturb=Training().disturb),
        loss_falls=True,
    ),
    Case(
        *("without running statistics, validated by 4", "evaluated-by-batch"),
        *(Training(net=Stateless, evaluated_by=4, seen="validation"), "with them"),
        lambda training, layer: replace(training, net=Net),
        loss_falls=True,
    ),
    Case(
        *("NaN in validation data", "non-finite-validation"),
        *(Training(disturb=nan_in_evaluation, seen="validation"), "no NaN"),
        lambda training, layer: replace(training, disturb=Training().disturb),
    ),
    Case(
        *("validated in training mode", "updated-in-validation"),
        *(Training(net=AlwaysInTraining, seen="validation"), "eval mode"),
        lambda training, layer: replace(training, net=Net),
    ),
    Case(
        *("averaged weights", "other-weights"),
        *(Training(net=Averaged, step=averaging, finish=take_average, seen="validation"), "recalibrate"),
        lambda training, layer: replace(training, finish=take_average_and_recalibrate),
        loss_falls=True,
    ),
    Case(
        *("averaged weights, told of", "averaged, other-weights"),
        *(Training(net=Averaged, step=averaging, finish=take_average, seen="averaged weights"), "recalibrate"),
        *(lambda training, layer: replace(training, finish=take_average_and_recalibrate), "norm1 (averaged)"),
        mended=("averaged",),
        loss_falls=True,
    ),
    Case(
        *("averaged copy", "unused, never-updated"),
        *(Training(net=WithTeacher, step=averaging, seen="validation"), "recalibrate the copy"),
        *(lambda training, layer: replace(training, finish=recalibrate_teacher), "teacher.norm1"),
        mended=("unused",),
        loss_falls=True,
    ),
)


def without_cause(cases: Iterable[Case]) -> list[str]:
    """Verdicts and flags that none of these causes must be given, though one process suffices."""
    given = {name for case in cases for name in case.expected.split(", ")}
    return [name for name in (*VERDICTS, *FLAGS) if name not in given and name not in WITHOUT_TRAINING]


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
    if missing := without_cause(CASES):
        raise SystemExit(f"No cause here must be given: {', '.join(missing)}.")
    warnings.filterwarnings("ignore", "No BatchNorm layer to monitor")  # where a remedy has replaced them all
    epochs: list[list[LayerReport]] = [[] for _ in range(EPOCHS)]
    rows, named, helped, remedies = [], 0, 0, 0
    for case in CASES:
        reports, loss = run(case.training, args.seed)
        layer = reports[-1][case.layer]
        for epoch, report in zip(epochs, reports, strict=True):
            if case.layer in report:
                epoch.append(replace(report[case.layer], name=case.title))
        is_right = case.is_right(layer)
        named += is_right
        named_group = f" ({case.names})" if case.names else ""
        said = f"{_words(layer)}{named_group if is_right else f' (NOT {case.expected}{named_group})'}"
        row = [case.cause, case.layer, said, loss, case.remedy]
        if case.repaired is not None:
            remedies += 1
            (*_, repaired), loss_after = run(case.repaired(case.training, layer), args.seed)
            after = repaired.get(case.layer)
            most = loss + (-_TOLERANCE if case.loss_falls else _TOLERANCE)
            helps = case.is_mended(after) and math.isfinite(loss_after) and not loss_after > most  # which may be NaN
            helped += helps
            row += [(_words(after) if after else "gone") + ("" if helps else " (NOT MENDED)"), loss_after]
        rows.append(row)
        if args.explain:
            print(f"{layer.explanation}\n  -> {layer.remedy}\n")
    headers = ["cause", "layer", "verdict", "eval loss", "remedy", "verdict after", "eval loss after"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f", missingval="-"))
    print(
        f"\n{named} of {len(CASES)} causes are named, {helped} of {remedies} remedies help.\n"
        f"Of {len(VERDICTS)} verdicts and {len(FLAGS)} flags there is a cause for all but "
        f"{', '.join(WITHOUT_TRAINING)}, which small trainings in one process do not give."
    )
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
        ("one batch of NaN, epochs ago", "NaN in eval()", (17.6, 4)),
        ("activation checkpointing, momentum 0.3", "chance itself is too much:\nthe bar is above 0.1", (22.3, 0.45)),
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
