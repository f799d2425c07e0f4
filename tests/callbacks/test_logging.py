"""What the monitor logs, where and at which step, against every value the layers received; checkpoints and stopping."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.lightning_versions import takes_callbacks_of_the_other
from tests.callbacks.recorded_fits import (
    BATCHES,
    JUDGED,
    LAYER_TAGS,
    LAYERS,
    SUMMARY_TAGS,
    Net,
    OnTrainBatchEnd,
    Recorder,
    Steps,
    body,
    close,
    events,
    hooks_of,
    num_batches,
    optimizer_hooks,
    ours,
    read_csv,
    steps_of,
    train_data,
    trainer_for,
    val_data,
    windows_of,
)

pytestmark = EXPECTED_WARNINGS


# ------------------------------------------------------------------------------------------------------- what is logged


def test_event_file_has_one_point_a_window_of_each_documented_tag_with_exact_values_at_lightnings_own_step(tmp_path):
    recorder, monitor = Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, max_epochs=3, logger=True)
    trainer.fit(Net(), train_data(), val_data())
    scalars = events(tmp_path)
    assert ours(scalars) == SUMMARY_TAGS | LAYER_TAGS
    epoch_end_steps = steps_of(scalars["train_loss"])
    assert epoch_end_steps == steps_of(scalars["val_loss"]) == [5, 11, 17]
    for tag in SUMMARY_TAGS | LAYER_TAGS:
        assert steps_of(scalars[tag]) == epoch_end_steps, tag
    for tag in SUMMARY_TAGS - {JUDGED} | LAYER_TAGS:
        expected = [window[tag] for window in recorder.expected_of(windows_of(BATCHES, 18))]
        assert all(math.isfinite(value) for _, value in scalars[tag])
        assert [value for _, value in scalars[tag]] == close(expected), tag


@pytest.mark.parametrize("per_layer", [True, False])
def test_each_validation_has_a_point_of_the_error_that_the_running_statistics_made_there(tmp_path, per_layer):
    model, monitor = Net(), BatchNormMonitor(per_layer=per_layer)
    trainer = trainer_for(tmp_path, monitor, max_epochs=2, val_check_interval=3, logger=True)
    trainer.fit(model, train_data(), val_data())
    scalars, errors = events(tmp_path), {}
    for name in LAYERS:  # the last validation saw the model as it is now
        inputs, layer = [], model.get_submodule(name)
        with torch.no_grad(), layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0])):
            for x, _ in val_data():
                model.eval()(x)
        x = np.concatenate([np.moveaxis(x.double().numpy(), 1, 0).reshape(layer.num_features, -1) for x in inputs], 1)
        wrong = (x.T - layer.running_mean.numpy()) / np.sqrt(layer.running_var.numpy() + layer.eps)
        right = (x.T - x.mean(axis=1)) / np.sqrt(x.var(axis=1) + layer.eps)
        errors[name] = math.sqrt(np.square(wrong - right).mean())
        assert errors[name] == pytest.approx(monitor.report()[name].evidence["val_error"], rel=1e-3)
    expected = {"bn/val_error_max": max(errors.values())}
    expected |= {f"bn.val_error/{name}": error for name, error in errors.items()} if per_layer else {}
    assert {tag for tag in scalars if tag.startswith(("bn/val_error", "bn.val_error"))} == set(expected)
    for tag, error in expected.items():
        assert steps_of(scalars[tag]) == steps_of(scalars["val_loss"])
        assert scalars[tag][-1][1] == pytest.approx(error, rel=1e-3)  # which counts variance by N
    assert float(trainer.callback_metrics["bn/val_error_max"]) == pytest.approx(max(errors.values()), rel=1e-3)


def test_where_the_calls_of_a_step_differ_the_largest_difference_is_logged_for_each_window(tmp_path):
    class OfTwoKinds(Net):
        def forward(self, x):
            return super().forward(x) + super().forward(3 * x + 5) if self.training else super().forward(x)

    monitor = BatchNormMonitor()
    trainer = trainer_for(tmp_path, monitor, max_epochs=3, logger=True)
    trainer.fit(OfTwoKinds(), train_data(20))
    largest = max(layer.evidence["call_shift"] for layer in monitor.report().values())
    assert largest > 0.5
    points = events(tmp_path)["bn/call_shift_max"]
    assert steps_of(points) == [19, 39, 59]
    assert points[-1][1] == close(largest)
    assert float(trainer.callback_metrics["bn/call_shift_max"]) == close(largest)


def test_log_var_ratio_of_a_layer_is_a_mean_of_magnitudes(tmp_path):
    """Channels of both signs must not cancel."""

    class Opposite(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            var = trainer.model.body.narrow.running_var
            var.copy_(torch.tensor([1e-6, 1e6, 1.0]))

    recorder = Recorder()
    trainer = trainer_for(tmp_path, Opposite(), recorder, BatchNormMonitor(), logger=True)
    trainer.fit(Net(), train_data())
    ((_, value),) = events(tmp_path)["bn.log_var_ratio/body.narrow"]
    assert value == close(recorder.expected((0, BATCHES))["bn.log_var_ratio/body.narrow"])
    assert value > 5


@pytest.mark.parametrize("logger", ["none", "both"])
def test_metrics_reach_every_logger_there_is(tmp_path, logger):
    tensorboard, in_csv = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    loggers = {"none": False, "both": [tensorboard, in_csv]}[logger]
    recorder, monitor, judgements = Recorder(), BatchNormMonitor(), []
    judge = OnTrainBatchEnd(lambda count: judgements.append(len(monitor.report().unhealthy)) if count % 6 == 0 else 0)
    trainer = trainer_for(tmp_path, recorder, monitor, judge, max_epochs=2, logger=loggers)
    trainer.fit(Net(), train_data(), val_data())
    windows = recorder.expected_of(windows_of(6, 12))
    expected = {tag: [(5, close(windows[0][tag])), (11, close(windows[1][tag]))] for tag in windows[0]}
    expected[JUDGED] = list(zip([5, 11], judgements, strict=True))
    if logger == "both":
        scalars = events(tmp_path / "tb")
        assert {tag: scalars[tag] for tag in ours(scalars)} == expected
        rows = read_csv(tmp_path / "csv")
        logged = {tag: [(int(row["step"]), float(row[tag])) for row in rows if row[tag]] for tag in ours(rows[0])}
        assert logged == expected
    else:
        assert not list(tmp_path.iterdir())
    ours_in_callback_metrics = {name: trainer.callback_metrics[name] for name in ours(trainer.callback_metrics)}
    windows[1][JUDGED] = judgements[1]
    assert ours_in_callback_metrics == {tag: close(windows[1][tag]) for tag in SUMMARY_TAGS}


# ----------------------------------------------------------------------- callback_metrics, for checkpoints and stopping


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "options", "validates", "saved"),
    [
        ({}, {"max_epochs": 3}, True, {0: (0, 6), 1: (6, 12), 2: (12, 18)}),
        ({}, {"max_epochs": 3}, False, {0: (0, 6), 1: (6, 12), 2: (12, 18)}),
        ({}, {"max_epochs": 4, "check_val_every_n_epoch": 2}, True, {1: (6, 12), 3: (18, 24)}),
        (
            {"every_n_epochs": 2},
            {"max_epochs": 4, "check_val_every_n_epoch": 2},
            True,
            {1: (0, 12), 3: (12, 24)},
        ),
        ({"every_n_train_batches": 3}, {"max_epochs": 2}, True, {0: (3, 6), 1: (9, 12)}),
        (
            {"every_n_train_batches": 3},
            {"max_epochs": 2, "check_val_every_n_epoch": 2},
            True,
            {1: (9, 12)},
        ),
    ],
)
def test_model_checkpoint_sees_the_window_that_has_just_ended(tmp_path, arguments, options, validates, saved):
    recorder = Recorder()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="bn/eval_error_max", save_top_k=-1, filename="{epoch}")
    trainer = trainer_for(tmp_path, recorder, checkpoint, BatchNormMonitor(**arguments), **options)
    trainer.fit(Net(), train_data(), val_data() if validates else None)
    seen = {Path(path).stem: float(value) for path, value in checkpoint.best_k_models.items()}
    size, total = saved[max(saved)][1] - saved[max(saved)][0], len(recorder.batches)
    expected = dict(zip(windows_of(size, total), recorder.expected_of(windows_of(size, total)), strict=True))
    assert seen == {f"epoch={epoch}": close(expected[window]["bn/eval_error_max"]) for epoch, window in saved.items()}


def test_every_summary_tag_can_be_monitored_by_model_checkpoint_with_its_defaults(tmp_path):
    tags = sorted(SUMMARY_TAGS - {JUDGED})
    recorder, checkpoints = Recorder(), [ModelCheckpoint(dirpath=tmp_path / tag, monitor=tag) for tag in tags]
    trainer = trainer_for(tmp_path, recorder, BatchNormMonitor(), *checkpoints, max_epochs=3)
    trainer.fit(Net(), train_data(), val_data())
    windows = recorder.expected_of(windows_of(6, 18))
    assert [float(checkpoint.best_model_score) for checkpoint in checkpoints] == [
        close(min(window[tag] for window in windows)) for tag in tags
    ]


class Settling(Net):
    """Learns nothing, so that its running statistics come closer to the exact ones with every epoch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = body()
        del network.dropout
        network.wide.momentum = network.narrow.momentum = 0.05
        super().__init__(network)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="module")
