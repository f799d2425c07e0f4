"""Which layer's running statistics cost how much: against losses computed by hand with buffers written by hand."""

import copy
import itertools
import math
import random
import re
import warnings
from fractions import Fraction

import matplotlib as mpl

mpl.use("Agg")

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from lightning_bnmonitor import Attribution, BatchNormMonitor, BatchNormTracker, attribute_eval_gap
from lightning_bnmonitor.repair.attribution import Contribution

NAN, INF = math.nan, math.inf
LAYERS = ["stem", "blocks.0.norm", "blocks.1.norm", "head"]


@pytest.fixture(autouse=True)
def seeded_and_no_figure_left():
    torch.manual_seed(0)
    yield
    plt.close("all")


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(p)

    def forward(self, x):
        return self.dropout(torch.tanh(self.norm(self.linear(x))))


class Net(nn.Module):
    """BatchNorm layers at different depths, some in blocks with skip connections."""

    def __init__(self, p=0.0, num_blocks=2):
        super().__init__()
        self.stem = nn.BatchNorm1d(6)
        self.blocks = nn.ModuleList(Block(p) for _ in range(num_blocks))
        self.head = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.head(x))


def norms(model):
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


def normalising_by_the_batch(model):
    model = copy.deepcopy(model).eval()
    for layer in norms(model).values():
        layer.train()
    return model


@torch.no_grad()
def exact_stats(model, batches):
    """Mean and unbiased variance in two passes in float64 of what the layers receive, normalising by the batch."""
    model, received = normalising_by_the_batch(model), {}
    for name, layer in norms(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: received.setdefault(name, []).append(args[0]))
    for batch in batches:
        model(batch[0])
    stats = {}
    for name, values in received.items():
        x = torch.cat(values).double().transpose(0, 1).flatten(1)
        mean = x.sum(1, keepdim=True) / x.shape[1]
        stats[name] = (mean[:, 0], (x - mean).square().sum(1) / (x.shape[1] - 1), x)
    return stats


@torch.no_grad()
def with_exact(model, stats, names=None):
    model = copy.deepcopy(model)
    for name, layer in norms(model).items():
        if name in (stats if names is None else names):
            layer.running_mean.copy_(stats[name][0])
            layer.running_var.copy_(stats[name][1])
    return model


@torch.no_grad()
def losses_by_hand(model, batches, loss):
    """Of the model in the mode in which it is, as a float64 array: its layers' statistics are not used after."""
    model = copy.deepcopy(model)
    return np.concatenate([loss(model(batch[0]), batch).double().reshape(-1).numpy() for batch in batches])


def error_by_hand(layer, stats):
    mean, var, x = stats
    running_mean, running_var = layer.running_mean.double(), layer.running_var.double()
    of_exact = (x - mean[:, None]) / (var[:, None] + layer.eps).sqrt()
    of_running = (x - running_mean[:, None]) / (running_var[:, None] + layer.eps).sqrt()
    return float((of_exact - of_running).square().mean().sqrt())


def mean_and_stderr(difference):
    return difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))


def per_sample(output, batch):
    return (output - batch[1]).square().mean(dim=1)


def mean_loss(output, batch):
    return per_sample(output, batch).mean()


def healthy(model=None, num_batches=6, size=32, noise=0.1):
    """A model with exact statistics, and data whose targets are its outputs in eval mode with noise."""
    model = Net() if model is None else model
    with torch.no_grad():
        for layer in norms(model).values():
            if layer.affine:
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_()
    inputs = [torch.randn(size, 6) * torch.tensor([1, 2, 3, 1, 1, 0.5]) + 2 for _ in range(num_batches)]
    model.load_state_dict(with_exact(model, exact_stats(model, [(x,) for x in inputs])).state_dict())
    teacher = copy.deepcopy(model).eval()
    with torch.no_grad():
        return model, [(x, teacher(x) + noise * torch.randn(size, 2)) for x in inputs]


def spoil_mean(layer):
    layer.running_mean += 1.5 * layer.running_var.sqrt()


def spoil_var(layer):
    layer.running_var *= 0.05


def spoil_nan(layer):
    layer.running_var.fill_(NAN)


