"""When layers need attention: counted, warned of once, or raised."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback
from torch import nn

from lightning_bnmonitor import BatchNormMonitor, UnhealthyBatchNormError
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import (
    JUDGED,
    LAYERS,
    SUMMARY_TAGS,
    Net,
    Recorder,
    body,
    events,
    hooks_of,
    num_batches,
    optimizer_hooks,
    steps_of,
    train_data,
    trainer_for,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


class AtRest(Net):
    """Learns nothing. One layer is healthy from the first epoch of 20 batches on, the other noisy."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = body()
        del network.dropout
        network.wide.momentum, network.narrow.momentum = 0.2, 0.9
        super().__init__(network)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class OnTrainEpochStart(Callback):
    """Does something at the beginning of some epochs."""

    def __init__(self, actions) -> None:
        self.actions = actions

    def on_train_epoch_start(self, trainer, pl_module):
        self.actions.get(trainer.current_epoch, lambda _: None)(pl_module.body)


def poison(layer):
    return lambda network: network.get_submodule(layer).running_mean.fill_(math.nan)


def warned(run) -> list[str]:
    """The warnings about layers that something gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "BatchNorm" in str(warning.message)]


class SideBySide(nn.Module):
    """A noisy layer, or several of them."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(6, momentum=0.9) for _ in range(num_layers))
        self.out = nn.Linear(6, 1)

    def forward(self, x):
        return self.out(sum(layer(x.flatten(1)) for layer in self.layers))


def fit(tmp_path, monitor, *callbacks, model=None, num_batches=20, **options):
    trainer = trainer_for(tmp_path, *callbacks, monitor, **options)
    trainer.fit(AtRest() if model is None else model, train_data(num_batches), train_data(num_batches))
    return trainer


def settled(num_batches=20) -> AtRest:
    """A model whose running statistics are right."""
    model = AtRest()
    torch.optim.swa_utils.update_bn(train_data(num_batches), model)
    return model


@pytest.mark.slow
def test_the_number_of_layers_that_need_attention_is_logged_for_each_window(tmp_path):
    spoil = OnTrainEpochStart({1: poison("narrow"), 2: poison("wide")})
    trainer = fit(tmp_path, BatchNormMonitor(), spoil, max_epochs=4, logger=True)
    assert events(tmp_path)[JUDGED] == [(19, 1.0), (39, 1.0), (59, 2.0), (79, 2.0)]
    assert trainer.callback_metrics[JUDGED] == 2


