"""The monitor in kinds of models: GANs, teachers, shared, lazy, quantised and compiled layers."""

import copy
from collections import OrderedDict

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelSummary
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker
from tests.callbacks.compared_fits import (
    BATCH_SIZE,
    BATCHES,
    MOMENTUM,
    Net,
    Steps,
    Windows,
    fit,
    fit_in_both_orders,
    hooks_of,
    network,
    samples,
    trainer_for,
    val_data,
)
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS

pytestmark = EXPECTED_WARNINGS


# ------------------------------------------------------------------------------------------------------ kinds of models


class Gan(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8, momentum=MOMENTUM), nn.ReLU(), nn.Linear(8, 6)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=MOMENTUM), nn.LeakyReLU(), nn.Linear(8, 1)
        )

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        first, second = self.optimizers()
        generated = self.generator(torch.randn(len(real), 2))
        self.toggle_optimizer(second)
        loss = nn.functional.softplus(-self.discriminator(real)).mean()
        loss = loss + nn.functional.softplus(self.discriminator(generated.detach())).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)
        if batch_idx % 2:
            self.toggle_optimizer(first)
            loss = nn.functional.softplus(-self.discriminator(generated)).mean()
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            self.untoggle_optimizer(first)

    def validation_step(self, batch, batch_idx):
        self.discriminator(batch[0].flatten(1) + self.generator(torch.randn(len(batch[0]), 2)))

    def configure_optimizers(self):
        networks = self.generator, self.discriminator
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in networks]


def test_a_gan_with_two_optimizers_and_three_calls_of_the_discriminator(tmp_path):
    ran = fit(tmp_path, Gan, max_epochs=3).check(10, 20, 30)
    assert {name: layer.num_batches for name, layer in ran.reports[-1].items()} == {
        "generator.1": 10,
        "discriminator.1": 25,
    }
    assert ran.flags() == {
        "generator.1": (),  # is given noise in validation, too
        "discriminator.1": ("calls-differ", "domain-shift"),  # real and generated
    }


class Distilled(Net):
    """A student and its averaged teacher."""

    def __init__(self, teaches):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.teaches = teaches
        if teaches == "in eval mode":
            self.teacher.eval()
        else:
            self.teacher.a.momentum = self.teacher.b.momentum = 0.0

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher(batch[0])
        answer = self(batch[0])
        return nn.functional.mse_loss(answer, batch[1]) + nn.functional.mse_loss(answer, target)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.002)


@pytest.mark.parametrize(
    ("teaches", "verdict", "flags"),
    [("in eval mode", "frozen", ()), ("in train mode with momentum 0", "stale", ("not-updating",))],
)
def test_a_teacher_and_its_student(tmp_path, teaches, verdict, flags):
    ran = fit(tmp_path, lambda: Distilled(teaches)).check(10, 20)
    for window in (0, 1):
        for name in ("teacher.a", "teacher.b"):
            layer = ran.reports[window][name]
            assert (layer.verdict, layer.flags) == (verdict, flags)
            assert layer.needs_attention  # the buffers are initial ones
            assert layer.num_batches == 10
        for name in ("net.a", "net.b"):
            assert ran.reports[window][name].num_batches == 10
            assert not window or ran.reports[window][name].verdict == "healthy"


def test_a_teacher_whose_running_statistics_follow_the_students(tmp_path):
    class Follows(Distilled):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            with torch.no_grad():
                for mine, theirs in zip(self.teacher.buffers(), self.net.buffers(), strict=True):
                    mine.copy_(torch.lerp(mine.float(), theirs.float(), 0.3))

    ran = fit(tmp_path, lambda: Follows("in eval mode"), max_epochs=4).check(10, 20, 30, 40)
    for name in ("teacher.a", "teacher.b"):
        layer = ran.reports[-1][name]
        assert layer.verdict == "frozen"
        assert layer.num_batches == 10
        assert not layer.needs_attention
        assert layer.summary()["eval_error"] < 0.1


def test_a_layer_under_two_names_called_three_times(tmp_path):
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.first = nn.BatchNorm1d(1, momentum=MOMENTUM)
            self.second = self.first

        def forward(self, x):
            return self.net(self.first(x)) + self.net(self.second(x * 2 + 1)) + self.net(self.second(x))

    ran = fit(tmp_path, Shared).check(10, 20)
    assert {name: layer.num_batches for name, layer in ran.reports[-1].items()} == {
        "net.a": 30,
        "net.b": 30,
        "first": 30,
    }
    # It is given three kinds of inputs, which it makes alike.
    shifted = ("domain-shift",)
    assert ran.flags() == {"first": ("calls-differ", *shifted), "net.a": shifted, "net.b": shifted}


