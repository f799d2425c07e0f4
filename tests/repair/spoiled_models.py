"""Models whose running statistics are exact, or spoiled, and losses computed by hand with buffers written by hand."""

import copy
import math

import numpy as np
import torch
from torch import nn

from lightning_bnmonitor import attribute_eval_gap

NAN, INF = math.nan, math.inf
LAYERS = ["stem", "blocks.0.norm", "blocks.1.norm", "head"]


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


def assert_plain(found):
    losses = [name for name in vars(found) if name.endswith("_loss")]
    assert len(losses) == 7
    for name in (*losses, "gap", "gap_stderr"):
        assert type(getattr(found, name)) is float, name
    assert type(found.contributions) is tuple
    for part in (*found.contributions, *([found.rest] if found.rest else [])):
        assert type(part.name) is str
        assert [type(value) for value in part[1:]] == [float] * 3
    assert type(found.is_significant) is bool
    assert [type(value) for part in found.remaining for value in part[1:]] == [float] * 2 * len(found.remaining)


def numbers(found):
    return repr(found)
