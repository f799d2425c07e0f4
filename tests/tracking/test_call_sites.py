"""Layers that are called several times in a training step: what is found of their calls, whenever they are merged."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, LayerReport
from tests.promises.test_cost import Operations, bytes_held
from tests.tracking.small_models import assert_alike, hooks_on, network, saved_and_loaded
from tests.tracking.test_interrupts import Interrupt

C = 8
Batches = Sequence[Tensor]


def steps_of(num: int, calls: int | Sequence[int] = 2, apart: float = 0.5, seed: int = 0) -> list[list[Tensor]]:
    """Batches of so many steps, step by step; the first of a step lies so far from the others."""
    generator = torch.Generator().manual_seed(seed)
    calls = [calls] if isinstance(calls, int) else calls
    of_steps = itertools.islice(itertools.cycle(calls), num)
    return [[torch.randn(16, C, generator=generator) + apart * (k == 0) for k in range(own)] for own in of_steps]


def train(tracker: BatchNormTracker, model: nn.Module, steps: Sequence[Batches], flush: int = 0) -> LayerReport:
    """Call the model for each batch, tell the tracker of each step; merge after every so many calls."""
    calls = itertools.count(1)
    for batches in steps:
        for x in batches:
            model(x)
            if flush and next(calls) % flush == 0:
                tracker.flush()
        tracker.step()
    return next(iter(tracker.report().values()))


def layer(**options: bool) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(C, **options))


def shift_in_float64(steps: Sequence[Batches], eps: float = 1e-5) -> float:
    """The shift of the first of two calls a step, where means and variances both differ by more than chance or not."""
    arrays = [np.stack([x.double().numpy() for x in batches]) for batches in steps]
    scaled = np.concatenate(arrays).reshape(-1, C).var(axis=0, ddof=1) + eps
    means = np.stack([array.mean(axis=1) for array in arrays])
    apart = means[:, 0] - means.mean(axis=1)
    squares = apart.mean(axis=0) ** 2 - apart.var(axis=0, ddof=1) / len(apart)
    return float(np.sqrt((squares / scaled).mean()))


def test_two_kinds_of_calls_are_found_and_measured() -> None:
    model, steps = layer(), steps_of(100)
    with BatchNormTracker(model) as tracker:
        report = train(tracker, model, steps)
    assert report.evidence["call_shift"] == pytest.approx(shift_in_float64(steps), rel=1e-5)
    assert report.evidence["call_shift_index"] == 1
    assert report.evidence["calls_per_step"] == 2
    assert report.flags == ("calls-differ",)
    assert report.needs_attention


@pytest.mark.parametrize("calls", [2, 3, 5, [1, 2], [2, 1, 4]], ids=str)
def test_calls_of_one_kind_are_not_flagged(calls: int | list[int]) -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        report = train(tracker, model, steps_of(60, calls, apart=0.0))
    assert report.evidence["call_shift"] < 0.05
    assert report.evidence["calls_per_step"] == np.mean(calls)
    assert report.flags == ()


def test_one_call_a_step_tells_nothing_of_calls() -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        tracker.see_inputs(())  # so that what the model is given is not looked at
        evidence = train(tracker, model, steps_of(60, calls=1)).evidence
        assert not evidence.keys() & {"call_shift", "call_shift_index", "calls_per_step"}
        assert bytes_held(tracker) < 1024 * C


def test_a_loop_that_does_not_tell_of_its_steps_has_none() -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        for x in itertools.chain.from_iterable(steps_of(60)):
            model(x)
        assert "call_shift" not in tracker.report()["0"].evidence


@pytest.mark.parametrize("calls", [2, [3, 1], [5, 2]], ids=str)
@pytest.mark.parametrize("flush", [2, 3, 5, 7])
def test_when_calls_are_merged_changes_nothing_once_the_layer_is_known(calls: int | list[int], flush: int) -> None:
    model, known, steps = layer(), steps_of(20, calls, seed=1), steps_of(60, calls)
    reports = []
    for merge_after in (0, flush):
        with BatchNormTracker(model) as tracker:
            train(tracker, model, known)
            tracker.reset()
            reports.append(train(tracker, model, steps, merge_after))
    once, often = reports
    for name in ("call_shift", "call_shift_index", "calls_per_step"):
        assert often.evidence[name] == pytest.approx(once.evidence[name], rel=1e-6)
    assert once.evidence["calls_per_step"] == np.mean([len(batches) for batches in steps])


@pytest.mark.parametrize("flush", [1, 3])
def test_a_step_whose_first_call_was_merged_before_the_layer_was_known_is_left_out(flush: int) -> None:
    model, steps = layer(), steps_of(60)
    with BatchNormTracker(model) as tracker:
        report = train(tracker, model, steps, flush)
    assert report.evidence["calls_per_step"] == 2
    left_out = [shift_in_float64(steps[first:]) for first in range(3)]
    assert min(abs(report.evidence["call_shift"] / shift - 1) for shift in left_out) < 0.01


def test_steps_of_more_calls_than_may_wait_count_whole() -> None:
    model, steps = layer(), steps_of(13, calls=100)
    with BatchNormTracker(model) as tracker:
        evidence = train(tracker, model, steps).evidence
    assert evidence["calls_per_step"] == 100
    assert evidence["call_shift_index"] == 1
    assert evidence["call_shift"] == pytest.approx(0.5, rel=0.3)


def test_layers_that_are_called_unequally_often_have_numbers_of_their_own() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(C), nn.BatchNorm1d(C), nn.BatchNorm1d(C)])
    alone, steps = layer(), steps_of(40, [3, 2])
    with BatchNormTracker(alone) as tracker:
        expected = train(tracker, alone, steps).evidence
    with BatchNormTracker(model) as tracker:
        for number, batches in enumerate(steps):
            for call, x in enumerate(batches):
                model[0](x)
                if call == 0:
                    model[1](x)
                if number % 4 == 0:
                    model[2](x - 0.5 * (call == 0))
            tracker.step()
        first, once, rarely = (each.evidence for each in tracker.report().values())
    assert first["call_shift"] == pytest.approx(expected["call_shift"], rel=1e-9)
    assert "call_shift" not in once
    assert rarely["call_shift"] < 0.05
    assert (first["calls_per_step"], rarely["calls_per_step"]) == (2.5, 3)


@pytest.mark.parametrize("at", range(1, 400, 40))
def test_an_interrupt_while_calls_are_merged_loses_and_doubles_none(at: int) -> None:
    expected, model, steps = layer(), layer(), steps_of(40, [3, 1, 2])
    with BatchNormTracker(expected) as tracker:
        left_alone = train(tracker, expected, steps, flush=20).evidence
    with BatchNormTracker(model) as tracker:
        train(tracker, model, steps[:27], flush=20)
        for batches in steps[27:]:
            for x in batches:
                model(x)
            tracker.step()
        with contextlib.suppress(KeyboardInterrupt), Interrupt(at):
            tracker.flush()
        evidence = tracker.report()["0"].evidence
    for name in ("call_shift", "calls_per_step"):
        assert evidence[name] == pytest.approx(left_alone[name], rel=1e-9)


def test_a_window_begins_with_no_steps_and_says_what_the_last_one_had() -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        first = train(tracker, model, steps_of(40))
        assert "call_shift_before" not in first.evidence
        tracker.reset()
        few = train(tracker, model, steps_of(7, apart=0.0))
        assert "call_shift" not in few.evidence
        second = train(tracker, model, steps_of(40, apart=0.0))
    assert second.evidence["call_shift"] < 0.05
    assert second.evidence["call_shift_before"] == first.evidence["call_shift"]


def test_a_saved_window_goes_on_as_if_it_had_not_been() -> None:
    model, steps = layer(), steps_of(60)
    with BatchNormTracker(model) as tracker:
        train(tracker, model, steps_of(20, seed=1))
        tracker.reset()
        train(tracker, model, steps[:31])
        state = saved_and_loaded(tracker.state_dict())
        left_alone = train(tracker, model, steps[31:])
    assert state["call_sites"]["channels"].nbytes == 128 * C
    twin = layer()
    with BatchNormTracker(twin) as tracker:
        tracker.load_state_dict(state)
        resumed = train(tracker, twin, steps[31:])
    for name in ("call_shift", "call_shift_index", "calls_per_step", "call_shift_before"):
        assert_alike(resumed.evidence[name], left_alone.evidence[name], 1e-9)


def test_a_state_of_other_layers_is_left_out() -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        train(tracker, model, steps_of(20))
        state = tracker.state_dict()
    other = network()
    with BatchNormTracker(other) as tracker:
        with pytest.warns(UserWarning, match="left out"):
            tracker.load_state_dict(state)
        assert not any("call_shift" in each.evidence for each in tracker.report().values())


@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_of_layers_called_several_times_a_tracker_holds_at_most_1280_bytes_a_channel(capture: str) -> None:
    model = nn.ModuleList(nn.BatchNorm1d(2048) for _ in range(2))
    most = 0
    with BatchNormTracker(model, capture=capture) as tracker:
        for _ in range(60):
            for _, bn in itertools.product(range(3), model):
                bn(torch.randn(2, 2048, requires_grad=True))
            most = max(most, bytes_held(tracker))
            tracker.step()
        assert "call_shift" in tracker.report()["0"].evidence
    assert 1024 * 2048 * 2 < most <= 1280 * 2048 * 2 + 64 * 1024


@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (lambda: layer(), ("calls-differ",)),
        (lambda: layer(track_running_stats=False), ()),
        (lambda: nn.Sequential(nn.BatchNorm1d(C).eval()), ()),
    ],
    ids=["training", "without running statistics", "frozen"],
)
def test_only_what_training_normalises_by_itself_is_flagged(
    make: Callable[[], nn.Module], flags: tuple[str, ...]
) -> None:
    model = make()
    with BatchNormTracker(model) as tracker:
        assert train(tracker, model, steps_of(40)).flags == flags


class Adversary(pl.LightningModule):
    """Judges real and made up samples: an optimizer step with a call of each, then one with a call alone."""

    def __init__(self, apart: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.apart = apart
        self.judge = nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 1))
        self.maker = nn.Linear(4, 4)

    def training_step(self, batch: list[Tensor], index: int) -> None:
        (real,) = batch
        made = self.maker(torch.randn_like(real)).detach() if self.apart else torch.randn_like(real)
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer, losses in (
            (first, lambda: self.judge(made + self.apart).mean() - self.judge(real).mean()),
            (second, lambda: -self.judge(made + self.apart).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(losses())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.judge.parameters(), 1e-3), torch.optim.Adam(self.maker.parameters(), 1e-3)]


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fitted(module: pl.LightningModule, **options: int) -> LayerReport:
    torch.manual_seed(0)
    monitor = BatchNormMonitor()
    options = {"max_epochs": 2} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )
    with contextlib.redirect_stdout(None):
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(640, 4)), batch_size=16, shuffle=True))
    report = monitor.report()
    assert report is not None
    return next(iter(report.values()))


@pytest.mark.parametrize("apart", [0.0, 2.0])
def test_of_two_optimizers_in_one_training_batch_each_has_a_step_of_its_own(apart: float) -> None:
    report = fitted(Adversary(apart))
    assert report.evidence["calls_per_step"] == 1.5
    assert ("calls-differ" in report.flags) == (apart > 0)


def test_batches_whose_gradients_are_accumulated_are_steps_of_their_own() -> None:
    report = fitted(Classifier(), accumulate_grad_batches=4)
    assert "call_shift" not in report.evidence


class Twice(nn.Module):
    """Its layer stands at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.bn(x).relu())


