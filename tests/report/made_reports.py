"""Reports made by hand, with the numbers and the verdict that a test wants, and reports of small tracked models."""

import math

import numpy as np
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report
from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.diagnosis.evidence import distances
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout

NAN, INF = math.nan, math.inf
METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
PER_CHANNEL = ("mean_shift", "log_var_ratio", "act_rmse", "kl", "eval_error")
NOT_SICK = ("unused", "no-running-stats", "stale", "frozen", "insufficient-data", "drifting", "healthy")


def layer(
    name="layer",
    mean=(0.0,),
    var=(1.0,),
    running_mean=(0.0,),
    running_var=(1.0,),
    verdict="healthy",
    flags=(),
    **fields,
) -> LayerReport:
    """A layer's report with the given statistics; those at the end of the window are the population's if not given.

    Its diagnosis is the given one, whatever the numbers are; ``evidence`` is added to a floor of 0.05.
    """
    zeros = [0.0] * len(mean)
    now = {"now_mean": mean, "now_var": var, "z_mean": zeros, "z_var": zeros}
    now |= {"running_mean_stderr": zeros, "running_var_stderr": zeros}
    tensors = {
        **{"population_mean": mean, "population_var": var, "running_mean": running_mean, "running_var": running_var},
        **{field: fields.pop(field, values) for field, values in now.items()},
    }
    order = [f"{of}_{moment}" for of in ("population", "running", "now", "z") for moment in ("mean", "var")]
    order += ["running_mean_stderr", "running_var_stderr"]
    numbers = torch.tensor([list(tensors[name]) for name in order], dtype=torch.float64)
    evidence = {"noise_error": 0.05, "num_features": float(len(mean)), **found(numbers, fields)}
    evidence |= fields.pop("evidence", {})
    attention = fields.pop("needs_attention", verdict not in NOT_SICK)
    defaults = {
        "name": name,
        "type": "BatchNorm1d",
        "eps": 0.0,
        "momentum": 0.1,
        "num_batches": 10,
        "num_samples": 80,
        "has_running_stats": True,
        "diagnosis": Diagnosis(verdict, flags, attention, evidence),
    }
    return LayerReport(**(defaults | {"numbers": numbers} | fields))


def found(numbers: torch.Tensor, fields) -> dict[str, float]:
    """The distances that the tracker would put into the evidence."""
    comparable = fields.get("has_running_stats", True) and fields.get("num_samples", 80) > 0
    eps = torch.full((numbers.shape[1],), fields.get("eps", 0.0), dtype=torch.float64)
    layout = ChannelLayout(np.array([numbers.shape[1]]))
    metrics = distances(numbers[0:2], numbers[4:6], numbers[2:4], eps, layout, np.array([comparable]))
    return {name: float(values[0]) for name, values in metrics.items() if not math.isnan(values[0])}


def with_error(name: str, error: float, **fields) -> LayerReport:
    """One channel of variance 1 whose running mean is off by so much: so are eval_error, act_rmse and mean_shift."""
    return layer(name, running_mean=[error], **fields)


def unused(name: str) -> LayerReport:
    return layer(name, mean=[NAN], var=[NAN], num_batches=0, num_samples=0, verdict="unused")


def stateless(name: str) -> LayerReport:
    return layer(name, running_mean=[NAN], running_var=[NAN], has_running_stats=False, verdict="no-running-stats")


class Branches(nn.Module):
    """Layers called in another order than that of the modules, one of them twice, one under two names, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.BatchNorm1d(2)
        self.late = nn.BatchNorm1d(3)
        self.early = nn.BatchNorm1d(3)
        self.again = self.early
        self.nothing_kept = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x):
        return self.again(self.nothing_kept(self.late(self.early(x))))


def tracked(model: nn.Module, batches) -> Report:
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
    return tracker.report()


def branches_report() -> Report:
    torch.manual_seed(0)
    return tracked(Branches(), [torch.randn(8, 3) for _ in range(4)])


# ------------------------------------------------------------------------------------------------------------ as values


def decoded(value):
    """What a reader of the JSON makes of it."""
    if isinstance(value, list):
        return [decoded(element) for element in value]
    return float(value) if isinstance(value, str) else value
