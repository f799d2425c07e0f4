"""What recalibration takes as batches, and what it says of those it cannot take."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormTracker, recalibrate
from tests.repair.exact_population import SIZES, C, Recorder, assert_written, data, layers_of
from tests.repair.small_models import Net, single, trained
from tests.repair.unchanged import Unchanged, bits, buffers_of

# -------------------------------------------------------------------------------------------------- what batches may be


class Anything:
    """A batch that is an object."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class TakesNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)

    def forward(self, x: Tensor | Anything, scale: float = 1.0) -> Tensor:
        return self.norm((x.x if isinstance(x, Anything) else x) * scale)


@pytest.mark.parametrize(
    ("wrap", "forward", "scale"),
    [
        (lambda x: x, None, 1),
        (lambda x: (x, torch.zeros(len(x))), None, 1),
        (lambda x: [x, "label"], None, 1),
        (lambda x: {"x": x, "scale": 2.0}, None, 2),
        (lambda x: {"scale": 3.0, "x": x}, None, 3),
        (Anything, None, 1),
        (lambda x: {"image": Anything(x)}, lambda model, batch: model(batch["image"], scale=4), 4),
        (lambda x: ("label", x), lambda model, batch: model(x=batch[1]), 1),
    ],
    ids=["tensor", "tuple", "list", "dict", "dict in another order", "object", "dict, forward", "tuple, forward"],
)
def test_batches_of_any_kind(wrap: Callable[[Tensor], Any], forward: Any, scale: float) -> None:
    model, batches = TakesNames(), data()
    recalibrate(model, [wrap(x) for x in batches], forward)
    assert_written(model.norm, [x * scale for x in batches])


@pytest.mark.parametrize("num_batches", [1, 4, 10, None])
def test_a_generator_is_asked_for_no_more_than_is_needed(num_batches: int | None) -> None:
    model, batches, given_out = single(), data(), []

    def generate() -> Iterator[Tensor]:
        for x in batches:
            given_out.append(x)
            yield x

    generator = generate()
    result = recalibrate(model, generator, num_batches=num_batches)
    used = num_batches or len(batches)
    assert len(given_out) == result.num_batches == used
    assert_written(model[0], batches[:used])
    assert len(list(generator)) == len(batches) - used


def test_a_loader_with_workers() -> None:
    model, x = single(), torch.cat(data())
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=16, shuffle=True, num_workers=2)
    with Unchanged(model):
        result = recalibrate(model, loader)
    assert result.num_batches == len(loader)
    assert_written(model[0], [x])


def test_random_states_are_as_before_whatever_data_and_model_draw() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + torch.rand(()) + random.random() + np.random.rand())

    def generate(fails: bool) -> Iterator[Tensor]:
        for _ in range(10):
            yield torch.randn(4 + random.randrange(3), C) * np.random.rand()
        if fails:
            raise OSError("gone")

    model = Draws()
    with Unchanged(model):
        recalibrate(model, generate(False))
    with Unchanged(model, entirely=True), pytest.raises(OSError, match="gone"):
        recalibrate(model, generate(True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_whether_gradients_are_enabled_plays_no_part(context: Callable[[], Any]) -> None:
    model, batches = trained(Net()), data()
    recorder = Recorder(model)
    with context(), Unchanged(model):
        result = recalibrate(model, batches)
    for name, layer in layers_of(model).items():
        assert_written(layer, recorder[name])
        assert not layer.running_mean.is_inference()
    model(batches[0]).sum().backward()
    result.restore()


def test_a_model_made_in_inference_mode_is_recalibrated_and_restored_anywhere() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm1d(C))
    batches, before = data(), buffers_of(model)
    result = recalibrate(model, batches)
    assert_written(model[0], batches)
    result.restore()
    assert buffers_of(model) == before


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("num_batches", [0, -1, True, False, 2.0, "3", float("nan")])
def test_a_bad_number_of_batches_is_refused(num_batches: Any) -> None:
    model, pulled = single(), iter(data())
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match="`num_batches` must be"):
        recalibrate(model, pulled, num_batches=num_batches)
    assert len(list(pulled)) == len(SIZES)


def test_no_batch_at_all_is_an_error() -> None:
    for model in (single(), trained(Net()).eval()):
        with Unchanged(model, entirely=True), pytest.raises(ValueError, match="gave no batch"):
            recalibrate(model, [])
        with Unchanged(model, entirely=True), pytest.raises(ValueError, match="gave no batch"):
            recalibrate(model, iter(()), num_batches=3)


def test_fewer_batches_than_asked_for_are_used_with_a_warning_that_says_how_many() -> None:
    model, batches = single(), data()
    with Unchanged(model), pytest.warns(UserWarning, match="gave 10 batches, not the 11") as caught:
        recalibrate(model, iter(batches), num_batches=11)
    assert caught[0].filename == __file__
    assert_written(model[0], batches)


def test_that_warning_as_an_error_leaves_the_model_as_it_was() -> None:
    model = single()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Unchanged(model, entirely=True), pytest.raises(UserWarning, match="gave 10"):
            recalibrate(model, data(), num_batches=11)


