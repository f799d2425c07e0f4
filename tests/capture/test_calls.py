"""Calls that are like the last one are recorded without looking closer: what changes between two calls is noticed."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.nn.functional import batch_norm
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT, LayerHook
from lightning_bnmonitor.compat import HAS_UNPACK_HOOKS

C, ALIKE = 4, 5


class Frozen(nn.BatchNorm1d):
    """Normalises by its running statistics while it is frozen, in training mode; may return something else, too."""

    is_frozen = False
    returns_more = False

    def forward(self, x: Tensor) -> Any:
        if self.returns_more:
            return super().forward(x), 0
        if not self.is_frozen:
            return super().forward(x)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> list[LayerHook]:
    """Hooks of the calls that went the long way, passes that were asked for left out."""
    went: list[LayerHook] = []
    take = LayerHook._take

    def noted(self: LayerHook, module: Any, x: Any, output: Any) -> None:
        went.extend([] if self.by_pass else [self])
        take(self, module, x, output)

    monkeypatch.setattr(LayerHook, "_take", noted)
    return went


def batch(*shape: int) -> Tensor:
    return torch.randn(shape or (6, C)) * 2 + 1


def reference(batches: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of all values, in two float64 passes."""
    values = np.concatenate([np.moveaxis(x.double().numpy(), 1, -1).reshape(-1, C) for x in batches])
    mean = values.mean(axis=0)
    return mean, np.square(values - mean).sum(axis=0) / (len(values) - 1)


def change_eps(layer: Any) -> None:
    layer.eps = 0.5


def change_momentum(layer: Any) -> None:
    layer.momentum = 0.7


def average(layer: Any) -> None:
    layer.momentum = None


def track_nothing(layer: Any) -> None:
    layer.track_running_stats = False


def lose_buffers(layer: Any) -> None:
    layer.running_mean = layer.running_var = None


def return_more(layer: Any) -> None:
    layer.returns_more = True


def freeze(layer: Any) -> None:
    layer.is_frozen = True


LAYERS_CHANGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "eps": (change_eps, "saved"),
    "momentum": (change_momentum, "saved"),
    "cumulative average": (average, "saved"),
    "eval mode": (lambda layer: layer.eval(), "pass"),
    "no tracking": (track_nothing, "saved"),
    "no buffers": (lose_buffers, "saved"),
    "frozen in training mode": (freeze, "pass"),
    "another output": (return_more, "pass"),
    "double precision": (lambda layer: layer.double(), "saved"),
}
INPUTS_CHANGE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "batch size": (lambda: batch(9, C), "saved"),
    "positions": (lambda: batch(6, C, 2), "saved"),
    "strides": (lambda: batch(6, 3, C).transpose(1, 2), "saved"),
    "large and strided": (lambda: batch(6, 1000, C).transpose(1, 2), "pass"),
    "large, one position": (lambda: batch(6000, C), "pass"),
}


goes_the_short_way = pytest.mark.skipif(not HAS_UNPACK_HOOKS, reason="before torch 2.10 only PyTorch's own forward")


