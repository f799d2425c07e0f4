"""What is examined after a training is told what the monitor has told in it, as far as one pass can tell."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import lightning_bnmonitor
from lightning_bnmonitor import BatchNormTracker, LayerReport, Report, examine, recalibrate

pytestmark = pytest.mark.slow
Batches = list[tuple[Tensor, Tensor]]


def data(num: int, size: int, seed: int = 0) -> Batches:
    """Images in four classes, in random order."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (num * size,), generator=generator)
    x = torch.randn(num * size, 2, 6, 6, generator=generator)
    x += torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(99))[y] + 0.5
    return list(zip(x.split(size), y.split(size), strict=True))


def network(momentum: float = 0.1) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, 4)),
    )


@dataclass
class Trained:
    """A model, what the monitor has told of its layers, and what to examine it with."""

    model: nn.Module
    told: Mapping[str, LayerReport]
    batches: Any
    evaluation: Any = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    mask: Callable[[Any], Any] | None = None


def fit(
    model: nn.Module,
    batches: Batches,
    epochs: int,
    step: Callable[[nn.Module, Any], Tensor] = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    evaluation: Batches = (),
    begin: Callable[[nn.Module], Any] = nn.Module.train,
    lr: float = 0.01,
    mask: Callable[[Any], Any] | None = None,
    end: Callable[[nn.Module], Any] = lambda model: None,
    after_step: Callable[[], Any] = lambda: None,
) -> Report:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    with BatchNormTracker(model, mask=mask) as tracker:
        for _ in range(epochs):
            begin(model)
            tracker.reset()
            for batch in batches:
                tracker.see_inputs(batch)
                optimizer.zero_grad()
                step(model, batch).backward()
                optimizer.step()
                after_step()
                tracker.step()
            tracker.close()
        if not evaluation:
            return tracker.report()
        end(model.eval())
        tracker.start_validation()
        for x, _ in evaluation:
            model(x)
        return tracker.validation_report()


def few_batches() -> Trained:
    model, batches = network(momentum=0.01), data(5, 64)
    return Trained(model, fit(model, batches, 8), batches)


def settled() -> Trained:
    model, batches = network(), data(40, 64)
    return Trained(model, fit(model, batches, 3), batches, evaluation=data(9, 64, seed=4))


def unprepared() -> Trained:
    model, batches = network(), data(40, 64)
    evaluation = [(4 * x + 1, y) for x, y in data(9, 64, seed=4)]
    return Trained(model, fit(model, batches, 3, evaluation=evaluation), batches, evaluation)


def in_order() -> Trained:
    model, batches = network(), data(40, 64)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    x = x + torch.randn(len(x), 1, 1, 1)
    order = x.mean((1, 2, 3)).argsort()
    batches = list(zip(x[order].split(64), y[order].split(64), strict=True))
    return Trained(model, fit(model, batches, 3), batches)


def one_image_each() -> Trained:
    model, generator = network()[:-4], torch.Generator().manual_seed(3)
    model = nn.Sequential(*model[:6], nn.Conv2d(8, 1, 1))
    gain = torch.exp(torch.randn(60, 1, 1, 1, generator=generator))
    x = gain * torch.randn(60, 2, 6, 6, generator=generator) + 2 * torch.randn(60, 1, 1, 1, generator=generator)
    batches = [(each, each[:, :1, 1:5:2, 1:5:2]) for each in x.split(1)]
    step = lambda model, batch: F.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    return Trained(model, fit(model, batches, 3, step), batches)


def small_last_batch() -> Trained:
    model, batches = network(momentum=0.4), [*data(18, 64), *data(1, 2, seed=7)]
    return Trained(model, fit(model, batches, 4), batches)


def two_calls() -> Trained:
    model = network()
    pairs = [(x, 3 * other.flip(0)) for (x, _), (other, _) in zip(data(40, 64), data(40, 64, seed=5), strict=True)]
    step = lambda model, pair: F.softplus(model(pair[1]) - model(pair[0])).mean()  # noqa: E731
    both = lambda model, pair: [model(side) for side in pair]  # noqa: E731
    return Trained(model, fit(model, pairs, 3, step), pairs, forward=both)


def stale_backbone() -> Trained:
    model, batches = network(), data(40, 64)
    fit(model, batches, 2)
    for layer in (model[1], model[4]):
        layer.track_running_stats = False
    batches = [(1 - 3 * x, y) for x, y in batches]
    return Trained(model, fit(model, batches, 2), batches)


def frozen_backbone() -> Trained:
    model, batches = network(), data(40, 64)
    fit(model, batches, 2)
    batches = [(1 - 3 * x, y) for x, y in batches]
    begin = lambda model: (model.train(), model[1].eval(), model[4].eval())  # noqa: E731
    return Trained(model, fit(model, batches, 2, begin=begin), batches)


