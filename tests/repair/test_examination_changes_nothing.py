"""An examination leaves everything as it was, to the bit, whatever happens in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormTracker, examine
from tests.repair.exact_population import C, data, layers_of
from tests.repair.small_models import Net, single, trained
from tests.repair.unchanged import Everything, Unchanged


class Drawing(nn.Module):
    """Draws random numbers of each kind in whatever mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.01 * torch.randn_like(x) + 0.01 * float(np.random.rand()) + 0.01 * random.random())


MODES = {
    "training": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "one layer frozen": lambda model: (model.train(), model.net.b.eval()),
    "one layer alone in training": lambda model: (model.eval(), model.net.b.train()),
    "one layer stale": lambda model: (model.train(), setattr(model.net.b, "track_running_stats", False)),
    "frozen weights": lambda model: (model.train(), model.net.b.requires_grad_(False)),
    "no gradients at all": lambda model: model.eval().requires_grad_(False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_batches", ["auto", None, 3])
def test_in_any_mode(mode: str, num_batches: Any) -> None:
    model = Drawing()
    trained(model)
    MODES[mode](model)
    loader = DataLoader(torch.cat(data()), 8, shuffle=True, drop_last=True)
    with Unchanged(model, entirely=True):
        examine(model, loader, loader, num_batches=num_batches)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_any_precision(dtype: torch.dtype) -> None:
    model, batches = single().to(dtype), [x.to(dtype) for x in data()]
    with Unchanged(model, entirely=True):
        examine(model, batches, batches)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        model = trained(Net())
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        examine(model, data())
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("place", ["forward", "iterable", "layer"])
@pytest.mark.parametrize("when", ["batches", "evaluation"])
def test_whatever_is_raised_in_it(error: type[BaseException], place: str, when: str) -> None:
    model, fails_at = trained(Net()), 4 if when == "batches" else 14
    model.b.eval()
    seen: list[int] = []

    def batches() -> Iterator[Tensor]:
        for x in data():
            if place == "iterable" and len(seen) == fails_at:
                raise error("on purpose")
            yield x

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(len(batch))
        model(batch)
        if place == "forward" and len(seen) == fails_at:
            raise error("on purpose")

    def fails(*_: Any) -> None:
        if place == "layer" and len(seen) == fails_at:
            raise error("on purpose")

    model.c.register_forward_hook(fails)
    wrapped = issubclass(error, Exception) and place != "iterable"
    with Unchanged(model, entirely=True), pytest.raises(RuntimeError if wrapped else error) as raised:
        examine(model, batches(), batches(), forward)
    assert isinstance(raised.value.__cause__ if wrapped else raised.value, error)
    assert len(seen) == fails_at


def test_gradients_and_optimizers_go_on_as_if_nothing_had_happened() -> None:
    def steps(examined: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        torch.manual_seed(3)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for x in data():
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if examined:
                examine(model, data()[:3], data()[:2])
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()

    (one, of_one), (other, of_other) = steps(True), steps(False)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(
        torch.equal(of_one["state"][index]["exp_avg"], of_other["state"][index]["exp_avg"]) for index in of_one["state"]
    )


def test_trackers_that_are_attached_do_not_count_its_calls() -> None:
    model = trained(Net())
    with BatchNormTracker(model) as tracker:
        model(data()[0])
        examine(model, data(), data())
        model(data()[1])
    report = tracker.report()
    assert [report[name].num_batches for name in "abc"] == [2, 2, 2]
    assert not {flag for layer in report.values() for flag in layer.flags}
    assert "val_error" not in report["a"].evidence


def test_observers_of_quantisation_aware_training_do_not_see_the_pass() -> None:
    model = nn.Sequential(qat.ConvBn2d(2, C, 3, qconfig=get_default_qat_qconfig("fbgemm"))).train()
    model(torch.randn(8, 2, 6, 6))
    batches = [torch.randn(n, 2, 6, 6) * n for n in (3, 9, 8)]
    everything = Everything(model)
    report = examine(model, batches, batches)
    everything.assert_same()
    assert list(report) == list(layers_of(model))


@pytest.mark.slow
def test_what_is_compiled_runs_eagerly_in_it() -> None:
    model = trained(Net())
    compiled = torch.compile(model, backend="eager")
    compiled(data()[0])
    with Unchanged(model, entirely=True):
        report = examine(compiled, data(), data())
    assert [report[name].num_batches for name in "abc"] == [10, 10, 10]
