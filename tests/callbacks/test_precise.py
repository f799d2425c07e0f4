"""`PreciseBatchNorm`: what is validated, saved and left has exact running statistics, however training ends."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lightning_bnmonitor import BatchNormMonitor, PreciseBatchNorm
from tests.callbacks.lightning_versions import takes_callbacks_of_the_other
from tests.callbacks.precise_fits import (
    ALL,
    BATCH_SIZE,
    BATCHES,
    EXPECTED_WARNINGS,
    LAYERS,
    STATS,
    Net,
    OtherNet,
    Trace,
    error_of,
    fit,
    inputs_of,
    is_exact,
    same,
    samples,
    saved,
    train_data,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


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


@pytest.mark.parametrize(("restore", "inference_mode"), [(False, True), (True, True), (True, False)])
def test_what_is_validated_and_what_is_left_are_exact(tmp_path, restore, inference_mode):
    precise = PreciseBatchNorm(ALL, restore=restore)
    _, model = fit(tmp_path, precise, inference_mode=inference_mode)
    assert len(model.validated) == 2
    assert all(is_exact(state) for state in [*model.validated, model.state_dict()])
    assert precise.recalibration.num_batches == BATCHES


def test_without_the_callback_they_are_not(tmp_path):
    _, without = fit(tmp_path)
    assert min(error_of(state) for state in [*without.validated, without.state_dict()]) > 0.1


def test_both_layers_are_exact_where_the_batches_are_known(tmp_path):
    _, model = fit(tmp_path, PreciseBatchNorm(ALL), data=train_data(shuffle=False))
    assert all(is_exact(state, batch_size=BATCH_SIZE) for state in [*model.validated, model.state_dict()])


def test_no_more_batches_than_asked_for(tmp_path):
    _, model = fit(tmp_path, precise := PreciseBatchNorm(2), data=train_data(shuffle=False))
    x = samples().tensors[0][: 2 * BATCH_SIZE].double().numpy()
    assert all(is_exact(state, x, BATCH_SIZE) for state in [*model.validated, model.state_dict()])
    assert precise.recalibration.num_batches == 2


def test_as_many_batches_as_it_takes_and_all_if_they_are_too_few(tmp_path):
    _, model = fit(tmp_path, precise := PreciseBatchNorm("auto"), data=train_data(shuffle=False))
    assert all(is_exact(state, batch_size=BATCH_SIZE) for state in [*model.validated, model.state_dict()])
    assert precise.recalibration.num_batches == BATCHES
    assert "not below 0.01: the data ended." in str(precise.recalibration)
    data = samples(20 * 8192).tensors[0]
    loader = [(part, None) for part in data.split(8192)]
    _, model = fit(tmp_path, precise := PreciseBatchNorm("auto", dataloader=loader))
    assert precise.recalibration.num_batches == 8
    assert is_exact(model.state_dict(), data[: 8 * 8192].double().numpy(), 8192)


def test_as_many_as_it_takes_with_restore_change_nothing_of_the_training(tmp_path):
    _, model = fit(tmp_path, PreciseBatchNorm("auto", restore=True))
    _, plain = fit(tmp_path)
    assert same(model.state_dict(), plain.state_dict(), STATS) == []


@pytest.mark.parametrize("position", [0, 3])  # before and after all others
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


@pytest.mark.parametrize(
    ("how", "val"),
    [
        *((how, True) for how in ("top", "last", "last only", "train epoch end", "weights only")),
        ("last", False),  # all are saved at the end of the epoch then
    ],
)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("num_batches", [ALL, "auto"])
def test_fast_dev_run(tmp_path, num_batches):
    _, model = fit(tmp_path, precise := PreciseBatchNorm(num_batches), fast_dev_run=2, data=train_data(shuffle=False))
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


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("num_batches", "every_n_epochs") for value in (0, -1, 1.5, True, "2")]
    + [("num_batches", None), ("restore", 1), ("restore", None), ("frozen", 1), ("frozen", None)],
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value!r}"):
        PreciseBatchNorm(**{name: value})


# ------------------------------------------------------------------------------------------------------ other entrances


@takes_callbacks_of_the_other
def test_under_pytorch_lightning(tmp_path):
    checkpoint = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
    monitor = BatchNormMonitor()
    precise = PreciseBatchNorm(ALL, restore=True)
    trainer_class = pytorch_lightning.Trainer
    _, model = fit(tmp_path, precise, checkpoint, monitor, model=OtherNet(), trainer_class=trainer_class)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    states = [saved(path)["state_dict"] for path in files]
    assert all(is_exact(state) for state in [*states, *model.validated, model.state_dict()])
    assert all("written-outside" not in layer.flags for layer in monitor.report().values())
    _, plain = fit(tmp_path, model=OtherNet(), trainer_class=trainer_class)
    assert same(model.state_dict(), plain.state_dict(), STATS) == []


@pytest.mark.parametrize("num_batches", [4, "auto"])
def test_from_yaml(tmp_path, num_batches):
    (tmp_path / "config.yaml").write_text(
        f"""
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
        num_batches: {num_batches}
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
    assert (precise._num_batches, precise._every_n_epochs, precise._is_restoring) == (num_batches, 2, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.trainer.fit(cli.model, train_data(), val_data())
    assert precise.recalibration.num_batches == (BATCHES if num_batches == "auto" else 4)


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
