"""Exact running statistics in real Trainer runs, against float64 passes over what the layers received."""

import copy
import datetime
import os
import pickle
import random
import socket
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_bnmonitor import BatchNormMonitor, PreciseBatchNorm

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:BatchNorm layers need attention"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore:`batches` gave"),
]
BATCHES, BATCH_SIZE, MOMENTUM = 6, 16, 0.05  # in an epoch
STATS = ("running_mean", "running_var")
LAYERS = ("net.a", "net.b")
ALL = 1000  # more batches than there are


# ------------------------------------------------------------------------------------------------------ models and data


def network():
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv1d(1, 4, 3),
            a=nn.BatchNorm1d(4, momentum=MOMENTUM),
            relu=nn.ReLU(),
            drop=nn.Dropout(0.3),
            flat=nn.Flatten(),
            linear=nn.Linear(16, 3),
            b=nn.BatchNorm1d(3, momentum=MOMENTUM),
            out=nn.Linear(3, 1),
        )
    )


class Steps:
    """Keeps the running statistics that each validation sees, the weights then, and the batches of training."""

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(x.detach().double().numpy().copy())
        loss = nn.functional.mse_loss(self(x).float(), y.float())
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and self.trainer.validating and self.trainer.state.fn == "fit":
            self.validated.append({key: value.clone() for key, value in self.state_dict().items()})
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]).float(), batch[1].float()))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Net(Steps, LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = network()
        self.validated, self.seen = [], []


class OtherNet(Steps, pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = network()
        self.validated, self.seen = [], []


def samples(num=BATCHES * BATCH_SIZE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(num, 1, 6, generator=generator) + 3
    return TensorDataset(x, x.mean(dim=2) + torch.randn(num, 1, generator=generator))


def train_data(num=BATCHES * BATCH_SIZE, **kwargs):
    return DataLoader(samples(num), **({"batch_size": BATCH_SIZE, "shuffle": True} | kwargs))


def val_data():
    return DataLoader(samples(2 * BATCH_SIZE, seed=2), batch_size=BATCH_SIZE)


def trainer_for(folder, *callbacks, trainer_class=Trainer, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "num_sanity_val_steps": 0,
        "logger": False,
        "default_root_dir": folder,
    }
    return trainer_class(callbacks=list(callbacks), **(defaults | options))


def fit(folder, *callbacks, model=None, data=None, val=True, ckpt_path=None, error=None, **options):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    model = Net() if model is None else model
    trainer = trainer_for(folder, *callbacks, **options)
    loaders = train_data() if data is None else data, val_data() if val else None
    if error is None:
        trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    else:
        with pytest.raises(error):
            trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    return trainer, model


# -------------------------------------------------------------------------------------------- the independent reference


def inputs_of(state, x, batch_size=None):
    """What the two layers receive with these weights, in float64: the second one after a batch-normalised first."""
    w = {key: np.asarray(value.double()) for key, value in state.items()}
    windows = np.stack([x[:, 0, i : i + 4] for i in range(3)], axis=-1)  # (N, 4 positions, 3)
    first = np.einsum("npk,ck->ncp", windows, w["net.conv.weight"][:, 0]) + w["net.conv.bias"][None, :, None]
    parts = []
    for start in range(0, len(x), batch_size or len(x)):
        part = first[start : start + (batch_size or len(x))]
        mean, var = part.mean(axis=(0, 2), keepdims=True), part.var(axis=(0, 2), keepdims=True)
        part = (part - mean) / np.sqrt(var + 1e-5)
        part = part * w["net.a.weight"][None, :, None] + w["net.a.bias"][None, :, None]
        parts.append(np.maximum(part, 0).reshape(len(part), -1) @ w["net.linear.weight"].T + w["net.linear.bias"])
    return np.moveaxis(first, 1, 0).reshape(4, -1), np.concatenate(parts).T


def expected(state, x, batch_size=None):
    pairs = zip(LAYERS, inputs_of(state, x, batch_size), strict=True)
    return {name: (values.mean(axis=1), values.var(axis=1, ddof=1)) for name, values in pairs}


def error_of(state, x=None, batch_size=None, layers=LAYERS):
    """The largest error of running statistics against these weights' population: of `a` alone if batches are unknown.

    In standard deviations of the layer's inputs, and in parts of the variance.
    """
    x = samples().tensors[0].double().numpy() if x is None else x
    wanted = expected(state, x, batch_size)
    errors = []
    for name in layers if batch_size else layers[:1]:
        mean, var = (state[f"{name}.{stat}"].double().numpy() for stat in STATS)
        errors += [np.abs(mean - wanted[name][0]) / np.sqrt(wanted[name][1]), np.abs(var / wanted[name][1] - 1)]
    return float(np.max(np.concatenate(errors)))


def is_exact(state, x=None, batch_size=None, tolerance=1e-5):
    return error_of(state, x, batch_size) < tolerance


def saved(path):
    return torch.load(path, weights_only=True)


def same(one, two, but=()):
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key]) and not key.endswith(tuple(but))]


def same_training(one, two, but=()):
    """Two Trainers that have trained the same, to the last bit: weights, buffers, optimizer, random states."""
    (trainer, model), (other_trainer, other) = one, two
    assert same(model.state_dict(), other.state_dict(), but) == []
    assert trainer.global_step == other_trainer.global_step
    mine, others = (t.optimizers[0].state_dict()["state"] for t in (trainer, other_trainer))
    assert all(torch.equal(mine[i][key], others[i][key]) for i in mine for key in mine[i])
    assert mine.keys() == others.keys() != set()


