"""`PreciseBatchNorm` beside the monitor, which reports what training did and knows who wrote."""

from functools import cache

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bnmonitor import BatchNormMonitor, PreciseBatchNorm
from tests.callbacks.precise_fits import (
    ALL,
    BATCH_SIZE,
    BATCHES,
    EXPECTED_WARNINGS,
    ByStep,
    Net,
    close,
    fit,
    is_exact,
    saved,
    train_data,
)

pytestmark = EXPECTED_WARNINGS


class Windows(Callback):
    """Each report as it comes, with the number of training batches before it."""

    def __init__(self, monitor):
        self.monitor, self.reports, self.last = monitor, [], None

    def look(self, trainer):
        report = self.monitor._report
        if report is not None and report is not self.last and (trainer.global_step not in dict(self.reports)):
            self.reports.append((trainer.global_step, report))
        self.last = report

    def on_train_batch_end(self, trainer, *_):
        self.look(trainer)

    def on_validation_start(self, trainer, *_):
        self.look(trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.look(trainer)

    def on_train_end(self, trainer, *_):
        self.look(trainer)


def with_monitor(folder, *callbacks, options=None, monitor_first=True, model=None, **trainer_options):
    monitor = BatchNormMonitor(**(options or {}))
    windows = Windows(monitor)
    order = [monitor, *callbacks] if monitor_first else [*callbacks, monitor]
    trainer, model = fit(folder, *order, windows, model=model or ByStep(), **trainer_options)
    return windows.reports, model, trainer


MONITORED = {
    "epochs": ({}, {}),
    "epochs, validation within": ({}, {"val_check_interval": 0.5}),
    "batches": ({"every_n_train_batches": 4}, {}),
    "batches, validation within": ({"every_n_train_batches": 4}, {"val_check_interval": 0.5}),
    "two epochs": ({"every_n_epochs": 2}, {}),
    "max_steps": ({}, {"max_steps": 10}),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The reports of the monitor alone, fitted once for each of ``MONITORED``."""

    @cache
    def reports(how):
        options, more = MONITORED[how]
        return with_monitor(tmp_path_factory.mktemp("alone"), options=options, max_epochs=3, **more)[0]

    return reports


both_orders = pytest.mark.parametrize(
    ("how", "monitor_first"), [*((how, True) for how in MONITORED), ("epochs", False), ("batches", False)]
)


@pytest.mark.slow
@both_orders
def test_with_restore_the_monitor_reports_what_it_does_without(tmp_path, how, monitor_first, alone):
    options, more = MONITORED[how]
    kwargs = {"options": options, "max_epochs": 3, **more}
    precise = PreciseBatchNorm(ALL, restore=True)
    reports, model, _ = with_monitor(tmp_path, precise, monitor_first=monitor_first, **kwargs)
    plain = alone(how)
    assert [step for step, _ in reports] == [step for step, _ in plain] != []
    for (_, one), (_, two) in zip(reports, plain, strict=True):
        assert close(one.to_dict(), two.to_dict())
        assert all("written-outside" not in layer.flags for layer in one.values())
    assert all(is_exact(state) for state in model.validated)


@pytest.mark.slow
@both_orders
def test_without_restore_the_monitor_knows_who_wrote(tmp_path, how, monitor_first, alone):
    options, more = MONITORED[how]
    kwargs = {"options": options, "max_epochs": 3, **more}
    reports, _, _ = with_monitor(tmp_path, PreciseBatchNorm(ALL), monitor_first=monitor_first, **kwargs)
    plain = alone(how)
    assert [step for step, _ in reports] == [step for step, _ in plain] != []
    for (_, one), (_, two) in zip(reports, plain, strict=True):
        for name, layer in one.items():
            assert "written-outside" not in layer.flags, name
            assert (layer.num_batches, layer.num_samples) == (two[name].num_batches, two[name].num_samples)
            assert torch.equal(layer.population_mean, two[name].population_mean)
            assert torch.equal(layer.population_var, two[name].population_var)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "restore"),
    [
        *((how, True) for how in ("epochs", "batches, validation within", "two epochs", "max_steps")),
        ("batches, validation within", False),
        ("max_steps", False),
    ],
)
def test_the_monitor_after_a_resume(tmp_path, how, restore, alone):
    options, more = MONITORED[how]
    kwargs = {"options": options, "max_epochs": 3, **more}

    def precise():
        return PreciseBatchNorm(ALL, restore=restore)

    plain = alone(how) if restore else with_monitor(tmp_path / "plain", precise(), **kwargs)[0]
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    with_monitor(tmp_path, precise(), checkpoint, **kwargs)
    for path in sorted(tmp_path.glob("*.ckpt"))[:2]:
        start = saved(path)["global_step"]
        if start < (10 if how == "max_steps" else 3 * BATCHES):
            resumed, _, _ = with_monitor(tmp_path, precise(), ckpt_path=path, **kwargs)
            expected = [(step, report) for step, report in plain if step > start]
            assert [step for step, _ in resumed if step > start] == [step for step, _ in expected] != []
            reports = [report for step, report in resumed if step > start]
            for report, (step, other) in zip(reports, expected, strict=True):
                assert close(report.to_dict(), other.to_dict()), step
                assert all("written-outside" not in layer.flags for layer in report.values())


@pytest.mark.slow
def test_the_example_is_repaired(tmp_path):
    """A layer whose momentum is far too small: validation is better at once, the next verdict is healthy."""

    class Slow(Net):
        def __init__(self):
            super().__init__()
            self.net.a.momentum = 0.001
            self.losses = []

        def on_validation_end(self):
            self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.001)

    def run(*callbacks):
        monitor = BatchNormMonitor()
        windows = Windows(monitor)
        data = train_data(40 * BATCH_SIZE)
        _, model = fit(tmp_path, *callbacks, monitor, windows, model=Slow(), data=data, max_epochs=3)
        return model.losses, [report["net.a"] for _, report in windows.reports]

    losses, layers = run(PreciseBatchNorm())
    before, sick = run()
    assert all(layer.needs_attention for layer in [layers[0], *sick])
    assert [(layer.verdict, layer.flags) for layer in layers[1:]] == [("healthy", ())] * 2
    assert all(loss < other for loss, other in zip(losses, before, strict=True))


class OtherWeights(Callback):
    """Validates with weights that training does not have."""

    def on_validation_start(self, trainer, pl_module):
        self.own = [parameter.detach().clone() for parameter in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.data.mul_(1.5).add_(0.1)

    def on_validation_end(self, trainer, pl_module):
        for parameter, own in zip(pl_module.parameters(), self.own, strict=True):
            parameter.data.copy_(own)


def test_statistics_that_were_lent_to_other_weights_are_known_to_fit_them(tmp_path):
    def last(*callbacks):
        monitor = BatchNormMonitor(on_unhealthy="ignore")
        fit(tmp_path, OtherWeights(), *callbacks, monitor, data=train_data(40 * BATCH_SIZE), max_epochs=2)
        return monitor.report()

    names = {"other-weights", "domain-shift", "unexplained-error", "written-outside"}
    bare = {flag for layer in last().values() for flag in layer.flags}
    assert bare & names == {"other-weights"}
    lent = last(PreciseBatchNorm(restore=True))
    assert all(layer.evidence["val_error"] < 2 * layer.evidence["val_error_noise"] for layer in lent.values())
    assert max(layer.evidence["val_shift"] for layer in lent.values()) > 0.3
    assert not {flag for layer in lent.values() for flag in layer.flags} & names
