"""What monitoring costs in operations and memory: counted, not timed."""

from __future__ import annotations

import contextlib
import functools
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT

STEPS = 80
C = 8


class Operations(TorchDispatchMode):
    """Every operation that reaches a device, and whether it copies to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies_elsewhere: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.names.append(str(func))
        device = kwargs.get("device")
        if device is not None and any(isinstance(arg, Tensor) and arg.device != torch.device(device) for arg in args):
            self.copies_elsewhere.append(str(func))
        return func(*args, **kwargs)


def chain(depth: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)) for _ in range(depth)])


@functools.cache
def operations_of_training(depth: int, capture: str | None) -> Operations:
    """Of one that is monitored in this way, or not at all; several tests look at each."""
    torch.manual_seed(0)
    model = chain(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with contextlib.nullcontext() if capture is None else BatchNormTracker(model, capture=capture) as tracker:
        with Operations() as operations:
            for _ in range(STEPS):
                optimizer.zero_grad()
                model(torch.randn(4, C)).square().mean().backward()
                optimizer.step()
        if tracker is not None:
            for layer in tracker.report().values():
                path = "calls_saved" if capture == "auto" else "calls_pass"
                assert layer.evidence[path] == layer.num_batches == STEPS
    return operations


def extra_operations_a_step(depth: int, capture: str = "auto") -> float:
    with_, without = operations_of_training(depth, capture), operations_of_training(depth, None)
    return (len(with_.names) - len(without.names)) / STEPS


@pytest.mark.slow
def test_a_training_step_has_few_more_operations_however_deep_the_network() -> None:
    shallow, deep = extra_operations_a_step(5), extra_operations_a_step(25)
    print(f"operations added to a training step: {shallow:.2f} with 5 layers, {deep:.2f} with 25")
    assert 0 < shallow <= 5
    assert deep <= shallow + 0.1


@pytest.mark.slow
def test_a_pass_is_a_few_operations_for_each_layer() -> None:
    by_depth = {depth: extra_operations_a_step(depth, "pass") for depth in (5, 10)}
    assert by_depth[10] - by_depth[5] <= 5 * 12


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_training_steps_wait_for_no_device(capture: str) -> None:
    with_, without = operations_of_training(5, capture), operations_of_training(5, None)
    added = set(with_.names) - set(without.names)
    assert added
    forbidden = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default")
    assert not [name for name in with_.names if any(name.split(".")[1].startswith(word) for word in forbidden)]
    assert not with_.copies_elsewhere


def test_a_value_that_is_read_would_be_noticed() -> None:
    with Operations() as operations:
        torch.ones(1).item()
        bool(torch.ones(1) > 0)
        torch.ones(1).to("meta")
    assert operations.names.count("aten._local_scalar_dense.default") == 2
    assert operations.copies_elsewhere == ["aten._to_copy.default"]


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["auto", "pass"])
def test_training_steps_do_without_the_values_on_the_device(capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bnmonitor.capture.layer_hook.is_abstract", lambda x: False)  # that would skip them
    model = chain(2)
    with BatchNormTracker(model, capture=capture) as tracker:
        model.to("meta")  # a device that raises if a value is copied from it
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with pytest.raises(NotImplementedError):
            model(torch.randn(4, C, device="meta")).cpu()
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(4, C, device="meta")).square().mean().backward()
            optimizer.step()
        assert [layer.num_calls for layer in tracker._recorder.layers] == [STEPS + 1] * 2
        assert all(
            len(layer.hook.stash) < STASH_LIMIT < STEPS for layer in tracker._recorder.layers
        )  # they were merged
        assert list(tracker._recorder.windows.by_device) == [torch.device("meta")]


def test_a_call_read_off_the_kernel_adds_no_operation_at_all() -> None:
    def operations_of_forward(monitored: bool) -> tuple[list[str], int]:
        torch.manual_seed(0)
        model, x = chain(3), torch.randn(4, C)
        tracker = BatchNormTracker(model)
        tracker.see_inputs(())  # what the model is given is looked at, too: this is about its layers
        with tracker if monitored else contextlib.nullcontext(), Operations() as operations:
            for _ in range(20):
                model(x)
        return operations.names, sum(layer.num_batches for layer in tracker.report().values())

    plain, _ = operations_of_forward(monitored=False)
    monitored, counted = operations_of_forward(monitored=True)
    assert counted == 60
    assert monitored == plain


# --- memory -----------------------------------------------------------------------------------------------------------


def bytes_held(tracker: BatchNormTracker) -> int:
    """Bytes of every tensor and array that can be reached from a tracker and is not the model's own."""
    storages: dict[int, int] = {}
    seen = {id(buffer) for layer in tracker._recorder.layers for buffer in layer.module.buffers()}
    pending: list[Any] = [tracker]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module | type | weakref.ref):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, np.ndarray):
            storages[value.__array_interface__["data"][0]] = value.nbytes
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            pending += value
        elif type(value).__module__.startswith("lightning_bnmonitor"):
            pending.append(vars(value))
    return sum(storages.values())


