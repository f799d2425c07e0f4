"""What is reported, against float64 two-pass moments of what the layers received."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, LayerReport
from lightning_bnmonitor.compat import HAS_UNPACK_HOOKS

LAW = settings(max_examples=100, deadline=None)
C = 5

LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...], torch.memory_format]] = {
    "BatchNorm1d (N, C)": (nn.BatchNorm1d, (), torch.contiguous_format),
    "BatchNorm1d (N, C, L)": (nn.BatchNorm1d, (7,), torch.contiguous_format),
    "BatchNorm2d": (nn.BatchNorm2d, (4, 3), torch.contiguous_format),
    "BatchNorm3d": (nn.BatchNorm3d, (2, 3, 2), torch.contiguous_format),
    "BatchNorm2d channels-last": (nn.BatchNorm2d, (4, 3), torch.channels_last),
    "BatchNorm3d channels-last": (nn.BatchNorm3d, (2, 3, 2), torch.channels_last_3d),
}


class Received:
    """What a layer receives, in float64, by a pre-hook of the test's own.

    It is one of all modules: a layer with hooks of its own is looked at more closely.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.batches: list[np.ndarray] = []
        self.listening = True
        of_layer, recorder = weakref.ref(layer), weakref.ref(self)

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if module is of_layer() and (alive := recorder()) is not None and alive.listening:
                alive.batches.append(args[0].detach().clone().double().numpy())

        weakref.finalize(self, register_module_forward_pre_hook(record).remove)

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """While a backward pass may compute a forward again."""
        self.listening = False
        yield
        self.listening = True

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and unbiased variance of all values, in two passes."""
        values = np.concatenate(
            [np.moveaxis(batch, 1, 0).reshape(batch.shape[1], -1) for batch in self.batches], axis=1
        )
        mean = values.mean(axis=1)
        return mean, np.square(values - mean[:, None]).sum(axis=1) / (values.shape[1] - 1)

    @property
    def num_samples(self) -> int:
        return sum(batch.size // batch.shape[1] for batch in self.batches)


def errors(layer: LayerReport, received: Received) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error of the mean in population standard deviations, that of the variance, and |mean| / std."""
    assert layer.num_batches == len(received.batches)
    assert layer.num_samples == received.num_samples
    mean, var = received.moments()
    std = np.sqrt(var)
    mean_error = np.abs(layer.population_mean.numpy() - mean) / std
    return mean_error, np.abs(layer.population_var.numpy() - var), np.abs(mean) / std


def assert_saved_bounds(
    layer: LayerReport, received: Received, *, serial: bool = False, single_batch: bool = False
) -> None:
    """A serial float32 sum, as the CPU makes in channels-last format, is 40 times less exact; a batch alone 4 times."""
    mean_error, var_error, ratio = errors(layer, received)
    _, var = received.moments()
    factor = 4 if single_batch else 1
    assert np.all(mean_error <= 2e-8 * (1 + ratio) * factor * (40 if serial else 1))
    assert np.all(var_error <= 2e-6 * (var + layer.eps) * factor)


def assert_pass_bounds(layer: LayerReport, received: Received, bound: float = 1e-6) -> None:
    mean_error, var_error, _ = errors(layer, received)
    _, var = received.moments()
    assert np.all(mean_error <= bound)
    assert np.all(var_error <= bound * var)


def assert_path(layer: LayerReport, path: str, calls: int) -> None:
    counted = {name: count for name, count in layer.evidence.items() if name.startswith("calls_") and count}
    assert counted == {f"calls_{path}": calls}


def values(
    kind: str, num: int, ratio: float, dtype: torch.dtype = torch.float32, batch: int = 8, std: float = 1.0
) -> list[Tensor]:
    """Batches for a kind of layer, with channel means of up to ``ratio`` standard deviations of either sign."""
    _, positions, memory_format = LAYERS[kind]
    centre = torch.linspace(-1, 1, C, dtype=torch.float64).mul(ratio).view(1, C, *[1] * len(positions))
    shape = (batch, C, *positions)
    drawn = [((torch.randn(shape, dtype=torch.float64) + centre) * std).to(dtype) for _ in range(num)]
    return [x.contiguous(memory_format=memory_format) for x in drawn]