class Trace(Callback):
    """The state after each training batch, with the random states."""

    def __init__(self):
        self.states, self.batches = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rng = {"torch": torch.get_rng_state(), "random": hash_of(random.random.__self__.getstate())}
        rng["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
        state = {key: value.clone() for key, value in pl_module.state_dict().items()}
        slots = trainer.optimizers[0].state_dict()["state"]
        state.update({f"{i}.{key}": value.clone() for i, slot in slots.items() for key, value in slot.items()})
        self.states.append({**state, **rng})

    def check(self, other, but=(), last=None):
        mine, others = self.states[-last:] if last else self.states, other.states[-last:] if last else other.states
        assert len(mine) == len(others) > 0
        for step, (one, two) in enumerate(zip(mine, others, strict=True)):
            assert same(one, two, but) == [], step


def hash_of(state):
    return torch.tensor([hash(state)])


def test_the_reference_is_what_the_network_computes():
    torch.manual_seed(1)
    net = Net().double()
    received = {}
    for name in LAYERS:
        hook = net.get_submodule(name).register_forward_pre_hook
        hook(lambda _, args, name=name: received.update({name: args[0].detach().transpose(0, 1).flatten(1)}))
    net.net.drop.eval()
    x = samples(32).tensors[0].double()
    net(x)
    for name, values in zip(LAYERS, inputs_of(net.state_dict(), x.numpy()), strict=True):
        np.testing.assert_allclose(values, received[name].numpy(), rtol=1e-12, atol=1e-12)
    assert not is_exact(net.state_dict(), x.numpy(), 32)


# ------------------------------------------------------------------------------------------ what is validated and saved


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_what_is_validated_and_what_is_left_are_exact(tmp_path, restore, inference_mode):
    precise = PreciseBatchNorm(ALL, restore=restore)
    _, model = fit(tmp_path, precise, inference_mode=inference_mode)
    assert len(model.validated) == 2
    assert all(is_exact(state) for state in [*model.validated, model.state_dict()])
    assert precise.recalibration.num_batches == BATCHES
    _, without = fit(tmp_path, inference_mode=inference_mode)
    assert min(error_of(state) for state in [*without.validated, without.state_dict()]) > 0.1


def test_both_layers_are_exact_where_the_batches_are_known(tmp_path):
    _, model = fit(tmp_path, PreciseBatchNorm(ALL), data=train_data(shuffle=False))
    assert all(is_exact(state, batch_size=BATCH_SIZE) for state in [*model.validated, model.state_dict()])


def test_no_more_batches_than_asked_for(tmp_path):
    _, model = fit(tmp_path, precise := PreciseBatchNorm(2), data=train_data(shuffle=False))
    x = samples().tensors[0][: 2 * BATCH_SIZE].double().numpy()
    assert all(is_exact(state, x, BATCH_SIZE) for state in [*model.validated, model.state_dict()])
    assert precise.recalibration.num_batches == 2


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("restore", [False, True])
def test_its_place_in_the_list_of_callbacks_does_not_matter(tmp_path, position, restore):
    others = [
        BatchNormMonitor(),
        EarlyStopping("val_loss", patience=10),
        ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1),
    ]
    others.insert(position, PreciseBatchNorm(ALL, restore=restore))
    trainer, model = fit(tmp_path, *others)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    states = [saved(path)["state_dict"] for path in files]
    assert all(is_exact(state) for state in [*states, *model.validated, model.state_dict()])
    assert [same(state, seen) for state, seen in zip(states, model.validated, strict=True)] == [[], []]
    report = next(c for c in trainer.callbacks if isinstance(c, BatchNormMonitor)).report()
    assert all(layer.num_batches == BATCHES and "written-outside" not in layer.flags for layer in report.values())


@pytest.mark.parametrize("how", ["top", "last", "last only", "train epoch end", "weights only"])
@pytest.mark.parametrize("val", [True, False])
def test_checkpoints_hold_the_exact_statistics(tmp_path, how, val):
    options = {
        "top": {"save_top_k": 1},
        "last": {"save_last": True},
        "last only": {"save_last": True, "save_top_k": 0},
        "train epoch end": {"save_on_train_epoch_end": True},
        "weights only": {"save_weights_only": True},
    }[how]
    trainer, model = fit(tmp_path, PreciseBatchNorm(ALL), ModelCheckpoint(tmp_path, **options), val=val)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == (2 if how == "last" else 1)
    for path in files:
        assert is_exact(saved(path)["state_dict"])
        assert same(saved(path)["state_dict"], model.state_dict()) == []
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert same(saved(tmp_path / "own.ckpt")["state_dict"], model.state_dict()) == []


def test_checkpoints_between_validations_hold_the_statistics_of_training(tmp_path):
    options = {"dirpath": tmp_path, "every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"}
    trace = Trace()
    fit(tmp_path, PreciseBatchNorm(ALL, restore=True), trace, ModelCheckpoint(**options), max_epochs=3)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={n}.ckpt" for n in (12, 16, 4, 8)]
    for step in (4, 8, 12, 16):
        state = saved(tmp_path / f"step={step}.ckpt")["state_dict"]
        assert not is_exact(state)
        assert [key for key in state if not torch.equal(state[key], trace.states[step - 1][key])] == []


def test_every_n_epochs(tmp_path):
    _, model = fit(tmp_path, PreciseBatchNorm(ALL, every_n_epochs=2), max_epochs=5)
    assert [is_exact(state) for state in model.validated] == [False, True, False, True, False]
    assert is_exact(model.state_dict())


def test_validations_within_an_epoch(tmp_path):
    _, model = fit(tmp_path, PreciseBatchNorm(ALL), val_check_interval=0.5)
    assert [is_exact(state) for state in model.validated] == [True] * 4


