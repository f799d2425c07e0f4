"""Calls from several threads all count, those of forked workers do not."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import lightning_bnmonitor
from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT
from tests.promises.faulty_runs import (
    MARKS,
    C,
    assert_population,
    feed,
    layer_of,
    single,
)

pytestmark = MARKS


def itself(model):
    return model


def replica(model):
    """As ``torch.nn.parallel.replicate`` makes them: shallow, with shared hooks and, on the first device, buffers."""
    twin = model.__new__(type(model))
    twin.__dict__ = model.__dict__.copy()
    twin._parameters, twin._buffers = model._parameters.copy(), model._buffers.copy()
    twin._modules = {name: replica(module) for name, module in model._modules.items()}
    return twin


def call_in_threads(models, batches):
    errors = []

    def run(model, batches):
        try:
            for x in batches:
                model(x)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=arguments) for arguments in zip(models, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


@pytest.mark.slow
@pytest.mark.parametrize("copied", [itself, replica])
def test_calls_from_four_threads_at_once_all_count(copied):
    sys.setswitchinterval(1e-6)
    for _ in range(10):
        model = single()
        batches = [[torch.randn(8 + index, C) + thread for index in range(50)] for thread in range(4)]
        with BatchNormTracker(model) as tracker:
            call_in_threads([copied(model) for _ in batches], batches)
            layer = layer_of(tracker)
        assert_population(layer, list(itertools.chain(*batches)))
        assert layer.evidence["calls_skipped"] == 0


@pytest.mark.parametrize("copied", [itself, replica])
def test_calls_from_threads_in_turn_all_count(copied):
    model = single()
    batches = [[torch.randn(8, C) + thread for _ in range(50)] for thread in range(4)]
    with BatchNormTracker(model) as tracker:
        for of_thread in batches:
            call_in_threads([copied(model)], [of_thread])
        assert_population(layer_of(tracker), list(itertools.chain(*batches)))


@pytest.mark.parametrize("waiting", [5, STASH_LIMIT])
def test_a_call_from_another_thread_while_calls_are_merged_counts(monkeypatch, waiting):
    window = lightning_bnmonitor.statistics.window
    merge, model, late, threads = window.merge_moments, single(), torch.randn(8, C), []

    def merge_meanwhile(*args):
        if not threads:
            threads.append(threading.Thread(target=model, args=(late,)))
            threads[0].start()
            threads[0].join(0.5)  # it may have to wait for us
        return merge(*args)

    monkeypatch.setattr(window, "merge_moments", merge_meanwhile)
    with BatchNormTracker(model) as tracker:
        batches = feed(model, waiting)
        tracker.flush()
        for thread in threads:
            thread.join(60)
        layer = layer_of(tracker)
    assert_population(layer, [*batches, late])


class Features(Dataset):
    """Runs the model that is trained, in the worker."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 60

    def __getitem__(self, index):
        assert self.model.training
        self.model(torch.randn(8, C) + 100)
        return torch.randn(C)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_what_forked_workers_do_with_the_model_counts_nothing():
    model, batches = single(), []
    loader = DataLoader(Features(model), batch_size=6, num_workers=2, multiprocessing_context="fork")
    with BatchNormTracker(model) as tracker:
        for x in loader:
            model(x)
            batches.append(x)
        layer = layer_of(tracker)
    assert len(batches) == 10
    assert_population(layer, batches)
    assert torch.equal(layer.running_mean, model[0].running_mean.double())
