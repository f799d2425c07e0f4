"""Anything that may happen to a model and its tracker, in any order, against a reference that keeps every value."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT
from tests.statistics.two_pass import rows, two_pass
from tests.tracking.drawn_networks import MOMENTA, OPTIONS, SEEDS, SHAPES, Network, draw_input
from tests.tracking.small_models import saved_and_loaded

pytestmark = pytest.mark.slow


@dataclass
class Received:
    """All that one layer received in a window, and what is known of its buffers."""

    values: list[Any] = field(default_factory=list)
    counted_updates: int = 0
    tracked_before: int = 0
    end: Any = None
    written: bool = False
    was_called: bool = False  # in any window


@dataclass
class Expected:
    """What a report must say of a layer."""

    num_batches: int
    num_samples: int
    mean: Any
    var: Any
    running: Any
    written: bool


@dataclass
class Reference:
    """Every value since the window began, and the few rules about what counts."""

    layers: dict[str, Received]
    closed: dict[str, Expected] | None = None


def buffers_of(layer):
    if layer.running_mean is None:
        return None
    return torch.stack([layer.running_mean, layer.running_var]).double().numpy().copy()


def tracked_of(layer):
    return 0 if layer.num_batches_tracked is None else layer.num_batches_tracked.item()


def is_same(one, other):
    return one is None or np.array_equal(one, other, equal_nan=True)


CALLS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.sampled_from([0.0, 3.0, -20.0])), min_size=1, max_size=4
)
WRITES = ["reset", "copy", "nan", "add", "same", "count"]


class Anything(RuleBasedStateMachine):
    dtype: torch.dtype
    capture: str
    bound: float

    def __init__(self) -> None:
        super().__init__()
        self.tracker = None
        self.saved = []
        self.is_paused = False
        self.frozen = set()

    @initialize(options=OPTIONS)
    def begin(self, options):
        self.model = Network(self.dtype, options)
        self.twin = copy.deepcopy(self.model)
        self.reference = Reference({name: Received() for name in SHAPES})
        self.tracker = BatchNormTracker(self.model, capture=self.capture).attach()

    # The reference

    def expected(self):
        if self.reference.closed is not None:
            return self.reference.closed
        result = {}
        for name, seen in self.reference.layers.items():
            layer = self.twin.layers[name]
            values = np.concatenate([np.empty((0, SHAPES[name][0])), *seen.values])
            set_back = seen.counted_updates and tracked_of(layer) < seen.tracked_before
            written = bool(seen.written or set_back)
            result[name] = Expected(len(seen.values), len(values), *two_pass(values), buffers_of(layer), written)
        return result

    def close_reference(self):
        if self.reference.closed is None:
            self.reference.closed = self.expected()
            for name, seen in self.reference.layers.items():
                seen.end = buffers_of(self.twin.layers[name])

    def begin_reference(self):
        self.reference.closed = None
        for name, seen in self.reference.layers.items():
            layer = self.twin.layers[name]
            seen.values, seen.counted_updates, seen.tracked_before = [], 0, tracked_of(layer)
            seen.written = not is_same(seen.end, buffers_of(layer))

    def check(self, report):
        expected = self.expected()
        assert sorted(report) == [f"layers.{name}" for name in SHAPES]
        for name in SHAPES:
            layer = report[f"layers.{name}"]
            reference = expected[name]
            assert (layer.num_batches, layer.num_samples) == (reference.num_batches, reference.num_samples), name
            mean, var = layer.population_mean.numpy(), layer.population_var.numpy()
            std = np.sqrt(np.fmax(reference.var, 1))  # that of what is drawn, if there are too few values to tell
            np.testing.assert_array_equal(np.isnan(mean), np.isnan(reference.mean))
            np.testing.assert_array_equal(np.isnan(var), np.isnan(reference.var))
            assert not (np.abs(mean - reference.mean) > self.bound * std).any(), (name, mean, reference.mean)
            assert not (np.abs(var - reference.var) > self.bound * std**2).any(), (name, var, reference.var)
            assert layer.has_running_stats == (reference.running is not None)
            running = np.full((2, len(mean)), np.nan) if reference.running is None else reference.running
            np.testing.assert_array_equal(torch.stack([layer.running_mean, layer.running_var]).numpy(), running)
            assert ("written-outside" in layer.flags) == reference.written, (name, layer.flags)
            self.check_metrics(layer, mean, var, *running)

    def check_metrics(self, layer, mean, var, running_mean, running_var):
        s, q = var + layer.eps, running_var + layer.eps
        shift = (running_mean - mean) / np.sqrt(s)
        # E[((x - running_mean) / sqrt(q) - (x - mean) / sqrt(s))^2]
        rmse = np.sqrt((1 / np.sqrt(q) - 1 / np.sqrt(s)) ** 2 * var + (running_mean - mean) ** 2 / q)
        ratio = np.log(q) - np.log(s)
        rmse, shift = rmse + 0 * running_mean, shift + 0 * s
        ratio = np.where(var <= 1e-3 * layer.eps, np.nan, ratio)
        for name, value in {"act_rmse": rmse, "mean_shift": shift, "log_var_ratio": ratio}.items():
            reported = getattr(layer, name).numpy()
            np.testing.assert_allclose(reported, value, rtol=1e-9, atol=1e-9, equal_nan=True, err_msg=name)
            finite = value[np.isfinite(value)]
            if len(finite):
                size = np.abs(finite).mean() if name == "log_var_ratio" else np.sqrt(np.square(finite).mean())
                assert layer.evidence[name] == pytest.approx(size, rel=1e-9, abs=1e-9)
            else:
                assert name not in layer.evidence

    # What may happen

    def inputs(self, calls, rng):
        made = []
        for name, size, loc in calls:
            layer = self.twin.layers[name]
            can_be_single = name in self.frozen and layer.running_mean is not None
            size = 2 if name == "a" and size == 1 and not can_be_single else size
            made.append((name, draw_input(rng, name, size, loc, self.dtype)))
        return made

    def receive(self, inputs):
        if self.reference.closed is not None or self.is_paused or not self.tracker.is_attached:
            return
        for name, x in inputs:
            seen, layer = self.reference.layers[name], self.twin.layers[name]
            seen.counted_updates += layer.training and layer.running_mean is not None
            if x.numel():
                seen.values.append(rows(x))
                seen.was_called = True

    def freeze(self):
        for model in (self.model, self.twin):
            model.train()
            for name in self.frozen:
                model.layers[name].eval()

    def call(self, inputs, mode="grad", **options):
        context = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
        with context():
            one, two = self.model(inputs, **options), self.twin(inputs, **options)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return one, two

    def train_on(self, calls, seed, repeats=1, mode="grad", step=False):
        rng = np.random.default_rng(seed)
        for _ in range(repeats):
            inputs = self.inputs(calls, rng)
            self.receive(inputs)
            outputs = self.call(inputs, mode)
            if step and mode == "grad":
                for model, out in zip((self.model, self.twin), outputs, strict=True):
                    loss = sum(y.square().sum() for y in out)
                    if loss.requires_grad:
                        loss.backward()
                        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
                        optimizer.step()
                        optimizer.zero_grad()

    def simple(self, action, seed=0):
        if action == "train":
            self.train_on([("a", 4, 3.0), ("b", 3, 0.0), ("c", 2, -20.0)], seed)
        elif action == "reset":
            self.tracker.reset()
            self.close_reference()
            self.begin_reference()
        elif action == "close":
            self.close_reference()
            report = self.tracker.close()
            self.check(report)
            assert self.tracker.report() is report
        elif action == "report":
            self.check(self.tracker.report())
        elif action == "eval":
            self.eval_pass(set(), seed, "grad")
        else:
            getattr(self.tracker, action)()

    @rule(
        calls=CALLS,
        seed=SEEDS,
        repeats=st.sampled_from([1, 1, 2, 7, STASH_LIMIT + 2]),
        mode=st.sampled_from(["grad", "grad", "no_grad", "inference"]),
        step=st.booleans(),
    )
    def train(self, calls, seed, repeats, mode, step):
        self.train_on(calls, seed, repeats, mode, step)

    @rule(
        calls=CALLS,
        repeats=st.sampled_from([0, 1, 5, STASH_LIMIT + 2]),
        action=st.sampled_from(["reset", "reset", "close", "report", "flush", "step", "state_dict"]),
        looks=st.booleans(),
        seed=SEEDS,
    )
    def train_and_act(self, calls, repeats, action, looks, seed):
        self.train_on(calls, seed, repeats)
        self.simple(action, seed)
        if looks:
            self.simple("report")

    @rule(
        actions=st.lists(
            st.sampled_from(["train", "train", "reset", "close", "report", "flush", "step", "state_dict", "eval"]),
            min_size=1,
            max_size=5,
        ),
        seed=SEEDS,
        fails=st.booleans(),
    )
    def paused(self, actions, seed, fails):
        with pytest.raises(ZeroDivisionError) if fails else nullcontext(), self.tracker.paused():
            self.is_paused = True
            for i, action in enumerate(actions):
                self.simple(action, [seed, i])
            self.is_paused = False
            if fails:
                raise ZeroDivisionError

    @rule(training=st.sets(st.sampled_from("abc")), seed=SEEDS, mode=st.sampled_from(["grad", "no_grad"]))
    def eval_pass(self, training, seed, mode):
        for model in (self.model, self.twin):
            model.eval()
            for name in training:  # in training mode themselves, in a model that is not
                model.layers[name].train()
        rng = np.random.default_rng(seed)
        self.call([(name, draw_input(rng, name, 4, 50.0, self.dtype)) for name in SHAPES], mode)
        self.freeze()

    @rule(calls=CALLS, seed=SEEDS, how=st.sampled_from(["after", "shape", "single"]), mode=st.sampled_from(["grad"]))
    def fail(self, calls, seed, how, mode):
        rng = np.random.default_rng(seed)
        inputs = self.inputs(calls, rng)
        self.receive(inputs)
        error: Any = ZeroDivisionError
        if how == "shape":
            inputs, error = [*inputs, ("b", torch.zeros(3, 2, 3, 1, dtype=self.dtype))], ValueError
        elif how == "single" and "a" not in self.frozen:
            inputs, error = [*inputs, ("a", torch.zeros(1, 3, dtype=self.dtype))], ValueError
        for model in (self.model, self.twin):
            with pytest.raises(error):
                model(inputs, fails=True)

    @rule(name=st.sampled_from("abc"))
    def freeze_or_thaw(self, name):
        self.frozen ^= {name}
        self.freeze()

    @rule(name=st.sampled_from("abc"), momentum=st.sampled_from(MOMENTA))
    def change_momentum(self, name, momentum):
        for model in (self.model, self.twin):
            model.layers[name].momentum = momentum

    @rule(name=st.sampled_from("abc"), how=st.sampled_from(WRITES), seed=SEEDS)
    def write(self, name, how, seed):
        values = torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 2, (2, SHAPES[name][0])))
        for model in (self.model, self.twin):
            layer = model.layers[name]
            if layer.running_mean is None:
                continue
            if how == "reset":
                layer.reset_running_stats()
            elif how == "copy":
                layer.running_mean.copy_(values[0])
                layer.running_var.copy_(values[1])
            elif how == "add":
                layer.running_var[-1] += 1e-3
            elif how == "nan":
                layer.running_mean[0] = math.nan
            elif how == "same":
                layer.running_mean = layer.running_mean.clone()
            else:
                layer.num_batches_tracked += 100

    @rule(seed=SEEDS)
    def call_a_copy(self, seed):
        rng = np.random.default_rng(seed)
        copied = copy.deepcopy(self.model)
        copied([(name, draw_input(rng, name, 4, 50.0, self.dtype)) for name in SHAPES])

    @rule()
    def detach(self):
        self.tracker.detach()

    @rule()
    def attach(self):
        self.tracker.attach()

    @rule()
    def save(self):
        states = [saved_and_loaded(x.state_dict()) for x in (self.tracker, self.model, self.twin)]
        self.saved.append((states, copy.deepcopy(self.reference)))

    @precondition(lambda self: self.saved)
    @rule(
        number=st.integers(0, 100),
        into=st.sampled_from(["itself", "another", "a copy"]),
        restore=st.booleans(),
        attach_first=st.booleans(),
    )
    def load(self, number, into, restore, attach_first):
        (state, of_model, of_twin), reference = self.saved[number % len(self.saved)]
        if into != "itself":
            self.tracker.detach()
            self.model = copy.deepcopy(self.model) if into == "a copy" else self.model
            self.tracker = BatchNormTracker(self.model, capture=self.capture)
        if restore:
            self.model.load_state_dict(of_model)
            self.twin.load_state_dict(of_twin)
        if attach_first or into == "itself":
            self.tracker.attach()
        self.tracker.load_state_dict(state)
        self.tracker.attach()
        self.reference = copy.deepcopy(reference)

    def teardown(self):
        if self.tracker is None:
            return
        self.tracker.detach()
        self.check(self.tracker.report())
        self.close_reference()
        self.check(self.tracker.close())
        for one, two in zip(self.model.state_dict().values(), self.twin.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


class AnythingInFloat32(Anything):
    dtype, capture, bound = torch.float32, "auto", 1e-5


class AnythingInFloat64(Anything):
    dtype, capture, bound = torch.float64, "pass", 1e-9


MACHINE = settings(max_examples=40, deadline=None, stateful_step_count=12, suppress_health_check=[HealthCheck.too_slow])
TestAnythingInFloat32 = AnythingInFloat32.TestCase
TestAnythingInFloat32.settings = MACHINE
TestAnythingInFloat64 = AnythingInFloat64.TestCase
TestAnythingInFloat64.settings = MACHINE