def test_what_is_counted_as_held_includes_state_and_what_waits() -> None:
    model = chain(2)
    with BatchNormTracker(model) as tracker:
        buffers_at_the_start = bytes_held(tracker)
        assert buffers_at_the_start == 2 * 2 * C * (8 + 4)  # running statistics, and weights and biases
        tracker.see_inputs(())
        model(torch.randn(4, C))
        assert bytes_held(tracker) - buffers_at_the_start == 2 * 2 * C * 4
        tracker.flush()
        assert (
            bytes_held(tracker)
            >= sum(w._channels.untyped_storage().nbytes() for w in tracker._recorder.windows.by_device.values())
            > 0
        )


class Skipping(nn.Module):
    """A residual network whose layers are skipped at random."""

    def __init__(self, num: int, width: int, probability: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(num))
        self.width, self.probability = width, probability

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() >= self.probability:
                x = x + layer(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "width", "probability", "capture", "dtype"),
    [
        (6, 512, 0.0, "auto", torch.float32),
        (6, 512, 0.5, "pass", torch.float32),
        (6, 512, 0.5, "auto", torch.float64),
        (20, 32, 0.0, "pass", torch.float32),
        (20, 32, 0.5, "auto", torch.float32),
        (20, 32, 0.0, "auto", torch.float64),
        (20, 32, 0.5, "auto", torch.float64),
        (1, 1, 0.0, "auto", torch.float64),
        (1, 1, 0.5, "pass", torch.float32),
    ],
)
def test_the_tracker_never_holds_more_than_a_kibibyte_a_channel_and_64_more(
    num: int, width: int, probability: float, capture: str, dtype: torch.dtype
) -> None:
    random.seed(0)
    model = Skipping(num, width, probability).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    most, closed = 0, []
    with BatchNormTracker(model, capture=capture) as tracker:
        for step in range(140):
            model(torch.randn(2, width, requires_grad=True, dtype=dtype)).sum().backward()
            most = max(most, bytes_held(tracker))
            optimizer.step()
            if step in (40, 60):
                tracker.close()
                closed.append(bytes_held(tracker))
                tracker.reset()
    assert 8 * num * width < most <= 1024 * num * width + 64 * 1024
    assert 8 * num * width < max(closed) <= 1024 * num * width + 64 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "width", "capture", "dtype"),
    [
        (6, 512, "auto", torch.float32),
        (6, 512, "auto", torch.float64),
        (6, 512, "pass", torch.float32),
        (20, 32, "auto", torch.float32),
        (1, 1, "pass", torch.float64),
    ],
)
@pytest.mark.parametrize("lengths", [[6, 7, 7, 30, 5], [7] * 4, [1] * 12, [6, 7, 80]])
def test_short_windows_that_are_kept_fit_into_that(
    lengths: list[int], num: int, width: int, capture: str, dtype: torch.dtype
) -> None:
    model = Skipping(num, width, 0.0).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    most = kept = 0
    with BatchNormTracker(model, capture=capture) as tracker:
        for length in lengths:
            tracker.reset()
            kept = max(kept, sum(w.nbytes for layer in tracker._recorder.layers for w in layer.earlier))
            for _ in range(length):
                model(torch.randn(2, width, requires_grad=True, dtype=dtype)).sum().backward()
                most = max(most, bytes_held(tracker))
                optimizer.step()
            tracker.close()
            most = max(most, bytes_held(tracker))
    print(f"{kept / (num * width):.0f} bytes a channel of earlier windows, {most / (num * width):.0f} in all")
    assert 100 * num * width < kept
    assert most <= 1024 * num * width + 64 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "dtype", "expected"),
    [
        ([8], torch.float32, STASH_LIMIT),
        ([8], torch.float64, STASH_LIMIT // 2),
        ([20_000], torch.float32, 53),  # (1024 - 600) / 8 bytes, and little more
        ([20_000], torch.float64, 26),
        ([64] * 100, torch.float32, 52),  # 850 bytes a layer less
        ([1] * 120, torch.float32, STASH_LIMIT // 2),
    ],
)
def test_of_wide_layers_fewer_calls_wait_once_they_have_a_window(
    widths: list[int], dtype: torch.dtype, expected: int
) -> None:
    layers, most = nn.ModuleList(nn.BatchNorm1d(width, dtype=dtype) for width in widths), 0
    with BatchNormTracker(layers) as tracker:
        for call in range(1 + STASH_LIMIT):
            for layer in layers:
                layer(torch.randn(2, layer.num_features, dtype=dtype))
            if call == 0:
                tracker.flush()
            most = max(most, *(len(layer.hook.stash) for layer in tracker._recorder.layers))
    assert most == expected


@pytest.mark.parametrize("calls_a_step", [1, 3, 50])
def test_what_waits_to_be_merged_is_bounded_however_often_a_layer_is_called(calls_a_step: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    most = 0
    with BatchNormTracker(model) as tracker:
        for _ in range(70):
            for _ in range(calls_a_step):
                model(torch.randn(4, C))
                most = max(most, *(len(layer.hook.stash) for layer in tracker._recorder.layers))
            optimizer.step()
    assert 1 < most <= STASH_LIMIT
    assert tracker.report()["0"].num_batches == 70 * calls_a_step


class Token:
    """Something that can be referred to weakly, and lives as long as a node of the graph."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Token) -> Tensor:
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Witnessed(nn.Module):
    """A BatchNorm layer that remembers weakly what goes in and out of it, and the graph that it is part of."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear, self.layer, self.after = nn.Linear(C, C), layer, nn.Linear(C, C)
        self.witnesses: list[weakref.ref[Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        token = Token()
        received = Marked.apply(self.linear(x), token)
        returned = self.layer(received)
        self.witnesses += map(weakref.ref, (token, received, received.untyped_storage(), returned))
        return self.after(returned)


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "no backward"])
@pytest.mark.parametrize(
    ("layer", "capture"),
    [(nn.BatchNorm1d(C), "auto"), (nn.BatchNorm1d(C), "pass"), (nn.BatchNorm1d(C).eval(), "auto")],
    ids=["saved", "pass", "frozen"],
)
def test_no_activation_and_no_graph_outlives_its_step(layer: nn.Module, capture: str, backward: bool) -> None:
    model = Witnessed(layer)
    with BatchNormTracker(model, capture=capture) as tracker:
        for _ in range(5):
            loss = model(torch.randn(4, C)).square().sum()
            assert model.witnesses[-4]() is not None
            if backward:
                loss.backward()
            del loss
            assert [witness() for witness in model.witnesses] == [None] * len(model.witnesses)
        assert [len(layer.hook.stash) for layer in tracker._recorder.layers] == [5]
        for mean, spread, *_ in tracker._recorder.layers[0].hook.stash:
            for values in (mean, spread):
                assert values.grad_fn is None
                assert not values.requires_grad
                assert values.untyped_storage().nbytes() <= 8 * C


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_is_not_undone(use_reentrant: bool) -> None:
    model = Witnessed(nn.BatchNorm1d(C))
    with BatchNormTracker(model) as tracker:
        for _ in range(3):
            y = checkpoint(model, torch.randn(4, C, requires_grad=True), use_reentrant=use_reentrant)
            _, received, storage, returned = model.witnesses[-4:]
            assert received() is returned() is storage() is None
            y.square().sum().backward()
        del y
        assert [witness() for witness in model.witnesses] == [None] * len(model.witnesses)
    assert tracker.report()["layer"].num_batches == 3