def settling_errors(tmp_path_factory):
    """The errors of its first epochs."""
    recorder = Recorder()
    trainer_for(tmp_path_factory.mktemp("settling"), recorder, max_epochs=4).fit(Settling(), train_data())
    errors = [window["bn/eval_error_max"] for window in recorder.expected_of(windows_of(6, 24))]
    assert all(later < 0.95 * earlier for earlier, later in pairwise(errors))
    return errors


@pytest.mark.parametrize(
    ("options", "validates"),
    [
        ({}, True),
        ({}, False),
        ({"check_val_every_n_epoch": 2}, True),
        ({"val_check_interval": 1.0, "limit_val_batches": 1}, True),
    ],
)
def test_early_stopping_stops_in_the_epoch_whose_own_window_crosses_its_threshold(
    tmp_path, options, validates, settling_errors
):
    crossing = 3  # an epoch that is validated also where every other one is
    threshold = (settling_errors[crossing - 1] + settling_errors[crossing]) / 2
    stopping = EarlyStopping(monitor="bn/eval_error_max", stopping_threshold=threshold)
    trainer = trainer_for(tmp_path, stopping, BatchNormMonitor(), max_epochs=6, **options)
    trainer.fit(Settling(), train_data(), val_data() if validates else None)
    assert stopping.stopped_epoch == crossing
    assert trainer.current_epoch == crossing + 1