SPOILED = {"mean": spoil_mean, "variance": spoil_var, "NaN": spoil_nan}


def attribute(model, batches, loss=per_sample, **kwargs):
    return attribute_eval_gap(model, batches, loss, progress=False, **kwargs)


def bits(tensor):
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class Everything:
    """What must be as before."""

    def __init__(self, model, *generators):
        self.model, self.generators = model, generators
        self.tensors = [*model.parameters(), *model.buffers()]
        self.before = self.state()

    def state(self):
        modules = list(self.model.modules())
        attributes = ("training", "momentum", "track_running_stats", "eps")
        return {
            "tensors": [bits(tensor) for tensor in self.tensors],
            "same tensors": list(map(id, [*self.model.parameters(), *self.model.buffers()])),
            "gradients": [tensor.grad is None and tensor.requires_grad for tensor in self.model.parameters()],
            "attributes": [[getattr(module, name, None) for name in attributes] for module in modules],
            "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
            "torch": bits(torch.get_rng_state()),
            "numpy": repr([part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]),
            "python": random.getstate(),
            "generators": [bits(generator.get_state()) for generator in self.generators],
            "gradients are on": torch.is_grad_enabled(),
        }

    def assert_same(self):
        after = self.state()
        for what, before in self.before.items():
            assert after[what] == before, what


# ------------------------------------------------------------------------------------ against losses computed by hand


@pytest.mark.parametrize("loss", [per_sample, mean_loss])
def test_all_numbers_are_those_of_hand_written_buffers_and_paired_losses(loss):
    model, batches = healthy()
    batches[-1] = tuple(part[:11] for part in batches[-1])  # samples count alike, or batches do
    with torch.no_grad():
        spoil_mean(model.blocks[0].norm)
        spoil_var(model.stem)
    stats = exact_stats(model, batches)
    found = attribute(model, batches, loss)

    as_is, exact = (
        losses_by_hand(net.eval(), batches, loss) for net in (copy.deepcopy(model), with_exact(model, stats))
    )
    assert found.eval_loss == pytest.approx(as_is.mean(), rel=1e-5)
    assert found.exact_loss == pytest.approx(exact.mean(), rel=1e-5)
    by_batch = losses_by_hand(normalising_by_the_batch(model), batches, loss)
    assert found.batch_loss == found.train_loss == pytest.approx(by_batch.mean(), rel=1e-5)
    assert (found.gap, found.gap_stderr) == pytest.approx(mean_and_stderr(as_is - exact), rel=1e-4)
    assert len(as_is) == (5 * 32 + 11 if loss is per_sample else 6)

    names, present = [], as_is
    for part in found.contributions:
        names.append(part.name)
        following = losses_by_hand(with_exact(model, stats, names).eval(), batches, loss)
        assert (part.reduction, part.stderr) == pytest.approx(mean_and_stderr(present - following), rel=1e-3, abs=1e-7)
        assert part.eval_error == pytest.approx(error_by_hand(norms(model)[part.name], stats[part.name]), rel=1e-2)
        present = following
    if found.rest:
        assert (found.rest.reduction, found.rest.stderr) == pytest.approx(
            mean_and_stderr(present - exact), rel=1e-3, abs=1e-7
        )


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("loss", [per_sample, mean_loss])
def test_the_one_layer_that_is_spoiled_is_named(name, how, loss):
    model, batches = healthy()
    with torch.no_grad():
        SPOILED[how](norms(model)[name])
    everything = Everything(model)
    found = attribute(model, batches, loss)
    everything.assert_same()
    assert found.worst == name
    assert found.is_significant
    assert [part.name for part in found.contributions] == [name]
    assert found.rest.name == "3 other layers"
    assert found.contributions[0].reduction == pytest.approx(found.gap, rel=0.01)
    first_line = str(found).splitlines()[0]
    assert re.search(rf"\b{re.escape(name)}\b", first_line)
    assert ("nan" in first_line) == (how == "NaN")


@pytest.mark.parametrize("pair", [("stem", "head"), ("blocks.0.norm", "blocks.1.norm"), ("head", "blocks.0.norm")])
def test_two_spoiled_layers_are_both_named_and_nothing_else(pair):
    model, batches = healthy()
    with torch.no_grad():
        for name in pair:
            spoil_mean(norms(model)[name])
    found = attribute(model, batches)
    assert {part.name for part in found.contributions} == set(pair)
    assert found.worst == max(found.contributions, key=lambda part: part.reduction).name


