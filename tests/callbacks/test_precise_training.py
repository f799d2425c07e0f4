"""`PreciseBatchNorm` and training: restored bit by bit, resumed, interrupted, with averaged weights."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)

from lightning_bnmonitor import PreciseBatchNorm
from tests.callbacks.lightning_versions import averaging
from tests.callbacks.precise_fits import (
    ALL,
    BATCHES,
    EXPECTED_WARNINGS,
    LAYERS,
    MOMENTUM,
    STATS,
    ByStep,
    Net,
    Trace,
    fit,
    is_exact,
    same,
    same_training,
    saved,
    train_data,
    val_data,
)

pytestmark = EXPECTED_WARNINGS


# ----------------------------------------------------------------------------------------------------- averaged weights


@pytest.mark.slow
def test_stochastic_weight_averaging(tmp_path):
    def swa():
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)

    _, other = fit(tmp_path / "other", swa(), max_epochs=3)
    for first, restore in ((False, False), (True, False), (False, True), (True, True)):
        folder, precise = tmp_path / f"{first} {restore}", PreciseBatchNorm(ALL, restore=restore)
        callbacks = [precise, swa()] if first else [swa(), precise]
        _, model = fit(folder, *callbacks, ModelCheckpoint(folder, save_last=True), max_epochs=3)
        assert [is_exact(state) for state in model.validated] == [True] * 4
        assert is_exact(model.state_dict())
        assert is_exact(torch.load(folder / "last.ckpt", weights_only=False)["state_dict"])  # SWA keeps a function
        assert same(model.state_dict(), other.state_dict(), STATS) == []
        assert model.net.a.momentum == MOMENTUM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "use_buffers", "first", "restore"),
    [
        ("WeightAveraging", True, True, True),
        ("EMAWeightAveraging", True, False, False),
        ("EMAWeightAveraging", False, False, False),
        ("EMAWeightAveraging", False, True, True),
        ("EMAWeightAveraging", False, False, True),
    ],
)
def test_averaged_weights_have_their_own_exact_statistics(tmp_path, name, use_buffers, first, restore):
    def callbacks(*precise):
        average = averaging(name)(use_buffers=use_buffers)
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


class Swaps(Net):
    """Puts other weights in place for validation by itself, in the last hook before its first batch."""

    def on_validation_epoch_start(self):
        self.own = [parameter.detach().clone() for parameter in self.parameters()]
        for parameter in self.parameters():
            parameter.data.mul_(1.5).add_(0.1)

    def on_validation_epoch_end(self):
        for parameter, own in zip(self.parameters(), self.own, strict=True):
            parameter.data.copy_(own)


def test_weights_that_the_module_itself_swaps_have_their_own_exact_statistics(tmp_path):
    _, model = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), model=Swaps())
    assert [is_exact(state) for state in model.validated] == [True] * 2


# ------------------------------------------------------------------------------------------------------------ restoring


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 0.5},
        {"val_check_interval": 0.5, "inference_mode": False, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_training_is_bit_identical_with_restore(tmp_path, options):
    options = options | {"max_epochs": 3}
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


@pytest.mark.slow
@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_resumed_run_is_bit_identical_to_one_without(tmp_path, inference_mode):
    """From checkpoints of validations within an epoch and at its end."""
    options = {"val_check_interval": 0.5, "inference_mode": inference_mode, "max_epochs": 2}
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    plain = fit(tmp_path, two := Trace(), model=ByStep(), **options)
    fit(tmp_path, PreciseBatchNorm(ALL, restore=True), checkpoint, model=ByStep(), **options)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == 4
    for path in paths:
        left = 2 * BATCHES - saved(path)["global_step"]
        assert is_exact(saved(path)["state_dict"])
        if left:
            resumed = PreciseBatchNorm(ALL, restore=True)
            mine = fit(tmp_path, resumed, one := Trace(), model=ByStep(), ckpt_path=path, **options)
            one.check(two, last=left, but=("torch", "random", "numpy"))
            same_training(mine, plain, STATS)
            assert all(is_exact(state) for state in mine[1].validated)


def test_a_run_that_goes_on_after_its_end_is_bit_identical_to_a_longer_one_without(tmp_path):
    fit(tmp_path, PreciseBatchNorm(ALL, restore=True), ModelCheckpoint(tmp_path), model=ByStep())
    plain = fit(tmp_path, model=ByStep(), max_epochs=3)
    [path] = tmp_path.glob("*.ckpt")
    mine = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), model=ByStep(), max_epochs=3, ckpt_path=path)
    same_training(mine, plain, STATS)


def test_a_second_fit_goes_on_with_the_statistics_of_training(tmp_path):
    trainer, model = fit(tmp_path, PreciseBatchNorm(ALL, restore=True), one := Trace(), model=ByStep())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, train_data(), val_data())
    other_trainer, other = fit(tmp_path, two := Trace(), model=ByStep())
    other_trainer.fit_loop.max_epochs = 4
    other_trainer.fit(other, train_data(), val_data())
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "hook", "restore"),
    [
        (StopError, "on_validation_batch_end", True),
        (KeyboardInterrupt, "on_validation_batch_end", True),
        (StopError, "on_validation_end", True),
        (StopError, "on_train_batch_end", True),
        (StopError, "on_validation_batch_end", False),
        (StopError, "on_train_batch_end", False),
    ],
)
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