def test_what_is_loaded_before_training_is_not_repaired_in_the_sanity_check(tmp_path):
    class Net2(Net):
        def on_validation_epoch_start(self):
            if self.trainer.sanity_checking:
                self.validated.append({key: value.clone() for key, value in self.state_dict().items()})

    _, model = fit(tmp_path, PreciseBatchNorm(ALL), model=Net2(), num_sanity_val_steps=1)
    assert [is_exact(state) for state in model.validated] == [False, True, True]
    assert same(model.validated[0], Net().state_dict()) == []


ENDS = {
    "max_steps": ({"max_steps": 8, "max_epochs": -1}, 8),
    "limit_train_batches": ({"limit_train_batches": 4}, 8),
    "early stopping": ({"max_epochs": 10}, 2 * BATCHES),
    "should_stop": ({"max_epochs": 10}, 3),
    "accumulation": ({"accumulate_grad_batches": 4}, 4),
    "minimum of epochs": ({"max_epochs": 10, "min_epochs": 3}, 3 * BATCHES),
}


class EndsTraining(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("val", [True, False])
def test_however_training_ends_the_model_is_left_exact(tmp_path, how, val):
    options, steps = ENDS[how]
    more = {
        "early stopping": [EarlyStopping("val_loss" if val else "train_loss", patience=1, mode="max", min_delta=1e9)],
        "minimum of epochs": [EarlyStopping("train_loss", patience=1, mode="max", min_delta=1e9)],
        "should_stop": [EndsTraining()],
    }.get(how, [])
    trainer, model = fit(tmp_path, PreciseBatchNorm(ALL), ModelCheckpoint(tmp_path), *more, val=val, **options)
    assert trainer.global_step == steps
    assert is_exact(model.state_dict())
    late = not val and any(isinstance(callback, EarlyStopping) for callback in more)
    [path] = tmp_path.glob("*.ckpt")
    if not late:  # where training is ended after the last hook before the checkpoint
        assert same(saved(path)["state_dict"], model.state_dict()) == []


def test_fast_dev_run(tmp_path):
    _, model = fit(tmp_path, precise := PreciseBatchNorm(ALL), fast_dev_run=2, data=train_data(shuffle=False))
    assert precise.recalibration.num_batches == 2
    assert is_exact(model.state_dict(), samples().tensors[0][: 2 * BATCH_SIZE].double().numpy(), BATCH_SIZE)


def test_overfit_batches(tmp_path):
    _, model = fit(tmp_path, precise := PreciseBatchNorm(ALL), overfit_batches=2, data=train_data(shuffle=False))
    assert precise.recalibration.num_batches == 2
    assert is_exact(model.state_dict(), samples().tensors[0][: 2 * BATCH_SIZE].double().numpy(), BATCH_SIZE)


def test_validate_test_and_predict_leave_everything_as_it_is(tmp_path):
    trainer, model = fit(tmp_path, precise := PreciseBatchNorm(ALL, restore=True))
    before, done = copy.deepcopy(model.state_dict()), precise.recalibration
    for method in (trainer.validate, trainer.test, trainer.predict):
        method(model, val_data(), ckpt_path=None)
        assert same(before, model.state_dict()) == []
    assert precise.recalibration is done


# ----------------------------------------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_stochastic_weight_averaging(tmp_path, first, restore):
    def callbacks(*precise):
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
        return [*precise, swa] if first else [swa, *precise]

    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    precise = PreciseBatchNorm(ALL, restore=restore)
    _, model = fit(tmp_path, *callbacks(precise), checkpoint, max_epochs=3)
    _, other = fit(tmp_path / "other", *callbacks(), max_epochs=3)
    assert [is_exact(state) for state in model.validated] == [True] * 4
    assert is_exact(model.state_dict())
    assert is_exact(saved(tmp_path / "last.ckpt")["state_dict"])
    assert same(model.state_dict(), other.state_dict(), STATS) == []
    assert model.net.a.momentum == MOMENTUM


@pytest.mark.parametrize(("first", "restore"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize(
    ("averaging", "use_buffers"), [(WeightAveraging, True), (EMAWeightAveraging, True), (EMAWeightAveraging, False)]
)
def test_averaged_weights_have_their_own_exact_statistics(tmp_path, averaging, use_buffers, first, restore):
    def callbacks(*precise):
        average = averaging(use_buffers=use_buffers)
        return [*precise, average, trace] if first else [trace, average, *precise]

    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)
    trace = one = Trace()
    _, model = fit(tmp_path, *callbacks(PreciseBatchNorm(ALL, restore=restore)), checkpoint, val_check_interval=0.5)
    trace = two = Trace()
    _, other = fit(tmp_path / "other", *callbacks(), val_check_interval=0.5)
    assert [is_exact(state) for state in model.validated] == [True] * 4
    assert is_exact(model.state_dict())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 4
    assert all(is_exact(saved(path)["state_dict"]) for path in files)
    assert same(model.state_dict(), other.state_dict(), STATS) == []
    one.check(two)  # training has its own statistics, whatever those of the averaged weights are


# ------------------------------------------------------------------------------------------------------------ restoring


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("inference_mode", [False, True])
def test_training_is_bit_identical_with_restore(tmp_path, options, inference_mode):
    options = options | {"inference_mode": inference_mode, "max_epochs": 3}
    one, two = Trace(), Trace()
    mine = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), one, **options)
    others = fit(tmp_path, two, **options)
    one.check(two)
    same_training(mine, others, STATS)
    assert all(is_exact(state) for state in mine[1].validated)


