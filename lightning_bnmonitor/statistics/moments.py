"""Exact streaming moments per channel: the merge that everything rests on, and a metric that uses it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lightning_bnmonitor.arguments import check_positive

_COUNT, _MEAN, _M2 = 0, 1, 2


class Moments(NamedTuple):
    """Moments of each channel. Every field is a ``(C,)`` float64 tensor."""

    count: Tensor  # type: ignore[assignment]  # a field named like a method of tuple
    """Values seen."""
    mean: Tensor
    """Mean, NaN where nothing was seen."""
    var: Tensor
    """Unbiased variance (divided by count - 1), NaN where fewer than two values were seen."""


def merge_moments(
    weight: Tensor, mean: Tensor, m2: Tensor, members: Tensor, total: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Merge any number of parts, column by column, into one or several unions.

    With :math:`W = \sum_i w_i`, the mean is :math:`\bar x = \sum_i w_i x_i / W` and the sum of squared deviations
    :math:`M = \sum_i M_i + w_i (x_i - \bar x)^2`: for two parts this is the update of Chan, Golub and LeVeque,
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, equations 2.1.
    The differences are taken from the first part, so that a mean far from 0 cancels nothing.

    Args:
        weight: Weights of the parts, ``(P, C)``: counts, so 0 or at least 1. With fewer rows, the last is that of all
            further parts.
        mean: Means of the parts, ``(P, C)``; of ordinary size where the weight is 0.
        m2: Sums of squared deviations from them, ``(P, C)``; 0 where the weight is 0. Or those of the first parts
            alone, if the others have none.
        members: ``(J, P)`` of 0 and 1: which parts make up each of the J unions.
        total: Weights of the unions, ``(J, C)``, if they are known.

    Returns:
        Weight, mean and sum of squared deviations of the unions, ``(J, C)`` each.
    """
    first, last = mean[:1], len(weight) - 1
    unlike, alike = members[:, :last], members[:, last:]

    def union_of(values: Tensor) -> Tensor:  # the weight that parts have in common is left to the end
        return unlike @ (weight[:last] * values[:last]) + (alike @ values[last:]) * weight[last]

    if total is None:
        total = unlike @ weight[:last] + alike.sum(dim=1, keepdim=True) * weight[last]
    deviation = mean - first
    centre = union_of(deviation) / total.clamp_min(1)
    spread = union_of(deviation.addmm_(members.T, centre, alpha=-1).square_())
    return total, first + centre, spread + members[:, : len(m2)] @ m2