def test_a_model_without_batchnorm_is_warned_of() -> None:
    model = nn.Sequential(nn.Linear(C, 2), nn.LayerNorm(2))
    with Unchanged(model, entirely=True), pytest.warns(UserWarning, match="No BatchNorm layer.*1 LayerNorm"):
        result = recalibrate(model, data())
    assert len(result.before) == len(result.after) == result.num_batches == 0
    assert "0 BatchNorm layers recalibrated" in str(result)
    result.restore()


@pytest.mark.parametrize("good", [0, 4])
@pytest.mark.parametrize("bad", [torch.randn(4, C + 1), torch.randn(1, C), "text", None, 3, {"y": 1}, ()])
def test_a_batch_that_the_model_cannot_take_is_an_error_that_tells_which(bad: Any, good: int) -> None:
    model = trained(Net())
    with (
        Unchanged(model, entirely=True),
        pytest.raises(RuntimeError, match=rf"batch {good} .*a {type(bad).__name__}") as e,
    ):
        recalibrate(model, [*data()[:good], bad])
    assert e.value.__cause__ is not None
    assert "forward" in str(e.value)


def test_an_empty_batch_has_no_part_in_it() -> None:
    model, batches = single(), data()
    with Unchanged(model):
        recalibrate(model, [*batches[:3], torch.zeros(0, C), *batches[3:]])
    assert_written(model[0], batches)


def test_what_cannot_be_iterated_is_an_error() -> None:
    model = single()
    with Unchanged(model, entirely=True), pytest.raises(TypeError, match="not iterable"):
        recalibrate(model, 3)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, StopIteration, MemoryError])
@pytest.mark.parametrize("place", ["forward", "iterable", "iterable's beginning", "layer"])
@pytest.mark.parametrize("tracked", [False, True])
def test_whatever_is_raised_in_the_pass_the_model_is_as_it_was(
    error: type[BaseException], place: str, tracked: bool
) -> None:
    model, batches = trained(Net()), data()
    model.b.eval()

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            if place == "iterable's beginning":
                raise error("on purpose")
            self.batches = iter(batches)
            return self

        def __next__(self) -> Tensor:
            if place == "iterable" and error is not StopIteration and len(seen) == 4:
                raise error("on purpose")
            return next(self.batches)

    seen: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(len(batch))
        model(batch)
        if place == "forward" and len(seen) == 4:
            raise error("on purpose")

    def fails(*_: Any) -> None:
        if place == "layer" and len(seen) == 4:
            raise error("on purpose")

    model.c.register_forward_hook(fails)
    tracker = BatchNormTracker(model)
    if tracked:
        tracker.attach()
        model(batches[0])
    if (place, error) == ("iterable", StopIteration):
        return
    wrapped = issubclass(error, Exception) and place in ("forward", "layer")
    with Unchanged(model, entirely=True), pytest.raises(RuntimeError if wrapped else error) as raised:
        recalibrate(model, Batches(), forward)
    assert isinstance(raised.value.__cause__ if wrapped else raised.value, error)
    if tracked:
        seen.clear()
        model(batches[1])
        assert [tracker.report()[name].num_batches for name in "abc"] == [2, 2, 2]
        tracker.detach()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_an_error_that_names_layer_call_and_channel(value: float) -> None:
    model, batches = trained(Net()), data()
    batches[6][3, 1] = value
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match=r"layer 'a' .* call 7, channel 1\b"):
        recalibrate(model, batches)


def test_it_names_the_layer_that_was_called_first_not_the_one_that_is_defined_first() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.BatchNorm1d(C), nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).flip(1))

    model, batches = Backwards(), data()
    batches[2][0, 0] = torch.nan
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match=r"layer 'first' .* call 3, channel 0\b"):
        recalibrate(model, batches)


def test_a_variance_beyond_the_buffers_precision_is_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C)).half()
    batches = [x.half() for x in data(mean=0.0, std=100.0)]
    batches[3][:, 2] *= 20
    assert all(torch.isfinite(x).all() for x in batches)
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match=r"`running_var` of layer '0'.*torch.float16"):
        recalibrate(model, batches)


def test_a_single_value_has_no_variance() -> None:
    class TakesOne(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model, batches = TakesOne(C), list(torch.randn(2, 1, C))
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match="one value has no variance"):
        recalibrate(model, batches[:1])
    recalibrate(model, batches)
    assert_written(model, batches)


def test_a_channel_that_is_constant_gets_variance_0() -> None:
    model, batches = single(), data()
    for x in batches:
        x[:, 1] = 7
    result = recalibrate(model, batches)
    assert model[0].running_mean[1] == 7
    assert model[0].running_var[1] == 0
    assert result.after["0"].summary()["eval_error"] <= 1e-5


def test_a_lazy_layer_that_was_not_initialised_is_an_error_and_stays_lazy() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.LazyBatchNorm1d())
    before = bits(model[0].running_mean)
    with pytest.raises(ValueError, match="Layer '1' has not been initialised"):
        recalibrate(model, data())
    assert bits(model[0].running_mean) == before
    assert isinstance(model[1].running_mean, nn.UninitializedBuffer)
    model(data()[0])
    recalibrate(model, data())
    assert_written(model[0], data())