def test_training_goes_on_from_the_exact_ones_without_restore(tmp_path):
    class Look(Callback):
        def __init__(self):
            self.states = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.states.append({key: value.clone() for key, value in pl_module.state_dict().items()})

    _, model = fit(tmp_path, PreciseBatchNorm(ALL), look := Look())
    assert same(look.states[BATCHES], model.validated[0]) == []
    _, model = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), look := Look())
    assert set(same(look.states[BATCHES], model.validated[0])) == {f"{n}.{stat}" for n in LAYERS for stat in STATS}


def test_the_statistics_stay_exact_until_the_checkpoint_is_written_and_longer(tmp_path):
    class Look(Callback):
        def __init__(self):
            self.states = {}

    for name in ("on_validation_end", "on_train_epoch_end"):

        def hook(self, trainer, pl_module, name=name):
            self.states.setdefault(name, []).append({k: v.clone() for k, v in pl_module.state_dict().items()})

        setattr(Look, name, hook)
    fit(tmp_path, look := Look(), PreciseBatchNorm(ALL, restore=True))
    assert {name: [is_exact(state) for state in states] for name, states in look.states.items()} == {
        "on_validation_end": [True, True],
        "on_train_epoch_end": [True, True],
    }


class ByStep(Net):
    """Trains on the batch that belongs to the step, as Lightning does not bring a loader back to where it was."""

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step % BATCHES
        x, y = (tensor[step * BATCH_SIZE : (step + 1) * BATCH_SIZE] for tensor in samples().tensors)
        torch.manual_seed(self.trainer.global_step)
        return nn.functional.mse_loss(self(x), y)


@pytest.mark.parametrize(("interval", "inference_mode"), [(1.0, True), (0.5, True), (0.5, False)])
def test_a_resumed_run_is_bit_identical_to_one_without(tmp_path, interval, inference_mode):
    options = {"val_check_interval": interval, "inference_mode": inference_mode, "max_epochs": 3}
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    plain = fit(tmp_path, two := Trace(), model=ByStep(), **options)
    fit(tmp_path, PreciseBatchNorm(ALL, restore=True), checkpoint, model=ByStep(), **options)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3 / interval
    for path in paths:
        left = 3 * BATCHES - saved(path)["global_step"]
        assert is_exact(saved(path)["state_dict"])
        if left:
            resumed = PreciseBatchNorm(ALL, restore=True)
            mine = fit(tmp_path, resumed, one := Trace(), model=ByStep(), ckpt_path=path, **options)
            one.check(two, last=left, but=("torch", "random", "numpy"))
            same_training(mine, plain, STATS)
            assert all(is_exact(state) for state in mine[1].validated)


def test_a_run_that_goes_on_after_its_end_is_bit_identical_to_a_longer_one_without(tmp_path):
    fit(tmp_path, PreciseBatchNorm(ALL, restore=True), ModelCheckpoint(tmp_path), model=ByStep())
    plain = fit(tmp_path, model=ByStep(), max_epochs=4)
    [path] = tmp_path.glob("*.ckpt")
    for again in (PreciseBatchNorm(ALL, restore=True), PreciseBatchNorm(ALL, restore=True)):
        mine = fit(tmp_path, again, model=ByStep(), max_epochs=4, ckpt_path=path)
        same_training(mine, plain, STATS)


def test_a_second_fit_goes_on_with_the_statistics_of_training(tmp_path):
    trainer, model = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), one := Trace(), model=ByStep())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, train_data(), val_data())
    fit(tmp_path, two := Trace(), model=ByStep(), max_epochs=2)
    one.states, tail = one.states[: 2 * BATCHES], one.states[2 * BATCHES :]
    one.check(two, but=("torch", "random", "numpy"))
    other_trainer, other = fit(tmp_path, two := Trace(), model=ByStep())
    other_trainer.fit_loop.max_epochs = 4
    other_trainer.fit(other, train_data(), val_data())
    one.states, two.states = tail, two.states[2 * BATCHES :]
    one.check(two, but=("torch", "random", "numpy"))
    assert is_exact(model.state_dict())
    assert sum(type(callback).__name__ == "_Restorer" for callback in trainer.callbacks) == 1


def test_other_weights_in_a_second_fit_keep_their_own_statistics(tmp_path):
    precise = PreciseBatchNorm(ALL, restore=True)
    fit(tmp_path, precise, model=ByStep())
    mine = fit(tmp_path, precise, one := Trace(), model=ByStep())
    plain = fit(tmp_path, two := Trace(), model=ByStep())
    one.check(two)
    same_training(mine, plain, STATS)


class StopError(Exception):
    pass


class Stops(Callback):
    def __init__(self, hook, error, epoch=0, step=0):
        def stop(trainer, pl_module, *args):
            if not trainer.sanity_checking and trainer.current_epoch == epoch and trainer.global_step >= step:
                self.stopped = True
                if not self.done:
                    self.done = True
                    raise error

        self.done = False
        setattr(self, hook, stop)


@pytest.mark.parametrize(
    ("error", "hook"),
    [
        (StopError, "on_validation_batch_end"),
        (KeyboardInterrupt, "on_validation_batch_end"),
        (StopError, "on_validation_end"),
        (StopError, "on_train_batch_end"),
    ],
)
@pytest.mark.parametrize("restore", [False, True])
def test_a_new_fit_after_one_that_was_interrupted(tmp_path, error, hook, restore):
    precise = PreciseBatchNorm(ALL, restore=restore)
    caught = SystemExit if error is KeyboardInterrupt else error
    stops = Stops(hook, error, 0, 3)
    _, model = fit(tmp_path, precise, stops, one := Trace(), model=ByStep(), error=caught)
    mine = fit(tmp_path, precise, one, model=model.train(), num_sanity_val_steps=2)  # Lightning leaves it in eval mode
    assert is_exact(model.state_dict())
    assert all(is_exact(state) for state in model.validated[-2:])
    if restore:
        _, other = fit(tmp_path, Stops(hook, error, 0, 3), two := Trace(), model=ByStep(), error=caught)
        plain = fit(tmp_path, two, model=other.train(), num_sanity_val_steps=2)
        one.check(two, but=("torch", "random", "numpy"))
        same_training(mine, plain, STATS)


