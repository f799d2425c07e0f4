"""Frozen and stale layers under `PreciseBatchNorm`: left alone, with a warning if they do not fit, or repaired."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback

from lightning_bnmonitor import PreciseBatchNorm
from tests.callbacks.precise_fits import ALL, BATCHES, EXPECTED_WARNINGS, STATS, Net, Trace, fit, is_exact

pytestmark = [*EXPECTED_WARNINGS]
WARNING = "PreciseBatchNorm has left layers alone"


class Keeps(Callback):
    """These layers neither update their running statistics nor, if frozen, normalise by the batch."""

    def __init__(self, *names, frozen=False):
        self.names, self.frozen = names, frozen

    def on_train_epoch_start(self, trainer, pl_module):
        for name in self.names:
            layer = pl_module.get_submodule(name)
            if self.frozen:
                layer.eval()
            else:
                layer.track_running_stats = False


def warnings_of(folder, *callbacks, **options):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _, model = fit(folder, *callbacks, **options)
    said = [str(warning.message) for warning in warned]
    return [text for text in said if text.startswith(WARNING)], model


@pytest.mark.parametrize("frozen", [True, False])
def test_one_warning_a_fit_names_what_does_not_fit_and_the_argument(tmp_path, frozen):
    precise = PreciseBatchNorm(ALL)
    said, model = warnings_of(tmp_path, precise, Keeps("net.a", frozen=frozen), max_epochs=3)
    assert len(said) == 1
    assert f"net.a ({'frozen' if frozen else 'stale'}, eval_error " in said[0]
    assert "net.b" not in said[0]
    assert "`PreciseBatchNorm(frozen=True)` includes" in said[0]
    assert precise.recalibration.left_alone == {"net.a": "frozen" if frozen else "stale"}
    fresh = Net().state_dict()
    assert all(torch.equal(model.state_dict()[f"net.a.{stat}"], fresh[f"net.a.{stat}"]) for stat in STATS)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_asked_for_they_are_repaired(tmp_path, frozen, restore):
    precise = PreciseBatchNorm(ALL, frozen=True, restore=restore)
    said, model = warnings_of(tmp_path, precise, Keeps("net.a", "net.b", frozen=frozen))
    assert said == []
    assert precise.recalibration.left_alone == {}
    assert all(is_exact(state) for state in [*model.validated, model.state_dict()])


def test_stale_layers_that_are_repaired_and_restored_leave_training_bit_identical(tmp_path):
    one, two = Trace(), Trace()
    fit(tmp_path, Keeps("net.a"), PreciseBatchNorm(ALL, frozen=True, restore=True), one)
    fit(tmp_path, Keeps("net.a"), two)
    one.check(two)


def test_what_fits_is_not_warned_of(tmp_path):
    class Pretrained(Net):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                x = self.net.conv(2 * torch.randn(4000, 1, 6) + 3)
                self.net.a.running_mean.copy_(x.mean((0, 2)))
                self.net.a.running_var.copy_(x.var((0, 2)))
            self.net.conv.requires_grad_(False)

    said, _ = warnings_of(tmp_path, PreciseBatchNorm(ALL), Keeps("net.a", frozen=True), model=Pretrained())
    assert said == []


@pytest.mark.parametrize("max_epochs", [1, 3])
def test_where_nothing_is_repaired_data_pass_once(tmp_path, max_epochs):
    calls = []

    def forward(model, batch):
        calls.append(len(batch[0]))
        return model(batch[0])

    precise = PreciseBatchNorm(ALL, forward=forward)
    said, _ = warnings_of(tmp_path, precise, Keeps("net.a", "net.b"), model=stale(), max_epochs=max_epochs)
    assert len(said) == 1
    assert len(calls) == 1 + BATCHES  # one is tried when training starts
    assert precise.recalibration.left_alone == {"net.a": "stale", "net.b": "stale"}


def stale():
    model = Net()
    model.net.a.track_running_stats = model.net.b.track_running_stats = False
    return model
