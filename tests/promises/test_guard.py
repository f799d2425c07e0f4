"""The guard: a batch with NaN or Inf leaves running statistics as they were, and nothing else changes by a bit."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, compat, recalibrate
from lightning_bnmonitor.capture import guard
from tests.compiling import by_wrapping, in_place, its_forward, its_parts
from tests.promises.recorded_training import assert_identical, rng_states, seed

NAN, INF = math.nan, math.inf
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """Layers with all ways to average, one of which is called twice, one frozen, one without running statistics."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU())
        self.frozen, self.bare = nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)
        self.reused, self.mixing = nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 4)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(4, 1)
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bare(self.frozen(self.first(x).mean((2, 3))))
        return self.head(self.dropout(self.reused(self.mixing(self.reused(x)))))


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x.requires_grad_(), use_reentrant=False)


def checkpointed_by_reentering(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x.requires_grad_(), use_reentrant=True)


def in_bfloat16(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


def in_two_parts(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.chunk(2)])


def train(model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], steps: int = 30) -> list[Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    outputs = []
    for step in range(steps):
        outputs.append(forward(model, torch.randn(8, 2, 6, 6)))
        outputs[-1].square().mean().backward()
        if step % 3:  # gradients of two batches are added up now and then
            optimizer.step()
            optimizer.zero_grad()
    return outputs


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def any_device(request, monkeypatch):
    """Where to ask whether all is finite would mean to wait, nobody asks, and the buffers are always written."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(guard, "_is_known_finite", lambda _: False)


WAYS = [plainly, checkpointed, checkpointed_by_reentering, in_bfloat16, in_two_parts]


@pytest.mark.parametrize("forward", WAYS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_nothing_changes_as_long_as_all_is_finite(forward, momentum, any_device):
    def run(guard: bool | None):
        seed()
        model = Net(momentum)
        if guard is None:
            return model, train(model, forward), rng_states()
        with BatchNormTracker(model, guard=guard) as tracker:
            outputs = train(model, forward)
        assert "guarded" not in str(tracker.report())
        return model, outputs, rng_states()

    (expected, outputs, states), (guarded, others, after) = run(None), run(True)
    assert_identical(dict(guarded.state_dict()), dict(expected.state_dict()))
    assert all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))
    assert_identical(after, states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nothing_changes_in_other_precisions(dtype):
    seed()
    data = torch.randn(20, 16, 3, dtype=dtype)
    plain, guarded = nn.BatchNorm1d(3, dtype=dtype), nn.BatchNorm1d(3, dtype=dtype)
    with BatchNormTracker(guarded, guard=True) as tracker:
        for x in data:
            plain(x), guarded(x)
            tracker.step()
    assert_identical(dict(guarded.state_dict()), dict(plain.state_dict()))


class Reference:
    """The same layers, without a guard: what a bad call has written is put back by hand."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def call(self, x: Tensor) -> None:
        before = copy.deepcopy(self.model.state_dict())
        self.model(x)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm1d):
                finite = module.running_mean.isfinite().all() and module.running_var.isfinite().all()
                name = next(name for name, other in self.model.named_modules() if other is module)
                for buffer in () if finite else BUFFERS:
                    getattr(module, buffer).copy_(before[f"{name}.{buffer}" if name else buffer])


def batches(num: int, bad: dict[int, float], width: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(16, width, generator=generator) for _ in range(num)]
    for index, value in bad.items():
        data[index][5, 1] = value
    return data


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38])  # whose variance overflows
@pytest.mark.parametrize("is_told", [True, False])
def test_a_bad_batch_leaves_all_channels_as_they_were(momentum, value, is_told):
    layer = nn.BatchNorm1d(3, momentum=momentum)
    reference, data = Reference(layer), batches(20, {0: value, 3: value, 4: value, 19: value})
    with BatchNormTracker(layer, guard=True) as tracker:
        for x in data:
            layer(x), reference.call(x)
            if is_told:
                tracker.step()
                assert_identical(dict(layer.state_dict()), dict(reference.model.state_dict()))
    assert_identical(dict(layer.state_dict()), dict(reference.model.state_dict()))
    assert layer.num_batches_tracked == 16


