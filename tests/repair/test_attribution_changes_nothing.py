"""Attribution leaves the model, its monitors and all random states as they were, whatever happens."""

import copy
import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker
from tests.repair.spoiled_models import (
    LAYERS,
    NAN,
    Net,
    attribute,
    exact_stats,
    healthy,
    losses_by_hand,
    mean_loss,
    norms,
    numbers,
    per_sample,
    spoil_mean,
    spoil_var,
    with_exact,
)
from tests.repair.unchanged import Everything, bits

# ------------------------------------------------------------------------------------------------------- left as it was


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "loss", "batches"])
@pytest.mark.parametrize(
    ("error", "call"),
    [*((KeyboardInterrupt, call) for call in (0, 1, *range(3, 19, 3))), *((OSError, call) for call in (0, 10))],
)
def test_all_is_as_before_whenever_something_is_raised(error, where, call):
    model, batches = healthy(Net(p=0.2), num_batches=3)
    with torch.no_grad():
        for layer in norms(model).values():
            spoil_mean(layer)
        spoil_var(model.blocks[0].norm)
    model.stem.momentum = None
    model.blocks[1].eval()
    model.head.num_batches_tracked += 7
    everything = Everything(model)
    calls = dict.fromkeys(("forward", "loss", "batches"), 0)

    def count(what):
        torch.rand(1), np.random.rand(), random.random()
        calls[what] += 1
        if what == where and calls[what] > call:
            raise error("now")

    class Batches:
        def __iter__(self):
            for batch in batches:
                count("batches")
                yield batch

    def forward(model, batch):
        output = model(batch[0])
        count("forward")
        return output

    def loss(output, batch):
        count("loss")
        return per_sample(output, batch)

    total = 3 * 7  # blocks.1.norm is frozen, the last of the others needs no pass
    if call >= total:
        attribute(model, Batches(), loss, forward=forward)
        assert calls[where] == total
    else:
        wrapped = where != "batches" and error is OSError
        with pytest.raises(RuntimeError if wrapped else error, match="now") as raised:
            attribute(model, Batches(), loss, forward=forward)
        causes = [raised.value]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        assert isinstance(causes[-1], error)
        assert calls[where] == call + 1
    everything.assert_same()


@pytest.mark.parametrize("modes", ["train", "eval", "frozen layer", "only a part in training"])
def test_modes_are_as_before_and_frozen_layers_keep_their_statistics(modes):
    model, batches = healthy()
    with torch.no_grad():
        spoil_mean(model.stem)
        spoil_mean(model.head)
    model.train(modes in ("train", "frozen layer"))
    if modes == "frozen layer":
        model.head.eval()
    if modes == "only a part in training":
        model.blocks.train()
    everything = Everything(model)
    found = attribute(model, batches)
    everything.assert_same()
    names = {part.name for part in found.contributions}
    if modes == "frozen layer":
        assert names == {"stem"}
        stats = exact_stats(model, batches)
        exact = with_exact(model, stats, [name for name in LAYERS if name != "head"]).eval()
        assert found.exact_loss == pytest.approx(losses_by_hand(exact, batches, per_sample).mean(), rel=1e-5)
        by_hand = losses_by_hand(model, batches, per_sample).mean()
        assert found.train_loss == found.batch_loss == pytest.approx(by_hand, rel=1e-5)
    else:
        assert names == {"stem", "head"}
        assert found.train_loss == found.batch_loss


class Odd(nn.Module):
    """A shared layer, one that is never called, one without running statistics, one that never updates them."""

    def __init__(self):
        super().__init__()
        self.shared = nn.BatchNorm1d(6)
        self.same = self.shared
        self.unused = nn.BatchNorm1d(6)
        self.stateless = nn.BatchNorm1d(6, track_running_stats=False)
        self.still = nn.BatchNorm1d(6, momentum=0.0)
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        return self.linear(self.still(self.stateless(self.same(torch.tanh(self.shared(x))) * 2)))


def test_layers_that_are_shared_unused_stateless_or_never_updated():
    model = Odd()
    inputs = [torch.randn(64, 6) + 1 for _ in range(4)]
    batches = [(x, torch.zeros(64, 2)) for x in inputs]
    with torch.no_grad():
        spoil_mean(model.unused)
        model.unused.running_var.fill_(NAN)
        model.linear.weight.normal_()
        received = {"shared": [], "still": []}
        by_batch = copy.deepcopy(model).eval()
        for name, inputs_of in received.items():
            layer = getattr(by_batch, name).train()
            layer.register_forward_pre_hook(lambda _, args, inputs_of=inputs_of: inputs_of.append(args[0]))
        for x in inputs:
            by_batch(x)
        for name, inputs_of in received.items():
            getattr(model, name).running_mean.copy_(torch.cat(inputs_of).double().mean(0))
            getattr(model, name).running_var.copy_(torch.cat(inputs_of).double().var(0))
        exact = copy.deepcopy(model).eval()
        batches = [(x, exact(x)) for x in inputs]
        model.shared.running_mean += 2
        model.shared.running_var *= 20
    everything = Everything(model)
    found = attribute(model, batches)
    everything.assert_same()
    assert [part.name for part in found.contributions] == ["shared"]
    assert found.rest.name == "1 other layer"
    assert found.exact_loss == pytest.approx(0, abs=1e-9)
    assert found.eval_loss > 0.01


