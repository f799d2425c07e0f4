"""What attribution takes as losses and as batches."""

import copy
import math
import random
import re

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from tests.repair.spoiled_models import (
    assert_plain,
    attribute,
    exact_stats,
    healthy,
    losses_by_hand,
    mean_loss,
    numbers,
    per_sample,
    spoil_mean,
    with_exact,
)
from tests.repair.unchanged import Everything


@pytest.mark.parametrize("num_batches", [1, 2])
def test_one_batch_is_enough_if_there_is_a_loss_of_each_sample(num_batches):
    model, batches = healthy(num_batches=num_batches, size=200)
    with torch.no_grad():
        spoil_mean(model.head)
    assert attribute(model, batches).worst == "head"
    if num_batches == 2:
        assert math.isfinite(attribute(model, batches, mean_loss).gap_stderr)


def test_errors_of_use_are_value_errors_that_change_nothing():
    model, batches = healthy()
    everything = Everything(model)
    with pytest.raises(ValueError, match="two batches or more"):
        attribute(model, batches[:1], mean_loss)
    with pytest.raises(ValueError, match="two batches or more"):
        attribute(model, [(batches[0][0][:1], batches[0][1][:1])])
    for nothing in ([], iter([]), ()):
        with pytest.raises(ValueError, match="0 batches"):
            attribute(model, nothing)
    for shape in ((32, 2), (32, 1), (1, 1, 1)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            attribute(model, batches, lambda output, batch, shape=shape: torch.zeros(shape))
    everything.assert_same()


@pytest.mark.parametrize("of_loss", [False, True])
def test_what_cannot_be_computed_is_a_runtime_error_that_says_which_of_the_two(of_loss):
    model, batches = healthy()
    everything = Everything(model)
    broken = [*batches[:2], ("text", batches[0][1])]

    def loss(output, batch):
        if batch is batches[2]:
            raise KeyError("no such target")
        return per_sample(output, batch)

    with pytest.raises(RuntimeError, match=r"`loss`.* batch 2" if of_loss else r"model cannot take batch 2") as error:
        attribute(model, batches if of_loss else broken, loss)
    assert isinstance(error.value.__cause__, KeyError if of_loss else Exception)
    assert ("forward" in str(error.value)) != of_loss
    everything.assert_same()
    with pytest.raises(RuntimeError, match="`loss`"):
        attribute(model, batches, lambda output, batch: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_losses_of_any_dtype_are_compared_in_float64(dtype):
    model, batches = healthy(num_batches=3)
    with torch.no_grad():
        spoil_mean(model.head)
    loss = lambda output, batch: per_sample(output, batch).to(dtype)  # noqa: E731
    found = attribute(model, batches, loss)
    as_is = losses_by_hand(copy.deepcopy(model).eval(), batches, loss)
    assert found.eval_loss == pytest.approx(as_is.mean(), rel=1e-6 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize(
    "kind", [float, np.float64, lambda value: int(1000 * value), lambda value: value.requires_grad_(), bool]
)
def test_a_loss_may_be_any_number(kind):
    model, batches = healthy(num_batches=3)
    with torch.no_grad():
        spoil_mean(model.stem)
    found = attribute(model, batches, lambda output, batch: kind(mean_loss(output, batch)))
    assert found.worst == ("stem" if kind is not bool else None)
    assert_plain(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precisions(dtype):
    model, batches = healthy(size=64)
    model = model.to(dtype)
    batches = [tuple(part.to(dtype) for part in batch) for batch in batches]
    with torch.no_grad():
        spoil_mean(model.blocks[1].norm)
    everything = Everything(model)
    found = attribute(model, batches)
    everything.assert_same()
    assert found.worst == "blocks.1.norm"
    assert_plain(found)
    exact = losses_by_hand(with_exact(model, exact_stats(model, batches)).eval(), batches, per_sample).mean()
    assert found.exact_loss == pytest.approx(exact, rel=1e-9 if dtype == torch.float64 else 0.05)


def test_what_can_be_iterated_once_is_kept(spoiled):
    model, batches = spoiled
    expected = numbers(attribute(model, batches))
    assert numbers(attribute(model, iter(batches))) == expected
    assert numbers(attribute(model, (batch for batch in batches))) == expected
    assert numbers(attribute(model, zip(*zip(*batches, strict=True), strict=True))) == expected
    assert numbers(attribute(model, iter(DataLoader(batches, batch_size=None)))) == expected


def test_an_iterator_that_draws_leaves_random_states_as_before(spoiled):
    model, _ = spoiled
    everything = Everything(model)
    drawn = ((torch.randn(8, 6) * np.random.rand() * random.random(), torch.zeros(8, 2)) for _ in range(3))
    attribute(model, drawn)
    everything.assert_same()


class Rows(Dataset):
    """Rows of a data set, with augmentation by torch's, NumPy's and Python's random numbers."""

    def __init__(self, x, augment):
        self.x, self.augment = x, augment

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = (torch.randn(6) + np.random.randn() + random.random()) * self.augment
        return self.x[index] + noise, self.x[index, :2]


def global_generator(data, **kwargs):
    return DataLoader(data, 8, shuffle=True, **kwargs), []


def own_generator(data, **kwargs):
    generator = torch.Generator().manual_seed(5)
    return DataLoader(data, 8, shuffle=True, generator=generator, **kwargs), [generator]


def sampler_with_generator(data, **kwargs):
    generator = torch.Generator().manual_seed(5)
    return DataLoader(data, 8, sampler=RandomSampler(data, generator=generator), **kwargs), [generator]


def batch_sampler_with_generator(data, **kwargs):
    generator = torch.Generator().manual_seed(5)
    sampler = BatchSampler(RandomSampler(data, generator=generator), 8, False)
    return DataLoader(data, batch_sampler=sampler, **kwargs), [generator]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "num_workers"),
    [
        (global_generator, 0),
        (global_generator, 1),  # a worker's seed is drawn from the loader's generator, not from that of a sampler
        (own_generator, 0),
        (own_generator, 1),
        (sampler_with_generator, 0),
        (batch_sampler_with_generator, 0),
    ],
)
def test_a_shuffling_loader_gives_the_same_batches_in_each_pass_and_its_generators_are_as_before(make, num_workers):
    model, _ = healthy()
    with torch.no_grad():
        spoil_mean(model.head)
    loader, generators = make(Rows(torch.randn(32, 6), 0.1), num_workers=num_workers)
    seen = []

    def forward(model, batch):
        seen.append(batch[0].clone())
        return model(batch[0])

    everything = Everything(model, *generators)
    found = attribute(model, loader, forward=forward)
    everything.assert_same()
    assert len(seen) == 4 * (5 + len(found.contributions) - (found.rest is None))
    passes = [torch.stack(seen[start : start + 4]) for start in range(0, len(seen), 4)]
    assert all(torch.equal(one, passes[0]) for one in passes)
    assert len(set(passes[0][:, :, 0].flatten().tolist())) == 32


def test_the_generator_of_a_loader_is_as_before_after_an_interrupt():
    model, _ = healthy()
    loader, generators = own_generator(TensorDataset(torch.randn(32, 6), torch.randn(32, 2)))
    everything = Everything(model, *generators)
    calls = []

    def loss(output, batch):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return per_sample(output, batch)

    with pytest.raises(KeyboardInterrupt):
        attribute(model, loader, loss)
    everything.assert_same()


class Changing:
    """Gives so many batches when it is iterated for the n-th time, and the last number from then on."""

    def __init__(self, batches, counts):
        self.batches, self.counts = batches, list(counts)

    def __iter__(self):
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        return iter(self.batches[:count])


@pytest.mark.parametrize("counts", [[4, 3], [4, 4, 3, 4], [4, 4, 4, 3], [4, 4, 4, 4, 3], [3, 4], [4, 0], [4, 4, 0]])
@pytest.mark.parametrize("loss", [per_sample, mean_loss])
def test_other_batches_when_iterated_again_are_an_error_that_changes_nothing(spoiled, counts, loss):
    model, batches = spoiled
    everything = Everything(model)
    with pytest.raises(ValueError, match=r"same batches each time|no batch|0 batches"):
        attribute(model, Changing(batches, counts), loss)
    everything.assert_same()


class Endless(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_loader_without_a_length_is_fine(spoiled):
    model, batches = spoiled
    loader = DataLoader(Endless(batches), batch_size=None)
    assert numbers(attribute(model, loader)) == numbers(attribute(model, batches))


@pytest.mark.parametrize("form", ["mapping", "tensor", "forward"])
def test_batches_of_other_forms(spoiled, form):
    model, batches = spoiled
    expected = numbers(attribute(model, batches))
    target = {id(x): y for x, y in batches}
    if form == "mapping":
        changed, forward = [{"x": x} for x, _ in batches], None
        loss = lambda output, batch: per_sample(output, (None, target[id(batch["x"])]))  # noqa: E731
    elif form == "tensor":
        changed, forward = [x for x, _ in batches], None
        loss = lambda output, batch: per_sample(output, (None, target[id(batch)]))  # noqa: E731
    else:
        changed = [{"input": x, "target": y} for x, y in batches]
        forward = lambda model, batch: {"output": model(batch["input"])}  # noqa: E731
        loss = lambda output, batch: per_sample(output["output"], (None, batch["target"]))  # noqa: E731
    assert numbers(attribute(model, changed, loss, forward=forward)) == expected