def test_every_other_batch_is_bad_and_each_is_put_back_before_the_next(any_device):
    layer, data = nn.BatchNorm1d(3), batches(12, dict.fromkeys(range(0, 12, 2), NAN))
    reference = Reference(layer)
    with BatchNormTracker(layer, guard=True):
        for x in data:  # nobody tells of steps
            layer(x), reference.call(x)
    assert_identical(dict(layer.state_dict()), dict(reference.model.state_dict()))


def test_without_torchs_own_way_to_copy_many(monkeypatch):
    monkeypatch.setattr(guard, "copy_all", compat._copy_each)
    layer, data = nn.BatchNorm1d(3), batches(6, {2: NAN})
    reference = Reference(layer)
    with BatchNormTracker(layer, guard=True):
        for x in data:
            layer(x), reference.call(x)
    assert_identical(dict(layer.state_dict()), dict(reference.model.state_dict()))


READS = {
    "eval mode": lambda model, _: model.eval()(torch.ones(2, 3)),
    "state_dict": lambda model, _: model.state_dict(),
    "report": lambda _, tracker: tracker.report(),
    "close": lambda _, tracker: tracker.close(),
    "state of the tracker": lambda _, tracker: tracker.state_dict(),
    "validation": lambda _, tracker: tracker.start_validation(),
    "step": lambda _, tracker: tracker.step(),
    "put_back": lambda _, tracker: tracker.put_back(),
    "detach": lambda _, tracker: tracker.detach(),
    "optimizer": lambda model, _: torch.optim.SGD(model.parameters(), lr=0.1).step(),
}


@pytest.mark.parametrize("read", READS)
def test_whoever_looks_finds_them_put_back(read):
    model, (good, bad) = nn.Sequential(nn.BatchNorm1d(3)), batches(2, {1: NAN})
    tracker = BatchNormTracker(model, guard=True).attach()
    model(good)
    before = copy.deepcopy(model.state_dict())
    model(bad)
    assert model[0].running_mean.isnan().any()
    READS[read](model, tracker)
    for name, buffer in model[0].named_buffers():
        assert torch.equal(buffer, before[f"0.{name}"]), name


def test_steps_that_a_scaler_skips():
    model, twin = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(2))
    twin.load_state_dict(model.state_dict())

    def fit(model, data):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
        for x in data:
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update(65536.0)

    with BatchNormTracker(model, guard=True):
        fit(model, batches(10, {4: INF, 9: INF}))
        saved = copy.deepcopy(model.state_dict())
    fit(twin, [x for x in batches(10, {4: INF, 9: INF}) if x.isfinite().all()])
    assert all(torch.equal(saved[name], value) for name, value in twin.state_dict().items())


@pytest.mark.parametrize("forward", [checkpointed, checkpointed_by_reentering])
def test_what_checkpointing_makes_again_is_undone_with_it_and_counts_once(forward):
    model = Net()
    with BatchNormTracker(model, guard=True) as tracker:
        train(model, forward, steps=1)
        before = copy.deepcopy(model.state_dict())
        x = torch.randn(8, 2, 6, 6)
        x[0, 0, 0, 0] = NAN
        forward(model, x).sum().backward()
        tracker.step()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert tracker.report()["first.1"].evidence["guarded_calls"] == 1
    assert tracker.report()["reused"].evidence["guarded_calls"] == 2


def test_of_layers_with_counters_and_without_those_that_were_spoiled_are_put_back(any_device):
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(5), nn.BatchNorm1d(3), nn.BatchNorm1d(2)])
    for layer in (model[0], model[2]):
        layer.num_batches_tracked = None
    data = [torch.randn(8, layer.num_features) for layer in model]
    with BatchNormTracker(model, guard=True) as tracker:
        for layer, x in zip(model, data, strict=True):
            layer(x)
        tracker.step()
        before = copy.deepcopy(model.state_dict())
        for index, (layer, x) in enumerate(zip(model, data, strict=True)):
            layer(x * NAN if index in (0, 1) else x)
        tracker.step()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(("0.", "1.")), name
    assert [layer.num_batches_tracked for layer in model] == [None, 1, None, 2]