class Repeats(Net):
    """Weights at rest, and as many passes over each batch as are asked for."""

    lr = 0.0

    def __init__(self, times):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(6, 32), nn.BatchNorm1d(32, momentum=MOMENTUM), nn.Linear(32, 1)
        )
        self.times = times

    def training_step(self, batch, batch_idx):
        return sum(super(Repeats, self).training_step(batch, batch_idx) for _ in range(self.times))


def noise(num, window):
    """Independent inputs, anew in each epoch."""
    generator = torch.Generator().manual_seed(window)
    return TensorDataset(torch.randn(num, 1, 6, generator=generator), torch.zeros(num, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "times",
    [
        1,
        pytest.param(
            4,
            marks=pytest.mark.xfail(
                strict=True, reason="calls with the same inputs in one step are taken for independent batches"
            ),
        ),
    ],
)
def test_passes_over_the_same_batch_are_one_draw_of_chance(tmp_path, times):
    class Independent(Repeats):
        def train_dataloader(self):
            return DataLoader(noise(40 * BATCH_SIZE, self.trainer.current_epoch), batch_size=BATCH_SIZE)

    options = {"data": None, "twin": False, "reload_dataloaders_every_n_epochs": 1, "max_epochs": 6}
    ran = fit(tmp_path, lambda: Independent(times), **options).check(40, 80, 120, 160, 200, 240)
    z = torch.stack([layer.z_mean for report in ran.reports[1:] for layer in report.values()])
    assert 0.7 < z.square().mean().sqrt() < 1.4
    assert {layer.verdict for report in ran.reports[1:] for layer in report.values()} == {"healthy"}


class Lazy(Net):
    def __init__(self, example=False):
        super().__init__()
        if example:
            self.example_input_array = torch.full((5, 1, 6), 1e3)
        self.net.a = nn.LazyBatchNorm1d(momentum=MOMENTUM)
        self.net.b = nn.LazyBatchNorm1d(momentum=MOMENTUM)


@pytest.mark.parametrize("materialised", ["in training", "in the sanity check", "by the model summary"])
def test_lazy_layers(tmp_path, materialised):
    if materialised == "by the model summary":
        fits = fit_in_both_orders(tmp_path, lambda: Lazy(True), lambda: [ModelSummary()])
    else:
        fits = [fit(tmp_path, Lazy, num_sanity_val_steps=int(materialised == "in the sanity check"))]
    for ran in fits:
        ran.check(10, 20).check_healthy()
        assert {layer.type for layer in ran.reports[-1].values()} == {"BatchNorm1d"}
        weights = [layer.evidence["initial_weight"] for layer in ran.reports[0].values()]
        assert weights == pytest.approx([(1 - MOMENTUM) ** 10] * 2)


def test_layers_made_by_configure_model(tmp_path):
    class Late(Steps, LightningModule):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = network()

    for ran in fit_in_both_orders(tmp_path, Late, lambda: [ModelSummary()]):
        ran.check(10, 20).check_healthy()


@pytest.mark.parametrize("buffers", ["its own", "copies"])
def test_functional_call_in_training_step(tmp_path, buffers):
    class Functional(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            state = {name: 1.0 * value for name, value in self.net.named_parameters()}
            if buffers == "copies":
                state |= {name: value.clone() for name, value in self.net.named_buffers()}
            return nn.functional.mse_loss(torch.func.functional_call(self.net, state, (x,)), y)

    ran = fit(tmp_path, Functional).check(10, 20)
    if buffers == "its own":
        ran.check_healthy()
    else:
        assert ran.verdicts() == dict.fromkeys(("net.a", "net.b"), "stale")
        assert ran.flags() == dict.fromkeys(("net.a", "net.b"), ("not-updating",))


# ------------------------------------------------------------------------------------------------------------ quantised


class Quantised(Net):
    """What ``prepare_qat`` makes of a convolution and its BatchNorm, which it fuses."""

    def __init__(self, slow=False, frozen=False):
        super().__init__()
        self.net = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(1, 4, (1, 3)),
                a=nn.BatchNorm2d(4, momentum=MOMENTUM),
                relu=nn.ReLU(),
                flat=nn.Flatten(),
                linear=nn.Linear(16, 3),
                b=nn.BatchNorm1d(3, momentum=MOMENTUM),
                out=nn.Linear(3, 1),
            )
        )
        quantization = torch.ao.quantization
        fused = quantization.fuse_modules_qat(self.net, ["conv", "a", "relu"])
        fused.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        self.net = quantization.prepare_qat(fused)
        self.net.conv._enable_slow_path_for_better_numerical_stability = slow
        if frozen:
            self.net.conv.freeze_bn_stats()

    def forward(self, x):
        return self.net(x[:, :, None])


