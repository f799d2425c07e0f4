"""What a window has shown of one layer, in numbers: exact and running statistics, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.statistics import divergence


class Course(NamedTuple):
    """How the batch statistics of a layer went over the window: at most 16 runs of consecutive batches.

    Of the calls on this rank that updated the running statistics. ``(J, C)`` float64 tensors on the CPU; a channel that
    received a value that is not finite is NaN in any of the runs.
    """

    num_batches: Tensor
    """Batches in each run, ``(J,)``."""
    mean: Tensor
    """Mean of all values of a run."""
    var: Tensor
    """Mean of the unbiased batch variances of a run, weighted by the values per channel less one."""


class GroupValues(NamedTuple):
    """Batches of one group (a source, a domain), as a layer received them in one window, on all ranks."""

    num_batches: int
    """Calls of the layer in them."""
    num_samples: int
    """Values per channel in them."""
    mean: Tensor
    """Exact mean of these values, ``(C,)`` float64 on the CPU."""
    var: Tensor
    """Exact unbiased variance of them, ``(C,)``; NaN if there was but one."""
    shift: float
    """RMS error of the normalised activation that mean and variance of all batches make on them; NaN without others."""
    noise: float
    """What chance makes of it; NaN if that cannot be told, as their batches were few, or came at other times than the
    others': weights that have moved meanwhile may then be the reason for the shift."""


