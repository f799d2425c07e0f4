"""Fits with `PreciseBatchNorm`, and the exact statistics in float64 from the weights and the data alone."""

import random
from collections import OrderedDict

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks import expected_warnings

BATCHES, BATCH_SIZE, MOMENTUM = 6, 16, 0.05  # in an epoch
STATS = ("running_mean", "running_var")
LAYERS = ("net.a", "net.b")
EXPECTED_WARNINGS = [
    *expected_warnings.EXPECTED_WARNINGS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore:`batches` gave"),
]
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


class ByStep(Net):
    """Trains on the batch that belongs to the step, as Lightning does not bring a loader back to where it was."""

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step % BATCHES
        x, y = (tensor[step * BATCH_SIZE : (step + 1) * BATCH_SIZE] for tensor in samples().tensors)
        torch.manual_seed(self.trainer.global_step)
        return nn.functional.mse_loss(self(x), y)


def close(one, two):
    """What two reports say, compared number by number."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        # How far validation is from training is as seen by the network that validates.
        return all(close(one[key], two[key]) for key in one if not key.startswith(("val_error", "val_shift")))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(close(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, float) and isinstance(two, float):
        return bool(np.isclose(one, two, rtol=1e-12, atol=1e-12, equal_nan=True))
    return one == two