def run(layer: nn.Module, batches: list[Tensor], capture: str = "auto") -> tuple[LayerReport, Received]:
    """What is reported of a layer alone in a model that receives these batches in training mode."""
    model, received = nn.Sequential(layer), Received(layer)
    with BatchNormTracker(model, capture=capture) as tracker:
        for x in batches:
            model(x)
    return tracker.report()["0"], received


# --- read off the kernel ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 9.0, 90.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_the_kernel_saved_is_exact_enough(kind: str, ratio: float) -> None:
    torch.manual_seed(0)
    layer, received = run(LAYERS[kind][0](C), values(kind, 40, ratio))
    assert_path(layer, "saved", 40)
    assert_saved_bounds(layer, received, serial="last" in kind or kind.endswith("(N, C)"))


@pytest.mark.parametrize("ratio", [0.0, 9.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_window_of_a_single_batch_is_as_exact(kind: str, ratio: float) -> None:
    torch.manual_seed(0)
    layer, received = run(LAYERS[kind][0](C), values(kind, 1, ratio))
    assert_path(layer, "saved", 1)
    assert_saved_bounds(layer, received, serial="last" in kind or kind.endswith("(N, C)"), single_batch=True)


PRACTICE = {
    "images": ((32, 16, 32, 32), torch.contiguous_format, "saved", False),
    "small images channels-last": ((64, 16, 8, 8), torch.channels_last, "saved", True),
    "images channels-last": ((32, 16, 32, 32), torch.channels_last, "pass", True),
    "a batch of rows": ((64, 16), torch.contiguous_format, "saved", True),
    "rows": ((4096, 16), torch.contiguous_format, "saved", True),
    "pooled images": ((4096, 16, 1, 1), torch.contiguous_format, "saved", True),
    "more rows": ((4097, 16), torch.contiguous_format, "pass", True),
}


@pytest.mark.parametrize("num_batches", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ratio", [0.0, 9.0])
@pytest.mark.parametrize("case", PRACTICE)
def test_batches_of_a_size_as_in_practice_are_as_exact(case: str, ratio: float, num_batches: int) -> None:
    shape, memory_format, path, serial = PRACTICE[case]
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])
    batches = [(torch.randn(shape) + ratio).contiguous(memory_format=memory_format) for _ in range(num_batches)]
    reported, received = run(layer, batches)
    assert_path(reported, path, num_batches)
    if path == "saved":
        assert_saved_bounds(reported, received, serial=serial, single_batch=num_batches == 1)
    else:
        assert_pass_bounds(reported, received)


LAYOUTS: dict[str, Callable[[float], Tensor]] = {
    "permuted": lambda ratio: (torch.randn(16, 30, C, 30) + ratio).permute(0, 2, 1, 3),
    "sliced": lambda ratio: (torch.randn(16, C, 60, 60) + ratio)[:, :, ::2, ::2],
    "channels sliced": lambda ratio: (torch.randn(16, 2 * C, 8, 8) + ratio)[:, ::2],
    "expanded": lambda ratio: (torch.randn(16, C, 1, 8) + ratio).expand(-1, -1, 8, -1),
    "large and permuted": lambda ratio: (torch.randn(32, 28, C, 28) + ratio).permute(0, 2, 1, 3),
}


@pytest.mark.parametrize("ratio", [0.0, 9.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_that_are_views_are_as_exact_as_in_channels_last(layout: str, ratio: float) -> None:
    torch.manual_seed(0)
    batches = [LAYOUTS[layout](ratio) for _ in range(20)]
    layer, received = run(nn.BatchNorm2d(C), batches)
    large = batches[0].numel() // C > 4096
    assert_path(layer, "pass" if large else "saved", 20)
    if large:
        assert_pass_bounds(layer, received)
    else:
        assert_saved_bounds(layer, received, serial=True)


Scenario = Callable[[], tuple[nn.Module, nn.Module, Callable[[Received], None], int]]
"""A model, the layer in it to look at, how it is trained, and how many calls of the layer that makes."""


def learn(loss: Tensor, received: Received) -> None:
    with received.deaf():
        loss.float().square().mean().backward()


def training(model: nn.Module, batches: list[Tensor]) -> Callable[[Received], None]:
    def train(received: Received) -> None:
        for x in batches:
            learn(model(x), received)

    return train


def without_affine() -> tuple:
    layer = nn.BatchNorm2d(C, affine=False)
    model = nn.Sequential(nn.Conv2d(3, C, 3), layer)
    return model, layer, training(model, [torch.randn(6, 3, 5, 5) for _ in range(20)]), 20


def without_affine_but_with_an_input_that_requires_grad() -> tuple:
    layer = nn.BatchNorm1d(C, affine=False)
    model = nn.Sequential(layer)
    return model, layer, training(model, [torch.randn(6, C, requires_grad=True) for _ in range(20)]), 20


def cumulative_average() -> tuple:
    layer = nn.BatchNorm2d(C, momentum=None)
    model = nn.Sequential(nn.Conv2d(3, C, 3), layer, nn.ReLU(inplace=True))
    return model, layer, training(model, [torch.randn(6, 3, 5, 5) for _ in range(20)]), 20


def no_running_stats() -> tuple:
    layer = nn.BatchNorm1d(C, track_running_stats=False)
    model = nn.Sequential(nn.Linear(3, C), layer)
    return model, layer, training(model, [torch.randn(6, 3) for _ in range(20)]), 20


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(C, C), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(self.bn(x)) * 3 + 1)


def called_twice_a_step() -> tuple:
    model = Twice()
    return model, model.bn, training(model, [torch.randn(6, C) for _ in range(20)]), 40


def unequal_batches() -> tuple:
    layer = nn.BatchNorm2d(C)
    model = nn.Sequential(layer, nn.Conv2d(C, 2, 3))
    return model, layer, training(model, [torch.randn(n, C, 5, 5) + n for n in [16] * 19 + [2]]), 20


def batches_of_growing_images() -> tuple:
    layer = nn.BatchNorm2d(C)
    model = nn.Sequential(layer, nn.Conv2d(C, 2, 3))
    return model, layer, training(model, [torch.randn(4, C, 3 + n % 7, 3) - n / 9 for n in range(40)]), 40


def gradient_accumulation() -> tuple:
    layer = nn.BatchNorm1d(C)
    model = nn.Sequential(nn.Linear(3, C), layer, nn.Linear(C, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(received: Received) -> None:
        for step in range(48):
            learn(model(torch.randn(6, 3)), received)
            if step % 8 == 7:
                optimizer.step()
                optimizer.zero_grad()

    return model, layer, train, 48


def moving_weights() -> tuple:
    layer = nn.BatchNorm1d(C, momentum=0.3)
    model = nn.Sequential(nn.Linear(3, C), layer, nn.Linear(C, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def train(received: Received) -> None:
        for _ in range(60):
            optimizer.zero_grad()
            learn(model(torch.randn(16, 3)) - 1, received)
            optimizer.step()

    return model, layer, train, 60


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def activation_within_the_layer() -> tuple:
    layer = BatchNormReLU(C)
    model = nn.Sequential(nn.Conv2d(3, C, 3), layer)
    return model, layer, training(model, [torch.randn(6, 3, 5, 5) for _ in range(20)]), 20


def hook_that_replaces_the_output() -> tuple:
    layer = nn.BatchNorm2d(C)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    model = nn.Sequential(nn.Conv2d(3, C, 3), layer)
    return model, layer, training(model, [torch.randn(6, 3, 5, 5) for _ in range(20)]), 20


def autocast(dtype: torch.dtype) -> Scenario:
    def scenario() -> tuple:
        layer = nn.BatchNorm1d(C)
        model = nn.Sequential(nn.Linear(3, C), layer, nn.Linear(C, 1))

        def train(received: Received) -> None:
            for _ in range(20):
                with torch.autocast("cpu", dtype=dtype):
                    y = model(torch.randn(6, 3))
                learn(y, received)

        return model, layer, train, 20

    return scenario


def half_inputs(kind: str, dtype: torch.dtype) -> Scenario:
    def scenario() -> tuple:
        layer = LAYERS[kind][0](C)
        model = nn.Sequential(layer)
        return model, layer, training(model, values(kind, 20, 5.0, dtype)), 20

    return scenario


SAVED: dict[str, Scenario] = {
    **({"subclass with an activation": activation_within_the_layer} if HAS_UNPACK_HOOKS else {}),
    "hook that replaces the output": hook_that_replaces_the_output,
    "affine=False": without_affine,
    "affine=False, input requires grad": without_affine_but_with_an_input_that_requires_grad,
    "momentum=None, ReLU in place": cumulative_average,
    "track_running_stats=False": no_running_stats,
    "called twice a step": called_twice_a_step,
    "unequal last batch": unequal_batches,
    "images of many sizes": batches_of_growing_images,
    "gradient accumulation": gradient_accumulation,
    "weights that move": moving_weights,
    "bf16 autocast": autocast(torch.bfloat16),
    "fp16 autocast": autocast(torch.float16),
    **{
        f"{dtype} into {kind}": half_inputs(kind, dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for kind in ("BatchNorm1d (N, C)", "BatchNorm2d", "BatchNorm2d channels-last")
    },
}


@pytest.mark.parametrize("scenario", SAVED.values(), ids=SAVED)
def test_whatever_is_trained_is_read_off_the_kernel_and_exact(scenario: Scenario) -> None:
    torch.manual_seed(1)
    model, module, train, calls = scenario()
    received = Received(module)
    with BatchNormTracker(model) as tracker:
        train(received)
    (layer,) = tracker.report().values()
    assert_path(layer, "saved", calls)
    serial = any(batch.ndim == 2 or not batch.flags.c_contiguous for batch in received.batches)
    assert_saved_bounds(layer, received, serial=serial)


def test_half_inputs_reach_the_layer_under_autocast() -> None:
    seen = set()
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))
    model[1].register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            model(torch.randn(6, 3))
    assert seen == {torch.bfloat16, torch.float16}


# --- by a pass --------------------------------------------------------------------------------------------------------


def with_no_grad() -> tuple:
    layer = nn.BatchNorm1d(C)
    model = nn.Sequential(layer)

    def train(received: Received) -> None:
        for _ in range(20):
            with torch.no_grad():
                model(torch.randn(6, C))

    return model, layer, train, 20


def nothing_requires_grad() -> tuple:
    layer = nn.BatchNorm2d(C, affine=False)
    model = nn.Sequential(layer)

    def train(received: Received) -> None:
        for _ in range(20):
            model(torch.randn(6, C, 3, 3))

    return model, layer, train, 20


def frozen_layer() -> tuple:
    layer = nn.BatchNorm2d(C)
    model = nn.Sequential(nn.Conv2d(3, C, 3), layer).train()
    layer.eval()
    return model, layer, training(model, [torch.randn(6, 3, 5, 5) for _ in range(20)]), 20


def activations_on_the_cpu() -> tuple:
    layer = nn.BatchNorm2d(C)
    model = nn.Sequential(nn.Conv2d(3, C, 3), layer, nn.Conv2d(C, 2, 2))

    def train(received: Received) -> None:
        for _ in range(20):
            with torch.autograd.graph.save_on_cpu():
                y = model(torch.randn(6, 3, 5, 5))
            learn(y, received)

    return model, layer, train, 20


def activation_checkpointing(use_reentrant: bool) -> Scenario:
    def scenario() -> tuple:
        layer = nn.BatchNorm2d(C)
        model = nn.Sequential(nn.Conv2d(3, C, 3), layer, nn.Conv2d(C, 2, 2))

        def train(received: Received) -> None:
            for _ in range(20):
                x = torch.randn(6, 3, 5, 5, requires_grad=True)
                learn(checkpoint(model, x, use_reentrant=use_reentrant), received)

        return model, layer, train, 20

    return scenario


def half_precision_module(dtype: torch.dtype) -> Scenario:
    def scenario() -> tuple:
        layer = nn.BatchNorm2d(C)
        model = nn.Sequential(layer).to(dtype)
        return model, layer, training(model, values("BatchNorm2d", 20, 3.0, dtype)), 20

    return scenario


PASS: dict[str, Scenario] = {
    "no_grad": with_no_grad,
    "nothing requires grad": nothing_requires_grad,
    "frozen layer in a training model": frozen_layer,
    "save_on_cpu": activations_on_the_cpu,
    "reentrant checkpointing": activation_checkpointing(use_reentrant=True),
    "non-reentrant checkpointing": activation_checkpointing(use_reentrant=False),
    "bf16 module": half_precision_module(torch.bfloat16),
    "fp16 module": half_precision_module(torch.float16),
}


@pytest.mark.parametrize("scenario", PASS.values(), ids=PASS)
def test_where_the_kernel_saved_nothing_usable_a_pass_is_made(scenario: Scenario) -> None:
    torch.manual_seed(2)
    model, module, train, calls = scenario()
    received = Received(module)
    with BatchNormTracker(model) as tracker:
        train(received)
    (layer,) = tracker.report().values()
    assert_path(layer, "pass", calls)
    assert_pass_bounds(layer, received)


@pytest.mark.parametrize("scenario", SAVED.values(), ids=SAVED)
def test_a_pass_can_be_had_on_request(scenario: Scenario) -> None:
    torch.manual_seed(3)
    model, module, train, calls = scenario()
    received = Received(module)
    with BatchNormTracker(model, capture="pass") as tracker:
        train(received)
    (layer,) = tracker.report().values()
    assert_path(layer, "pass", calls)
    assert_pass_bounds(layer, received)


@pytest.mark.parametrize(
    ("kind", "ratio", "path"),
    [
        ("BatchNorm2d", 80.0, "saved"),
        ("BatchNorm2d", 120.0, "pass"),
        ("BatchNorm1d (N, C)", 120.0, "pass"),
        ("BatchNorm2d channels-last", 8.0, "saved"),
        ("BatchNorm2d channels-last", 12.0, "pass"),
        ("BatchNorm3d channels-last", 12.0, "pass"),
    ],
)
def test_a_layer_far_from_0_is_passed_over_from_the_next_window_on(kind: str, ratio: float, path: str) -> None:
    torch.manual_seed(4)
    module = LAYERS[kind][0](C)
    model = nn.Sequential(module)
    with BatchNormTracker(model) as tracker:
        for x in values(kind, 10, ratio):
            model(x)
        assert_path(tracker.report()["0"], "saved", 10)

        tracker.reset()
        received = Received(module)
        for x in values(kind, 10, ratio):
            model(x)
        assert_path(tracker.report()["0"], path, 10)
        if path == "pass":
            assert_pass_bounds(tracker.report()["0"], received)

        tracker.reset()
        for x in values(kind, 10, 0.0):
            model(x)
        assert_path(tracker.report()["0"], path, 10)

        tracker.reset()
        for x in values(kind, 10, 0.0):
            model(x)
        assert_path(tracker.report()["0"], "saved", 10)


def test_one_channel_far_from_0_is_enough() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with BatchNormTracker(model) as tracker:
        model(torch.randn(16, 3) + torch.tensor([0.0, 1000.0, 0.0]))
        tracker.reset()
        model(torch.randn(16, 3))
    assert_path(tracker.report()["0"], "pass", 1)
    assert_path(tracker.report()["1"], "saved", 1)


kinds = st.sampled_from(list(LAYERS))
ratios = st.floats(0, 4).map(lambda exponent: 10**exponent) | st.just(0.0)
stds = st.sampled_from([1e-3, 1.0, 1e3])
seeds = st.integers(0, 2**31)


@pytest.mark.slow
@LAW
@given(kind=kinds, ratio=ratios, std=stds, num=st.integers(1, 4), batch=st.integers(2, 9), seed=seeds)
def test_a_pass_is_exact_from_the_first_batch_on_however_far_from_0(
    kind: str, ratio: float, std: float, num: int, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, received = run(LAYERS[kind][0](C), values(kind, num, ratio, batch=batch, std=std), "pass")
    assert_path(layer, "pass", num)
    assert_pass_bounds(layer, received)


@pytest.mark.slow
@LAW
@given(kind=kinds, ratio=ratios, std=stds, num=st.integers(1, 4), batch=st.integers(2, 9), seed=seeds)
def test_float64_models_are_exact_to_float64(
    kind: str, ratio: float, std: float, num: int, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    batches = values(kind, num, ratio, torch.float64, batch=batch, std=std)
    layer, received = run(LAYERS[kind][0](C).double(), batches, "pass")
    assert_path(layer, "pass", num)
    assert_pass_bounds(layer, received, 1e-9)


@pytest.mark.parametrize("outlier", [0.0, 1000.0, -1e5], ids=str)
def test_a_pass_is_as_exact_if_the_first_value_is_unlike_the_others(outlier: float) -> None:
    torch.manual_seed(6)
    x = torch.randn(32, C, 28, 28) + 1000
    x[0, :, 0, 0] = outlier
    layer, received = run(nn.BatchNorm2d(C), [x], "pass")
    assert_pass_bounds(layer, received)


def test_a_channel_that_never_varies_has_its_exact_mean_and_no_variance() -> None:
    x = torch.full((6, 2, 3, 3), 1e4 + 1 / 3)
    layer, _ = run(nn.BatchNorm2d(2), [x, x, x], "pass")
    assert torch.equal(layer.population_mean, x[0, :, 0, 0].double())
    assert torch.equal(layer.population_var, torch.zeros(2, dtype=torch.float64))


# --- the merge --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@LAW
@given(
    kind=kinds,
    ratio=ratios,
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=40),
    eps=st.sampled_from([1e-5, 1e-3]),
    seed=seeds,
)
def test_captured_batches_are_merged_as_in_float64(
    kind: str, ratio: float, sizes: list[int], eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    module = LAYERS[kind][0](C, eps=eps)
    captured: list[tuple[int, np.ndarray, np.ndarray]] = []

    def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        node = output.grad_fn
        mean, invstd = node._saved_result1.double().numpy().copy(), node._saved_result2.double().numpy().copy()
        captured.append((args[0].numel() // C, mean, np.maximum(1 / (invstd * invstd) - eps, 0)))

    module.register_forward_hook(record)
    batches = values(kind, len(sizes), ratio, batch=max(sizes))
    layer, _ = run(module, [x[:n] for x, n in zip(batches, sizes, strict=True)])
    assert_path(layer, "saved", len(sizes))

    counts = np.array([n for n, _, _ in captured], dtype=float)[:, None]
    means, variances = np.stack([mean for _, mean, _ in captured]), np.stack([var for _, _, var in captured])
    shifted = means - means[0]  # exact: the largest term of the sum is no longer the mean itself
    centre = (counts * shifted).sum(axis=0) / counts.sum()
    m2 = (counts * variances).sum(axis=0) + (counts * np.square(shifted - centre)).sum(axis=0)
    var = m2 / (counts.sum() - 1)
    mean_error = np.abs(layer.population_mean.numpy() - (means[0] + centre)) / np.sqrt(var + eps)
    assert np.all(mean_error <= 1e-9)
    assert np.all(np.abs(layer.population_var.numpy() - var) <= 1e-9 * (var + eps))


def test_the_layers_of_a_network_are_each_exact() -> None:
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2),
    )  # fmt: skip
    received = {name: Received(model[int(name)]) for name in ("1", "4", "8")}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with BatchNormTracker(model) as tracker:
        for n in [16] * 70 + [5]:
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(n, 3, 7, 7)), torch.randint(2, (n,))).backward()
            optimizer.step()
    report = tracker.report()
    assert list(report) == ["1", "4", "8"]
    for name, layer in report.items():
        assert_path(layer, "saved", 71)
        assert_saved_bounds(layer, received[name])
        assert torch.equal(layer.running_mean, model[int(name)].running_mean.double())
        assert torch.equal(layer.running_var, model[int(name)].running_var.double())
