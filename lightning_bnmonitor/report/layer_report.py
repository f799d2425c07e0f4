"""What a window has shown of one layer: plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.diagnosis import METRICS, Diagnosis
from lightning_bnmonitor.report.figures import plot_channels
from lightning_bnmonitor.statistics import divergence

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One BatchNorm layer in one window. Tensors are ``(C,)`` float64 on the CPU; derived ones are computed on access.

    A channel that received a value that is not finite is NaN in this window, and the others are exact.
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
        statistics, which have no part in it.
        """
        if self.validation is None:
            return torch.full_like(self.now_mean, torch.nan)
        mean, var = self.validation
        return divergence.act_rmse(mean, var, self.now_mean, self.now_var, self.eps)

    @property
    def verdict(self) -> str:
        """What is the matter with the layer, in a word: ``healthy``, ``noisy``, ``lagging``, ..."""
        return self.diagnosis.verdict

    @property
    def flags(self) -> tuple[str, ...]:
        """What else is to be said: ``dead-channels``, ``written-outside``, ..."""
        return self.diagnosis.flags

    @property
    def needs_attention(self) -> bool:
        """Whether something should be done."""
        return self.diagnosis.needs_attention

    @property
    def explanation(self) -> str:
        """What was found and what it means, with this layer's numbers; all of them are in :attr:`evidence`."""
        return f"{self.name}: {self.verdict}. {self.diagnosis.explanation}"

    @property
    def remedy(self) -> str:
        """What to do about it; empty if there is nothing to do."""
        return self.diagnosis.remedy

    @property
    def evidence(self) -> dict[str, float]:
        """What verdict, explanation and remedy rest on. What could not be told is absent.

        Errors are RMS errors of the normalised activation in ``eval()``, over the channels.

        - ``eval_error``, ``act_rmse``, ``mean_shift``, ``log_var_ratio``: see :meth:`summary`.
        - ``noise_error``: what the sampling noise of the running statistics makes of it: the floor that is reached
          however long one trains. ``now_error``: what the noise of the present statistics adds to ``eval_error``.
        - ``warmup_error``: what is left of the initial values makes; their weight is ``initial_weight``.
        - ``lag_error``: the running statistics being those of earlier weights or data makes, chance taken off;
          0 where it may be chance. ``drift_error``: the same of the window's statistics against the present ones.
        - ``z_mean``, ``z_var``: RMS over channels of :attr:`z_mean` and :attr:`z_var`, about 1 if only chance is at
          work. ``max_score``: the largest deviation of any channel in any of the tests, on the scale of a standard
          normal variable: an effect in few channels shows here.
        - ``batches``: batches that updated the running statistics; ``samples_per_batch``: values per channel in them;
          ``batch_size``: samples in them; ``degrees_of_freedom``: of the variance between batches.
        - ``drift_per_batch``: how far the inputs' mean and variance move per batch; ``jitter``: by how much those of
          a batch differ by sampling noise; ``severity``: ``eval_error`` squared over ``jitter`` squared
          (m / (2 - m) is what momentum m makes by itself; above 1 the last batch's statistics would serve better).
        - ``ordering_ratio``, ``ordering_limit``: variance between parts of the window over that expected from
          neighbouring batches, and what chance explains of it; ``ordering_share``: its share of the variance,
          ``trend_share``: the part of that which is a steady movement.
        - ``grouping_ratio``, ``grouping_limit``: variance of batch means over that of as many independent samples, and
          what chance explains of it; ``grouping_share``: its share of the variance.
        - ``momentum``, ``effective_momentum``: the module's, and that of the last call, all its updates together.
        - ``recommended_momentum``, ``recommended_error``, ``recommended_batch_size``, ``compensated_momentum``,
          ``batches_to_go``: the numbers of the remedy.
        - ``updates_per_call``: updates of the buffers for each call that was to update them (1; 2 under activation
          checkpointing); ``assumed_updates_per_call``: what was assumed, where that is something else.
        - ``calls_saved``, ``calls_traced``, ``calls_pass``: calls whose batch moments were read off the kernel, were
          computed in a compiled graph, and were computed by a pass over the input.
        - ``calls_skipped``: calls that could not be looked at and are not in ``num_batches``: within a transform of
          ``torch.func`` (``vmap``, ``grad``), while tracing, of fake tensors, and of anything but ``(N, C, *)``.
        - ``calls_not_updating``: calls in training mode that left the running statistics as they were.
        - ``num_features``; ``dead_channels``: channels whose variance is at most a thousandth of ``eps``;
          ``non_finite_channels``: channels with a value or a running statistic that is not finite,
          ``non_finite_running_stats``: with such a running statistic; ``first_bad_batch``, ``first_bad_channel``: the
          first call in the window with such a value, counted from 1, and the first such channel in it, from 0.
        - ``val_shift``: RMS over channels of :attr:`val_shift`; ``val_noise``: what chance makes of it;
          ``val_batches``: calls in validation that were looked at.
        - ``ranks``: how many ranks the window is of, if several; ``rank_error``: what rank 0's data being others than
          all ranks' makes, chance taken off; 0 where it may be chance.
        """
        return dict(self.diagnosis.evidence)

    def summary(self) -> dict[str, float]:
        """One number for each of ``eval_error``, ``act_rmse``, ``mean_shift`` and ``log_var_ratio``.

        The RMS over channels (for ``log_var_ratio`` the mean absolute value), those that are NaN left out. NaN if none
        is left: the layer was not called, or has no running statistics.
        """
        return {
            "eval_error": _rms(self.eval_error),
            "act_rmse": _rms(self.act_rmse),
            "mean_shift": _rms(self.mean_shift),
            "log_var_ratio": float(self.log_var_ratio.abs().nanmean()),
        }

    def plot(self, ax: Any = None) -> tuple[Figure, Any]:
        """The layer channel by channel, and its worst channel over the window, as a matplotlib figure.

        Above: the exact mean and standard deviation of each channel, and the running ones with two standard errors,
        which is as far as chance puts them; of more than 60 channels, the 60 with the largest ``eval_error``. Below, of
        the channel where that is largest: mean and standard deviation of the batches by block, beside the running ones.

        Args:
            ax: Four axes, in any array, to draw in; None makes a figure.

        Returns:
            The figure and the four axes.

        Raises:
            ValueError: If ``ax`` are not four axes.
        """
        return plot_channels(self, ax)

    def to_dict(self) -> dict[str, Any]:
        """All but the course, in JSON's types (lists per channel); what JSON lacks: "NaN", "Infinity", "-Infinity"."""
        scalars = ("name", "type", "num_features", "eps", "momentum", "num_batches", "num_samples", "has_running_stats")
        words = ("verdict", "needs_attention", "explanation", "remedy")
        moments = ("population_mean", "population_var", "running_mean", "running_var", "now_mean", "now_var")
        per_channel = (*moments, *METRICS, "kl", "z_mean", "z_var", "val_shift")
        errors = ("running_mean_stderr", "running_var_stderr")
        return {
            **{field: jsonable(getattr(self, field)) for field in (*scalars, *words, *per_channel, *errors)},
            "flags": list(self.flags),
            "summary": jsonable(self.summary()),
            "evidence": jsonable(self.evidence),
        }

    def __getstate__(self) -> dict[str, Any]:
        # They may be views of all layers' numbers, which would be saved with them.
        blocks = self.blocks and (self.blocks[0].clone(), self.blocks[1].clone())
        return {**vars(self), "numbers": self.numbers.clone(), "blocks": blocks}

    @property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.population_mean, self.population_var, self.running_mean, self.running_var

    def __repr__(self) -> str:
        numbers = ", ".join(f"{metric}={value:.3g}" for metric, value in self.summary().items())
        kind = f"{self.type}({self.num_features})"
        return f"LayerReport({self.name!r}, {kind}, {self.verdict!r}, num_batches={self.num_batches}, {numbers})"


def _rms(values: Tensor) -> float:
    return float(values.square().nanmean().sqrt())


def jsonable(value: Any) -> Any:
    """A value, or what it contains, in JSON's types."""
    if isinstance(value, Tensor):
        return [jsonable(element) for element in value.tolist()]
    if isinstance(value, Mapping):
        return {key: jsonable(element) for key, element in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