@goes_the_short_way
@pytest.mark.parametrize("what", [*LAYERS_CHANGE, *INPUTS_CHANGE])
def test_a_change_is_noticed(what: str, long_way: list[LayerHook]) -> None:
    layer, received = Frozen(C), []
    change, path = LAYERS_CHANGE.get(what, (lambda layer: None, ""))
    changed_batch, path = INPUTS_CHANGE.get(what, (batch, path))
    model = Model(layer)

    def call(x: Tensor) -> None:
        received.append(x.to(layer.weight.dtype))
        model(received[-1])

    with BatchNormTracker(model) as tracker, BatchNormTracker(model, capture="pass") as passes:
        for _ in range(ALIKE):
            call(batch())
        assert len(long_way) == 1
        change(layer)
        for _ in range(2 * ALIKE):
            call(changed_batch())
        assert len(long_way) == 1 + (1 if path == "saved" and what != "no buffers" else 2 * ALIKE)
        report, exact = tracker.report()["norm"], passes.report()["norm"]
    mean, var = reference(received)
    assert report.num_batches == len(received) == 3 * ALIKE
    assert report.num_samples == sum(x.numel() // C for x in received)
    np.testing.assert_allclose(report.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(report.population_var.numpy(), var, rtol=2e-5)
    evidence, expected = dict(report.evidence), dict(exact.evidence)
    assert evidence.pop("calls_saved") == (3 if path == "saved" else 1) * ALIKE
    assert evidence.pop("calls_pass") == (0 if path == "saved" else 2) * ALIKE
    assert (expected.pop("calls_saved"), expected.pop("calls_pass")) == (0, 3 * ALIKE)
    assert evidence == pytest.approx(expected, rel=1e-2, abs=1e-4, nan_ok=True)
    assert (report.verdict, report.flags) == (exact.verdict, exact.flags)


def test_strides_are_noticed_where_the_shape_stays(long_way: list[LayerHook]) -> None:
    model, received = Model(nn.BatchNorm1d(C)), []
    with BatchNormTracker(model) as tracker:
        for index in range(3 * ALIKE):
            received.append(batch(6, 1000, C).transpose(1, 2) if index % 3 == 2 else batch(6, C, 1000))
            model(received[-1])
        report = tracker.report()["norm"]
    mean, var = reference(received)
    np.testing.assert_allclose(report.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(report.population_var.numpy(), var, rtol=1e-6)
    assert (report.evidence["calls_saved"], report.evidence["calls_pass"]) == (2 * ALIKE, ALIKE)
    assert len(long_way) == 2 * ALIKE


def test_the_mode_is_noticed_of_a_layer_without_buffers() -> None:
    model = Model(nn.BatchNorm1d(C, track_running_stats=False))
    with BatchNormTracker(model) as tracker:
        for index in range(2 * ALIKE):
            model.norm.train(index < ALIKE)
            model(batch())
        tracker.flush()
        assert [layer.counts.training for layer in tracker._recorder.layers] == [ALIKE]
        assert tracker.report()["norm"].num_batches == 2 * ALIKE


@contextlib.contextmanager
def saved_tensor_hooks() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


CONTEXTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no graph": (torch.no_grad, "pass"),
    "inference mode": (torch.inference_mode, "pass"),
    "saved-tensor hooks": (saved_tensor_hooks, "pass"),
    "half precision": (lambda: torch.autocast("cpu", torch.bfloat16), "saved"),
}


@pytest.mark.parametrize("what", CONTEXTS)
def test_a_mode_is_noticed(what: str, long_way: list[LayerHook]) -> None:
    context, path = CONTEXTS[what]
    model, received = Model(nn.BatchNorm1d(C)), []
    with BatchNormTracker(model) as tracker:
        for index in range(3 * ALIKE):
            received.append(batch())
            with context() if index % 3 == 2 else contextlib.nullcontext():
                model(received[-1])
        report = tracker.report()["norm"]
    mean, var = reference(received)
    np.testing.assert_allclose(report.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(report.population_var.numpy(), var, rtol=2e-5)
    num_other = ALIKE if path == "pass" else 0
    assert (report.evidence["calls_saved"], report.evidence["calls_pass"]) == (3 * ALIKE - num_other, num_other)
    assert len(long_way) == (2 * num_other or 1)  # the one after each, too


@pytest.mark.parametrize("what", ["vmap", "grad", "trace"])
def test_a_transform_is_noticed(what: str) -> None:
    model = Model(nn.BatchNorm1d(C, track_running_stats=False))
    x, received = batch(), []

    def transformed() -> None:
        if what == "vmap":
            torch.func.vmap(model)(torch.stack([x, x]))
        elif what == "grad":
            torch.func.grad(lambda x: model(x).square().sum())(x)
        else:
            torch.jit.trace(model, x, check_trace=False)

    with BatchNormTracker(model) as tracker:
        for _ in range(ALIKE):
            received.append(batch())
            model(received[-1])
            transformed()
        report = tracker.report()["norm"]
    mean, _ = reference(received)
    assert report.num_batches == ALIKE
    assert report.evidence["calls_skipped"] >= ALIKE
    np.testing.assert_allclose(report.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_noticed(use_reentrant: bool) -> None:
    model, received = Model(nn.BatchNorm1d(C)), []
    with BatchNormTracker(model) as tracker:
        for _ in range(ALIKE):
            received += [batch(), batch()]
            model(received[-2])
            y = checkpoint(model, received[-1].requires_grad_(), use_reentrant=use_reentrant)
            y.square().sum().backward()
        report = tracker.report()["norm"]
    mean, _ = reference([x.detach() for x in received])
    assert report.num_batches == 2 * ALIKE
    np.testing.assert_allclose(report.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)


def test_what_a_backward_pass_makes_again_is_noticed_after_calls_that_went_the_short_way(
    long_way: list[LayerHook],
) -> None:
    model, received = Model(nn.BatchNorm1d(C)), []
    with BatchNormTracker(model) as tracker:
        for _ in range(ALIKE):
            received += [batch().requires_grad_(), batch()]
            remade = checkpoint(model, received[-2], use_reentrant=True)
            (remade.sum() + model(received[-1]).sum() + model(received[-1]).sum()).backward()
            received.append(received[-1])
        assert len(long_way) == 3 * ALIKE  # those without a graph, the ones after them, and those made again
        report = tracker.report()["norm"]
    mean, _ = reference([x.detach() for x in received])
    assert report.num_batches == 3 * ALIKE
    np.testing.assert_allclose(report.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)


def test_what_is_not_to_count_is_noticed(long_way: list[LayerHook]) -> None:
    model, received = Model(nn.BatchNorm1d(C)), []
    with BatchNormTracker(model) as tracker:
        for _ in range(ALIKE):
            received.append(batch())
            model(received[-1])
            with tracker.paused():
                model(batch())
            model.eval()
            model(batch())
            model.norm.train()  # as a pass that recalibrates does
            model(batch())
            model.train()
        report = tracker.report()["norm"]
    mean, _ = reference(received)
    assert report.num_batches == ALIKE
    assert len(long_way) == 2 * ALIKE  # those within a pause, and those right after it
    np.testing.assert_allclose(report.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)


def test_a_pass_can_be_asked_for_between_two_calls() -> None:
    model = Model(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        for _ in range(ALIKE):
            model(batch() * 1e-3 + 1e3)
        tracker.reset()  # which finds a mean that is large beside the standard deviation
        for _ in range(ALIKE):
            model(batch() * 1e-3 + 1e3)
        report = tracker.report()["norm"]
    assert (report.evidence["calls_saved"], report.evidence["calls_pass"]) == (0, ALIKE)


def test_an_update_is_due_at_the_end_of_the_step_that_filled_a_stash(long_way: list[LayerHook]) -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, C), nn.BatchNorm1d(C))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with BatchNormTracker(model) as tracker:
        waiting = []
        for _ in range(2 * STASH_LIMIT + 3):
            model(batch()).sum().backward()
            optimizer.step()
            waiting.append({len(layer.hook.stash) for layer in tracker._recorder.layers})
        assert waiting[STASH_LIMIT - 2 : STASH_LIMIT + 1] == [{STASH_LIMIT - 1}, {0}, {1}]
        limit = tracker._recorder.layers[0].hook.limit  # beside a window
        assert waiting[-4:] == [{calls % limit} for calls in range(STASH_LIMIT, STASH_LIMIT + 4)]
        assert len(long_way) == 2  # the first calls
        assert {layer.num_batches for layer in tracker.report().values()} == {2 * STASH_LIMIT + 3}


class Within(nn.BatchNorm1d):
    """Something intercepts what autograd saves within its forward alone."""

    how = "checkpoint"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpoint":
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]
        if self.how == "none":
            return super().forward(x)
        kept: list[Tensor | None] = []

        def pack(tensor: Tensor) -> int:
            kept.append(tensor)
            return len(kept) - 1

        def unpack_once(index: int) -> Tensor | None:
            tensor, kept[index] = kept[index], None
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack_once):
            return super().forward(x)


def checkpointed_by_patch(layer: nn.Module) -> None:
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def checkpointed_by_hooks(layer: nn.Module) -> None:
    composable_checkpoint(layer)


def checkpointed_by_class(layer: nn.Module) -> None:
    layer.__class__ = Within


def offloaded(layer: nn.Module) -> None:
    layer.__class__ = Within
    layer.how = "offload"


@goes_the_short_way
@pytest.mark.parametrize("before", [0, ALIKE], ids=["from the start", "later"])
@pytest.mark.parametrize("intercept", [checkpointed_by_patch, checkpointed_by_hooks, checkpointed_by_class, offloaded])
@pytest.mark.parametrize("subclass", [False, True])
def test_what_the_layers_own_forward_intercepts_is_not_read(
    intercept: Callable[[nn.Module], None], before: int, subclass: bool
) -> None:
    """To read it would recompute the call, update the running statistics once more, or take what comes but once."""
    layer: nn.BatchNorm1d = Within(C) if subclass else nn.BatchNorm1d(C)
    layer.how = "none"
    model = Model(layer)
    twin = copy.deepcopy(model)
    received = [batch() for _ in range(before + ALIKE)]
    with BatchNormTracker(model) as tracker:
        for index, x in enumerate(received):
            if index == before:
                for each in (model, twin):
                    del each.norm.how
                    intercept(each.norm)
            for each in (model, twin):
                each(x).square().sum().backward()
        report = tracker.report()["norm"]
    for own, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=0)
    mean, _ = reference(received)
    assert (report.evidence["calls_saved"], report.evidence["calls_pass"]) == (before, ALIKE)
    np.testing.assert_allclose(report.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["restored", "double", "no_grad"])
