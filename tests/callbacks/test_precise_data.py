"""Where `PreciseBatchNorm` takes its batches from, and that training still gets those it would have got."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_bnmonitor import PreciseBatchNorm
from tests.callbacks.precise_fits import (
    ALL,
    BATCH_SIZE,
    BATCHES,
    EXPECTED_WARNINGS,
    Net,
    Trace,
    fit,
    is_exact,
    same,
    samples,
    train_data,
    trainer_for,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


class Drawing(Dataset):
    """Draws from every generator there is."""

    def __len__(self):
        return BATCHES * BATCH_SIZE

    def __getitem__(self, index):
        noise = torch.rand(1) + random.random() + float(np.random.rand())
        x, y = samples()[index]
        return x + noise, y


class Weird(Sampler):
    """Refuses to be copied."""

    def __iter__(self):
        return iter(range(BATCHES * BATCH_SIZE))

    def __len__(self):
        return BATCHES * BATCH_SIZE

    def __deepcopy__(self, memo):
        raise TypeError("not me")


def own(seed=5):
    return torch.Generator().manual_seed(seed)


LOADERS = {
    "shuffled": train_data,
    "short last batch": lambda: train_data(BATCHES * BATCH_SIZE - 5),
    "last batch dropped": lambda: train_data(BATCHES * BATCH_SIZE + 5, drop_last=True),
    "generator of the loader": lambda: train_data(generator=own()),
    "sampler with a generator": lambda: train_data(shuffle=False, sampler=RandomSampler(samples(), generator=own())),
    "batch_sampler": lambda: DataLoader(
        samples(), batch_sampler=BatchSampler(RandomSampler(samples(), generator=own()), BATCH_SIZE, False)
    ),
    "no batch size": lambda: DataLoader(
        samples(),
        batch_size=None,
        sampler=BatchSampler(SequentialSampler(range(BATCHES * BATCH_SIZE)), BATCH_SIZE, False),
    ),
    "drawing": lambda: DataLoader(Drawing(), batch_size=BATCH_SIZE, shuffle=True),
    "persistent workers": lambda: train_data(num_workers=1, persistent_workers=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", LOADERS)
def test_training_gets_the_batches_that_it_would_have_got(tmp_path, how):
    options = {"val_check_interval": 0.5, "max_epochs": 2}
    _, model = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), one := Trace(), data=LOADERS[how](), **options)
    _, other = fit(tmp_path, two := Trace(), data=LOADERS[how](), **options)
    assert len(model.seen) == len(other.seen) == 2 * BATCHES
    assert all(np.array_equal(a, b) for a, b in zip(model.seen, other.seen, strict=True))
    one.check(two)
    if how in ("shuffled", "generator of the loader", "persistent workers", "batch_sampler"):
        assert all(is_exact(state) for state in model.validated)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A fit without the callback."""
    _, model = fit(tmp_path_factory.mktemp("plain"), trace := Trace())
    return model, trace


def test_the_order_of_training_is_the_same_without_restore_too(tmp_path, plain):
    _, model = fit(tmp_path, PreciseBatchNorm(ALL))
    assert all(np.array_equal(a, b) for a, b in zip(model.seen, plain[0].seen, strict=True))


def test_a_weighted_sampler_gives_its_own_population(tmp_path):
    weights = torch.zeros(BATCHES * BATCH_SIZE)
    weights[:BATCH_SIZE] = 1
    sampler = WeightedRandomSampler(weights, BATCH_SIZE, replacement=False)
    _, model = fit(tmp_path, PreciseBatchNorm(ALL), data=train_data(shuffle=False, sampler=sampler))
    x = samples().tensors[0][:BATCH_SIZE].double().numpy()
    assert is_exact(model.state_dict(), x, BATCH_SIZE)


@pytest.mark.parametrize("kind", ["list", "shuffled loader", "loader with workers"])
def test_batches_of_a_loader_of_its_own(tmp_path, kind, plain):
    dataset = samples(3 * BATCH_SIZE, seed=7)
    loader = {
        "list": lambda: [tuple(t[i : i + 16] for t in dataset.tensors) for i in (0, 16, 32)],
        "shuffled loader": lambda: DataLoader(dataset, batch_size=16, shuffle=True),
        "loader with workers": lambda: DataLoader(dataset, batch_size=16, num_workers=1),
    }[kind]()
    precise = PreciseBatchNorm(ALL, dataloader=loader, restore=True)
    _, model = fit(tmp_path, precise, one := Trace())
    one.check(plain[1])  # random states, too
    x = dataset.tensors[0].double().numpy()
    assert all(is_exact(state, x) for state in [*model.validated, model.state_dict()])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples())


class NoNorm(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 1))


BAD_DATA = {
    "iterable": (lambda: DataLoader(Stream(), batch_size=BATCH_SIZE), "iterable data set .Stream."),
    "dict": (lambda: {"a": train_data(), "b": train_data()}, "are a dict"),
    "list": (lambda: [train_data(), train_data()], "are a list"),
    "sampler": (lambda: train_data(shuffle=False, sampler=Weird()), "cannot be copied.*not me"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_from_which_no_loader_can_be_made_are_a_clear_error_when_training_starts(tmp_path, kind):
    make, message = BAD_DATA[kind]
    model = Net()
    with pytest.raises(ValueError, match=message + ".*Give PreciseBatchNorm a `dataloader` of its own."):
        trainer_for(tmp_path, PreciseBatchNorm()).fit(model, make(), val_data())
    assert model.seen == []
    assert same(model.state_dict(), Net().state_dict()) == []


@pytest.mark.parametrize("kind", ["iterable", "sampler"])
def test_such_data_with_a_loader_of_its_own(tmp_path, kind):
    _, model = fit(tmp_path, PreciseBatchNorm(ALL, dataloader=train_data()), data=BAD_DATA[kind][0]())
    assert all(is_exact(state) for state in [*model.validated, model.state_dict()])


def test_a_model_without_batchnorm_trains_on_anything(tmp_path):
    data = DataLoader(Stream(), batch_size=BATCH_SIZE)
    with pytest.warns(UserWarning, match="No BatchNorm layer"):
        fit(tmp_path, PreciseBatchNorm(restore=True), one := Trace(), model=NoNorm(), data=data)
    fit(tmp_path, two := Trace(), model=NoNorm(), data=data)
    one.check(two)


@pytest.mark.parametrize("once", [lambda: iter([1]), lambda: (i for i in range(2)), lambda: iter(train_data())])
def test_a_loader_that_can_be_iterated_only_once_is_an_error(once):
    with pytest.raises(ValueError, match="again and again"):
        PreciseBatchNorm(dataloader=once())
