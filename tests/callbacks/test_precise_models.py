"""How `PreciseBatchNorm` calls the model: batches on their way, frozen layers, precisions, compiled models."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_bnmonitor import PreciseBatchNorm
from tests.callbacks.precise_fits import (
    ALL,
    BATCHES,
    EXPECTED_WARNINGS,
    STATS,
    Net,
    Trace,
    fit,
    is_exact,
    network,
    same,
    samples,
    train_data,
    trainer_for,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


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


@pytest.mark.filterwarnings("ignore:PreciseBatchNorm has left layers alone")
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


@pytest.mark.filterwarnings("ignore:PreciseBatchNorm has left layers alone")
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "restore"), [("bf16-mixed", True), ("bf16-true", True), ("64-true", True), ("bf16-true", False)]
)
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


@pytest.mark.slow
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