class ChannelMoments(Metric):
    r"""Exact count, mean and unbiased variance of every channel over all data seen, in ``O(C)`` memory.

    Batches may be split, merged and gathered over ranks in any way: the result is that of one pass over all values, to
    float64 rounding. Inputs are converted to float64 batch by batch, which takes 8 bytes a value while ``update`` runs.
    The state is float64 too, and stays so when the metric, or a module that has it, is converted to another dtype.

    As usual in torchmetrics, the state is no part of ``state_dict()`` before ``metric.persistent(True)``; it is loaded
    from a checkpoint that has it, and a module that has gained the metric loads older checkpoints, strictly too.
    Results are cached only with ``compute_with_cache=True``; without, each ``compute`` on several ranks is collective.

    Args:
        num_channels: Number of channels C.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_channels`` is not a positive integer.

    Example::

        >>> import torch
        >>> from lightning_bnmonitor import ChannelMoments
        >>> moments = ChannelMoments(num_channels=2)
        >>> moments.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> moments.update(torch.tensor([[5.0, 50.0]]))
        >>> moments.compute().mean
        tensor([ 3., 30.], dtype=torch.float64)
        >>> moments.compute().var
        tensor([  4., 400.], dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    state: Tensor  # TorchScript reads this, so annotations are not postponed in this file

    def __init__(self, num_channels: int, **kwargs: Any) -> None:
        super().__init__(**{"compute_with_cache": False, **kwargs})  # a cache outlives `load_state_dict`
        check_positive("num_channels", num_channels)
        self.num_channels = num_channels
        empty = torch.zeros(3, num_channels, dtype=torch.float64)
        self.add_state("state", default=empty, dist_reduce_fx=_merge_states)

    @property
    def update_called(self) -> bool:
        """Whether there is anything to compute: an update, known moments, another metric's state, a loaded one."""
        return self.update_count > 0 or bool(self.state.any())

    def update(self, x: Tensor) -> None:
        """Add a batch.

        Args:
            x: ``(N, C, *)`` of any real floating dtype: ``(N, C)``, ``(N, C, L)``, ``(N, C, H, W)``,
                ``(N, C, D, H, W)``, ... An empty batch counts nothing.

        Raises:
            TypeError: If ``x`` is not a real floating-point tensor.
            ValueError: If dimension 1 of ``x`` is missing or is not ``num_channels``.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"`x` must be a real floating-point tensor, got {got}. Convert it, e.g. `x.float()`.")
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"`x` must have shape (N, C, *) with C = num_channels = {self.num_channels}, got {tuple(x.shape)}."
            )
        if x.numel() == 0:
            return
        count = x.numel() // self.num_channels
        var, mean = torch.var_mean(x.detach().double(), [d for d in range(x.ndim) if d != 1], correction=0)
        self._add(torch.full_like(mean, count), mean, var * count)

    def update_moments(self, count: float | Tensor, mean: Tensor, m2: Tensor) -> None:
        """Add data of which only the moments are known.

        Args:
            count: Number of values per channel, a number or ``(C,)``: 0 or at least 1.
            mean: Their mean, ``(C,)``; ignored where the count is 0.
            m2: Sum of their squared deviations from it, ``(C,)``; ignored where the count is 0.

        Raises:
            ValueError: If a shape is not ``(C,)``, a count is not 0 or at least 1, or a sum of squares is negative.
        """
        count = torch.as_tensor(count, dtype=torch.float64, device=self.state.device).detach()
        if count.ndim == 0:
            count = count.expand(self.num_channels)
        for name, value in (("count", count), ("mean", mean), ("m2", m2)):
            if tuple(value.shape) != (self.num_channels,):
                raise ValueError(f"`{name}` must have shape ({self.num_channels},), got {tuple(value.shape)}.")
        if not torch.all((count == 0) | (count >= 1) & torch.isfinite(count)):
            raise ValueError(f"`count` must be 0, or finite and at least 1, in every channel, got {count.tolist()}.")
        nothing = torch.zeros_like(count)
        mean, m2 = (torch.where(count > 0, values.detach(), nothing) for values in (mean, m2))
        if torch.any(m2 < 0):
            raise ValueError(f"`m2` must not be negative, got {m2[m2 < 0].min().item()}.")
        self._computed = None  # a cached result is that of before
        self._add(count, mean, m2)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the data of another metric, as torchmetrics' own method does, which came with torchmetrics 1.6.

        Args:
            incoming_state: A metric of this class, or its states by name: ``{"state": metric.state}``.

        Raises:
            ValueError: If it is neither of them, lacks a state, or has another number of channels.
            RuntimeError: With ``dist_sync_on_step=True``, or if a subclass has not ``full_state_update=False``.
        """
        if not isinstance(incoming_state, (dict, type(self))):
            raise ValueError(
                f"`incoming_state` must be a {type(self).__name__} or a dictionary of its states, "
                f"got {type(incoming_state).__name__}."
            )
        if self.full_state_update is not False or self.dist_sync_on_step:
            raise RuntimeError(
                "`merge_state` needs `full_state_update=False` and `dist_sync_on_step=False`, "
                f"got {self.full_state_update} and {self.dist_sync_on_step}."
            )
        states: dict[str, Any] = incoming_state if isinstance(incoming_state, dict) else incoming_state.metric_state
        missing = [name for name in self.metric_state if name not in states]
        if missing:
            raise ValueError(f"`incoming_state` must have {list(self.metric_state)}, but lacks {missing}.")
        shape = tuple(states["state"].shape)
        if shape != (3, self.num_channels):
            raise ValueError(f"The state of `incoming_state` must have shape (3, {self.num_channels}), got {shape}.")
        self._computed = None
        self._reduce_states(states)

    def compute(self) -> Moments:
        """Moments of all data so far. See :class:`Moments`."""
        count, mean, m2 = self.state
        missing = torch.full_like(mean, torch.nan)
        return Moments(
            count=count.clone(),
            mean=torch.where(count > 0, mean, missing),
            var=torch.where(count > 1, m2 / (count - 1), missing),
        )

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def keep_shape(*args: Any, **kwargs: Any) -> Any:
            # torchmetrics squeezes tensors of one element: give (1,) back to a single channel.
            value = wrapped(*args, **kwargs)
            return Moments(*map(torch.atleast_1d, value)) if isinstance(value, Moments) else value

        return keep_shape

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Move the state and keep it float64, which torchmetrics does in ``half()`` but not in ``to(torch.half)``."""

        @functools.wraps(fn)  # torchmetrics goes by its name
        def keep_double(values: Tensor) -> Tensor:
            moved = fn(values)
            return values.to(moved.device) if values.dtype == torch.float64 != moved.dtype else moved

        return super()._apply(keep_double, exclude_state)

    def _add(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        self.state = _merge_states(torch.stack([self.state, torch.stack([count, mean, m2])]))


def _merge_states(states: Tensor) -> Tensor:
    """Merge ``(R, 3, C)`` states into one ``(3, C)``: the metric's own update, and its reduction over ranks."""
    everything = torch.ones(1, len(states), dtype=states.dtype, device=states.device)
    merged = merge_moments(states[:, _COUNT], states[:, _MEAN], states[:, _M2], everything)
    return torch.cat(merged)