def test_a_convolution_fused_for_quantization_aware_training_is_monitored(tmp_path):
    ran = fit(tmp_path, Quantised).check(10, 20).check_healthy()
    assert set(ran.reports[-1]) == {"net.conv.bn", "net.b"}
    assert type(ran.model.net.conv).__name__ == "ConvBnReLU2d"
    assert ran.reports[-1]["net.conv.bn"].num_batches == 10


def test_a_fused_convolution_that_takes_the_slow_path_is_monitored(tmp_path):
    ran = fit(tmp_path, lambda: Quantised(slow=True)).check(10, 20).check_healthy()
    assert ran.reports[-1]["net.conv.bn"].num_batches == 10


def test_a_fused_convolution_whose_statistics_are_frozen_is_monitored(tmp_path):
    ran = fit(tmp_path, lambda: Quantised(frozen=True)).check(10, 20)
    assert ran.verdicts() == {"net.conv.bn": "frozen", "net.b": "healthy"}


# ------------------------------------------------------------------------------------------------------------- compiled


class Wrapped(nn.Module):  # Dynamo leaves a bare Sequential's `compile()` alone
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x)


class WrappedNet(Net):
    def __init__(self):
        super().__init__()
        self.net = Wrapped()


def compiled_by(how):
    model = WrappedNet()
    if how == "module.compile, dynamic":
        model.net.compile(backend="eager", dynamic=True)
    elif how == "the whole, by torch.compile":
        return torch.compile(model, backend="eager")
    else:
        model.net = torch.compile(model.net, backend="eager")
    return model


def data_with_a_shorter_last_batch():
    return DataLoader(samples(BATCHES * BATCH_SIZE - 5), batch_size=BATCH_SIZE, shuffle=True)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """The fit that is not compiled."""
    folder, data = tmp_path_factory.mktemp("eager"), data_with_a_shorter_last_batch
    return fit(folder, WrappedNet, data=data, twin=False).check(10, 20)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module.compile, dynamic", "the whole, by torch.compile", "a part, by torch.compile"])
def test_compiled_models_with_a_shorter_last_batch(tmp_path, how, eager):
    torch._dynamo.reset()
    seed_everything(3, verbose=False)
    model, monitor = compiled_by(how), BatchNormMonitor()
    windows = Windows(monitor)
    trainer = trainer_for(tmp_path, [monitor, windows])
    trainer.fit(model, data_with_a_shorter_last_batch(), val_data())
    assert windows.ends == [10, 20]
    for report, expected in zip(windows.reports, eager.reports, strict=True):
        for name, layer in report.items():
            other = expected[name]
            assert (layer.num_batches, layer.num_samples) == (other.num_batches, other.num_samples)
            assert layer.evidence["calls_traced"] == 10
            torch.testing.assert_close(layer.population_mean, other.population_mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.population_var, other.population_var, rtol=1e-4, atol=1e-4)
            assert (layer.verdict, layer.flags) == (other.verdict, other.flags)
    assert hooks_of(model) == 0
    torch._dynamo.reset()


def test_averaged_weights_with_running_statistics_of_others_are_seen_in_a_pass_over_data():
    """The lines in the README."""
    torch.manual_seed(0)
    x = torch.randn(2048, 8) + 1
    y = (x.sum(dim=1) > 8).long()
    batches = x.split(64)
    layers = [nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(32, 2))
    averaged, optimizer = torch.optim.swa_utils.AveragedModel(net), torch.optim.SGD(net.parameters(), 0.3, momentum=0.9)
    for _ in range(6):
        for indices in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[indices]), y[indices]).backward()
            optimizer.step()
        averaged.update_parameters(net)

    def look():
        averaged.train()
        for module in averaged.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        with BatchNormTracker(averaged) as tracker, torch.no_grad():
            for batch in batches:
                averaged(batch)
        averaged.eval()
        with torch.no_grad():
            return tracker.report(), float(nn.functional.cross_entropy(averaged(x), y))

    report, loss = look()
    assert [(layer.verdict, layer.needs_attention) for layer in report.values()] == [("frozen", True)] * 2
    torch.optim.swa_utils.update_bn(batches, averaged)
    repaired, loss_after = look()
    assert repaired.unhealthy == []
    assert loss_after < loss / 2
