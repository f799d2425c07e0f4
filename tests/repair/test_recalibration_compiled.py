"""Recalibration of compiled models: the same statistics, and nothing compiled again."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_bnmonitor import BatchNormTracker, recalibrate
from tests.compiling import by_wrapping, in_place, its_parts
from tests.repair.exact_population import C, assert_written, data
from tests.repair.small_models import Net, trained
from tests.repair.unchanged import Unchanged, bits

pytestmark = pytest.mark.slow


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.randn(16, C)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler (g++)")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "how", "tracked"),
    [
        pytest.param("inductor", by_wrapping, False, marks=needs_compiler),
        ("eager", by_wrapping, True),
        ("eager", in_place, True),
        ("eager", its_parts, False),
    ],
)
def test_a_compiled_model_gets_what_an_eager_one_gets_and_is_not_compiled_again(
    backend: str, how: Callable[[nn.Module, str], nn.Module], tracked: bool
) -> None:
    eager, batches = trained(Net()), data()
    eager.drop.p = 0.0
    model = how(copy.deepcopy(eager), backend)
    inner = getattr(model, "_orig_mod", model)
    tracker = BatchNormTracker(model)
    if tracked:
        tracker.attach()
    train(model)
    inner.eval()
    model(batches[0])
    inner.train()
    with torch.no_grad():
        for mine, its in zip(everything(eager), everything(inner), strict=True):
            mine.copy_(its)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled
    with Unchanged(model):
        result = recalibrate(model, batches)
    expected = recalibrate(eager, batches)
    assert [bits(tensor) for tensor in everything(inner)] == [bits(tensor) for tensor in everything(eager)]
    assert list(result.after) == list(expected.after)
    train(model)
    inner.eval()
    model(batches[0])
    inner.train()
    train(model)
    assert counters["stats"]["unique_graphs"] == compiled
    if tracked:
        assert [layer.num_batches for layer in tracker.report().values()] == [6, 6, 6]
        assert [layer.flags for layer in tracker.report().values()] == [(), (), ()]
        tracker.detach()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_that_is_compiled_but_was_never_run_is_not_compiled_by_it() -> None:
    model, batches = torch.compile(nn.BatchNorm1d(C), backend="aot_eager"), data()
    recalibrate(model, batches)
    assert not counters["stats"]["unique_graphs"]
    assert_written(model._orig_mod, batches)