def test_a_healthy_trained_model_has_nothing_to_explain():
    model = Net()
    inputs = [torch.randn(64, 6) for _ in range(20)]
    batches = [(x, torch.stack([x[:, 0], x[:, 1] * x[:, 2]], 1) + 0.3 * torch.randn(64, 2)) for x in inputs]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for rate in (0.1, 0.1, 0.1, 0.0):  # running statistics catch up with the weights
        optimizer.param_groups[0]["lr"] = rate
        for batch in batches:
            optimizer.zero_grad()
            mean_loss(model(batch[0]), batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    stats = exact_stats(model, batches)
    with_exact_stats = with_exact(model, stats)
    for net in (model, with_exact_stats):
        as_is, exact = (
            losses_by_hand(one.eval(), batches, mean_loss) for one in (copy.deepcopy(net), with_exact_stats)
        )
        gap, stderr = mean_and_stderr(as_is - exact)
        net.train()
        found = attribute(net, batches, mean_loss)
        assert found.gap == pytest.approx(gap, abs=1e-5)
        assert found.is_significant == (found.gap > found.gap_stderr)
        assert abs(gap) < 0.01 * found.eval_loss
        if gap < stderr * 0.9:
            assert str(found).startswith("Nothing to explain")
            assert (found.contributions, found.rest, found.worst) == ((), None, None)
    assert not attribute(with_exact_stats, batches, mean_loss).contributions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gap_of_rounding_alone_is_nothing_to_explain(dtype):
    """The same in all batches, so that its spread does not show that it is nothing."""
    model, batches = healthy(num_batches=4)
    exact = model.head.running_mean.clone()
    with torch.no_grad():
        spoil_mean(model.head)
    last_place = torch.finfo(dtype).eps
    for units, is_significant in ((1, False), (2, True)):

        def loss(output, batch, units=units):
            is_spoiled = not torch.allclose(model.head.running_mean, exact, atol=1e-4)
            return torch.tensor(1.0, dtype=dtype) + is_spoiled * units * last_place

        found = attribute(model.eval(), batches, loss)
        assert found.gap == units * last_place
        assert found.gap_stderr == pytest.approx(last_place)
        assert found.is_significant == is_significant
        assert found.worst == ("head" if is_significant else None)


def test_a_gap_below_its_standard_error_is_nothing_to_explain_and_one_above_is():
    model, batches = healthy(num_batches=4)
    with torch.no_grad():
        spoil_mean(model.head)
    signs = {False: [1, -1, 1, -1.2], True: [1, 1, 1, 0.9]}
    for is_significant, factors in signs.items():
        weighted = [(x, y, factor) for (x, y), factor in zip(batches, factors, strict=True)]
        found = attribute(model, weighted, lambda output, batch: mean_loss(output, batch) * batch[2])
        assert (found.gap > found.gap_stderr) == is_significant
        assert found.is_significant == is_significant
        assert bool(found.contributions) == is_significant
        assert str(found).startswith("Nothing to explain") != is_significant


@pytest.mark.parametrize("is_training", [True, False])
def test_contributions_and_the_rest_add_up_to_the_gap_and_all_steps_to_the_losses(is_training):
    model, batches = healthy(Net(p=0.3))
    with torch.no_grad():
        for layer in norms(model).values():
            layer.running_mean += torch.randn(6) * layer.running_var.sqrt()
    found = attribute(model.train(is_training), batches)
    parts = [*found.contributions, *([found.rest] if found.rest else [])]
    assert sum(part.reduction for part in parts) == pytest.approx(found.gap, rel=1e-9)
    assert found.eval_loss - found.exact_loss == pytest.approx(found.gap, rel=1e-9)
    steps = [value for _, value in found._remaining]
    assert found.eval_loss - found.gap - sum(steps) == pytest.approx(found.train_loss, rel=1e-9)


def test_layers_are_taken_in_the_order_of_eval_error():
    model, batches = healthy(num_batches=3)
    with torch.no_grad():
        for layer, shift in zip(norms(model).values(), (0.5, 2.0, 1.0, 0.2), strict=True):
            layer.running_mean += shift * layer.running_var.sqrt()
    stats = exact_stats(model, batches)
    errors = {name: error_by_hand(layer, stats[name]) for name, layer in norms(model).items()}
    found = attribute(model, batches)
    expected = sorted(errors, key=errors.__getitem__, reverse=True)
    names = [part.name for part in found.contributions]
    assert names == expected[: len(names)]
    assert len(names) >= 3
    if found.rest:
        assert found.rest.name == "1 other layer"
        assert found.rest.eval_error == pytest.approx(errors[expected[-1]], rel=1e-2)


def test_layers_that_are_equally_far_off_are_taken_in_the_order_of_the_model():
    model, batches = healthy()
    with torch.no_grad():
        spoil_nan(model.blocks[0].norm)
        spoil_nan(model.head)
    found = attribute(model, batches)
    assert [part.name for part in found.contributions] == ["blocks.0.norm", "head"]
    assert [part.reduction for part in found.contributions] == pytest.approx([NAN, INF], nan_ok=True)
    assert found.worst == "blocks.0.norm"


@pytest.mark.parametrize("num_spoiled", [1, 2, 3, 12])
def test_no_pass_is_made_for_layers_that_explain_less_than_a_hundredth(num_spoiled):
    model, batches = healthy(Net(num_blocks=10), num_batches=3)
    with torch.no_grad():
        for layer in list(norms(model).values())[:num_spoiled]:
            layer.running_mean += 2 * layer.running_var.sqrt()
    stats = exact_stats(model, batches)
    errors = {name: error_by_hand(layer, stats[name]) for name, layer in norms(model).items()}
    order = sorted(errors, key=errors.__getitem__, reverse=True)
    exact = losses_by_hand(with_exact(model, stats).eval(), batches, per_sample).mean()
    left = [
        losses_by_hand(with_exact(model, stats, order[:number]).eval(), batches, per_sample).mean() - exact
        for number in range(len(order) + 1)
    ]
    expected = next(number for number in range(1, len(order) + 1) if abs(left[number]) < 0.01 * left[0])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = attribute(model, batches)
    assert [part.name for part in found.contributions] == order[:expected]
    assert len(calls) == 3 * (4 + expected - (expected == len(order)))
    assert (found.rest is None) == (expected == len(order))
    if found.rest:
        others = len(order) - expected
        assert found.rest.name == f"{others} other layer{'s' * (others > 1)}"
        assert abs(found.rest.reduction) < 0.01 * found.gap


# ------------------------------------------------------------------------------------------------------ what remains


def test_dropout_is_in_what_other_modules_do_in_training_mode():
    model, batches = healthy(Net(p=0.5), size=256, noise=0.01)
    state = torch.get_rng_state()
    training = losses_by_hand(model.train(), batches, per_sample).mean()
    torch.set_rng_state(state)
    found = attribute(model, batches)
    assert found.train_loss == pytest.approx(training, rel=1e-5)
    by_batch, others = dict(found._remaining).values()
    assert by_batch == found.exact_loss - found.batch_loss
    assert others == found.batch_loss - found.train_loss
    assert others < -20 * abs(by_batch)
    assert not found.contributions
    rows = table(found)[1]
    assert float(rows["- other modules in training mode"]["explains"]) == pytest.approx(others, rel=1e-3)


def test_a_model_that_is_worse_in_eval_mode_for_another_reason_says_so():
    class Bug(nn.Module):
        def forward(self, x):
            return x if self.training else 3 * x

    model, batches = healthy()
    targets = normalising_by_the_batch(model)
    with torch.no_grad():
        batches = [(x, targets(x)) for x, _ in batches]
    found = attribute(nn.Sequential(model, Bug()), batches)
    assert dict(found._remaining)["other modules in training mode"] > 10 * found.train_loss + 0.1
    assert f"{found.exact_loss - found.train_loss:.4g} more than in training mode remain" in str(found)
    assert "no running statistics explain" in str(found)


def test_tiny_batches_are_in_normalising_by_the_batch():
    model, _ = healthy(num_batches=40, size=64)
    x = torch.randn(200, 6)
    with torch.no_grad():
        target = normalising_by_the_batch(model)(x)
    batches = list(zip(x.split(2), target.split(2), strict=True))
    found = attribute(model, batches)
    by_hand = losses_by_hand(normalising_by_the_batch(model), batches, per_sample).mean()
    assert found.batch_loss == pytest.approx(by_hand, rel=1e-5)
    by_batch, others = dict(found._remaining).values()
    assert others == 0
    assert by_batch == found.exact_loss - found.train_loss
    assert abs(by_batch) > 0.5 * found.exact_loss


# ---------------------------------------------------------------------------------------------------- losses, batches


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


def assert_plain(found):
    for name in ("eval_loss", "exact_loss", "batch_loss", "train_loss", "gap", "gap_stderr"):
        assert type(getattr(found, name)) is float, name
    assert type(found.contributions) is tuple
    for part in (*found.contributions, *([found.rest] if found.rest else [])):
        assert type(part.name) is str
        assert [type(value) for value in part[1:]] == [float] * 3
    assert type(found.is_significant) is bool


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


def numbers(found):
    return repr(
        (found.eval_loss, found.exact_loss, found.batch_loss, found.train_loss, found.contributions, found.rest)
    )


@pytest.fixture
def spoiled():
    model, batches = healthy(num_batches=4)
    with torch.no_grad():
        spoil_mean(model.blocks[0].norm)
    return model, batches


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


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "make", [global_generator, own_generator, sampler_with_generator, batch_sampler_with_generator]
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
    assert len(seen) == 4 * (4 + len(found.contributions) - (found.rest is None))
    passes = [torch.stack(seen[start : start + 4]) for start in range(0, len(seen), 4)]
    assert all(torch.equal(one, passes[0]) for one in passes)
    assert len(set(passes[0][:, :, 0].flatten().tolist())) == 32


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


# ------------------------------------------------------------------------------------------------------ left as it was


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "loss", "batches"])
@pytest.mark.parametrize("call", [0, 1, *range(3, 24, 3), 23])
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

    total = 3 * 6  # blocks.1.norm is frozen, the last of the others needs no pass
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
        received = []
        by_batch = copy.deepcopy(model).eval()
        by_batch.shared.train()
        by_batch.shared.register_forward_pre_hook(lambda _, args: received.append(args[0]))
        for x in inputs:
            by_batch(x)
        exact = copy.deepcopy(model).eval()
        exact.shared.running_mean.copy_(torch.cat(received).double().mean(0))
        exact.shared.running_var.copy_(torch.cat(received).double().var(0))
        batches = [(x, exact(x)) for x in inputs]
        model.shared.running_mean += 2
        model.shared.running_var *= 20
    everything = Everything(model)
    found = attribute(model, batches)
    everything.assert_same()
    assert [part.name for part in found.contributions] == ["shared"]
    assert found.rest is None
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
    remaining = dict(found._remaining)
    assert remaining["normalising by the batch"] == 0
    assert remaining["other modules in training mode"] == found.eval_loss - found.train_loss
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