def trained_in_eval_mode() -> Trained:
    model, batches = network(), [(3 * x + 2, y) for x, y in data(20, 64)]
    return Trained(model, fit(model, batches, 2, begin=nn.Module.eval), batches)


def values_that_are_not_finite() -> Trained:
    model, batches = network(), data(20, 64)
    batches[11][0][3, 1] = torch.inf
    told = fit(model, batches, 1, lr=0.0)
    return Trained(model, told, batches)


def moving_fast() -> Trained:
    model, batches = network(momentum=0.02), data(30, 64)
    fit(model, batches, 6, lr=0.01)
    step = lambda model, batch: 20 * F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return Trained(model, fit(model, batches, 1, step), batches)


def shuffled_and_fast() -> Trained:
    model, batches = network(momentum=0.3), data(40, 32)
    return Trained(model, fit(model, batches, 1, lr=0.3), batches)


def too_large_a_momentum() -> Trained:
    model, batches = network(momentum=0.9), data(40, 16)
    return Trained(model, fit(model, batches, 2, lr=1e-3), batches)


def one_source_a_batch() -> Trained:
    model, generator = network(), torch.Generator().manual_seed(2)
    batches = [(x + 2 * torch.randn((), generator=generator), y) for x, y in data(40, 32)]
    return Trained(model, fit(model, batches, 2), batches)