def test_a_checkpoint_of_a_run_that_crashed_in_validation_is_resumed_bit_identically(tmp_path):
    crash = OnExceptionCheckpoint(tmp_path)
    stops = Stops("on_validation_batch_end", StopError, 1)
    fit(tmp_path, PreciseBatchNorm(ALL, restore=True), stops, crash, model=ByStep(), max_epochs=3, error=StopError)
    assert is_exact(saved(crash.ckpt_path)["state_dict"])
    options = {"model": ByStep(), "max_epochs": 3, "ckpt_path": crash.ckpt_path}
    mine = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), one := Trace(), **options)
    plain = fit(tmp_path, two := Trace(), model=ByStep(), max_epochs=3)
    one.check(two, last=BATCHES, but=("torch", "random", "numpy"))
    same_training(mine, plain, STATS)


def test_an_interrupt_within_the_pass_leaves_everything_as_it_was(tmp_path):
    class Loader:
        count = 0

        def __iter__(self):
            for batch in train_data():
                self.count += 1
                if self.count == 4:
                    raise KeyboardInterrupt
                yield batch

    _, model = fit(tmp_path, PreciseBatchNorm(ALL, dataloader=Loader()), one := Trace(), error=SystemExit)
    fit(tmp_path, two := Trace(), max_epochs=1)
    one.check(two)
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, one.states[-1][key])] == []
    assert not any(module.training for module in model.modules())  # as Lightning has it in validation
    assert all(module.track_running_stats for module in (model.net.a, model.net.b))
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------- where batches come from


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
    "in order": lambda: train_data(shuffle=False),
    "short last batch": lambda: train_data(BATCHES * BATCH_SIZE - 5),
    "last batch dropped": lambda: train_data(BATCHES * BATCH_SIZE + 5, drop_last=True),
    "generator of the loader": lambda: train_data(generator=own()),
    "sampler with a generator": lambda: train_data(shuffle=False, sampler=RandomSampler(samples(), generator=own())),
    "weighted": lambda: train_data(
        shuffle=False, sampler=WeightedRandomSampler(torch.arange(96.0), BATCHES * BATCH_SIZE, generator=own())
    ),
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


@pytest.mark.parametrize("how", LOADERS)
def test_training_gets_the_batches_that_it_would_have_got(tmp_path, how):
    options = {"val_check_interval": 0.5, "max_epochs": 2}
    _, model = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), one := Trace(), data=LOADERS[how](), **options)
    _, other = fit(tmp_path, two := Trace(), data=LOADERS[how](), **options)
    assert len(model.seen) == len(other.seen) == 2 * BATCHES
    assert all(np.array_equal(a, b) for a, b in zip(model.seen, other.seen, strict=True))
    one.check(two)
    if how in ("shuffled", "in order", "generator of the loader", "persistent workers", "batch_sampler"):
        assert all(is_exact(state) for state in model.validated)


def test_the_order_of_training_is_the_same_without_restore_too(tmp_path):
    _, model = fit(tmp_path, PreciseBatchNorm(ALL))
    _, other = fit(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(model.seen, other.seen, strict=True))


def test_a_weighted_sampler_gives_its_own_population(tmp_path):
    weights = torch.zeros(BATCHES * BATCH_SIZE)
    weights[:BATCH_SIZE] = 1
    sampler = WeightedRandomSampler(weights, BATCH_SIZE, replacement=False)
    _, model = fit(tmp_path, PreciseBatchNorm(ALL), data=train_data(shuffle=False, sampler=sampler))
    x = samples().tensors[0][:BATCH_SIZE].double().numpy()
    assert is_exact(model.state_dict(), x, BATCH_SIZE)


@pytest.mark.parametrize("kind", ["list", "loader", "shuffled loader", "loader with workers"])
def test_batches_of_a_loader_of_its_own(tmp_path, kind):
    dataset = samples(3 * BATCH_SIZE, seed=7)
    loader = {
        "list": lambda: [tuple(t[i : i + 16] for t in dataset.tensors) for i in (0, 16, 32)],
        "loader": lambda: DataLoader(dataset, batch_size=16),
        "shuffled loader": lambda: DataLoader(dataset, batch_size=16, shuffle=True),
        "loader with workers": lambda: DataLoader(dataset, batch_size=16, num_workers=1),
    }[kind]()
    precise = PreciseBatchNorm(ALL, dataloader=loader, restore=True)
    _, model = fit(tmp_path, precise, one := Trace())
    _, _ = fit(tmp_path, two := Trace())
    one.check(two)  # random states, too
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


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("num_batches", "every_n_epochs") for value in (0, -1, 1.5, True, "2")]
    + [("num_batches", None), ("restore", 1), ("restore", None)],
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value!r}"):
        PreciseBatchNorm(**{name: value})


# ---------------------------------------------------------------------------------------------- how the model is called


class Picky(Net):
    """Its forward takes two arguments."""

    def forward(self, x, twice):
        return self.net(x * 2 if twice else x)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].numpy().copy())
        return nn.functional.mse_loss(self(batch[0], True), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0], True)


