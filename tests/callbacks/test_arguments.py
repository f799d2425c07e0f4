"""The monitor's arguments: what each chooses, and what is refused with which words."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks import event_files
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import (
    BATCHES,
    JUDGED,
    LAYER_TAGS,
    PER_LAYER,
    SUMMARY,
    SUMMARY_TAGS,
    Net,
    Recorder,
    close,
    events,
    hooks_of,
    optimizer_hooks,
    ours,
    train_data,
    trainer_for,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_layers", "per_layer", "logged"),
    [(100, "auto", True), (101, "auto", False), (101, True, True), (2, False, False)],
)
def test_per_layer_auto_logs_and_charts_up_to_a_hundred_layers_and_true_and_false_override_it(
    tmp_path, num_layers, per_layer, logged
):
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 1), *[nn.BatchNorm1d(1) for _ in range(num_layers)])
    trainer = trainer_for(tmp_path, BatchNormMonitor(per_layer=per_layer), logger=True)
    trainer.fit(Net(network), train_data(1))
    names = [f"body.{index + 2}" for index in range(num_layers)] if logged else []
    assert ours(events(tmp_path)) == SUMMARY_TAGS | {f"bn.{metric}/{name}" for metric in PER_LAYER for name in names}
    dashboard = event_files.events(trainer.log_dir)
    assert dashboard.categories() == ["BatchNorm health", *["BatchNorm layers"] * logged]
    assert dashboard.at("bn/heatmap") == [0]
    assert SUMMARY_TAGS.issubset(trainer.callback_metrics)


def test_log_key_prefix_begins_every_name(tmp_path):
    trainer = trainer_for(tmp_path, BatchNormMonitor(log_key_prefix="norms"), logger=True)
    trainer.fit(Net(), train_data())
    renamed = {"norms" + tag.removeprefix("bn") for tag in SUMMARY_TAGS | LAYER_TAGS}
    assert ours(events(tmp_path)) == renamed
    assert set(trainer.callback_metrics) == {"train_loss", *(f"norms/{name}" for name in SUMMARY)}


@pytest.mark.parametrize(
    ("arguments", "monitored"),
    [
        ({"include": "body.w*"}, ["body.wide"]),
        ({"include": ["*narrow", "*wide"]}, ["body.wide", "body.narrow"]),
        ({"exclude": ["body.narrow"]}, ["body.wide"]),
        ({"include": "body.*", "exclude": ["*.narrow"]}, ["body.wide"]),
    ],
)
def test_include_and_exclude_choose_layers_by_pattern(tmp_path, arguments, monitored):
    recorder, monitor = Recorder(), BatchNormMonitor(dashboard=False, **arguments)
    trainer_for(tmp_path, recorder, monitor, logger=True).fit(Net(), train_data())
    assert list(monitor.report()) == monitored
    expected = recorder.expected((0, BATCHES), layers=monitored)
    scalars = events(tmp_path)
    assert {tag: scalars[tag] for tag in ours(scalars) - {JUDGED}} == {
        tag: [(5, close(value))] for tag, value in expected.items()
    }
    assert JUDGED in scalars


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
@pytest.mark.parametrize("argument", ["every_n_epochs", "every_n_train_batches"])
def test_a_period_that_is_no_positive_integer_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be a positive integer.*got {value}"):
        BatchNormMonitor(**{argument: value})


def test_two_periods_at_once_are_refused():
    with pytest.raises(ValueError, match=r"`every_n_epochs` and `every_n_train_batches` exclude.* 2 and 3.*None"):
        BatchNormMonitor(every_n_epochs=2, every_n_train_batches=3)


def test_an_unknown_capture_is_refused():
    with pytest.raises(ValueError, match=r"`capture` must be .*'auto', 'pass'.* got 'fast'"):
        BatchNormMonitor(capture="fast")


@pytest.mark.parametrize("value", ["yes", None, 0, 1, 2])
def test_a_per_layer_that_is_neither_a_bool_nor_auto_is_refused(value):
    with pytest.raises(ValueError, match=f'`per_layer` must be True, False or "auto", got {value!r}'):
        BatchNormMonitor(per_layer=value)


@pytest.mark.parametrize("value", [3, [3], ["body.*", None], b"body"])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns_that_are_no_strings_are_refused(argument, value):
    with pytest.raises(TypeError) as refusal:
        BatchNormMonitor(**{argument: value})
    message = str(refusal.value)
    assert f"`{argument}`" in message
    assert repr(value) in message
    assert "None" in message


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_no_layer_is_refused_when_fit_starts_and_leaves_no_hook(tmp_path, argument):
    model = Net()
    before = hooks_of(model), optimizer_hooks()
    monitor = BatchNormMonitor(**{argument: ["body.*", "encoder.*"]})
    with pytest.raises(ValueError, match=rf"`{argument}` pattern 'encoder\.\*' .*body\.wide, body\.narrow"):
        trainer_for(tmp_path, monitor).fit(model, train_data())
    assert (hooks_of(model), optimizer_hooks()) == before


def test_a_model_without_batch_norm_trains_on_with_one_warning_that_names_its_norm_layers(tmp_path, capsys):
    network = nn.Sequential(nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    monitor = BatchNormMonitor()
    trainer = trainer_for(tmp_path, monitor, max_epochs=2, logger=True)
    with pytest.warns(UserWarning, match="No BatchNorm layer") as caught:
        trainer.fit(Net(network), train_data(), val_data())
    (warning,) = [str(warning.message) for warning in caught if "BatchNorm" in str(warning.message)]
    assert "2 LayerNorm" in warning
    assert trainer.global_step == 12
    assert ours(events(tmp_path)) == set()
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss"}
    assert len(monitor.report()) == 0
    assert "No BatchNorm layer" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["error", "", None, True, 3])
def test_a_reaction_that_is_unknown_is_refused(value):
    with pytest.raises(ValueError, match=rf"`on_unhealthy` must be .*'warn', 'ignore', 'raise'.* got {value!r}"):
        BatchNormMonitor(on_unhealthy=value)


def test_a_strategy_that_nobody_has_shown_to_work_is_refused(tmp_path):
    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    trainer = trainer_for(tmp_path, BatchNormMonitor(), strategy=DeepSpeedStrategy(torch.device("cpu")))
    with pytest.raises(ValueError, match="BatchNormMonitor does not support DeepSpeed"):
        trainer.fit(Net(), train_data())


@pytest.mark.parametrize("prefix", ["", 3])
def test_a_prefix_that_is_no_name_is_refused(prefix):
    with pytest.raises(ValueError, match=f"`log_key_prefix` must be a string that is not empty, got {prefix!r}"):
        BatchNormMonitor(log_key_prefix=prefix)


@pytest.mark.parametrize("value", ["yes", 1, 0, None])
def test_a_dashboard_that_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(ValueError, match=rf"`dashboard` must be True or False, got {value!r}\."):
        BatchNormMonitor(dashboard=value)