class _WithCopy(nn.Module):
    """A network and a copy with averaged weights, which is what it evaluates."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.copy = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.net if self.training else self.copy)(x)

    @torch.no_grad()
    def average(self) -> None:
        for mine, new in zip(self.copy.parameters(), self.net.parameters(), strict=True):
            mine.lerp_(new, 0.02)


def averaged_copy() -> Trained:
    model, batches, evaluation = _WithCopy(), data(40, 64), data(9, 64, seed=4)
    told = fit(model, batches, 2, evaluation=evaluation, after_step=model.average)
    of_copy = {name.removeprefix("copy."): layer for name, layer in told.items() if name.startswith("copy.")}
    return Trained(model.copy, of_copy, batches, evaluation)


def averaged_weights() -> Trained:
    model, batches, evaluation = _WithCopy(), data(40, 64), data(9, 64, seed=4)
    swap = lambda net: net.load_state_dict(dict(model.copy.named_parameters()), strict=False)  # noqa: E731
    told = fit(model.net, batches, 2, evaluation=evaluation, after_step=model.average, end=swap, lr=0.5)
    return Trained(model.net, told, batches, evaluation)


def _fine_tuned() -> tuple[nn.Module, Batches, Report]:
    """A network whose layers up to the last but one do not train, on other data than before."""
    model, batches = network(), data(40, 64)
    fit(model, batches, 2)
    model[:-1].requires_grad_(False)
    other = [(1 - 3 * x, y) for x, y in batches]
    return model, other, fit(model, other, 2)


def half_frozen() -> Trained:
    model, batches, told = _fine_tuned()
    return Trained(model, told, batches)


class _BiasFree(nn.BatchNorm2d):
    """Divides by the standard deviation and subtracts no mean."""

    def forward(self, x: Tensor) -> Tensor:
        var = self.running_var
        if self.training:
            var = x.var((0, 2, 3))
            with torch.no_grad():
                self.running_var.lerp_(var, self.momentum)
                self.num_batches_tracked += 1
        return x * (self.weight / (var + self.eps).sqrt())[:, None, None]


def forward_of_its_own() -> Trained:
    model, batches = network(), data(20, 64)
    model[1], model[4] = _BiasFree(8), _BiasFree(8)
    return Trained(model, fit(model, batches, 2), batches)


class _Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


def checkpointed_and_called_again() -> Trained:
    model, batches = network(momentum=0.2), data(40, 32)
    model = nn.Sequential(_Checkpointed(*model[:3]), *model[3:])

    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        with torch.no_grad():
            hard = F.cross_entropy(model(x + torch.randn_like(x)), y)
        return F.cross_entropy(model(x), y) / hard.clamp(0.5)

    return Trained(model, fit(model, batches, 2, step), batches)


def calls_far_apart() -> Trained:
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.02), nn.Linear(4, 1))
    pairs = [torch.randn(2, 64, 4) + torch.tensor([0.0, 1.2])[:, None, None] for _ in range(80)]
    step = lambda model, pair: F.softplus(model(pair[1]) - model(pair[0])).mean()  # noqa: E731
    both = lambda model, pair: [model(side) for side in pair]  # noqa: E731
    return Trained(model, fit(model, pairs, 4, step), pairs, forward=both)


class _OfSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x)).relu().mean(-1))


def padded() -> Trained:
    model, generator = _OfSequences(), torch.Generator().manual_seed(6)
    batches = []
    for _ in range(40):
        longest = int(torch.randint(4, 21, (), generator=generator))
        counts = torch.arange(20)[None] < torch.randint(2, longest + 1, (16, 1), generator=generator)
        x = (torch.randn(16, 3, 20, generator=generator) + 2) * counts[:, None]
        batches.append((x, (x.sum((1, 2)) > 50).long(), counts))
    mask = lambda batch: batch[2]  # noqa: E731
    return Trained(model, fit(model, batches, 3, mask=mask), batches, mask=mask)


def without_running_stats_and_not_reached() -> Trained:
    model, batches = network(), data(20, 64)
    model[4] = nn.BatchNorm2d(8, track_running_stats=False)
    model[-1].register_module("aside", nn.BatchNorm1d(4))
    return Trained(model, fit(model, batches, 3), batches)


# What is wrong in each of them, as the monitor says it of a layer at least.
KINDS: dict[Callable[[], Trained], str] = {
    few_batches: "warming-up",
    settled: "healthy",
    unprepared: "domain-shift",
    in_order: "ordered-batches",
    one_source_a_batch: "grouped-batches",
    one_image_each: "tiny-batch",
    small_last_batch: "small-last-batch",
    too_large_a_momentum: "noisy",
    two_calls: "calls-differ",
    calls_far_apart: "calls-differ",
    stale_backbone: "stale",
    frozen_backbone: "frozen",
    half_frozen: "half-frozen",
    trained_in_eval_mode: "trained-in-eval",
    averaged_copy: "never-updated",
    averaged_weights: "other-weights",
    values_that_are_not_finite: "non-finite",
    moving_fast: "lagging",
    shuffled_and_fast: "drifting",
    forward_of_its_own: "own-forward",
    checkpointed_and_called_again: "double-update",
    padded: "padded",
    without_running_stats_and_not_reached: "no-running-stats",
}
# Verdicts of the monitor that are others here, and why.
SEEN_AS = {
    ("lagging", "misfit"): "that the weights have moved away is not seen while they stay",
    ("drifting", "healthy"): "at fixed weights nothing moves",
    ("lagging", "noisy"): "nor that they have, where noise explains as much",
    ("noisy", "healthy"): "noise that was to be expected did not happen in these running statistics",
    ("trained-in-eval", "warming-up"): "the mode of the training is not seen, what it has left is",
    ("unused", "warming-up"): "a copy that is given data is called",
}
# Which of these it is, chance decides where errors are near to what is worth a warning: what the monitor compares with
# is known from the last batches of a window, what is received here from all.
OF_AN_ERROR = {"healthy", "drifting", "warming-up", "lagging", "noisy", "misfit"}
# Others, and flags, where it is of one kind of training.
SEEN_AS_IN = {
    (averaged_weights, "healthy", "misfit"): "with the averaged weights in place there are no others",
    (calls_far_apart, "healthy", "misfit"): "running statistics lack what lies between calls, which recalibration adds",
}
UNSEEN = {
    "not-updating": "calls that training makes",
    "double-update": "calls that training makes",
    "other-weights": "there are no others",
}
UNSEEN_IN = {(checkpointed_and_called_again, "calls-differ"): "the other call is made in training alone"}
SEEN_IN = {(trained_in_eval_mode, "never-updated"): "training in eval mode has left that"}


def difference(kind: Callable[[], Trained], told: LayerReport, said: LayerReport) -> str:
    """In what verdicts and flags differ, if not for one of the reasons above; empty if they do not."""
    pair, flags = (told.verdict, said.verdict), set(told.flags) ^ set(said.flags)
    is_same = told.verdict == said.verdict or pair in SEEN_AS or (kind, *pair) in SEEN_AS_IN
    is_same |= OF_AN_ERROR.issuperset(pair) and is_close_call(told, said)
    of_monitor = {flag for flag in told.flags if flag in UNSEEN or (kind, flag) in UNSEEN_IN}
    unexplained = flags - of_monitor - {flag for flag in said.flags if (kind, flag) in SEEN_IN}
    return "" if is_same and not unexplained else f"{said.name}: {pair}, {sorted(unexplained)}"


def is_close_call(told: LayerReport, said: LayerReport) -> bool:
    """Whether errors are so near to what is worth a warning that chance decides."""
    return any(abs(layer.evidence.get("eval_error", 0.0) - 0.1) < 0.05 for layer in (told, said))


@pytest.mark.parametrize(("kind", "wrong"), KINDS.items(), ids=[kind.__name__ for kind in KINDS])
def test_it_says_what_the_monitor_has_said(kind: Callable[[], Trained], wrong: str) -> None:
    torch.manual_seed(0)
    trained = kind()
    told, model = trained.told, copy.deepcopy(trained.model)
    assert wrong in {said for layer in told.values() for said in (layer.verdict, *layer.flags)}
    batches, evaluation, forward, mask = trained.batches, trained.evaluation, trained.forward, trained.mask
    report = examine(trained.model, batches, evaluation, forward, num_batches=None, mask=mask)
    assert list(report) == list(told)
    assert [text for name in told if (text := difference(kind, told[name], report[name]))] == []
    for name, layer in report.items():
        assert layer.needs_attention == told[name].needs_attention or is_close_call(told[name], layer), name
        if evaluation is not None and "val_error" in told[name].evidence:
            assert layer.evidence["val_error"] == pytest.approx(told[name].evidence["val_error"], rel=1e-3), name
    for one, other in zip(model.state_dict().values(), trained.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def followed(remedy: str, model: nn.Module, loader: Any) -> nn.Module:
    """A copy of a model after the first call of `recalibrate` that a remedy prints."""
    twin = copy.deepcopy(model)
    call = re.search(r"`(lightning_bnmonitor\.recalibrate\([^`]*\))`", remedy)[1]
    eval(call, {"lightning_bnmonitor": lightning_bnmonitor, "model": twin, "loader": loader})
    return twin


@torch.no_grad()
def loss_in_eval(model: nn.Module, batches: Batches) -> float:
    model = copy.deepcopy(model).eval()
    return float(sum(F.cross_entropy(model(x), y) for x, y in batches)) / len(batches)


def test_never_updated_names_the_reasons_and_what_tells_them_apart() -> None:
    torch.manual_seed(0)
    helps = {}
    for kind in (trained_in_eval_mode, averaged_copy):
        trained = kind()
        for layer in examine(trained.model, trained.batches).values():
            assert layer.flags == ("never-updated",)
            assert "averaged weights in a copy" in layer.explanation
            assert "in eval mode all the time it was trained" in layer.explanation
            assert "one pass does not tell" in layer.explanation
        call = re.search(r"`print\((lightning_bnmonitor\.attribute_eval_gap\([^`]*\))\)`", layer.remedy)[1]
        loss = lambda output, batch: F.cross_entropy(output, batch[1])  # noqa: E731
        names = {"model": trained.model, "loader": trained.batches, "loss": loss}
        gap = eval(call, {"lightning_bnmonitor": lightning_bnmonitor, **names})
        helps[kind] = gap.gap / gap.eval_loss
        repaired = loss_in_eval(followed(layer.remedy, trained.model, trained.batches), trained.batches)
        helped = 1 - repaired / loss_in_eval(trained.model, trained.batches)
        assert helped == pytest.approx(helps[kind], abs=0.05)
    assert helps[averaged_copy] > 0.2
    assert helps[trained_in_eval_mode] < 0.1


def test_statistics_that_went_over_to_other_data_while_the_weights_did_not_train_are_told_and_brought_back() -> None:
    torch.manual_seed(0)
    model, first = network(), data(40, 64)
    fit(model, first, 2)
    before, head = loss_in_eval(model, first), copy.deepcopy(model[-1])
    model[:-1].requires_grad_(False)
    fit(model, [(1 - 3 * x, y) for x, y in first], 2)
    model[-1] = head
    after, report = loss_in_eval(model, first), examine(model, first)
    assert after > 2 * before
    for name in "14":
        assert (report[name].verdict, report[name].flags) == ("misfit", ("half-frozen",))
        assert "trained on other data like this" in report[name].explanation
        assert "To keep what is recomputed, call `layer.eval()`" in report[name].remedy
    repaired = followed(report["1"].remedy, model, first)
    assert loss_in_eval(repaired, first) < 1.1 * before
    for layer in examine(repaired, first).values():
        assert (layer.verdict, layer.flags) == ("healthy", ("half-frozen",))


def test_what_running_statistics_lack_as_calls_differ_is_told_and_recalibration_adds_it() -> None:
    torch.manual_seed(0)
    trained = calls_far_apart()
    layer = examine(trained.model, trained.batches, forward=trained.forward)["0"]
    assert "without what lies between them" in layer.explanation
    assert "does not tell" not in layer.explanation
    assert layer.evidence["unseen_error"] == pytest.approx(layer.evidence["eval_error"], rel=0.2)
    recalibrate(trained.model, trained.batches, trained.forward)
    again = examine(trained.model, trained.batches, forward=trained.forward)["0"]
    assert (again.verdict, again.flags, again.needs_attention) == ("healthy", ("calls-differ",), True)