def test_a_model_that_cannot_take_the_batch_fails_when_training_starts(tmp_path):
    model = Picky()
    with pytest.raises(RuntimeError, match=r"cannot take batch 0.*twice.*`forward`"):
        trainer_for(tmp_path, PreciseBatchNorm()).fit(model, train_data(), val_data())
    assert model.seen == []
    assert same(model.state_dict(), Picky().state_dict()) == []
    _, model = fit(tmp_path, PreciseBatchNorm(ALL, forward=lambda m, batch: m(batch[0], True)), model=Picky())
    x = 2 * samples().tensors[0].double().numpy()
    assert all(is_exact(state, x) for state in [*model.validated, model.state_dict()])


class Transfers(Net):
    """Its batches are made on the way, in training only."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] + 10 * self.trainer.training, batch[1])

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] * 2 if self.trainer.training else batch[0], batch[1])


class TransfersData(LightningDataModule):
    on_before_batch_transfer = Transfers.on_before_batch_transfer
    on_after_batch_transfer = Transfers.on_after_batch_transfer

    def train_dataloader(self):
        return train_data()

    def val_dataloader(self):
        return val_data()


@pytest.mark.parametrize("of", ["module", "data module"])
def test_batches_take_the_way_of_training_batches(tmp_path, of):
    model = Transfers() if of == "module" else Net()
    trainer = trainer_for(tmp_path, PreciseBatchNorm(ALL))
    if of == "module":
        trainer.fit(model, train_data(), val_data())
    else:
        trainer.fit(model, datamodule=TransfersData())
    x = 2 * (samples().tensors[0].double().numpy() + 10)
    assert np.allclose(np.sort(np.concatenate(model.seen[:BATCHES]).ravel()), np.sort(x.ravel()), atol=1e-5)
    assert all(is_exact(state, x, tolerance=1e-4) for state in [*model.validated, model.state_dict()])


class Unfreezes(BaseFinetuning):
    """Freezes the first layer with its running statistics, in the first epoch only."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net.conv, pl_module.net.a], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.net.conv, pl_module.net.a], optimizer)


