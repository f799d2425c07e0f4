"""CUDA graphs: those of ``torch.compile`` are exact, and of those that a user captures nothing wrong is recorded."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker, Report
from tests.gpu.training import ON_CUDA, Received, assert_exact, images, needs_cuda, network, train, training_step

STEPS = 120  # in which there is an update, and some that wait
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class CompiledRun:
    """A training of a compiled model whose weights stay: so its layers receive what an eager one's do."""

    def __init__(self, mode: str) -> None:
        torch._dynamo.reset()
        model = torch.compile(network(), mode=mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        batches = [images(step) for step in range(STEPS)]
        with BatchNormTracker(model) as tracker, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step, x in enumerate(batches):
                if ON_CUDA:
                    torch.cuda.set_sync_debug_mode("default" if step < 30 else "warn")
                training_step(model, optimizer, x)
            if ON_CUDA:
                torch.cuda.set_sync_debug_mode("default")
        waits = [each for each in caught if "called a synchronizing" in str(each.message)]
        self.waits = {f"{each.filename}:{each.lineno}" for each in waits}
        self.report = tracker.report()
        eager = network()
        self.received = Received(eager)
        train(eager, STEPS, lr=0.0)
        torch._dynamo.reset()


@pytest.fixture(scope="module", params=["default", "reduce-overhead"])
def run(request):
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        return CompiledRun(request.param)


def test_compiled_code_is_exact(run):
    assert_exact(run.report, run.received.batches, "traced", mean_bound=1e-5, var_bound=1e-4)


@needs_cuda
def test_compiled_steps_never_wait_for_the_device(run):
    assert not run.waits


# ------------------------------------------------------------------------------------------ captured by those who train


def eager_steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int) -> None:
    """As PyTorch wants it before a capture: on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(steps):
            x.copy_(images(step))
            training_step(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(stream)


def captured_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training_step(model, optimizer, x)
    return graph


def assert_replays_unseen(report: Report, received: Received) -> None:
    """The population is that of the eager calls, and the call that was captured is reported as not looked at."""
    assert_exact(report, received.batches)
    for layer in report.values():
        assert layer.evidence["calls_skipped"] == 1
        assert "could not be looked at" in layer.explanation


@needs_cuda
@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_replays_of_a_captured_step_are_not_counted(capture):
    model, x = network(), torch.empty_like(images(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    received = Received(model)
    with BatchNormTracker(model, capture=capture) as tracker:
        eager_steps(model, optimizer, x, 11)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            graph = captured_step(model, optimizer, x)
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(100):
            x.add_(1)
            graph.replay()
            tracker.step()
        torch.cuda.set_sync_debug_mode("default")
    assert sum("replays run no hooks" in str(each.message) for each in told) == 1  # of three layers
    assert_replays_unseen(tracker.report(), received)


@needs_cuda
@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_eager_steps_after_a_capture_count_again(capture):
    model, x = network(), torch.empty_like(images(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    received = Received(model)
    with BatchNormTracker(model, capture=capture) as tracker:
        eager_steps(model, optimizer, x, 11)
        graph = captured_step(model, optimizer, x)
        for step in range(90):
            training_step(model, optimizer, images(step))
            graph.replay()
    assert_replays_unseen(tracker.report(), received)


@needs_cuda
@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_an_update_that_is_due_does_not_get_into_a_capture(capture):
    model, x = network(), images(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    received = Received(model)
    with BatchNormTracker(model, capture=capture) as tracker:
        eager_steps(model, optimizer, x, 3)
        while not tracker._recorder.gate.is_full:  # without the steps of an optimizer, after which it would come
            model(x).square().mean().backward()
        model.zero_grad()  # or the graph writes to gradients that are not its own
        captured_step(model, optimizer, x).replay()
        tracker.step()
    assert_replays_unseen(tracker.report(), received)


@needs_cuda
@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_graphed_callables(capture):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    received = Received(model)
    with BatchNormTracker(model, capture=capture) as tracker:
        train(model, 5)
        graphed = torch.cuda.make_graphed_callables(model, (images(5),))  # calls it three times before
        for step in range(100):
            training_step(graphed, optimizer, images(step))
    assert len(received.batches["1"]) == 8
    assert_replays_unseen(tracker.report(), received)


@needs_cuda
def test_a_tracker_that_comes_after_the_capture_sees_nothing():
    model, x = network(), images(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    eager_steps(model, optimizer, x, 3)
    graph = captured_step(model, optimizer, x)
    with BatchNormTracker(model) as tracker:
        for _ in range(100):
            graph.replay()
            tracker.step()
    assert {layer.num_batches for layer in tracker.report().values()} == {0}
