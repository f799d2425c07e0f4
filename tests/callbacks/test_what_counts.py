"""What counts for a window and what does not: sanity check, validation, frozen layers, calls before training."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import (
    BATCH_SIZE,
    BATCHES,
    LAYERS,
    SUMMARY_TAGS,
    Net,
    Recorder,
    close,
    events,
    hooks_of,
    num_batches,
    ours,
    train_data,
    trainer_for,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


# -------------------------------------------------------------------------------------------------- what must not count


def test_the_sanity_check_counts_nothing(tmp_path):
    counts = []

    class Looks(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            counts.append(num_batches(monitor.report()))

        def on_train_start(self, trainer, pl_module):
            counts.append(num_batches(monitor.report()))

    monitor = BatchNormMonitor()
    trainer_for(tmp_path, monitor, Looks(), num_sanity_val_steps=2).fit(Net(), train_data(), val_data())
    assert counts == [dict.fromkeys(LAYERS, 0)] * 2


def test_validation_counts_nothing(tmp_path):
    counts = []

    class Looks(Callback):
        def on_validation_start(self, trainer, pl_module):
            counts.append((num_batches(monitor.report()), {n: r.num_samples for n, r in monitor.report().items()}))

        on_validation_end = on_validation_start

    monitor = BatchNormMonitor(every_n_epochs=2)
    trainer = trainer_for(tmp_path, monitor, Looks(), val_check_interval=2)
    trainer.fit(Net(), train_data(), val_data())
    per_batch = {"body.wide": BATCH_SIZE * 4, "body.narrow": BATCH_SIZE}
    expected = [
        (dict.fromkeys(LAYERS, count), {name: count * n for name, n in per_batch.items()}) for count in (2, 4, 6)
    ]
    assert counts[::2] == expected  # before each validation
    assert counts[1::2] == expected  # and after it


def test_evaluation_outside_of_fit_leaves_the_report_of_a_fit_and_no_hook_on_the_model(tmp_path):
    model, monitor, hooks = Net(), BatchNormMonitor(), []

    class Looks(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            hooks.append(hooks_of(pl_module))

        on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    trainer = trainer_for(tmp_path, monitor, Looks())
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        evaluate(model, val_data())
        assert len(monitor.report()) == 0
        assert hooks_of(model) == 0
    trainer.fit(model, train_data())
    before = monitor.report().to_dict()
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        evaluate(model, val_data())
        assert monitor.report().to_dict() == before
        assert hooks_of(model) == 0
    each = len(LAYERS) + 1  # and one before the model
    assert hooks == [each] * 6 + [0] * 3 + [each] * 6 + [0] * 3  # none to predict


def test_a_frozen_layer_inside_a_training_model_is_counted_and_its_inputs_are_the_population(tmp_path):
    class Frozen(Net):
        def on_train_start(self):
            self.body.wide.running_mean.fill_(0.5)
            self.body.wide.eval()

    model, recorder, monitor = Frozen(), Recorder(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, recorder, monitor, max_epochs=2, logger=True)
    trainer.fit(model, train_data(), val_data())
    assert not model.body.wide.training
    assert torch.equal(model.body.wide.running_mean, torch.full((4,), 0.5))
    report = monitor.report()
    assert num_batches(report) == dict.fromkeys(LAYERS, BATCHES)
    values = recorder.population((6, 12), "body.wide")
    np.testing.assert_allclose(report["body.wide"].population_mean, values.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(report["body.wide"].population_var, values.var(axis=1, ddof=1), rtol=1e-5)
    scalars = events(tmp_path)
    for tag, value in recorder.expected((6, 12)).items():
        assert scalars[tag][-1] == (11, close(value)), tag


# ----------------------------------------------------------------------------------------------------------- short runs


def test_fast_dev_run_reports_its_one_batch(tmp_path):
    model, monitor = Net(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, monitor, logger=True, fast_dev_run=True)
    trainer.fit(model, train_data(), val_data())
    assert num_batches(monitor.report()) == dict.fromkeys(LAYERS, 1)
    assert SUMMARY_TAGS.issubset(trainer.callback_metrics)
    assert not list(tmp_path.rglob("events*"))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"max_steps": 0}])
def test_a_fit_without_a_training_batch_logs_nothing(tmp_path, options):
    model, monitor = Net(), BatchNormMonitor()
    trainer = trainer_for(tmp_path, monitor, logger=True, **options)
    trainer.fit(model, train_data(), val_data())
    assert SUMMARY_TAGS.isdisjoint(trainer.callback_metrics)
    for file in tmp_path.rglob("events*"):
        assert ours(events(file.parent)) == set()
    assert all(layer.num_batches == 0 and layer.population_mean.isnan().all() for layer in monitor.report().values())
    assert hooks_of(model) == 0


@pytest.mark.parametrize("kwargs", [{}, {"every_n_train_batches": 4}])
def test_calls_before_the_first_batch_do_not_count(tmp_path, kwargs):
    class Early(Callback):
        def on_train_start(self, trainer, pl_module):
            assert pl_module.training
            for _ in range(3):
                pl_module(torch.randn(8, 1, 6))

    counts = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append(monitor.report()["body.wide"].num_batches)

    monitor = BatchNormMonitor(**kwargs)
    trainer_for(tmp_path, Early(), monitor, Look()).fit(Net(), train_data())
    assert counts == ([1, 2, 3, 4, 4, 4] if kwargs else [1, 2, 3, 4, 5, 6])