# ------------------------------------------------------------------------------------------------------------ monitors


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


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_epoch_end", "on_train_epoch_end", "on_fit_end"])
def test_a_monitor_reports_as_if_nothing_had_been_run(hook, tmp_path):
    _, batches = healthy(num_batches=4)
    reports = []
    for attributing in (False, True):
        torch.manual_seed(2)
        module, monitor, own = Lit(), BatchNormMonitor(), Attributing(hook, batches[:2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                max_epochs=2,
                accelerator="cpu",
                callbacks=[monitor, *([own] if attributing else [])],
                default_root_dir=tmp_path,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
        assert bool(own.found) == attributing
        assert all(part.name.startswith("net.") for found in own.found for part in found.contributions)
        reports.append((contents(monitor.report()), [bits(tensor) for tensor in module.state_dict().values()]))
    assert reports[0] == reports[1]


# -------------------------------------------------------------------------------------------------------- what is said


def test_the_progress_bar_goes_to_stderr_and_says_which_pass_it_is(spoiled, capsys):
    model, batches = spoiled
    found = attribute_eval_gap(model, batches, per_sample)
    out, err = capsys.readouterr()
    assert out == ""
    for label in ("eval mode", "training mode", "exact statistics", f"exact in {found.contributions[0].name}"):
        assert label in err
    assert err.count("0/4") >= 4
    attribute_eval_gap(model, batches, per_sample, progress=False)
    assert capsys.readouterr() == ("", "")


def table(found):
    """The sentence, and the rows by their first cell, as dicts by the columns' names."""
    sentence, text = str(found).split("\n\n")
    header, rule, *lines = text.splitlines()
    spans = [match.span() for match in re.finditer("-+", rule)]
    columns = [header[start:end].strip() for start, end in spans]
    rows = [[line[start:end].strip() for start, end in spans] for line in lines]
    assert "".join(header[end:start] for (_, end), (start, _) in itertools.pairwise(spans)).strip() == ""
    assert len({row[0] for row in rows}) == len(rows)
    return sentence, {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


def is_rounded(text, value, digits):
    if not math.isfinite(value):
        return text == str(value)
    return float(text) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits), abs=0)


def assert_printed(found):
    sentence, rows = table(found)
    parts = [*found.contributions, *([found.rest] if found.rest else [])]
    expected = ["eval mode as it is", *(f"- {part.name}" for part in parts), "eval mode with exact statistics"]
    expected += ["- normalising by the batch", "- other modules in training mode", "training mode"]
    assert list(rows) == expected
    for row, value in zip(
        ("eval mode as it is", "eval mode with exact statistics", "training mode"),
        (found.eval_loss, found.exact_loss, found.train_loss),
        strict=True,
    ):
        assert is_rounded(rows[row]["loss"], value, 4)
        assert set(rows[row].values()) == {rows[row]["loss"], ""}
    for part in parts:
        row = rows[f"- {part.name}"]
        assert is_rounded(row["explains"], part.reduction, 4)
        assert is_rounded(row["stderr"], part.stderr, 2)
        assert float(row["eval_error"]) == pytest.approx(part.eval_error, abs=5.1e-5)
        if math.isfinite(found.gap):
            share = Fraction(row["of the gap"].rstrip("%")) / 100
            assert float(share) == pytest.approx(part.reduction / found.gap, abs=0.0051)
        else:
            assert row["of the gap"] == ""
    for row, value in zip(
        ("- normalising by the batch", "- other modules in training mode"),
        (found.exact_loss - found.batch_loss, found.batch_loss - found.train_loss),
        strict=True,
    ):
        assert is_rounded(rows[row]["explains"], value, 4)
    return sentence


def attribution(**fields):
    defaults = {
        **{"eval_loss": 2.5, "exact_loss": 1.5, "batch_loss": 1.25, "train_loss": 1.125, "gap": 1.0, "gap_stderr": 0.1},
        "contributions": (Contribution("a.norm", 0.9, 0.75, 0.05), Contribution("b.norm", 0.5, 0.2475, 0.01)),
        "rest": Contribution("7 other layers", 0.1, 0.0025, 0.001),
    }
    return Attribution(**(defaults | fields))


NOTHING = {"contributions": (), "rest": None}
CASES = {
    "usual": attribution(),
    "nothing": attribution(eval_loss=1.5, gap=0.001, gap_stderr=0.01, **NOTHING),
    "worse": attribution(eval_loss=1.3, gap=-0.2, gap_stderr=0.01, **NOTHING),
    "negative": attribution(eval_loss=-2.5, exact_loss=-3.5, batch_loss=-3.6, train_loss=-3.7),
    "infinite": attribution(
        eval_loss=NAN, gap=INF, gap_stderr=NAN, contributions=(Contribution("x", INF, INF, NAN),), rest=None
    ),
    "two infinite": attribution(
        eval_loss=INF,
        gap=INF,
        gap_stderr=NAN,
        contributions=(Contribution("x", INF, NAN, NAN), Contribution("y", INF, INF, NAN)),
    ),
    "neither is finite": attribution(eval_loss=NAN, exact_loss=INF, gap=NAN, gap_stderr=NAN, **NOTHING),
    "only as it is": attribution(exact_loss=NAN, gap=-INF, gap_stderr=NAN, **NOTHING),
    "training is not finite": attribution(train_loss=NAN, batch_loss=INF),
    "nothing is": attribution(
        eval_loss=NAN, exact_loss=NAN, batch_loss=NAN, train_loss=NAN, gap=NAN, gap_stderr=NAN, **NOTHING
    ),
    "better than in training": attribution(train_loss=1.75),
}


@pytest.mark.parametrize("case", CASES)
def test_the_table_is_the_fields(case):
    assert_printed(CASES[case])


def test_the_sentence_says_what_was_found():
    said = {case: assert_printed(found) for case, found in CASES.items()}
    assert "cost 1 ± 0.1 of the loss, 75% of that by a.norm" in said["usual"]
    assert "0.375 more than in training mode remain" in said["usual"]
    assert said["nothing"].startswith("Nothing to explain: exact running statistics lower the loss by 0.001 ± 0.01.")
    assert said["worse"].startswith("Nothing to explain: exact running statistics raise the loss by 0.2 ± 0.01.")
    assert said["infinite"].startswith("Running statistics make the loss nan: first those of x.")
    assert said["two infinite"].startswith("Running statistics make the loss inf: first those of x.")
    assert "not finite, and not with exact running statistics either" in said["neither is finite"]
    assert said["neither is finite"] == said["nothing is"]
    assert said["only as it is"].startswith("Nothing to explain: the loss is finite, but not with exact")
    assert "as good as training mode" in said["better than in training"]
    for case, sentence in said.items():
        good = case == "better than in training"
        assert ("as good as training mode" in sentence) == good, case
        assert ("which no running statistics explain" in sentence) == (
            case in ("usual", "nothing", "worse", "negative", "infinite", "two infinite")
        ), case


def test_what_attribute_eval_gap_returns_is_printed_as_its_fields(spoiled):
    model, batches = spoiled
    sentence = assert_printed(attribute(model, batches))
    assert "blocks.0.norm" in sentence
    with torch.no_grad():
        spoil_nan(model.head)
    found = attribute(model, batches)
    assert "head" in assert_printed(found)
    assert (found.gap, found.worst, found.is_significant) == (INF, "head", True)
    assert math.isnan(found.gap_stderr)
    assert math.isfinite(found.exact_loss)
    assert_plain(found)


def test_losses_that_are_finite_in_no_mode_have_nothing_to_explain(spoiled):
    model, batches = spoiled
    everything = Everything(model)
    found = attribute(model, batches, lambda output, batch: per_sample(output, batch) * NAN)
    everything.assert_same()
    assert math.isnan(found.gap)
    assert (found.contributions, found.rest, found.worst, found.is_significant) == ((), None, None, False)
    assert "not finite" in assert_printed(found)
    assert_plain(found)


def test_exact_statistics_that_make_the_loss_infinite_have_nothing_to_explain():
    model = nn.BatchNorm1d(6)
    with torch.no_grad():
        model.running_var.fill_(1e9)
    batches = [(torch.randn(32, 6), torch.zeros(32, 6)) for _ in range(2)]
    found = attribute(model, batches, lambda output, batch: (1000 * output).exp().mean(1))
    assert math.isfinite(found.eval_loss)
    assert found.exact_loss == INF
    assert found.gap == -INF
    assert not found.is_significant
    assert "as good as" not in assert_printed(found)


# ------------------------------------------------------------------------------------------------------------- figures


def drawn(ax):
    """Names from the top, texts by position, bars as (left, right) by position."""
    ax.get_figure().canvas.draw()
    names = [label.get_text() for label in ax.get_yticklabels()]
    bottom, top = ax.get_ylim()
    assert bottom > top  # the first is at the top
    texts = {round(text.xy[1]): text.get_text() for text in ax.texts}
    bars = {
        round(bar.get_y() + bar.get_height() / 2): (bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches
    }
    return names, [texts[index] for index in range(len(names))], bars


def points(ax):
    return {round(line.get_ydata()[0]): line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"}


def test_the_figure_leads_from_eval_mode_to_training_mode():
    fig, ax = CASES["usual"].plot()
    assert ax.get_figure() is fig
    names, texts, bars = drawn(ax)
    assert names == [
        *("eval mode as it is", "a.norm", "b.norm", "7 other layers", "exact statistics"),
        *("normalising by the batch", "other modules in training mode", "training mode"),
    ]
    assert texts == ["2.5", "-0.75", "-0.2475", "-0.0025", "1.5", "-0.25", "-0.125", "1.125"]
    assert points(ax) == pytest.approx({0: 2.5, 4: 1.5, 7: 1.125})
    expected = {1: (1.75, 2.5), 2: (1.5025, 1.75), 3: (1.5, 1.5025), 5: (1.25, 1.5), 6: (1.125, 1.25)}
    assert set(bars) == set(expected)
    for position, ends in expected.items():
        assert sorted(bars[position]) == pytest.approx(ends)
    assert ax.get_xlabel() == "loss"


@pytest.mark.parametrize("case", CASES)
def test_any_result_is_drawn_without_a_warning_and_within_the_axes(case):
    found = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, ax = found.plot()
        names, texts, bars = drawn(ax)
    assert texts[0] == f"{found.eval_loss:.4g}"
    assert texts[-1] == f"{found.train_loss:.4g}"
    assert not any("+nan" in text or "-nan" in text for text in texts)
    assert len(names) == 5 + len(found._layers)
    low, high = ax.get_xlim()
    for value in (*points(ax).values(), *(end for ends in bars.values() for end in ends)):
        assert low < value < high
    inside, renderer = ax.get_window_extent(), ax.get_figure().canvas.get_renderer()
    for text in ax.texts:
        extent = text.get_window_extent(renderer)
        assert inside.x0 - 1 <= extent.x0
        assert extent.x1 <= inside.x1 + 1


def test_steps_after_the_one_that_makes_the_loss_finite_are_drawn():
    contributions = (Contribution("x", INF, INF, NAN), Contribution("y", 0.5, 0.5, 0.1))
    found = attribution(eval_loss=NAN, gap=INF, gap_stderr=NAN, contributions=contributions, rest=None)
    _, ax = found.plot()
    names, texts, bars = drawn(ax)
    assert texts[:4] == ["nan", "-inf", "-0.5", "1.5"]
    assert sorted(bars[names.index("y")]) == pytest.approx((1.5, 2.0))
    assert names.index("x") not in bars
    assert set(points(ax)) == {3, 6}


def test_small_steps_from_a_large_loss_can_be_seen():
    found = attribution(
        eval_loss=100.02,
        exact_loss=100.01,
        batch_loss=100.01,
        train_loss=100.0,
        gap=0.01,
        gap_stderr=0.001,
        contributions=(Contribution("x", 0.3, 0.01, 0.001),),
        rest=None,
    )
    _, ax = found.plot()
    _, _, bars = drawn(ax)
    low, high = ax.get_xlim()
    assert abs(bars[1][1] - bars[1][0]) > 0.2 * (high - low)


@pytest.mark.parametrize(
    "name", ["encoder." * 30 + "norm", "$x_1$ and $", "line\nbreak", "漢字.norm", "nan", "5", "a_b^c", "% {}", ""]
)
def test_odd_names_are_drawn(name):
    found = attribution(contributions=(Contribution(name, 0.5, 0.9, 0.01),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, ax = found.plot()
        shown = drawn(ax)[0][1]
    assert len(shown) <= 40
    assert name.isascii() is False or shown[-4:] == " ".join(name.split())[-4:]
    assert name.split() == [] or name.split()[0] in str(found)


@pytest.mark.parametrize("name", ["encoder." * 30 + "norm", "nan", "5", "1e5", "a | b", "-", "漢字"])
def test_odd_names_are_printed(name):
    assert_printed(attribution(contributions=(Contribution(name, 0.5, 0.9, 0.01),)))


def test_given_axes_are_drawn_in():
    fig, axes = plt.subplots(1, 2)
    result = CASES["usual"].plot(axes[1])
    assert result[0] is fig
    assert result[1] is axes[1]
    assert not axes[0].patches
    assert len(plt.get_fignums()) == 1
    same = plt.subplots()[1]
    assert CASES["usual"].plot(ax=same)[1] is same
    assert drawn(same)[0] == drawn(axes[1])[0]