class Trained(nn.Module):
    """Like a LightningModule, which is not called itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({"net": net})

    def training_step(self, x: Tensor) -> Tensor:
        return self.nets["net"](x)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_layer_at_several_places_is_told_from_a_model_that_is_called_several_times(wrapped: bool) -> None:
    def found(model: nn.Module, calls: int) -> LayerReport:
        root = Trained(model) if wrapped else model
        hooks = hooks_on(root)
        with BatchNormTracker(root) as tracker:
            for batches in steps_of(60, calls):
                for x in batches:
                    root.training_step(x) if isinstance(root, Trained) else root(x)
                tracker.step()
            report = next(iter(tracker.close().values()))
        assert hooks_on(root) == hooks
        return report

    at_two_places, called_twice = found(Twice(), calls=1), found(layer(), calls=2)
    assert at_two_places.evidence["calls_per_model_call"] == pytest.approx(2, abs=0.1)
    assert at_two_places.evidence["call_shift"] > 0.1
    assert at_two_places.flags == ("calls-differ",)
    assert not at_two_places.needs_attention
    assert called_twice.evidence["calls_per_model_call"] == pytest.approx(1, abs=0.1)
    assert called_twice.needs_attention


def test_where_a_layer_stands_is_known_after_the_tracker_was_detached_and_after_a_resume() -> None:
    model = Twice()
    with BatchNormTracker(model) as tracker:
        train(tracker, model, steps_of(60, 1))
        known = tracker.report()["bn"]
    detached = tracker.report()["bn"]
    resumed = BatchNormTracker(model)
    resumed.load_state_dict(saved_and_loaded(tracker.state_dict()))
    with resumed:
        later = train(resumed, model, steps_of(2, 1))  # too few to count anew
    for report in (detached, later):
        assert report.evidence["calls_per_model_call"] == known.evidence["calls_per_model_call"] > 1.9
        assert report.flags == known.flags == ("calls-differ",)
        assert not report.needs_attention


def test_what_counts_places_is_gone_when_a_window_ends_in_which_it_has_counted_enough() -> None:
    model = layer()
    with BatchNormTracker(model) as tracker:
        hooks = hooks_on(model)
        for steps, is_left in ((2, True), (20, False)):
            train(tracker, model, steps_of(steps))
            assert len(hooks_on(model)) > len(hooks)
            tracker.close()
            assert (hooks_on(model) != hooks) == is_left
            tracker.reset()


def test_where_a_layer_stands_is_known_at_the_end_of_a_short_first_window() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(C)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.bn(x).relu())

    model = Tied()
    with BatchNormTracker(model) as tracker:
        for step in steps_of(20):
            model(step[0])
            tracker.step()
        report = tracker.close()["bn"]
    assert report.evidence["calls_per_model_call"] == 2
    assert "Give each place" in report.remedy


def test_a_step_of_two_calls_has_few_more_operations() -> None:
    def operations(monitored: bool) -> int:
        model = nn.Sequential(*[nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)) for _ in range(8)])
        with BatchNormTracker(model) if monitored else contextlib.nullcontext() as tracker:
            with Operations() as seen:
                for _ in range(160):
                    (model(torch.randn(4, C)) - model(torch.randn(4, C))).square().mean().backward()
                    if tracker is not None:
                        tracker.step()
            assert tracker is None or "call_shift" in tracker.report()["0.1"].evidence
        return len(seen.names)

    assert 0 < operations(monitored=True) - operations(monitored=False) <= 5 * 160


@pytest.mark.parametrize("divided", [False, True])
def test_calls_that_an_optimizer_step_lies_between_are_not_compared(divided: bool) -> None:
    """As a GAN's: real and fake together in the discriminator's step, fake alone in the generator's."""
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with BatchNormTracker(model) as tracker:
        for first, second in steps_of(40):
            loss = model(first).square().mean()
            if divided:
                loss.backward()
                optimizer.step()
                loss = torch.zeros(())
            (loss + model(second).square().mean()).backward()
            optimizer.step()
            tracker.step()
        report = tracker.report()["1"]
    assert ("call_shift" in report.evidence) is not divided
    assert ("calls-differ" in report.flags) is not divided


def test_in_a_step_that_an_optimizer_divides_calls_are_compared_part_by_part() -> None:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steps = steps_of(40)
    with BatchNormTracker(model) as tracker:
        for index in range(0, 40, 2):
            for batches in steps[index : index + 2]:
                for x in batches:
                    model(x)
                optimizer.step()
            model(steps[index][1])  # alone
            tracker.step()
        report = tracker.report()["0"]
    assert report.evidence["call_shift"] == pytest.approx(shift_in_float64(steps), rel=0.02)


def test_what_no_running_average_sees_is_the_variance_between_batches() -> None:
    generator = torch.Generator().manual_seed(3)
    places = 0.8 * torch.randn(256, 1, C, generator=generator)
    batches = [2 * torch.randn(32, C, generator=generator) + 2 * place for place in places]
    model = layer()
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
        unseen = tracker.report()["0"].evidence["unseen_error"]
    values = torch.stack(batches).double().numpy()
    between, within = values.reshape(-1, C).var(axis=0, ddof=1), values.var(axis=1, ddof=1).mean(axis=0)
    by_hand = float(np.sqrt(((np.sqrt(between / within) - 1) ** 2).mean()))
    assert by_hand > 0.2
    assert unseen == pytest.approx(by_hand, rel=0.1)
