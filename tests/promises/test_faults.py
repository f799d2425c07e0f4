"""Runs that break: errors come out unchanged, nothing stays attached, and what was seen is reported."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from lightning.pytorch import Callback

import lightning_bnmonitor
from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT
from tests.promises.faulty_runs import (
    BATCHES,
    MARKS,
    BoomError,
    Net,
    assert_population,
    assert_usable,
    data,
    failing_callback,
    feed,
    hooks_of,
    layer_of,
    optimizer_hooks,
    raising_once,
    single,
    trainer_for,
)

pytestmark = MARKS


PLACES = ["before the first layer", "between two layers", "after the last layer", "backward", "optimizer step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "batch", "window"),
    [*((place, 4, (0, 5)) for place in PLACES), ("between two layers", BATCHES + 3, (0, BATCHES))],
)
def test_an_exception_comes_out_unchanged_and_the_report_tells_of_what_was_seen(tmp_path, place, batch, window):
    error, monitor = BoomError("broken"), BatchNormMonitor()
    model = Net(place, batch, error)
    before = hooks_of(model), optimizer_hooks()
    with pytest.raises(BoomError) as raised:
        trainer_for(tmp_path, monitor).fit(model, data(), data(1))
    assert raised.value is error
    assert raised.value.__context__ is None
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(monitor.report(), *window)
    assert_usable(tmp_path, model, monitor)


def test_what_was_seen_of_a_later_window_is_in_the_state_of_a_run_that_broke(tmp_path):
    monitor, model = BatchNormMonitor(), Net("between two layers", BATCHES + 3, BoomError())
    with pytest.raises(BoomError):
        trainer_for(tmp_path, monitor).fit(model, data())
    restored = BatchNormTracker(model)
    restored.load_state_dict(monitor.state_dict()["tracker"])
    with restored:
        model.assert_reported(restored.report(), BATCHES, len(model.seen))


def test_the_error_of_batch_norm_at_one_value_per_channel_comes_through_unchanged(tmp_path):
    def error_of(*callbacks):
        model = Net("one value per channel", 4)
        with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
            trainer_for(tmp_path, *callbacks).fit(model, data())
        return str(raised.value), type(raised.value), model

    monitor = BatchNormMonitor()
    *without, _ = error_of()
    *monitored, model = error_of(monitor)
    assert monitored == without
    model.assert_reported(monitor.report(), 0, 5)  # "a" has seen the fifth, "b" has not
    assert monitor.report()["a"].num_batches == monitor.report()["b"].num_batches + 1
    assert_usable(tmp_path, model, monitor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "window", "order"),
    [
        *(("on_train_epoch_start", (0, 6), order) for order in ("first", "last")),
        *(("on_train_batch_start", (0, 6), order) for order in ("first", "last")),
        ("on_before_zero_grad", (0, 6), "first"),  # where the monitor has no hook, the order is of no importance
        ("on_before_backward", (0, 6), "first"),
        ("on_after_backward", (0, 6), "first"),
        ("on_before_optimizer_step", (0, 6), "first"),
        *(("on_train_batch_end", (0, 6), order) for order in ("first", "last")),
        *(("on_validation_start", (6, 12), order) for order in ("first", "last")),
        ("on_validation_batch_end", (6, 12), "first"),
        ("on_validation_end", (6, 12), "first"),
        *(("on_train_epoch_end", (6, 12), order) for order in ("first", "last")),
    ],
)
def test_an_exception_in_another_callback_loses_nothing(tmp_path, hook, window, order):
    error, monitor, model = BoomError("broken"), BatchNormMonitor(), Net()
    before = hooks_of(model), optimizer_hooks()
    callbacks = [failing_callback(hook, error, epoch=1), monitor]
    with pytest.raises(BoomError) as raised:
        trainer_for(tmp_path, *callbacks[:: 1 if order == "first" else -1]).fit(model, data(), data(1))
    assert raised.value is error
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(monitor.report(), *window)
    assert_usable(tmp_path, model, monitor)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_end", "on_fit_end", "teardown"])
def test_an_exception_in_another_callback_when_a_fit_begins_or_ends_leaves_no_hook(tmp_path, hook, order):
    def fail(self, *args, **kwargs):
        raise error

    error, monitor, model = BoomError("broken"), BatchNormMonitor(), Net()
    before = hooks_of(model), optimizer_hooks()
    callbacks = [type("Fails", (Callback,), {hook: fail})(), monitor]
    with pytest.raises(BoomError) as raised:
        trainer_for(tmp_path, *callbacks[:: 1 if order == "first" else -1]).fit(model, data())
    assert raised.value is error
    assert (hooks_of(model), optimizer_hooks()) == before
    if model.seen:
        model.assert_reported(monitor.report(), BATCHES, 2 * BATCHES)
    assert_usable(tmp_path, model, monitor)


@pytest.mark.filterwarnings("ignore:Found .* module")
def test_a_fit_of_a_model_that_an_exception_in_validation_left_in_eval_mode_says_so(tmp_path):
    model, monitor = Net(), BatchNormMonitor()
    with pytest.raises(BoomError):
        trainer_for(tmp_path, failing_callback("on_validation_start", BoomError(), 1)).fit(model, data(), data(1))
    assert not model.training
    trainer_for(tmp_path, monitor, max_epochs=1).fit(model, data(), data(1))
    assert not model.training  # as it was found: Lightning trains in that mode, where nothing counts
    for layer in monitor.report().values():
        assert layer.verdict == "trained-in-eval"
        assert layer.needs_attention
        assert "model.train()" in layer.remedy


def test_where_lightning_does_not_tell_of_an_exception_the_next_fit_still_counts_once(tmp_path):
    """A callback that raises in ``on_exception`` keeps those after it from hearing of anything."""

    class Fails(Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise BoomError

    monitor, model = BatchNormMonitor(), Net("backward", 4, ZeroDivisionError())
    before = hooks_of(model), optimizer_hooks()
    with pytest.raises(BoomError):
        trainer_for(tmp_path, Fails(), monitor).fit(model, data())
    model.assert_reported(monitor.report(), 0, 5)
    model.place, first = None, len(model.seen)
    trainer_for(tmp_path, monitor, max_epochs=1).fit(model, data())
    model.assert_reported(monitor.report(), first, first + BATCHES)
    assert (hooks_of(model), optimizer_hooks()) == before


def test_after_a_keyboard_interrupt_the_state_has_all_that_was_seen(tmp_path):
    monitor, model = BatchNormMonitor(), Net("between two layers", 4, KeyboardInterrupt())
    before = hooks_of(model), optimizer_hooks()
    with pytest.raises(SystemExit):
        trainer_for(tmp_path, monitor).fit(model, data())
    assert (hooks_of(model), optimizer_hooks()) == before
    model.assert_reported(monitor.report(), 0, 5)
    resumed = BatchNormTracker(model)
    resumed.load_state_dict(monitor.state_dict()["tracker"])
    with resumed:
        model.assert_reported(resumed.report(), 0, 5)
    assert_usable(tmp_path, model, monitor)


def test_a_keyboard_interrupt_while_calls_are_merged_loses_and_doubles_nothing(monkeypatch):
    window = lightning_bnmonitor.statistics.window
    raising_once(window.merge_moments, KeyboardInterrupt(), monkeypatch, window)
    model, batches = single(), []
    with contextlib.suppress(KeyboardInterrupt), BatchNormTracker(model) as tracker:
        while True:
            batches += feed(model, 1)
            assert len(batches) < 3 * STASH_LIMIT
    layer = layer_of(tracker)
    calls = layer.num_samples // 8  # with or without the call that was interrupted
    assert len(batches) <= calls <= len(batches) + 1
    if calls == len(batches):
        assert_population(layer, batches)


def test_a_pass_that_runs_out_of_memory_does_not_end_the_run(monkeypatch):
    hooks = lightning_bnmonitor.capture.layer_hook
    raising_once(hooks.pass_moments, torch.OutOfMemoryError("out of memory"), monkeypatch, hooks)
    model = single()
    with warnings.catch_warnings(), BatchNormTracker(model, capture="pass") as tracker:
        warnings.simplefilter("ignore")
        _, *batches = feed(model, 6)
        layer = layer_of(tracker)
    assert_population(layer, batches)
    assert layer.evidence["calls_skipped"] == 1