@pytest.mark.slow
def test_each_layer_and_verdict_is_warned_of_once_in_a_fit(tmp_path):
    spoil = OnTrainEpochStart({2: poison("narrow"), 4: poison("wide")})
    monitor, by_epoch = BatchNormMonitor(), []

    class Count(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            by_epoch.append(monitor.report().summary().get("unhealthy_layers"))

    messages = warned(lambda: fit(tmp_path, monitor, spoil, Count(), max_epochs=6))
    assert by_epoch == [0, 1, 1, 1, 1, 2]  # at the end of the epochs before
    assert [
        [f" {layer} ({verdict}, eval_error " in message for layer in LAYERS for verdict in ("noisy", "non-finite")]
        for message in messages
    ] == [[False, False, True, False], [False, False, False, True], [False, True, False, False]]

    again = warned(lambda: fit(tmp_path, monitor, max_epochs=2))
    assert again == messages[:1]


def test_a_warning_comes_at_the_end_of_the_window(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(len(caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        trainer = trainer_for(tmp_path, BatchNormMonitor(every_n_train_batches=10), Look())
        trainer.fit(AtRest(), train_data(20))
    assert seen == [seen[0]] * 9 + [seen[0] + 1] * 11


def test_many_layers_are_warned_of_in_one_line_the_first_five_by_name(tmp_path):
    monitor = BatchNormMonitor()
    (message,) = warned(lambda: fit(tmp_path, monitor, model=Net(SideBySide(12)), num_batches=12))
    unhealthy = monitor.report().unhealthy
    assert len(unhealthy) == 12
    told = [f" {layer.name} ({layer.verdict}, eval_error " in message for layer in unhealthy]
    assert told == [True] * 5 + [False] * 7
    assert " and 7 more. " in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("window", ["healthy", "too short to tell"])
def test_where_no_layer_needs_attention_there_is_no_warning_and_nothing_is_raised(tmp_path, window):
    num_batches, max_epochs, verdict = (20, 2, "healthy") if window == "healthy" else (6, 1, "insufficient-data")
    model, monitor = settled(num_batches), BatchNormMonitor(on_unhealthy="warn")
    model.body.narrow.momentum = 0.05
    raises = BatchNormMonitor(on_unhealthy="raise", log_key_prefix="raises")
    assert (
        warned(lambda: fit(tmp_path, monitor, raises, model=model, num_batches=num_batches, max_epochs=max_epochs))
        == []
    )
    for report in (monitor.report(), raises.report()):
        assert [layer.verdict for layer in report.values()] == [verdict] * 2


def test_to_ignore_is_silent_and_still_counts(tmp_path):
    monitor = BatchNormMonitor(on_unhealthy="ignore")
    assert warned(lambda: fit(tmp_path, monitor, max_epochs=2, logger=True)) == []
    assert events(tmp_path)[JUDGED] == [(19, 1.0), (39, 1.0)]
    assert [layer.name for layer in monitor.report().unhealthy] == ["body.narrow"]


def test_what_only_validation_shows_is_warned_of_when_it_ends(tmp_path):
    model, seen = settled(), []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append("epoch ends")

        def on_validation_start(self, trainer, pl_module):
            seen.append([str(warning.message) for warning in caught if "BatchNorm" in str(warning.message)])

        on_validation_end = on_validation_start

    model.body.narrow.momentum = 0.05
    monitor = BatchNormMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_for(tmp_path, monitor, Look(), max_epochs=2).fit(model, train_data(20), val_data())
    before, (message,), *_ = seen
    assert before == []
    assert [f" {name} (domain-shift, val_error " in message for name in LAYERS] == [True, True]
    assert seen == [[], [message], "epoch ends", [message], [message], "epoch ends"]  # of each layer and cause once
    assert [layer.diagnosis.cause for layer in monitor.report().values()] == ["domain-shift"] * 2


def test_what_only_validation_shows_is_counted_when_it_ends(tmp_path):
    model = settled()
    model.body.narrow.momentum = 0.05
    trainer = trainer_for(tmp_path, BatchNormMonitor(on_unhealthy="ignore"), logger=True)
    trainer.fit(model, train_data(20), val_data())
    assert events(tmp_path)[JUDGED] == [(19, 0.0), (19, 2.0)]
    assert trainer.callback_metrics[JUDGED] == 2


def test_what_is_seen_in_mid_window_raises_no_alarm(tmp_path):
    monitor, seen = BatchNormMonitor(), []

    class Look(Callback):
        def on_validation_end(self, trainer, pl_module):
            messages = [str(warning.message) for warning in caught]
            seen.append(sum("layers need attention" in message for message in messages))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_for(tmp_path, monitor, Look(), val_check_interval=5)
        trainer.fit(AtRest(), train_data(20), val_data())
    assert seen == [0, 0, 0, 2]  # when the window has ended, and what its validation adds


def test_what_only_validation_shows_is_raised_when_it_ends(tmp_path):
    model, monitor = settled(), BatchNormMonitor(on_unhealthy="raise")
    model.body.narrow.momentum = 0.05
    with pytest.raises(UnhealthyBatchNormError, match="2 domain-shift") as raised:
        trainer_for(tmp_path, monitor, max_epochs=3).fit(model, train_data(20), val_data())
    assert raised.value.report is monitor.report()
    assert [layer.verdict for layer in monitor.report().values()] == ["healthy"] * 2
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 20)
    assert hooks_of(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "epoch", "num_batches", "steps"),
    [
        ({}, 0, 20, [19]),
        ({}, 2, 60, [19, 39, 59]),
        ({"every_n_epochs": 2}, 0, 40, [39]),
        ({"every_n_train_batches": 9}, 0, 9, [8]),
        ({"every_n_train_batches": 30}, 2, 60, [29, 59]),
    ],
)
def test_to_raise_ends_the_fit_after_the_window_is_logged_and_leaves_nothing_on_the_model(
    tmp_path, arguments, epoch, num_batches, steps
):
    model, recorder, monitor = AtRest(), Recorder(), BatchNormMonitor(on_unhealthy="raise", **arguments)
    model.body.narrow.momentum, model.body.narrow.eps = 0.05, 1.0  # so that its sampling noise is small
    validations = []

    class Look(Callback):
        def on_validation_start(self, trainer, pl_module):
            validations.append(trainer.current_epoch)

    before = hooks_of(model), optimizer_hooks()
    spoil = OnTrainEpochStart({epoch: poison("wide")})
    trainer = trainer_for(tmp_path, recorder, spoil, Look(), monitor, max_epochs=4, logger=True)
    with pytest.raises(UnhealthyBatchNormError) as raised:
        trainer.fit(model, train_data(20), train_data(20))
    recorder.teardown(None, None, "fit")
    assert (hooks_of(model), optimizer_hooks()) == before
    assert len(recorder.batches) == num_batches
    assert validations == list(range((num_batches - 1) // 20))  # it was not validated after

    report = raised.value.report
    assert report is monitor.report()
    assert report["body.wide"].verdict == "non-finite"
    assert report["body.wide"].num_batches == num_batches - (steps[-2] + 1 if len(steps) > 1 else 0)
    assert str(raised.value) == report.brief()
    assert "body.wide: non-finite" in str(raised.value)

    scalars = events(tmp_path)
    assert {tag: steps_of(scalars[tag]) for tag in SUMMARY_TAGS} == dict.fromkeys(SUMMARY_TAGS, steps)
    assert [value > 0 for _, value in scalars[JUDGED]] == [False] * (len(steps) - 1) + [True]
    assert trainer.callback_metrics[JUDGED] == len(report.unhealthy)
    assert math.isinf(trainer.callback_metrics["bn/eval_error_max"])


def test_the_monitor_that_raised_can_be_used_for_another_fit(tmp_path):
    monitor = BatchNormMonitor(on_unhealthy="raise")
    with pytest.raises(UnhealthyBatchNormError):
        fit(tmp_path, monitor)
    model = settled(6)
    fit(tmp_path, monitor, model=model, num_batches=6)
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 6)
    assert hooks_of(model) == 0


def test_what_is_raised_can_be_sent_between_processes(tmp_path):
    with pytest.raises(UnhealthyBatchNormError) as raised:
        fit(tmp_path, BatchNormMonitor(on_unhealthy="raise"), OnTrainEpochStart({0: poison("wide")}))
    for same in (pickle.loads(pickle.dumps(raised.value)), copy.deepcopy(raised.value), copy.copy(raised.value)):
        assert type(same) is UnhealthyBatchNormError
        assert isinstance(same, RuntimeError)
        assert str(same) == str(raised.value)
        assert same.report.to_dict() == raised.value.report.to_dict()


@pytest.mark.slow
def test_the_summary_at_the_end_of_fit_is_short_for_a_deep_network(tmp_path, capsys):
    monitor = BatchNormMonitor()
    trainer_for(tmp_path, monitor, max_epochs=2).fit(Net(SideBySide(150)), train_data(10))
    printed = capsys.readouterr().out
    report = monitor.report()
    assert report.brief() in printed
    assert printed.count("running statistics in the last window") == 1
    assert "150 of 150 BatchNorm layers need attention: 150 noisy." in printed
    rows = [line for line in printed.splitlines() if line.startswith("body.layers.") and "noisy  " in line]
    assert [row.split()[0] for row in rows] == [layer.name for layer in report.worst(10)]
    assert len(printed.strip().splitlines()) <= 35
    assert len(str(report).splitlines()) > 150