def test_no_more_is_put_back_than_was_finite_before():
    layer = nn.BatchNorm1d(3)
    layer.running_var[2] = INF  # as it was loaded
    (good, bad) = batches(2, {1: NAN})
    with BatchNormTracker(layer, guard=True) as tracker:
        layer(good)
        tracker.step()
        before = {name: getattr(layer, name).clone() for name in BUFFERS}
        layer(bad)
    assert all(torch.equal(getattr(layer, name), before[name]) for name in BUFFERS)
    assert tracker.report()["(root)"].verdict == "non-finite"


def test_what_was_not_finite_before_keeps_its_count_and_misses_no_calls():
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(NAN)
    layer.running_var.fill_(NAN)
    with BatchNormTracker(layer, guard=True) as tracker:
        for x in batches(20, {5: NAN}):
            layer(x)
            tracker.step()
        report = tracker.close()["(root)"]
    assert layer.num_batches_tracked == 20
    assert report.num_batches == 19
    assert (report.verdict, report.flags) == ("non-finite", ("guarded",))


def test_what_a_running_variance_in_half_precision_does_not_hold_is_undone_and_counted():
    layer, data = nn.BatchNorm1d(3).half(), [x.half() for x in batches(20, {})]
    data[4][:, 1] *= 3000  # a tenth of its variance is beyond 65504,
    data[7][:, 1] *= 100  # and not of this
    with BatchNormTracker(layer, guard=True) as tracker:
        for x in data:
            layer(x)
            tracker.step()
        report = tracker.close()["(root)"]
    assert layer.running_var.isfinite().all()
    assert layer.num_batches_tracked == report.num_batches == 19
    assert report.evidence["guarded_calls"] == report.evidence["updates_per_call"] == 1
    exact = np.concatenate([x.double().numpy() for x in (*data[:4], *data[5:])]).mean(axis=0)
    np.testing.assert_allclose(report.population_mean, exact, atol=2e-3)


def test_what_others_have_written_is_put_back_not_what_was_before_that():
    layer, (good, bad) = nn.BatchNorm1d(3), batches(2, {1: NAN})
    with BatchNormTracker(layer, guard=True) as tracker:
        layer(good)
        tracker.step()
        layer.running_mean.fill_(7.0)
        layer(bad)
    assert (layer.running_mean == 7).all()


def test_buffers_that_are_replaced_after_a_bad_call_stay_as_they_are():
    layer, (good, bad) = nn.BatchNorm1d(3), batches(2, {1: NAN})
    with BatchNormTracker(layer, guard=True) as tracker:
        layer(good)
        tracker.step()
        layer(bad)
        layer.running_mean = torch.full((3,), 7.0)
        tracker.step()
        layer(good)
        tracker.step()
    expected = 0.9 * 7 + 0.1 * good.mean(dim=0)
    torch.testing.assert_close(layer.running_mean, expected)


def test_wider_layers_in_the_place_of_narrow_ones():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with BatchNormTracker(model, guard=True) as tracker:
        model(batches(1, {0: NAN})[0])
        layer = model[0]
        layer.running_mean.data, layer.running_var.data = torch.zeros(4), torch.ones(4)
        layer.weight.data, layer.bias.data, layer.num_features = torch.ones(4), torch.zeros(4), 4
        model(torch.randn(8, 4))
        tracker.step()
    assert layer.running_mean.isfinite().all()


def test_calls_that_have_no_values_are_left_to_others():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with BatchNormTracker(model, guard=True):
        bare = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
        vmap(lambda x: functional_call(bare, {}, x))(torch.randn(4, 8, 3))
        functional_call(model, {name: buffer.clone() for name, buffer in buffers.items()}, torch.full((8, 3), NAN))
        torch.jit.trace(model, torch.randn(8, 3), check_trace=False)
        model(torch.full((8, 3), NAN))
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_lazy_layers_and_layers_on_the_meta_device():
    model = nn.ModuleDict({"lazy": nn.LazyBatchNorm1d(), "meta": nn.BatchNorm1d(3, device="meta")})
    with BatchNormTracker(model, guard=True) as tracker:
        for x in batches(3, {0: NAN, 2: NAN}):
            model["lazy"](x)
            tracker.step()
    assert model["lazy"].running_mean.isfinite().all()
    assert model["lazy"].num_batches_tracked == (2 if model["lazy"].running_mean.isnan().any() else 1)


