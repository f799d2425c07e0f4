"""Attaching, detaching, copying, and dying: nothing is kept alive, nothing counted twice."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
import sys
import weakref

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker
from lightning_bnmonitor.capture.attachment import CompilerSettings
from tests.promises.faulty_runs import (
    BATCHES,
    MARKS,
    C,
    Net,
    assert_population,
    data,
    feed,
    hooks_of,
    layer_of,
    optimizer_hooks,
    single,
    trainer_for,
)

pytestmark = MARKS


# ------------------------------------------------------------------------------- attaching, detaching, and who is alive


def test_two_trackers_attached_twice_and_detached_in_any_order_each_count_once():
    model = single()
    before = hooks_of(model), optimizer_hooks()
    one, other = BatchNormTracker(model).attach().attach(), BatchNormTracker(model).attach()
    first = feed(model)
    one.detach()
    one.detach()
    second = feed(model)
    other.attach()
    third = feed(model)
    other.detach()
    feed(model)
    assert (hooks_of(model), optimizer_hooks()) == before
    assert_population(layer_of(one), first)
    assert_population(layer_of(other), first + second + third)


def test_whatever_is_asked_after_detaching_and_after_the_model_died_works():
    model = single()
    tracker = BatchNormTracker(model).attach()
    batches = feed(model)
    tracker.detach()

    def ask():
        tracker.flush()
        tracker.step()
        tracker.detach()
        with tracker.paused():
            pass
        assert_population(layer_of(tracker), batches)
        tracker.state_dict()

    ask()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    ask()
    report = tracker.close()
    assert tracker.close() is report
    ask()
    tracker.reset()
    assert_population(layer_of(tracker), [])


def test_a_model_that_dies_while_attached_is_not_kept_and_its_layers_go_on_counting():
    model = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 1))
    tracker = BatchNormTracker(model).attach()
    batches = feed(model)
    layer, reference, linear = model[0], weakref.ref(model), weakref.ref(model[1])
    del model
    gc.collect()
    assert reference() is None
    assert linear() is None
    batches += feed(layer)
    tracker.step()
    assert_population(layer_of(tracker), batches)
    tracker.reset()
    tracker.close()
    tracker.detach()
    assert not layer._forward_hooks


def test_attached_and_detached_many_times_leaves_nothing():
    model = single()
    before = hooks_of(model), optimizer_hooks(), CompilerSettings.users
    tracker, batches = BatchNormTracker(model), []
    for _ in range(50):
        with tracker:
            batches += feed(model, 1)
        with BatchNormTracker(model) as other:
            feed(model, 1)
    assert_population(layer_of(tracker), batches)
    assert layer_of(other).num_batches == 1
    assert (hooks_of(model), optimizer_hooks(), CompilerSettings.users) == before
    references = []
    for _ in range(50):
        dropped = single()
        with BatchNormTracker(dropped) as other:
            feed(dropped, 1)
        references += [weakref.ref(dropped), weakref.ref(dropped[0]), weakref.ref(other)]
    del dropped, other
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_trackers_that_are_dropped_with_their_models_while_attached_leave_nothing():
    before, users, keys = optimizer_hooks(), CompilerSettings.users, set(_global_optimizer_post_hooks)
    references = []
    for _ in range(50):
        model = single()
        tracker = BatchNormTracker(model).attach()
        feed(model, 1)
        references += [weakref.ref(model), weakref.ref(model[0]), weakref.ref(tracker)]
    del model, tracker
    gc.collect()
    try:
        assert [reference() for reference in references] == [None] * len(references)
        assert (optimizer_hooks(), CompilerSettings.users) == (before, users)
    finally:
        for key in set(_global_optimizer_post_hooks) - keys:
            del _global_optimizer_post_hooks[key]
        while CompilerSettings.users > users:
            CompilerSettings.release()


@pytest.mark.slow
@pytest.mark.long
def test_hundreds_of_windows_take_no_more_memory_than_one_hundred():
    model, x = single(), torch.randn(8, C)

    def objects():
        gc.collect()
        alive = gc.get_objects()
        return len(alive), sum(issubclass(type(thing), torch.Tensor) for thing in alive)

    with BatchNormTracker(model) as tracker:
        for _ in range(100):
            model(x)
            tracker.reset()
        num_objects, num_tensors = objects()
        num_blocks = [sys.getallocatedblocks()]
        for _ in range(3):
            for _ in range(150):
                model(x)
                tracker.reset()
            after_objects, after_tensors = objects()
            num_blocks.append(sys.getallocatedblocks())
        assert after_tensors <= num_tensors
        assert after_objects - num_objects < 100  # of which there would be 450 for each that a window leaves behind
        # Nor are there any that are not counted above, as there would be in all three, where caches fill up sometime.
        assert min(after - before for before, after in itertools.pairwise(num_blocks)) < 150
        assert_population(layer_of(tracker), [])
        batches = feed(model)
        assert_population(layer_of(tracker), batches)


# ---------------------------------------------------------------------------------------------- copies of what is alive


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_copies_made_and_trained_during_fit_count_nothing_and_the_original_counts_on(tmp_path, duplicate):
    class Wrapped(Net):
        """Records without hooks, which could not be pickled."""

        def __init__(self):
            LightningModule.__init__(self)
            self.net = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 2))
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append({"net.0": [batch[0].clone()]})
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Copies(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.train(duplicate(pl_module.net))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.train(duplicate(pl_module.net))

        def train(self, twin):
            assert twin.training
            twin(torch.randn(8, C) + 100).sum().backward()

    monitor, model = BatchNormMonitor(), Wrapped()
    trainer_for(tmp_path, Copies(), monitor).fit(model, data())
    assert_population(monitor.report()["net.0"], model.received("net.0", BATCHES, 2 * BATCHES))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("attached", [True, False])
def test_a_deep_copy_of_a_tracker_is_detached_and_goes_on_with_what_the_original_has(attached):
    model, users = single(), CompilerSettings.users
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        if attached:
            twin = copy.deepcopy(tracker)
    if not attached:
        twin = copy.deepcopy(tracker)
    assert not twin.is_attached
    assert CompilerSettings.users == users
    with twin:
        assert_population(layer_of(twin), batches)
        more = feed(model)
        assert_population(layer_of(twin), batches + more)
    assert_population(layer_of(tracker), batches)


def test_a_copy_of_a_model_that_holds_its_tracker_has_one_of_its_own():
    model = single()
    model.tracker = BatchNormTracker(model).attach()
    batches = feed(model)
    other = copy.deepcopy(model)
    model.tracker.detach()
    with other.tracker as tracker:
        more = feed(other)
        assert_population(layer_of(tracker), batches + more)
    assert_population(layer_of(model.tracker), batches)


def test_a_tracker_refuses_to_be_pickled_and_counts_on():
    model = single()
    with BatchNormTracker(model) as tracker:
        batches = feed(model)
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(tracker)
        batches += feed(model)
        assert_population(layer_of(tracker), batches)


def test_a_copy_of_a_model_that_holds_its_tracker_leaves_the_original_counting():
    model = single()
    model.tracker = BatchNormTracker(model).attach()
    batches = feed(model)
    with contextlib.suppress(TypeError):
        feed(copy.deepcopy(model))
    batches += feed(model)
    model.tracker.detach()
    assert_population(layer_of(model.tracker), batches)