@dataclass(frozen=True, eq=False)
class LayerValues:
    """The numbers of one BatchNorm layer in one window.

    Tensors are ``(C,)`` float64 on the CPU; derived ones are computed on access. A channel that received a value that
    is not finite is NaN in this window, and the others are exact.
    """

    name: str
    """Name of the module in the model, ``(root)`` if it is the model."""
    type: str
    """Class name of the module."""
    eps: float
    """``eps`` of the module."""
    momentum: float | None
    """``momentum`` of the module now, in PyTorch's convention; None is a cumulative average."""
    num_batches: int
    """Calls counted; of several ranks together those on rank 0."""
    num_samples: int
    """Values per channel, of all ranks."""
    has_running_stats: bool
    """Whether the module has buffers; if not, ``eval()`` normalises by the batch, too."""
    diagnosis: Diagnosis
    """Verdict, flags, evidence."""
    numbers: Tensor
    """``(10, C)``: mean and variance of the population, of the running statistics, of now; z, and standard errors."""
    blocks: tuple[Tensor, Tensor] | None = None
    """What :attr:`course` is made of: batches, ``(16,)``, and mean and variance of each run, ``(16, 2, C)``."""
    validation: Tensor | None = None
    """Mean and unbiased variance of what it received in validation after this window, ``(2, C)``; None if none was."""
    val_running: Tensor | None = None
    """Running mean and variance as that validation began, ``(2, C)``; None if they had no part in it."""
    group_moments: Tensor | None = None
    """Mean and unbiased variance of each group of batches that it received, ``(G, 2, C)``; None without groups."""
    averaged_of: str | None = None
    """Of averaged weights, the name of the layer that is trained; None for that itself."""
    trained: Tensor | None = None
    """Of averaged weights, :attr:`now_mean` and :attr:`now_var` of that layer, ``(2, C)``."""

    unpadded: Tensor | None = None
    """Mean and unbiased variance of the values that the mask lets count, ``(2, C)``; None if no mask told of them."""

    @property
    def num_features(self) -> int:
        """Channels C."""
        return self.numbers.shape[1]

    @property
    def population_mean(self) -> Tensor:
        """Exact mean of all values received, NaN if there were none."""
        return self.numbers[0]

    @property
    def population_var(self) -> Tensor:
        """Exact unbiased variance of all values received, NaN if there were fewer than two."""
        return self.numbers[1]

    @property
    def running_mean(self) -> Tensor:
        """The module's buffer, NaN if it has none."""
        return self.numbers[2]

    @property
    def running_var(self) -> Tensor:
        """The module's buffer, NaN if it has none."""
        return self.numbers[3]

    @property
    def now_mean(self) -> Tensor:
        """Mean at the end of the window, with the weights as they are then; with too few batches the population's."""
        return self.numbers[4]

    @property
    def now_var(self) -> Tensor:
        """Unbiased variance at the end of the window; with too few batches the population's."""
        return self.numbers[5]

    @property
    def z_mean(self) -> Tensor:
        """The running mean against the window's, over what its sampling noise explains; 0 if it cannot be told."""
        return self.numbers[6]

    @property
    def z_var(self) -> Tensor:
        """The running variance against the batches' in the window, over what its noise explains; 0 likewise."""
        return self.numbers[7]

    @property
    def running_mean_stderr(self) -> Tensor:
        """Standard error of the running mean: the part of it that is chance. NaN if it cannot be told."""
        return self.numbers[8]

    @property
    def running_var_stderr(self) -> Tensor:
        """Standard error of the running variance; NaN likewise."""
        return self.numbers[9]

    @property
    def course(self) -> Course:
        """The batch statistics over the window, on this rank. Empty if no call updated the running statistics."""
        if self.blocks is None:
            empty = torch.empty(0, self.num_features, dtype=torch.float64, device="cpu")
            return Course(empty[:, 0], empty, empty)
        num_batches, values = self.blocks
        used = num_batches > 0
        return Course(num_batches[used], values[used, 0], values[used, 1])

    @property
    def mean_shift(self) -> Tensor:
        """Signed distance of the running mean from the population's, in population standard deviations."""
        return divergence.mean_shift(self.population_mean, self.population_var, self.running_mean, self.eps)

    @property
    def log_var_ratio(self) -> Tensor:
        """Log of the running variance over the population's; positive: too large. NaN in dead channels."""
        return divergence.log_var_ratio(self.population_var, self.running_var, self.eps)

    @property
    def act_rmse(self) -> Tensor:
        """RMS error that ``eval()`` would have made on this window's values, in units of the normalised activation."""
        return divergence.act_rmse(*self._moments, self.eps)

    @property
    def kl(self) -> Tensor:
        """Kullback-Leibler divergence of the running statistics from the population's, in nats; NaN if dead."""
        return divergence.kl(*self._moments, self.eps)

    @property
    def eval_error(self) -> Tensor:
        """RMS error of the normalised activation that ``eval()`` makes with the weights at the end of the window.

        That is the running statistics against :attr:`now_mean` and :attr:`now_var`. Infinite in a channel that was
        called and whose running statistics are not finite: it gives NaN in ``eval()``.
        """
        broken = ~(torch.isfinite(self.running_mean) & torch.isfinite(self.running_var))
        comparable = self.has_running_stats and self.num_samples > 0
        now = self.now_mean, self.now_var, self.running_mean, self.running_var
        return torch.where(broken & comparable, torch.inf, divergence.act_rmse(*now, self.eps))

    @property
    def val_shift(self) -> Tensor:
        """RMS error that the present statistics of training make on what was received in validation; NaN if none was.

        In units of the normalised activation. That is :attr:`now_mean` and :attr:`now_var` in the place of the running
        statistics, which have no part in it; of averaged weights, those of the layer that is trained.
        """
        if self.validation is None:
            return torch.full_like(self.now_mean, torch.nan)
        (mean, var), (now_mean, now_var) = self.validation, self.numbers[4:6] if self.trained is None else self.trained
        return divergence.act_rmse(mean, var, now_mean, now_var, self.eps)

    @property
    def val_error(self) -> Tensor:
        """RMS error of the normalised activation that the running statistics made in validation; NaN if they made none.

        That is :attr:`val_running`, as validation began, against what was received in it, whatever the reason.
        Infinite where the running statistics are not finite.
        """
        if self.validation is None or self.val_running is None:
            return torch.full_like(self.now_mean, torch.nan)
        (mean, var), (running_mean, running_var) = self.validation, self.val_running
        error = divergence.act_rmse(mean, var, running_mean, running_var, self.eps)
        return torch.where(torch.isfinite(self.val_running).all(dim=0), error, torch.inf)

    @property
    def groups(self) -> dict[str, GroupValues]:
        """The groups of batches that it received, by name, as they were told of; empty if none was."""
        if self.group_moments is None:
            return {}
        groups = zip(self.diagnosis.groups, self.group_moments, strict=True)
        return {
            its.name: GroupValues(its.num_batches, its.num_samples, moments[0], moments[1], its.shift, its.noise)
            for its, moments in groups
        }

    def __getstate__(self) -> dict[str, Any]:
        # They may be views of all layers' numbers, which would be saved with them.
        blocks = self.blocks and (self.blocks[0].clone(), self.blocks[1].clone())
        unpadded = None if self.unpadded is None else self.unpadded.clone()
        return {**vars(self), "numbers": self.numbers.clone(), "blocks": blocks, "unpadded": unpadded}

    @property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.population_mean, self.population_var, self.running_mean, self.running_var