def test_copies_of_a_guarded_model_are_not_guarded_and_what_is_detached_is_not_either():
    model, bad = nn.Sequential(nn.BatchNorm1d(3)), batches(1, {0: NAN})[0]
    with BatchNormTracker(model, guard=True):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied(bad)
            copied.state_dict()
            assert copied[0].running_mean.isnan().any()
    assert not model[0]._forward_pre_hooks
    assert not model[0]._state_dict_pre_hooks
    model(bad)
    assert model.state_dict()["0.running_mean"].isnan().any()


def test_without_it_nothing_is_put_back():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with BatchNormTracker(model) as tracker:
        model(batches(1, {0: NAN})[0])
        tracker.step()
        tracker.put_back()
    assert model[0].running_mean.isnan().any()


def test_recalibration_within_a_guarded_window():
    model, data = nn.Sequential(nn.BatchNorm1d(3)), batches(12, {3: NAN})
    good = [x for x in data if x.isfinite().all()]
    with BatchNormTracker(model, guard=True) as tracker:
        for x in data:
            model(x)
        recalibrate(model, good)
        expected = torch.cat(good).mean(dim=0)
        torch.testing.assert_close(model[0].running_mean, expected, rtol=1e-5, atol=1e-6)
        model(data[3])
        tracker.step()
    torch.testing.assert_close(model[0].running_mean, expected, rtol=1e-5, atol=1e-6)