def test_callback_metrics_have_none_of_our_keys_before_the_first_window_has_ended(tmp_path):
    keys = []
    look = OnTrainBatchEnd(lambda _: keys.append({key for key in ours(trainer.callback_metrics) if "bn" in key}))
    trainer = trainer_for(tmp_path, BatchNormMonitor(every_n_epochs=2), look, max_epochs=3)
    trainer.fit(Net(), train_data(), val_data())
    assert keys == [set()] * 11 + [SUMMARY_TAGS] * 7


# ---------------------------------------------------------------------------------------------- layers that are special


class WithSpecialLayers(Net):
    """Beside the usual two: a layer without running statistics and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stateless = nn.BatchNorm1d(1, track_running_stats=False)
        self.spare = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.body(self.stateless(x))


def test_a_layer_without_running_statistics_and_an_unused_one_are_reported_as_nan_and_enter_no_metric(tmp_path):
    recorder, monitor = Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, max_epochs=2, logger=True)
    trainer.fit(WithSpecialLayers(), train_data(), val_data())
    report = monitor.report()
    assert list(report) == ["stateless", "body.wide", "body.narrow", "spare"]
    for name in ("stateless", "spare"):
        assert all(math.isnan(value) for value in report[name].summary().values()), name
    stateless, spare = report["stateless"], report["spare"]
    assert (stateless.num_batches, spare.num_batches, spare.num_samples) == (6, 0, 0)
    values = recorder.population((6, 12), "stateless")
    np.testing.assert_allclose(stateless.population_mean, values.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert stateless.running_mean.isnan().all()
    assert spare.population_mean.isnan().all()
    scalars = events(tmp_path)
    assert ours(scalars) == SUMMARY_TAGS | LAYER_TAGS
    for tag, value in recorder.expected((6, 12)).items():
        assert scalars[tag][-1] == (11, close(value)), tag


def test_a_model_whose_only_layer_has_no_running_statistics_logs_that_none_is_unhealthy_and_nothing_else(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 1))
    monitor, loggers = BatchNormMonitor(), [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    trainer = trainer_for(tmp_path, monitor, logger=loggers)
    trainer.fit(Net(network), train_data())
    assert num_batches(monitor.report()) == {"body.1": BATCHES}
    scalars = events(tmp_path)
    assert {tag: scalars[tag] for tag in ours(scalars)} == {JUDGED: [(5, 0.0)]}
    rows = read_csv(tmp_path)
    assert {key for row in rows for key, value in row.items() if value} == {"epoch", "step", "train_loss", JUDGED}
    assert set(trainer.callback_metrics) == {"train_loss", JUDGED}
    assert trainer.callback_metrics[JUDGED] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("buffer", "poison"), [("running_mean", math.nan), ("running_var", math.inf)])
def test_a_running_statistic_that_is_not_finite_makes_the_largest_eval_error_infinite(tmp_path, buffer, poison):
    class Poisoned(Net):
        def on_train_start(self):
            getattr(self.body.wide, buffer)[0] = poison

    recorder, monitor = Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, logger=True)
    trainer.fit(Poisoned(), train_data())
    scalars = events(tmp_path)
    assert scalars["bn/eval_error_max"] == [(5, math.inf)]
    assert scalars["bn.eval_error/body.wide"] == [(5, math.inf)]
    assert math.isinf(trainer.callback_metrics["bn/eval_error_max"])
    causes = {name: layer.diagnosis.cause for name, layer in monitor.report().items()}
    assert causes == {"body.wide": "non-finite", "body.narrow": "warming-up"}
    assert trainer.callback_metrics[JUDGED] == 2
    untouched = recorder.layer_values((0, BATCHES), "body.narrow")
    assert scalars["bn.eval_error/body.narrow"] == [(5, close(untouched["eval_error"]))]
    assert all(math.isfinite(scalars[f"bn.{name}/body.wide"][0][1]) for name in ("act_rmse", "mean_shift"))


# ---------------------------------------------------------------------------------------------------- the other package


@takes_callbacks_of_the_other
def test_it_works_in_a_trainer_of_pytorch_lightning(tmp_path):
    class OtherNet(Steps, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = body()

    class OtherRecorder(Recorder, pytorch_lightning.Callback):
        pass

    model, recorder, monitor = OtherNet(), OtherRecorder(), BatchNormMonitor()
    before = hooks_of(model), optimizer_hooks()
    trainer = trainer_for(
        tmp_path, recorder, monitor, trainer_class=pytorch_lightning.Trainer, max_epochs=2, logger=True
    )
    trainer.fit(model, train_data(), val_data())
    scalars = events(tmp_path)
    windows = recorder.expected_of(windows_of(6, 12))
    assert {tag: scalars[tag] for tag in ours(scalars) - {JUDGED}} == {
        tag: [(5, close(windows[0][tag])), (11, close(windows[1][tag]))] for tag in windows[0]
    }
    assert steps_of(scalars[JUDGED]) == [5, 11]
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, BATCHES)
    assert float(trainer.callback_metrics["bn/eval_error_max"]) == close(windows[1]["bn/eval_error_max"])
    assert (hooks_of(model), optimizer_hooks()) == before