@pytest.mark.parametrize("others", [[nn.LayerNorm(6)], [nn.Dropout(0.5)]])
def test_a_model_without_batchnorm_warns_and_has_nothing_to_explain(others):
    model = nn.Sequential(*others, nn.Linear(6, 2))
    batches = [(torch.randn(64, 6), torch.randn(64, 2)) for _ in range(3)]
    everything = Everything(model)
    with pytest.warns(UserWarning, match="No BatchNorm layer"):
        found = attribute(model, batches)
    everything.assert_same()
    by_hand = losses_by_hand(copy.deepcopy(model).eval(), batches, per_sample).mean()
    assert found.eval_loss == found.exact_loss == found.batch_loss == pytest.approx(by_hand)
    assert (found.gap, found.contributions, found.rest, found.worst) == (0, (), None, None)
    assert found.gap_stderr < 2e-7 * found.eval_loss  # rounding
    by_batch, others = (part.reduction for part in found.remaining)
    assert by_batch == 0
    assert others == pytest.approx(found.eval_loss - found.train_loss)
    assert str(found).startswith("Nothing to explain")
    found.plot()[0].canvas.draw()


def test_a_layer_that_is_the_model():
    model = nn.BatchNorm1d(6)
    batches = [(torch.randn(64, 6) + 3, torch.zeros(64, 6)) for _ in range(3)]
    assert attribute(model, batches).worst == "(root)"


def test_a_lazy_layer_is_an_error_and_stays_lazy():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="'0' has not been initialised"):
        attribute(model, [(torch.randn(8, 6), torch.zeros(8, 2))] * 2)
    assert isinstance(model[0], nn.LazyBatchNorm1d)
    batches = [(torch.randn(8, 6) + 9, torch.zeros(8, 2))] * 2
    model(batches[0][0])
    everything = Everything(model)
    attribute(model, batches)
    everything.assert_same()


def test_buffers_of_other_modules_are_as_before_too():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.instance = nn.InstanceNorm1d(6, track_running_stats=True)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return self.instance(self.norm(x)[..., None].expand(-1, -1, 3)).mean(2)[:, :2]

    model = Counting()
    batches = [(torch.randn(8, 6) + 9, torch.randn(8, 2)) for _ in range(3)]
    everything = Everything(model)
    attribute(model, batches)
    everything.assert_same()


def test_it_works_in_inference_mode_and_on_a_model_that_was_made_there(spoiled):
    model, batches = spoiled
    expected = numbers(attribute(model, batches))
    with torch.inference_mode():
        made_there = Net()
        made_there.load_state_dict(model.state_dict())
        everything = Everything(model)
        assert numbers(attribute(model, batches)) == expected
    everything.before["gradients are on"] = True
    everything.assert_same()
    everything = Everything(made_there)
    assert numbers(attribute(made_there, batches)) == expected
    everything.assert_same()


@pytest.mark.slow
def test_a_compiled_model_is_attributed_as_the_one_that_is_compiled(spoiled):
    model, batches = spoiled
    expected = attribute(model, batches)
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0][0])
    with torch.no_grad():
        model.blocks[0].norm.running_mean.copy_(torch.full((6,), 4.0))
        model.stem.reset_running_stats()
    expected = attribute(model, batches)
    everything = Everything(compiled)
    found = attribute(compiled, batches)
    everything.assert_same()
    assert numbers(found) == numbers(expected)
    assert found.contributions[0].name in LAYERS


# ------------------------------------------------------------------------------------------------------------- monitors


def contents(report):
    tensors = {name: repr(layer.numbers.tolist()) for name, layer in report.items()}
    return tensors, repr(report.to_dict()), str(report)


@pytest.mark.parametrize("capture", ["auto", "pass"])
@pytest.mark.parametrize("closed", [False, True])
def test_an_attached_tracker_counts_nothing_and_flags_nothing(closed, capture):
    model, batches = healthy(Net(p=0.2), num_batches=8)
    with torch.no_grad():
        spoil_mean(model.head)
    control = copy.deepcopy(model)
    results = []
    for net, interrupted in ((control, False), (model, True)):
        torch.manual_seed(1)
        found = []
        with BatchNormTracker(net, capture=capture) as tracker:
            for batch in batches[:5]:
                net(batch[0])
            if closed:
                tracker.close()
            before = contents(tracker.report())
            if interrupted:
                everything = Everything(net)
                assert attribute(net, batches).worst == "head"
                everything.assert_same()
            assert contents(tracker.report()) == before
            for batch in batches[5:]:
                net(batch[0])
            found += [before, contents(tracker.report()), contents(tracker.close())]
            tracker.reset()
            for batch in batches:
                net(batch[0])
            found.append(contents(tracker.close()))
        results.append(found)
    assert results[0] == results[1]


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, index):
        return mean_loss(self.net(batch[0]), batch)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Attributing(pl.Callback):
    def __init__(self, hook, batches):
        self.batches, self.found = batches, []
        setattr(self, hook, self._attribute)

    def _attribute(self, trainer, pl_module, *args):
        forward = lambda module, batch: module.net(batch[0])  # noqa: E731
        self.found.append(attribute(pl_module, self.batches, forward=forward))


def trained_by_lightning(batches, folder, *callbacks):
    """What a monitor reports of a training, and the weights."""
    torch.manual_seed(2)
    module, monitor = Lit(), BatchNormMonitor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=[monitor, *callbacks],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
    return contents(monitor.report()), [bits(tensor) for tensor in module.state_dict().values()]


@pytest.mark.slow
def test_a_monitor_reports_as_if_nothing_had_been_run(tmp_path):
    _, batches = healthy(num_batches=4)
    undisturbed = trained_by_lightning(batches, tmp_path)
    for hook in ("on_train_batch_end", "on_validation_epoch_end", "on_train_epoch_end", "on_fit_end"):
        attributing = Attributing(hook, batches[:2])
        assert trained_by_lightning(batches, tmp_path, attributing) == undisturbed, hook
        assert attributing.found
        assert all(part.name.startswith("net.") for found in attributing.found for part in found.contributions)