class TestReport:
    """What is said of guarded calls: nothing counts them, and that is told."""

    @pytest.mark.parametrize("capture", ["auto", "pass"])
    @pytest.mark.parametrize("num", [12, 90, 200])  # merged once, and several times
    def test_the_population_is_that_of_the_others(self, num, capture):
        bad = {index: NAN if index % 2 else INF for index in range(7, num, 31)}
        layer, data = nn.BatchNorm1d(3), batches(num, bad)
        clean = nn.BatchNorm1d(3)
        with BatchNormTracker(layer, guard=True, capture=capture) as tracker, BatchNormTracker(clean) as other:
            for index, x in enumerate(data):
                layer(x)
                tracker.step()
                if index not in bad:
                    clean(x)
                    other.step()
        report, expected = tracker.report()["(root)"], other.report()["(root)"]
        received = np.concatenate([x.numpy() for index, x in enumerate(data) if index not in bad]).astype(float)
        np.testing.assert_allclose(report.population_mean, received.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(report.population_var, received.var(axis=0, ddof=1), rtol=1e-5)
        assert (report.num_batches, report.num_samples) == (num - len(bad), 16 * (num - len(bad)))
        assert report.evidence["guarded_calls"] == len(bad)
        assert (report.evidence["first_bad_batch"], report.evidence["first_bad_channel"]) == (8, 1)
        assert report.verdict == expected.verdict
        assert report.flags == ("guarded",)
        assert report.evidence["eval_error"] == pytest.approx(expected.evidence["eval_error"], rel=1e-4)
        assert report.evidence["initial_weight"] == pytest.approx(expected.evidence["initial_weight"])
        words = "1 of its calls" if len(bad) == 1 else f"{len(bad)} of its calls"
        assert f"{words} had NaN or Inf" in report.explanation
        assert "first in batch 8 of this window, channel 1" in report.explanation
        assert "detect_anomaly" in report.remedy

    def test_it_needs_attention_beyond_a_tenth_of_the_calls(self):
        def needs_attention(num_bad: int) -> bool:
            layer = nn.BatchNorm1d(3, momentum=0.1)
            with BatchNormTracker(layer, guard=True) as tracker:
                for x in batches(200, dict.fromkeys(range(0, 2 * num_bad, 2), NAN)):
                    layer(x)
            report = tracker.report()["(root)"]
            assert report.verdict == "healthy"
            assert report.diagnosis.cause == ("guarded" if report.needs_attention else "healthy")
            return report.needs_attention

        assert not needs_attention(20)
        assert needs_attention(21)

    def test_a_layer_of_whose_calls_none_was_finite(self):
        layer = nn.BatchNorm1d(3)
        with BatchNormTracker(layer, guard=True) as tracker:
            for x in batches(20, dict.fromkeys(range(20), NAN)):
                layer(x)
        report = tracker.close()["(root)"]
        assert (report.verdict, report.flags, report.needs_attention) == ("non-finite", ("guarded",), True)
        assert report.remedy.count("Find what made the values") == 1
        assert "20 of its calls" in report.explanation
        assert layer.num_batches_tracked == 0

    def test_a_frozen_layer_that_receives_them_is_judged_by_the_others(self):
        layer = nn.BatchNorm1d(3).eval()
        model = nn.Sequential(layer)
        model.training = True
        with BatchNormTracker(model, guard=True) as tracker:
            for x in batches(20, {4: NAN}):
                model(x)
        report = tracker.close()["0"]
        assert (report.verdict, report.flags, report.num_batches) == ("frozen", ("guarded",), 19)

    def test_the_next_window_begins_without(self):
        layer = nn.BatchNorm1d(3)
        with BatchNormTracker(layer, guard=True) as tracker:
            for x in batches(20, {4: NAN}):
                layer(x)
            assert tracker.close()["(root)"].flags == ("guarded",)
            tracker.reset()
            for x in batches(20, {}):
                layer(x)
        assert tracker.close()["(root)"].flags == ()

    def test_a_window_that_is_resumed_goes_on_counting(self):
        layer, again, data = nn.BatchNorm1d(3), nn.BatchNorm1d(3), batches(40, {4: NAN, 25: NAN})
        with BatchNormTracker(layer, guard=True) as tracker:
            for x in data[:20]:
                layer(x)
            state = pickle.loads(pickle.dumps(tracker.state_dict()))
            again.load_state_dict(layer.state_dict())
            for x in data[20:]:
                layer(x)
        with BatchNormTracker(again, guard=True) as resumed:
            resumed.load_state_dict(state)
            for x in data[20:]:
                again(x)
        assert resumed.report().to_dict() == tracker.report().to_dict()
        assert resumed.report()["(root)"].evidence["guarded_calls"] == 2

    def test_calls_of_a_step_that_differ_are_still_told(self):
        model = nn.ModuleDict({"bn": nn.BatchNorm1d(3)})
        real, fake = batches(60, {5: NAN}), [x + 2 for x in batches(60, {9: NAN})]
        with BatchNormTracker(model, guard=True) as tracker:
            for one, other in zip(real, fake, strict=True):
                model["bn"](one), model["bn"](other)
                tracker.step()
        report = tracker.report()["bn"]
        assert report.flags == ("calls-differ", "guarded")
        assert report.evidence["call_shift"] == pytest.approx(1 / math.sqrt(2), rel=0.2)  # apart by 2, of std sqrt(2)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled(nn.Module):
    """Calls of one layer, compiled or with a graph of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [by_wrapping, in_place, its_forward, its_parts])
@pytest.mark.parametrize("is_told", [True, False])
def test_compiled_models_are_put_back_before_their_next_call(compiled, is_told, fresh_compiler):
    torch.manual_seed(0)
    model = Compiled()
    twin, data = compiled(copy.deepcopy(model)), batches(12, {4: NAN, 5: INF, 11: NAN})
    seen = compiled(model)
    with BatchNormTracker(seen, guard=True) as tracker:
        for x in data:
            before = copy.deepcopy(twin.state_dict())
            seen(x), twin(x)
            if not x.isfinite().all():
                twin.load_state_dict(before)
            if is_told:
                tracker.step()
                assert_identical(dict(seen.state_dict()), dict(twin.state_dict()))
        report = tracker.close()
    assert_identical(dict(seen.state_dict()), dict(twin.state_dict()))
    assert [layer.evidence["guarded_calls"] for layer in report.values()] == [3, 3]
    assert [layer.evidence["calls_traced"] for layer in report.values()] == [9, 9]
