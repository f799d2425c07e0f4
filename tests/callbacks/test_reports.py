"""What `report()` tells during a fit, after it, in a second fit and in copies of the monitor."""

import copy
import pickle

import pytest
from lightning.pytorch import Callback
from torch import nn

from lightning_bnmonitor import BatchNormMonitor, Report
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import (
    LAYERS,
    Net,
    OnTrainBatchEnd,
    Recorder,
    close,
    events,
    hooks_of,
    num_batches,
    optimizer_hooks,
    ours,
    train_data,
    trainer_for,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


def test_the_report_before_fit_is_empty():
    report = BatchNormMonitor().report()
    assert isinstance(report, Report)
    assert len(report) == 0


def test_the_report_tells_of_the_window_so_far_until_the_first_has_ended_and_then_of_the_last_finished(tmp_path):
    recorder, monitor, reports = Recorder(), BatchNormMonitor(), []
    look = OnTrainBatchEnd(lambda _: reports.append(monitor.report()))
    trainer_for(tmp_path, recorder, monitor, look, max_epochs=3).fit(Net(), train_data(), val_data())

    told_of = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), *[(0, 6)] * 6, *[(6, 12)] * 6, (12, 18)]
    assert len(reports) == len(told_of)
    for report, window in zip([*reports, monitor.report()], [*told_of, (12, 18)], strict=True):
        assert num_batches(report) == dict.fromkeys(LAYERS, window[1] - window[0])
        for name in LAYERS:
            expected = recorder.layer_values(window, name)
            assert report[name].summary() == {metric: close(value) for metric, value in expected.items()}


@pytest.mark.slow
def test_asking_for_reports_in_mid_window_changes_nothing_that_is_logged(tmp_path):
    def logged(name, *callbacks):
        monitor = BatchNormMonitor()
        look = [OnTrainBatchEnd(lambda _: monitor.report())] if callbacks else []
        trainer_for(tmp_path / name, monitor, *look, max_epochs=2, logger=True).fit(Net(), train_data())
        scalars = events(tmp_path / name)
        return {tag: scalars[tag] for tag in ours(scalars)}

    asked, unasked = logged("asked", True), logged("unasked")
    assert asked == {tag: [(step, close(value)) for step, value in points] for tag, points in unasked.items()}


def test_the_report_is_printed_once_at_the_end_of_fit_with_the_name_of_each_layer(tmp_path, capsys):
    monitor = BatchNormMonitor()
    trainer_for(tmp_path, monitor, max_epochs=2).fit(Net(), train_data(), val_data())
    printed = capsys.readouterr().out
    assert printed.count(str(monitor.report())) == 1
    rows = [line.split()[0] for line in printed.splitlines() if line.startswith(LAYERS) and "  " in line]
    assert sorted(rows) == sorted(LAYERS)


def test_a_second_fit_starts_with_fresh_statistics_and_single_hooks(tmp_path):
    model, monitor, during = Net(), BatchNormMonitor(), []
    before = hooks_of(model), optimizer_hooks()
    trainer_for(tmp_path, monitor, max_epochs=2).fit(model, train_data(), val_data())
    assert (hooks_of(model), optimizer_hooks()) == before

    recorder = Recorder()
    look = OnTrainBatchEnd(lambda _: during.append(num_batches(monitor.report())))
    trainer_for(tmp_path, recorder, monitor, look, max_epochs=2).fit(model, train_data(4), val_data())
    assert during == [dict.fromkeys(LAYERS, count) for count in (1, 2, 3, 4, 4, 4, 4, 4)]
    for name in LAYERS:
        expected = recorder.layer_values((4, 8), name)
        assert monitor.report()[name].summary() == {metric: close(value) for metric, value in expected.items()}
    assert (hooks_of(model), optimizer_hooks()) == before


def test_the_same_trainer_can_fit_on_and_counts_each_batch_once(tmp_path):
    model, recorder, monitor = Net(), Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, max_epochs=2, logger=True)
    trainer.fit(model, train_data(), val_data())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, train_data(), val_data())
    assert len(recorder.batches) == 18
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 6)
    assert float(trainer.callback_metrics["bn/eval_error_max"]) == close(
        recorder.expected((12, 18))["bn/eval_error_max"]  # of a `fit` of its own: nothing of the first is known
    )


def test_a_second_fit_that_fails_to_start_does_not_report_the_model_of_the_first(tmp_path):
    monitor = BatchNormMonitor(include="body.*")
    trainer_for(tmp_path, monitor).fit(Net(), train_data())
    other = Net()
    other.tail, other.body = other.body, nn.Identity()  # BatchNorm layers, but of other names
    with pytest.raises(ValueError, match="matches no BatchNorm layer"):
        trainer_for(tmp_path, monitor).fit(other, train_data())
    assert len(monitor.report()) == 0


def test_a_copy_of_the_monitor_made_while_it_runs_can_be_used_for_another_fit(tmp_path):
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                copies.extend([copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))])

    monitor = BatchNormMonitor(every_n_train_batches=2)
    trainer_for(tmp_path, monitor, Copy()).fit(Net(), train_data())
    assert monitor.report()["body.wide"].num_batches == 2
    for copied in copies:
        assert copied.report()["body.wide"].num_batches == 2
        trainer_for(tmp_path, copied).fit(Net(), train_data(5))
        assert copied.report()["body.wide"].num_batches == 1


def test_the_monitor_can_be_pickled_after_a_fit_and_after_an_interrupted_one(tmp_path):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("on purpose")

    monitor = BatchNormMonitor()
    trainer_for(tmp_path, monitor).fit(Net(), train_data())
    assert pickle.loads(pickle.dumps(monitor)).report()["body.wide"].num_batches == 6
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer_for(tmp_path, monitor, Failing()).fit(Net(), train_data())
    assert len(pickle.loads(pickle.dumps(monitor)).report()) == 0
