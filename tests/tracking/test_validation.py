"""Validation against training: what differs is told apart from running statistics that are bad."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, PreciseBatchNorm, recalibrate

pytestmark = [
    pytest.mark.filterwarnings("ignore:BatchNorm layers need attention"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
C, BATCH = 4, 32


def network(momentum=0.1, dropout=0.0, width=8):
    return nn.Sequential(
        nn.BatchNorm1d(C, momentum=momentum), nn.Linear(C, width), nn.Dropout(dropout), nn.BatchNorm1d(width)
    )


def data(num, seed, shift=0.0, scale=1.0):
    values = torch.randn(num, BATCH, C, generator=torch.Generator().manual_seed(seed))
    return list(shift + scale * (2 * values + 1))


def trained(net, batches, validation=(), close=True):
    """A tracker after training (with nothing learnt) and validation, and its report."""
    tracker = BatchNormTracker(net).attach()
    net.train()
    for x in batches:
        net(x)
    if close:
        tracker.close()
    net.eval()
    tracker.start_validation()
    with torch.no_grad():
        for x in validation:
            net(x)
    report = tracker.validation_report()
    net.train()
    return tracker, report


def moments(batches):
    values = torch.cat(list(batches)).double().numpy()
    values = values.reshape(len(values), values.shape[1], -1).transpose(1, 0, 2).reshape(values.shape[1], -1)
    return values.mean(axis=1), values.var(axis=1, ddof=1)


def error_of(mean, var, other_mean, other_var, eps=1e-5):
    """RMS over channels of the error of the normalised activation that other moments make, as it is defined."""
    own, other = np.sqrt(var + eps), np.sqrt(other_var + eps)
    squares = (1 / other - 1 / own) ** 2 * var + ((mean - other_mean) / other) ** 2
    return np.sqrt(squares), math.sqrt(squares.mean())


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1.0, 1.0), (0.0, 3.0), (-5.0, 0.2)])
def test_the_shift_is_the_error_that_the_present_statistics_of_training_make_in_validation(shift, scale):
    torch.manual_seed(0)
    validation = data(12, 2, shift, scale)
    _, report = trained(network(), data(64, 1), validation)
    layer = report["0"]
    mean, var = moments(validation)
    np.testing.assert_allclose(layer.validation[0], mean, rtol=1e-6)
    np.testing.assert_allclose(layer.validation[1], var, rtol=1e-5)
    channels, whole = error_of(mean, var, layer.now_mean.numpy(), layer.now_var.numpy())
    np.testing.assert_allclose(layer.val_shift, channels, rtol=1e-4, atol=1e-6)
    assert layer.evidence["val_shift"] == pytest.approx(whole, rel=1e-4)
    assert layer.evidence["val_batches"] == 12
    assert report.summary()["val_shift_max"] == max(each.evidence["val_shift"] for each in report.values())
    is_other = (shift, scale) != (0.0, 1.0)
    assert ("domain-shift" in layer.flags) is is_other
    assert ("Validation differs from training" in str(report)) is is_other
    assert layer.needs_attention is is_other


@pytest.mark.slow
def test_the_noise_floor_is_what_chance_makes_of_the_shift():
    shifts, floors = [], []
    for seed in range(30):
        torch.manual_seed(seed)
        _, report = trained(network(), data(64, 2 * seed), data(16, 2 * seed + 1))
        shifts.append(report["0"].evidence["val_shift"])
        floors.append(report["0"].evidence["val_noise"])
        assert "domain-shift" not in {flag for layer in report.values() for flag in layer.flags}
    assert np.sqrt(np.mean(np.square(floors))) == pytest.approx(np.sqrt(np.mean(np.square(shifts))), rel=0.2)


def test_bad_running_statistics_are_no_domain_shift_not_even_in_the_layers_behind_them():
    torch.manual_seed(0)
    _, report = trained(network(momentum=0.001), data(64, 1), data(16, 2))
    assert report["0"].verdict == "warming-up"
    assert report["3"].evidence["val_shift"] > 0.25  # as what it receives is normalised wrongly
    assert [layer.flags for layer in report.values()] == [(), ()]
    assert "Validation differs" not in str(report)


def test_dropout_before_a_layer_is_a_shift_of_that_layer_alone():
    torch.manual_seed(0)
    _, report = trained(network(dropout=0.5), data(100, 1), data(16, 2))
    assert [layer.flags for layer in report.values()] == [(), ("domain-shift",)]
    assert "dropout" in report["3"].explanation
    assert "recalibrate" in report["3"].remedy
    assert "first in 3." in str(report).splitlines()[0]


@pytest.mark.parametrize("num", [0, 1, 3])
def test_one_batch_is_enough_where_chance_in_training_does_not_explain_it(num):
    _, report = trained(network(), data(64, 1), data(num, 2, shift=9.0))
    assert ("domain-shift" in report["0"].flags) is (num > 0)
    assert ("val_shift" in report["0"].evidence) is (num > 0)
    assert report["0"].evidence.get("val_batches", 0) == num


def test_a_channel_with_a_value_that_is_not_finite_is_left_out():
    validation = data(8, 2)
    validation[3][5, 1] = torch.nan
    _, report = trained(network(), data(64, 1), validation)
    layer = report["0"]
    assert layer.val_shift.isnan().tolist() == [False, True, False, False]
    mean, var = moments(validation)
    channels, _ = error_of(mean, var, layer.now_mean.numpy(), layer.now_var.numpy())
    assert layer.evidence["val_shift"] == pytest.approx(math.sqrt(np.nanmean(channels**2)), rel=1e-4)


@pytest.mark.parametrize("layout", ["half", "channels-last", "frozen", "none", "shared", "often"])
def test_any_kind_of_layer(layout):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(C, track_running_stats=layout != "none")
    shape, times = (8, C, 3, 3), {"shared": 2, "often": 70}.get(layout, 1)
    net = nn.Sequential(*[norm] * times) if times > 1 else nn.Sequential(norm)
    training, validation = ([torch.randn(shape) + k for _ in range(n)] for k, n in ((0, 20), (2, 6)))
    if layout == "half":
        net, training, validation = net.bfloat16(), *([x.bfloat16() for x in each] for each in (training, validation))
    if layout == "channels-last":
        training, validation = (
            [x.to(memory_format=torch.channels_last) for x in each] for each in (training, validation)
        )
    if layout == "frozen":
        norm.eval()
    received = []
    tracker = BatchNormTracker(net).attach()
    for x in training:
        net(x)
    tracker.close()
    net.eval()
    norm.register_forward_pre_hook(lambda module, args: received.append(args[0].double()))
    tracker.start_validation()
    with torch.no_grad():
        for x in validation:
            net(x)
    layer = tracker.validation_report()["0"]
    mean, var = moments(received)
    np.testing.assert_allclose(layer.validation[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.validation[1], var, rtol=1e-5)
    assert layer.evidence["val_batches"] == len(received)


def test_a_report_with_validation_goes_everywhere_a_report_goes():
    tracker, report = trained(network(), data(64, 1), data(8, 2, shift=2.0))
    assert tracker.report() is report
    assert json.loads(json.dumps(report.to_dict()))["layers"]["0"]["evidence"]["val_batches"] == 8
    copied = pickle.loads(pickle.dumps(report))
    assert torch.equal(copied["0"].validation, report["0"].validation)
    assert "domain-shift" in report.to_markdown()
    assert "val_shift" in report._repr_html_()
    report.plot()
    tracker.reset()
    assert "val_shift" not in tracker.report()["0"].evidence
    assert tracker.report()["0"].validation is None


def test_in_an_open_window_it_is_against_the_window_so_far_and_training_goes_on_counting():
    net, batches = network(), data(120, 1)
    tracker, report = trained(net, batches[:80], data(8, 2, shift=3.0), close=False)
    assert "domain-shift" in report["0"].flags
    for x in batches[80:]:
        net(x)
    mean, var = moments(batches)
    layer = tracker.report()["0"]
    assert (layer.num_batches, layer.validation) == (120, None)
    np.testing.assert_allclose(layer.population_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(layer.population_var, var, rtol=1e-5)


@pytest.mark.parametrize("how", ["paused", "recalibrate"])
def test_what_is_not_to_count_does_not_count_in_validation_either(how):
    net, batches = network(), data(80, 1)
    tracker, _ = trained(net, batches)
    net.eval()
    tracker.start_validation()
    net(batches[0])
    others = data(10, 2, shift=30.0)
    if how == "recalibrate":
        recalibrate(net, others)
    else:
        with tracker.paused():
            for x in others:
                net(x)
    net(batches[1])
    report = tracker.validation_report()
    mean, var = moments(batches[:2])
    assert report["0"].evidence["val_batches"] == 2
    np.testing.assert_allclose(report["0"].validation[0], mean, rtol=1e-6)
    np.testing.assert_allclose(report["0"].validation[1], var, rtol=1e-5)


def test_a_validation_that_begins_or_ends_within_a_pause_has_begun_or_ended_after_it():
    net, batches = network(), data(80, 1)
    tracker, _ = trained(net, batches)
    net.eval()
    with tracker.paused():
        tracker.start_validation()
        net(batches[0])
    for x in batches[1:3]:
        net(x)
    with tracker.paused():
        report = tracker.validation_report()
    net(batches[3])
    assert report["0"].evidence["val_batches"] == 2
    np.testing.assert_allclose(report["0"].validation[0], moments(batches[1:3])[0], rtol=1e-6)
    assert [layer.validation for layer in tracker._recorder.layers] == [{}, {}]  # nothing that came after the end


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += 1
        return func(*args, **(kwargs or {}))


def test_after_its_end_nothing_is_computed():
    net, x = network(), data(1, 1)[0]

    def operations():
        with torch.no_grad(), Operations() as operations:
            net(x)
        return operations.num

    net(x)
    net.eval()
    alone = operations()
    net.train()
    tracker, _ = trained(net, data(20, 2))
    net.eval()
    for _ in range(2):
        tracker.start_validation()
        assert all(operations() > alone for _ in range(100))
        tracker.stop_validation()
        assert operations() == alone
        assert tracker.validation_report()["0"].evidence["val_batches"] == 100


def test_of_several_loaders_the_one_that_differs_most_is_told_of():
    torch.manual_seed(0)
    net = network()
    tracker, _ = trained(net, data(64, 1))
    loaders = [data(6, 2), data(6, 3, shift=3.0), data(6, 4, shift=1.0)]
    net.eval()
    for index, batches in enumerate(loaders):
        tracker.start_validation(index)
        with torch.no_grad():
            for x in batches:
                net(x)
    layer = tracker.validation_report()["0"]
    assert layer.evidence["val_loader"] == 1
    np.testing.assert_allclose(layer.validation[0], moments(loaders[1])[0], rtol=1e-6)
    assert "domain-shift" in layer.flags
    assert "in validation (loader 1, counted from 0)" in layer.explanation


# ------------------------------------------------------------------------------------------------------------- Trainer


class Net(LightningModule):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = network(dropout=dropout)
        self.received = []
        self.net[0].register_forward_pre_hook(self.keep)

    def keep(self, module, args):
        if not self.training and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.received.append(args[0].clone())

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self(batch[0]).square().mean(), add_dataloader_idx=True)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(num, seed, shift=0.0):
    return DataLoader(TensorDataset(torch.cat(data(num, seed, shift))), batch_size=BATCH)


def fit(tmp_path, *callbacks, shift=0.0, training=None, validation=None, model=None, **options):
    torch.manual_seed(0)
    model = model or Net()
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = Trainer(callbacks=list(callbacks), **(defaults | quiet | options))
    trainer.fit(model, training or loader(32, 1), loader(20, 2, shift) if validation is None else validation)
    return trainer, model


def spread(batches, num):
    """So many batches, the first of as many equal parts each."""
    return [batches[math.ceil(part * len(batches) / num)] for part in range(num)]


def test_validation_data_that_come_sorted_do_not_differ_from_training_for_that(tmp_path):
    values = torch.cat(data(48, 3)) + torch.linspace(-2, 2, 48 * BATCH)[:, None]
    training = DataLoader(TensorDataset(values), BATCH, shuffle=True)
    validation = DataLoader(TensorDataset(values), BATCH)
    fit(tmp_path, monitor := BatchNormMonitor(), training=training, validation=validation)
    layer = monitor.report()["net.0"]
    assert layer.evidence["val_batches"] == 16
    assert "domain-shift" not in layer.flags
    assert layer.evidence["val_shift"] < 0.1


def test_of_data_of_unknown_length_the_first_batches_are_compared(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(x,) for x in data(20, 2)])

    _, model = fit(tmp_path, monitor := BatchNormMonitor(), validation=DataLoader(Stream(), batch_size=None))
    layer = monitor.report()["net.0"]
    np.testing.assert_allclose(layer.validation[0], moments(model.received[-20:][:16])[0], rtol=1e-5)


@pytest.mark.parametrize("value", [-1, True, 2.0, "all"])
def test_the_number_of_batches_is_checked(value):
    with pytest.raises(ValueError, match="`validation_batches` must be an integer and not negative"):
        BatchNormMonitor(validation_batches=value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "options", "expected"),
    [
        (5, {}, 5),
        (50, {}, 20),
        (16, {"limit_val_batches": 7}, 7),
        (16, {"val_check_interval": 0.5}, 16),
    ],
)
def test_at_most_so_many_batches_of_each_validation_are_compared(tmp_path, num, options, expected):
    _, model = fit(tmp_path, monitor := BatchNormMonitor(validation_batches=num), shift=2.0, **options)
    layer = monitor.report()["net.0"]
    assert layer.evidence["val_batches"] == expected
    of_last = model.received[-min(20, options.get("limit_val_batches", 20)) :]
    np.testing.assert_allclose(layer.validation[0], moments(spread(of_last, expected))[0], rtol=1e-5)
    assert "domain-shift" in layer.flags


def test_as_many_batches_are_compared_as_asked_for(tmp_path):
    _, model = fit(
        tmp_path, monitor := BatchNormMonitor(validation_batches=200), validation=loader(90, 2), max_epochs=1
    )
    layer = monitor.report()["net.0"]
    assert layer.evidence["val_batches"] == 90
    assert "val_loader" not in layer.evidence
    np.testing.assert_allclose(layer.validation[0], moments(model.received)[0], rtol=1e-5)


@pytest.mark.parametrize("num", [16, 4])
def test_batches_of_each_loader_are_compared_and_a_shifted_one_is_named(tmp_path, num):
    loaders = [loader(20, 2), loader(20, 3, shift=3.0)]
    _, model = fit(tmp_path, monitor := BatchNormMonitor(validation_batches=num), validation=loaders)
    layer = monitor.report()["net.0"]
    of_second = spread(model.received[-20:], num)
    np.testing.assert_allclose(layer.validation[0], moments(of_second)[0], rtol=1e-5)
    assert layer.evidence["val_batches"] == num
    assert "domain-shift" in layer.flags
    assert "(loader 1, counted from 0)" in layer.explanation


def test_zero_switches_it_off(tmp_path):
    trainer, _ = fit(tmp_path, monitor := BatchNormMonitor(validation_batches=0), shift=2.0)
    assert monitor.report()["net.0"].validation is None
    assert not [name for name in trainer.callback_metrics if "val_shift" in name]


def test_neither_training_nor_what_is_said_of_it_depends_on_it(tmp_path):
    outcomes = []
    for num in (0, 16):
        _, model = fit(tmp_path, monitor := BatchNormMonitor(validation_batches=num), shift=2.0)
        layers = monitor.report().to_dict()["layers"]
        for layer in layers.values():
            layer["evidence"] = {name: value for name, value in layer["evidence"].items() if name[:4] != "val_"}
            for name in ("val_error", "val_shift", "flags", "explanation", "remedy", "needs_attention"):
                del layer[name]
        outcomes.append((layers, model.state_dict(), torch.get_rng_state()))
    (one, weights, state), (other, other_weights, other_state) = outcomes
    assert one == other
    assert torch.equal(state, other_state)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_sanity_check_and_tests_are_no_validation(tmp_path):
    trainer, model = fit(tmp_path, monitor := BatchNormMonitor(), num_sanity_val_steps=4)
    report = monitor.report()
    assert report["net.0"].evidence["val_batches"] == 16
    trainer.test(model, loader(20, 5, shift=9.0), verbose=False)
    trainer.validate(model, loader(20, 5, shift=9.0), verbose=False)
    assert monitor.report()["net.0"].evidence == report["net.0"].evidence


def test_loggers_and_checkpoints_get_it_when_validation_ends(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    checkpoint = ModelCheckpoint(tmp_path, monitor="bn/val_shift_max", mode="min", save_top_k=-1)
    options = {"enable_checkpointing": True, "logger": logger}
    trainer, _ = fit(tmp_path, monitor := BatchNormMonitor(), checkpoint, shift=2.0, **options)
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    points = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"] if "val_shift" in tag}
    assert set(points) == {"bn/val_shift_max", "bn.val_shift/net.0", "bn.val_shift/net.3"}
    steps = [event.step for event in accumulator.Scalars("val_loss")]
    assert all([event.step for event in events] == steps for events in points.values())
    report = monitor.report()
    for name in ("net.0", "net.3"):
        assert points[f"bn.val_shift/{name}"][-1].value == pytest.approx(report[name].evidence["val_shift"])
    assert float(trainer.callback_metrics["bn/val_shift_max"]) == pytest.approx(report.summary()["val_shift_max"])
    assert len(checkpoint.best_k_models) == 2


@pytest.mark.parametrize("restore", [False, True])
def test_beside_exact_running_statistics(tmp_path, restore):
    _, _ = fit(tmp_path, PreciseBatchNorm(4, restore=restore), monitor := BatchNormMonitor(), shift=2.0)
    layer = monitor.report()["net.0"]
    assert layer.flags == ("domain-shift",)
    assert layer.evidence["val_batches"] == 16


def test_an_error_in_validation_leaves_nothing_behind(tmp_path):
    class Fails(Net):
        fails = True

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)
            if self.fails and batch_idx == 3:
                raise RuntimeError("stop")

    model, monitor = Fails(), BatchNormMonitor()
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, monitor, model=model)
    model.fails = False
    model.train()
    fit(tmp_path, monitor, model=model)
    assert monitor.report()["net.0"].evidence["val_batches"] == 16
    assert monitor.report()["net.0"].num_batches == 32


@pytest.mark.slow
@pytest.mark.parametrize(("inference_mode", "breaks"), [(True, False), (False, True)])
def test_compiled_models_also_where_another_hook_breaks_the_graph_at_a_layer(tmp_path, inference_mode, breaks):
    torch._dynamo.reset()
    model = Net(dropout=0.5)
    if not breaks:
        model.net[0]._forward_pre_hooks.clear()
    model.net.compile(backend="aot_eager")
    _, model = fit(tmp_path, monitor := BatchNormMonitor(), model=model, shift=2.0, inference_mode=inference_mode)
    layer = monitor.report()["net.0"]
    expected = torch.cat(spread(data(20, 2, 2.0), 16)).double()
    np.testing.assert_allclose(layer.validation[0], expected.mean(dim=0), rtol=1e-5)
    training = torch.cat(data(32, 1)).double()
    np.testing.assert_allclose(layer.population_mean, training.mean(dim=0), rtol=1e-5)
    assert (layer.num_batches, layer.evidence["val_batches"]) == (32, 16)
    assert "domain-shift" in layer.flags
    torch._dynamo.reset()