def test_half_as_many_calls_wait_in_float64(how: str) -> None:
    model = Model(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        hook = tracker._recorder.layers[0].hook
        model(batch())
        if how != "no_grad":
            model.double()
        if how == "restored":
            model(batch().double())
            tracker.load_state_dict(tracker.state_dict())
        for _ in range(2 * STASH_LIMIT):
            with torch.set_grad_enabled(how != "no_grad"):
                model(batch().to(model.norm.weight.dtype))
            assert len(hook.stash) <= STASH_LIMIT // 2
        tracker.reset()
        model.float()
        most = 0
        for _ in range(2 * STASH_LIMIT):
            model(batch())
            most = max(most, len(hook.stash))
        assert most == STASH_LIMIT


@pytest.mark.parametrize("kind", ["attribute", "parameter"])
def test_running_statistics_that_are_no_buffers_are_updated_too(kind: str) -> None:
    model = Model(nn.BatchNorm1d(C))
    for name in ("running_mean", "running_var"):
        values = getattr(model.norm, name)
        delattr(model.norm, name)
        setattr(model.norm, name, values if kind == "attribute" else nn.Parameter(values, requires_grad=False))
    with BatchNormTracker(model) as tracker:
        for _ in range(60):
            model(batch())
        report = tracker.report()["norm"]
    assert "not-updating" not in report.flags
    assert report.evidence["updates_per_call"] == 1


def test_a_cumulative_average_without_a_counter_is_none() -> None:
    model = Model(nn.BatchNorm1d(C, momentum=None))
    model.norm.num_batches_tracked = None
    with BatchNormTracker(model) as tracker:
        for _ in range(20):
            model(batch() + 3)
        report = tracker.report()["norm"]
    assert not model.norm.running_mean.any()
    assert report.verdict == "stale"


class Named(nn.BatchNorm1d):
    """Takes other things, too, or nothing."""

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None) -> Any:
        return 0 if x is None else super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_an_input_by_keyword_is_found_among_others(training: bool) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.plain = Named(C).train(training), nn.BatchNorm1d(C).train(training)

        def forward(self, x: Tensor) -> None:
            self.norm(mask=torch.zeros_like(x), x=x)
            self.plain(input=x)
            self.norm()

    model, received = Root(), [batch() for _ in range(ALIKE)]
    model.norm.train(training)
    with BatchNormTracker(model) as tracker:
        for x in received:
            model(x)
        report = tracker.report()
    mean, _ = reference(received)
    for layer in report.values():
        np.testing.assert_allclose(layer.population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    assert report["norm"].evidence["calls_skipped"] == ALIKE