class EvalInTraining(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net.a.eval()


@pytest.mark.parametrize("restore", [False, True])
def test_layers_in_eval_mode_in_training_are_left_alone(tmp_path, restore):
    precise = PreciseBatchNorm(ALL, restore=restore)
    _, model = fit(tmp_path, precise, EvalInTraining())
    fresh = Net().state_dict()
    for state in [*model.validated, model.state_dict()]:
        assert all(torch.equal(state[f"net.a.{stat}"], fresh[f"net.a.{stat}"]) for stat in STATS)
        assert not any(torch.equal(state[f"net.b.{stat}"], fresh[f"net.b.{stat}"]) for stat in STATS)
    assert precise.recalibration.left_alone == {"net.a": "frozen"}
    assert not model.net.a.training


def test_frozen_layers_are_left_alone_until_they_are_unfrozen(tmp_path):
    class Half(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    _, model = fit(tmp_path, precise := PreciseBatchNorm(ALL), Unfreezes(), model=Half())
    fresh = Net().state_dict()
    flags = [torch.equal(state["net.a.running_mean"], fresh["net.a.running_mean"]) for state in model.validated]
    assert flags[0] == (not model.validated[0]["net.a.num_batches_tracked"])
    assert is_exact(model.validated[1])
    assert precise.recalibration.left_alone == {}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("restore", [False, True])
def test_precisions(tmp_path, precision, restore):
    one, two = Trace(), Trace()
    _, model = fit(tmp_path, PreciseBatchNorm(ALL, restore=restore), one, precision=precision)
    if restore:
        fit(tmp_path, two, precision=precision)
        one.check(two)
    tolerance = 1e-9 if precision == "64-true" else 2e-2
    assert all(is_exact(state, tolerance=tolerance) for state in [*model.validated, model.state_dict()])
    assert model.net.a.running_mean.dtype == model.validated[0]["net.a.running_mean"].dtype
    assert model.net.a.running_mean.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(
        precision, torch.float32
    )


class Counting:
    """A compiler that counts what it compiles."""

    def __init__(self):
        self.epochs, self.trainer = [], None

    def __call__(self, graph, inputs):
        self.epochs.append(None if self.trainer is None else self.trainer.current_epoch)
        return graph


class Inner(nn.Module):  # Dynamo leaves a bare Sequential's `compile()` alone
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x)


class InnerNet(Net):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Inner()


def without_prefix(state):
    return {key.replace("_orig_mod.", "").replace("inner.", ""): value for key, value in state.items()}


@pytest.mark.parametrize("how", ["module.compile", "torch.compile", "aot_eager"])
def test_compiled_models_are_not_compiled_again(tmp_path, how):
    torch._dynamo.reset()
    model, counting = InnerNet(), Counting()
    if how == "module.compile":
        model.net.compile(backend=counting)
    elif how == "torch.compile":
        model.net = torch.compile(model.net, backend=counting)
    else:
        model.net = torch.compile(model.net, backend=how)

    class Tell(Callback):
        def on_train_start(self, trainer, pl_module):
            counting.trainer = trainer

    class Compiled(Callback):
        def __init__(self):
            self.counts = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.utils.counters.clear()
    precise = PreciseBatchNorm(ALL, restore=True)
    fit(tmp_path, precise, Tell(), compiled := Compiled(), model=model, max_epochs=3)
    states = [without_prefix(state) for state in [*model.validated, model.state_dict()]]
    assert all(is_exact(state, tolerance=1e-4) for state in states)
    assert compiled.counts[0] == compiled.counts[1] == compiled.counts[2] > 0
    assert all(epoch in (None, 0) for epoch in counting.epochs)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- beside the monitor


class Windows(Callback):
    """Each report as it comes, with the number of training batches before it."""

    def __init__(self, monitor):
        self.monitor, self.reports, self.last = monitor, [], None

    def look(self, trainer):
        report = self.monitor._report
        if report is not None and report is not self.last and (trainer.global_step not in dict(self.reports)):
            self.reports.append((trainer.global_step, report))
        self.last = report

    def on_train_batch_end(self, trainer, *_):
        self.look(trainer)

    def on_validation_start(self, trainer, *_):
        self.look(trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.look(trainer)

    def on_train_end(self, trainer, *_):
        self.look(trainer)


def close(one, two):
    """What two reports say, compared number by number."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        # How far validation is from training is as seen by the network that validates.
        return all(close(one[key], two[key]) for key in one if not key.startswith("val_shift"))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(close(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, float) and isinstance(two, float):
        return bool(np.isclose(one, two, rtol=1e-12, atol=1e-12, equal_nan=True))
    return one == two


def with_monitor(folder, *callbacks, options=None, monitor_first=True, model=None, **trainer_options):
    monitor = BatchNormMonitor(**(options or {}))
    windows = Windows(monitor)
    order = [monitor, *callbacks] if monitor_first else [*callbacks, monitor]
    trainer, model = fit(folder, *order, windows, model=model or ByStep(), **trainer_options)
    return windows.reports, model, trainer


MONITORED = {
    "epochs": ({}, {}),
    "epochs, validation within": ({}, {"val_check_interval": 0.5}),
    "batches": ({"every_n_train_batches": 4}, {}),
    "batches, validation within": ({"every_n_train_batches": 4}, {"val_check_interval": 0.5}),
    "two epochs": ({"every_n_epochs": 2}, {}),
    "max_steps": ({}, {"max_steps": 10}),
}


@pytest.mark.parametrize(
    ("how", "monitor_first"), [*((how, True) for how in MONITORED), ("epochs", False), ("batches", False)]
)
def test_with_restore_the_monitor_reports_what_it_does_without(tmp_path, how, monitor_first):
    options, more = MONITORED[how]
    kwargs = {"options": options, "max_epochs": 3, **more}
    precise = PreciseBatchNorm(ALL, restore=True)
    reports, model, _ = with_monitor(tmp_path, precise, monitor_first=monitor_first, **kwargs)
    plain, _, _ = with_monitor(tmp_path, **kwargs)
    assert [step for step, _ in reports] == [step for step, _ in plain] != []
    for (_, one), (_, two) in zip(reports, plain, strict=True):
        assert close(one.to_dict(), two.to_dict())
        assert all("written-outside" not in layer.flags for layer in one.values())
    assert all(is_exact(state) for state in model.validated)


@pytest.mark.parametrize(
    ("how", "monitor_first"), [*((how, True) for how in MONITORED), ("epochs", False), ("batches", False)]
)
def test_without_restore_the_monitor_knows_who_wrote(tmp_path, how, monitor_first):
    options, more = MONITORED[how]
    kwargs = {"options": options, "max_epochs": 3, **more}
    reports, _, _ = with_monitor(tmp_path, PreciseBatchNorm(ALL), monitor_first=monitor_first, **kwargs)
    plain, _, _ = with_monitor(tmp_path, **kwargs)
    assert [step for step, _ in reports] == [step for step, _ in plain] != []
    for (_, one), (_, two) in zip(reports, plain, strict=True):
        for name, layer in one.items():
            assert "written-outside" not in layer.flags, name
            assert (layer.num_batches, layer.num_samples) == (two[name].num_batches, two[name].num_samples)
            assert torch.equal(layer.population_mean, two[name].population_mean)
            assert torch.equal(layer.population_var, two[name].population_var)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("how", ["epochs", "batches, validation within", "two epochs", "max_steps"])
def test_the_monitor_after_a_resume(tmp_path, how, restore):
    options, more = MONITORED[how]
    kwargs = {"options": options, "max_epochs": 3, **more}

    def precise():
        return PreciseBatchNorm(ALL, restore=restore)

    plain, _, _ = with_monitor(tmp_path / "plain", *([] if restore else [precise()]), **kwargs)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    with_monitor(tmp_path, precise(), checkpoint, **kwargs)
    for path in sorted(tmp_path.glob("*.ckpt"))[:2]:
        start = saved(path)["global_step"]
        if start < (10 if how == "max_steps" else 3 * BATCHES):
            resumed, _, _ = with_monitor(tmp_path, precise(), ckpt_path=path, **kwargs)
            expected = [(step, report) for step, report in plain if step > start]
            assert [step for step, _ in resumed if step > start] == [step for step, _ in expected] != []
            reports = [report for step, report in resumed if step > start]
            for report, (step, other) in zip(reports, expected, strict=True):
                assert close(report.to_dict(), other.to_dict()), step
                assert all("written-outside" not in layer.flags for layer in report.values())


def test_the_example_is_repaired(tmp_path):
    """A layer whose momentum is far too small: validation is better at once, the next verdict is healthy."""

    class Slow(Net):
        def __init__(self):
            super().__init__()
            self.net.a.momentum = 0.001
            self.losses = []

        def on_validation_end(self):
            self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.001)

    def run(*callbacks):
        monitor = BatchNormMonitor()
        windows = Windows(monitor)
        data = train_data(40 * BATCH_SIZE)
        _, model = fit(tmp_path, *callbacks, monitor, windows, model=Slow(), data=data, max_epochs=3)
        return model.losses, [report["net.a"] for _, report in windows.reports]

    losses, layers = run(PreciseBatchNorm())
    before, sick = run()
    assert all(layer.needs_attention for layer in [layers[0], *sick])
    assert [(layer.verdict, layer.flags) for layer in layers[1:]] == [("healthy", ())] * 2
    assert all(loss < other for loss, other in zip(losses, before, strict=True))


# ------------------------------------------------------------------------------------------------------ other entrances


@pytest.mark.parametrize("restore", [False, True])
def test_under_pytorch_lightning(tmp_path, restore):
    checkpoint = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
    monitor = BatchNormMonitor()
    precise = PreciseBatchNorm(ALL, restore=restore)
    trainer_class = pytorch_lightning.Trainer
    _, model = fit(tmp_path, precise, checkpoint, monitor, model=OtherNet(), trainer_class=trainer_class)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    states = [saved(path)["state_dict"] for path in files]
    assert all(is_exact(state) for state in [*states, *model.validated, model.state_dict()])
    assert all("written-outside" not in layer.flags for layer in monitor.report().values())
    if restore:
        mine = torch.optim.Adam(model.parameters()), fit(tmp_path, model=OtherNet(), trainer_class=trainer_class)
        assert same(model.state_dict(), mine[1][1].state_dict(), STATS) == []


def test_from_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(
        """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_bnmonitor.PreciseBatchNorm
      init_args:
        num_batches: 4
        every_n_epochs: 2
        restore: true
"""
    )
    cli = LightningCLI(
        Net,
        run=False,
        args=["--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
        seed_everything_default=1,
    )
    [precise] = [callback for callback in cli.trainer.callbacks if isinstance(callback, PreciseBatchNorm)]
    assert (precise._num_batches, precise._every_n_epochs, precise._is_restoring) == (4, 2, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.trainer.fit(cli.model, train_data(), val_data())
    assert precise.recalibration.num_batches == 4


def test_a_run_that_is_resumed_with_other_settings_finds_the_statistics_of_training():
    settings = ({}, {"num_batches": 3}, {"every_n_epochs": 2}, {"restore": True})
    assert len({PreciseBatchNorm(**options).state_key for options in settings}) == 1


def test_the_callback_can_be_copied_and_pickled(tmp_path):
    precise = PreciseBatchNorm(ALL, restore=True)
    fit(tmp_path, precise)
    for twin in (copy.deepcopy(precise), pickle.loads(pickle.dumps(precise))):
        state, other = precise.state_dict(), twin.state_dict()
        assert set(state) == {"training", "exact"}
        assert all(torch.equal(state[kind][name], other[kind][name]) for kind in state for name in LAYERS)


# ---------------------------------------------------------------------------------------------------- several processes

WORLD_SIZE = 2


def run_rank(rank, folder, port):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": WORLD_SIZE,
        "LOCAL_WORLD_SIZE": WORLD_SIZE,
    }
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (place | address).items()})

    def run(name, *callbacks, shuffle=True, **options):
        strategy = DDPStrategy(timeout=datetime.timedelta(seconds=30), broadcast_buffers=False)
        monitor, trace = BatchNormMonitor(), Trace()
        path = Path(folder, name)
        data = train_data(WORLD_SIZE * BATCHES * BATCH_SIZE, shuffle=shuffle)
        options = {"devices": WORLD_SIZE, "strategy": strategy, **options}
        _, model = fit(path, *callbacks, monitor, trace, data=data, **options)
        return {
            "validated": model.validated,
            "left": {key: value.clone() for key, value in model.state_dict().items()},
            "trace": trace.states,
            "report": monitor.report().to_dict(),
        }

    results = {
        "without": run("without"),
        "with": run("with", PreciseBatchNorm(ALL)),
        "restored": run("restored", PreciseBatchNorm(ALL, restore=True), ModelCheckpoint(Path(folder, "saved"))),
    }
    try:
        trainer_options = {"devices": WORLD_SIZE, "strategy": DDPStrategy(timeout=datetime.timedelta(seconds=30))}
        bad = PreciseBatchNorm(dataloader=[torch.ones(2, 1, 6) if rank == 0 else "no batch"])
        trainer_for(Path(folder), bad, **trainer_options).fit(Net(), train_data(), val_data())
    except RuntimeError as error:
        results["failed"] = str(error)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, str(folder), port)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    give_up = time.monotonic() + 180
    for process in processes:
        process.join(timeout=max(give_up - time.monotonic(), 0))
    hangs = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert not any(hangs)
    results = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD_SIZE)]
    [path] = folder.glob("saved/*.ckpt")
    return results, saved(path)["state_dict"]


def test_all_ranks_have_the_exact_statistics_of_all_their_data(ranks):
    results, checkpoint = ranks
    x = samples(WORLD_SIZE * BATCHES * BATCH_SIZE).tensors[0].double().numpy()
    for how in ("with", "restored"):
        first, second = (result[how] for result in results)
        for one, two in zip([*first["validated"], first["left"]], [*second["validated"], second["left"]], strict=True):
            assert same(one, two, ["num_batches_tracked"]) == []
            assert is_exact(one, x)
    assert is_exact(checkpoint, x)
    assert same(checkpoint, results[0]["restored"]["left"]) == []


def test_on_all_ranks_training_is_bit_identical_with_restore(ranks):
    for result in ranks[0]:
        mine, plain = Trace(), Trace()
        mine.states, plain.states = result["restored"]["trace"], result["without"]["trace"]
        mine.check(plain)
        assert close(result["restored"]["report"], result["without"]["report"])


def test_if_the_pass_fails_on_one_rank_it_fails_on_all(ranks):
    assert "Another rank" in ranks[0][0]["failed"]
    assert "cannot take batch 0" in ranks[0][1]["failed"]
