"""Which layer's running statistics cost how much of the loss in ``eval()``, and what they do not explain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bnmonitor.compat import BatchNorm
from lightning_bnmonitor.repair.passes import Forward, forward_of, run, training_only
from lightning_bnmonitor.repair.recalibration import recalibrate_layers
from lightning_bnmonitor.repair.selection import check_initialised, select
from lightning_bnmonitor.report.figures import plot_contributions
from lightning_bnmonitor.tracking.buffers import SavedBuffers
from lightning_bnmonitor.tracking.discovery import find_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Loss = Callable[[Any, Any], Tensor]
_NEGLIGIBLE = 0.01  # share of the gap that is not taken apart further


class Contribution(NamedTuple):
    """What the exact statistics of one layer, or of several, do to the loss in eval mode."""

    name: str
    """The layer."""
    eval_error: float
    """RMS error of its normalised activation in eval mode; of several layers the largest."""
    reduction: float
    """By how much the loss falls; infinite if it was not finite before and is after."""
    stderr: float
    """Standard error of that."""


@dataclass(frozen=True)
class Attribution:
    """What :func:`attribute_eval_gap` has found. Printed, it is a sentence and a table."""

    eval_loss: float
    """Loss in eval mode as it is."""
    exact_loss: float
    """Loss in eval mode with exact statistics in all layers."""
    batch_loss: float
    """Loss where BatchNorm normalises by the batch and all else is in eval mode."""
    train_loss: float
    """Loss in training mode."""
    gap: float
    """``eval_loss`` less ``exact_loss``: what running statistics explain. Infinite if only the former is not finite,
    NaN if neither is."""
    gap_stderr: float
    """Standard error of the gap, the rounding of losses included."""
    contributions: tuple[Contribution, ...]
    """Layers in the order in which their statistics were replaced, the largest ``eval_error`` first. Empty if there is
    nothing to explain."""
    rest: Contribution | None
    """All other layers together, which explain less than 1 % of the gap; None if there are none."""

    @property
    def is_significant(self) -> bool:
        """Whether there is anything to explain: the gap exceeds its own standard error."""
        return _is_gap(self.gap, self.gap_stderr)

    @property
    def worst(self) -> str | None:
        """The layer that is responsible for most; None if there is nothing to explain."""
        return max(self.contributions, key=lambda part: part.reduction).name if self.contributions else None

    def __str__(self) -> str:
        from tabulate import tabulate

        parts = [
            (
                f"- {part.name}",
                "",
                f"{part.reduction:.4g}",
                f"{part.stderr:.2g}",
                f"{part.reduction / self.gap:.0%}" if math.isfinite(self.gap) else "",
                f"{part.eval_error:.4f}",
            )
            for part in self._layers
        ]
        rows: list[tuple[str, ...]] = [("eval mode as it is", f"{self.eval_loss:.4g}"), *parts]
        rows.append(("eval mode with exact statistics", f"{self.exact_loss:.4g}"))
        rows += [(f"- {name}", "", f"{reduction:.4g}") for name, reduction in self._remaining]
        rows.append(("training mode", f"{self.train_loss:.4g}"))
        headers = ["", "loss", "explains", "stderr", "of the gap", "eval_error"]
        rows = [(*row, *[""] * (len(headers) - len(row))) for row in rows]
        align = ("left", *["right"] * (len(headers) - 1))
        table = tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
        return f"{self._headline}\n\n{table}"

    @property
    def _headline(self) -> str:
        if math.isnan(self.gap):
            return "The loss in eval mode is not finite, and not with exact running statistics either."
        remaining = self.exact_loss - self.train_loss
        if not math.isfinite(remaining):
            then = (
                f"With exact ones, it is {self.exact_loss:.4g} in eval mode and {self.train_loss:.4g} in training mode."
            )
        elif remaining > 0:
            then = (
                f"{remaining:.4g} more than in training mode remain, which no running statistics explain: normalising "
                "by the batch, dropout, the data, or a bug."
            )
        else:
            then = "With exact ones, eval mode is as good as training mode."
        if self.gap == -math.inf:
            return f"Nothing to explain: the loss is finite, but not with exact running statistics. {then}"
        difference = f"{abs(self.gap):.4g} ± {self.gap_stderr:.2g}"
        if not self.is_significant:
            change = "raise" if self.gap < 0 else "lower"
            return f"Nothing to explain: exact running statistics {change} the loss by {difference}. {then}"
        if not self.contributions:
            return f"The loss differs by {difference}, and no layer was called that could be the reason. {then}"
        top = max(self.contributions, key=lambda part: part.reduction)
        if self.gap == math.inf:
            return f"Running statistics make the loss {self.eval_loss:.4g}: first those of {top.name}. {then}"
        share = f"{top.reduction / self.gap:.0%} of that by {top.name}"
        return f"Running statistics cost {difference} of the loss, {share}. {then}"

    @property
    def _layers(self) -> list[Contribution]:
        return [*self.contributions, *([self.rest] if self.rest else [])]

    @property
    def _remaining(self) -> list[tuple[str, float]]:
        return [
            ("normalising by the batch", self.exact_loss - self.batch_loss),
            ("other modules in training mode", self.batch_loss - self.train_loss),
        ]

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The loss from eval mode to training mode, step by step, as a matplotlib figure.

        Args:
            ax: The axes to draw in; None makes a figure.

        Returns:
            The figure and the axes.
        """
        layers = [(part.name, part.reduction) for part in self._layers]
        states = [("eval mode as it is", self.eval_loss), ("exact statistics", self.exact_loss)]
        return plot_contributions([*states, ("training mode", self.train_loss)], [layers, self._remaining], ax)


def attribute_eval_gap(
    model: nn.Module, batches: Iterable[Any], loss: Loss, forward: Forward | None = None, progress: bool = True
) -> Attribution:
    """How much each layer's running statistics are responsible for a loss that is worse in eval mode than it should be.

    The gap is the loss in eval mode as it is, less that in eval mode with exact statistics of the same data (see
    :func:`~lightning_bnmonitor.recalibrate`) in all layers. To take it apart, exact statistics are put into one layer
    after another, the one with the largest ``eval_error`` first, and stay there, until the layers that are left explain
    less than 1 % of the gap: a pass over the data for each. What a layer explains is therefore given those before it.

    On training data, the gap is that of the running statistics alone; on validation data the exact statistics are
    those of validation data, so that it includes what running statistics of training data cannot fit. Two more passes
    tell what no running statistic explains: with BatchNorm normalising by the batch and all else in eval mode, and in
    training mode. Losses are compared batch by batch, or sample by sample, so that standard errors are those of the
    differences (and of the losses' rounding: one unit in their last place).

    All is left as it was, to the bit: buffers, modes, random states. On several ranks each is on its own.

    Args:
        model: The root module. Layers that :func:`~lightning_bnmonitor.recalibrate` leaves alone keep their statistics.
        batches: What to pass through the model. It is iterated several times and has to give the same batches in the
            same order, which a ``DataLoader`` does here, shuffling or not; what can be iterated only once is kept.
        loss: Called with the model's output and the batch: a scalar, the mean of the batch (then batches count alike),
            or a loss for each sample, ``(N,)`` (then samples do).
        forward: Called with the model and a batch, to run it; by default as in
            :func:`~lightning_bnmonitor.recalibrate`.
        progress: Whether to show a progress bar.

    Returns:
        Losses, and the layers' contributions.

    Raises:
        ValueError: If there is no batch, or only one and no loss of each sample (it would have no standard error), if
            the loss has two dimensions or more, the number of losses changes from pass to pass, or a layer has not been
            initialised (lazy ones, before the first call).
        RuntimeError: If the model cannot take a batch or the loss cannot be computed, with the error as the cause.

    Example::

        >>> import torch
        >>> from lightning_bnmonitor import attribute_eval_gap
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        >>> data = [(torch.randn(32, 4) + 3, torch.zeros(32, 1)) for _ in range(8)]
        >>> loss = lambda output, batch: (output - batch[1]).square().mean(dim=1)
        >>> attribute_eval_gap(model, data, loss, progress=False).worst
        '0'
    """
    found = find_layers(model, None, None)
    check_initialised(found)
    if isinstance(batches, Iterator):
        with training_only(model, ()):  # random states are as before
            batches = list(batches)
    in_eval = {layer for layer in found.values() if model.training and not layer.training}
    selection = select(found, in_eval, frozen=False)._replace(aside={})
    layers = selection.layers
    in_training = [module for module in model.modules() if module.training or not model.training]
    passes, old = _Passes(model, batches, loss, forward or forward_of, progress), SavedBuffers(layers.values())
    by_batch: list[Tensor] = []
    with old.restored_at_end():
        as_is = passes.losses("eval mode")
        training = passes.losses("training mode", in_training)
        with passes.same_batches():
            measured = passes.measured("exact statistics", by_batch)
            repair = recalibrate_layers(model, measured, passes.run_model, None, selection, all_ranks=False)
        batch_losses = passes.joined(by_batch) if layers else as_is
        new = SavedBuffers(layers.values())
        exact = passes.losses("eval mode, exact statistics") if layers else as_is
        old.restore()
        errors = {name: report.summary()["eval_error"] for name, report in repair.before.items()}
        repaired = {name: error for name, error in errors.items() if name not in repair.left_alone}
        gap = passes.difference(as_is, exact)
        contributions, rest = _take_apart(passes, layers, new, repaired, as_is, exact) if _is_gap(*gap) else ((), None)
    return Attribution(
        eval_loss=float(as_is.mean()),
        exact_loss=float(exact.mean()),
        batch_loss=float(batch_losses.mean()),
        train_loss=float(training.mean()),
        gap=gap[0],
        gap_stderr=gap[1],
        contributions=contributions,
        rest=rest,
    )


def _is_gap(gap: float, stderr: float) -> bool:
    """Whether there is anything to explain: the gap exceeds its own standard error."""
    return gap > stderr or gap == math.inf


def _take_apart(
    passes: _Passes,
    layers: Mapping[str, BatchNorm],
    new: SavedBuffers,
    errors: Mapping[str, float],
    as_is: Tensor,
    exact: Tensor,
) -> tuple[tuple[Contribution, ...], Contribution | None]:
    """Put exact statistics into one layer after another, until what is left of the gap is negligible.

    Args:
        passes: Of the data.
        layers: The layers by name, with the running statistics as they were.
        new: The exact statistics.
        errors: ``eval_error`` of the layers whose running statistics the gap is due to.
        as_is: Losses in eval mode with the running statistics as they were.
        exact: Losses in eval mode with exact statistics in all layers.

    Returns:
        The contributions of layers, and that of the layers that are left together, None if none is.
    """
    gap, _ = passes.difference(as_is, exact)
    scale = gap if math.isfinite(gap) else float(exact.mean())
    order = sorted(errors, key=errors.__getitem__, reverse=True)
    contributions: list[Contribution] = []
    present, left = as_is, gap
    while order and not (contributions and abs(left) < _NEGLIGIBLE * abs(scale)):
        name = order.pop(0)
        new.of([layers[name]]).restore()
        following = passes.losses(f"eval mode, exact in {name}, too") if order else exact
        contributions.append(Contribution(name, errors[name], *passes.difference(present, following)))
        present = following
        left, _ = passes.difference(present, exact)
    if not order:
        return tuple(contributions), None
    what = f"{len(order)} other layer{'s' * (len(order) > 1)}"
    return tuple(contributions), Contribution(what, errors[order[0]], *passes.difference(present, exact))


class _Passes:
    """Passes of the same batches through a model. Each gives one loss per batch, or one per sample."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Loss, forward: Forward, progress: bool) -> None:
        self.model = model
        self.batches = batches
        self.loss = loss
        self.forward = forward
        self.progress = progress
        self.output: Any = None
        self.num_losses: int | None = None
        self.rounding = 0.0  # of a loss, relative to it: need not average out

    @torch.no_grad()
    def losses(self, label: str, in_training: Iterable[nn.Module] = ()) -> Tensor:
        """Losses with these modules in training mode, in float64."""
        collected: list[Tensor] = []
        with training_only(self.model, in_training), self.same_batches():
            run(self.model, self.measured(label, collected), self.run_model)
        return self.joined(collected)

    def joined(self, collected: list[Tensor]) -> Tensor:
        """The losses of all batches of a pass, as many as in the others."""
        losses = torch.cat([torch.empty(0, dtype=torch.float64, device="cpu"), *collected])
        if len(losses) < 2:
            raise ValueError(
                f"`batches` must give two batches or more, or `loss` one value for each sample: {len(collected)} "
                f"batches gave {len(losses)} losses, and a difference of which one cannot tell whether it is chance."
            )
        if len(losses) != (self.num_losses or len(losses)):
            raise ValueError(
                f"`batches` gave {self.num_losses} losses when it was iterated first, and {len(losses)} later: it must "
                "give the same batches each time."
            )
        self.num_losses = len(losses)
        return losses

    def measured(self, label: str, collected: list[Tensor]) -> Iterator[Any]:
        """The batches, with a progress bar. When the next is asked for, the model has been run on this one."""
        from tqdm.auto import tqdm

        total = length_hint(self.batches) or None
        once = iter(self.batches)  # tqdm would make two iterators, and a loader start its workers twice
        with tqdm(once, label, total, leave=False, disable=not self.progress) as bar:
            for index, batch in enumerate(bar):
                yield batch
                collected.append(self._loss_of(index, batch))

    def run_model(self, model: nn.Module, batch: Any) -> None:
        """Run the model, and keep the output for the loss."""
        self.output = self.forward(model, batch)

    def _loss_of(self, index: int, batch: Any) -> Tensor:
        """The loss of one batch, of one value or of as many as samples."""
        output, self.output = self.output, None
        try:
            value = torch.as_tensor(self.loss(output, batch))
        except Exception as error:
            raise RuntimeError(
                f"`loss` cannot be computed for batch {index}: {error!r}. Nothing was changed."
            ) from error
        if value.ndim > 1:
            raise ValueError(f"`loss` must return a scalar or one value for each sample, got {tuple(value.shape)}.")
        if value.is_floating_point():
            self.rounding = max(self.rounding, torch.finfo(value.dtype).eps)
        return value.detach().reshape(-1).to("cpu", torch.float64)

    def difference(self, one: Tensor, other: Tensor) -> tuple[float, float]:
        """Mean difference of paired losses, infinite if only one of them is not finite, and its standard error."""
        finite = bool(torch.isfinite(one).all()), bool(torch.isfinite(other).all())
        if not all(finite):
            return (math.nan if not any(finite) else math.inf if finite[1] else -math.inf), math.nan
        difference = one - other
        by_chance = float(difference.std()) / math.sqrt(len(difference))
        return float(difference.mean()), math.hypot(by_chance, self.rounding * float(other.abs().mean()))

    @contextmanager
    def same_batches(self) -> Iterator[None]:
        """A context after which the generators that a loader draws from are as before it."""
        loader = self.batches
        samplers = [loader, loader.sampler, loader.batch_sampler] if isinstance(loader, DataLoader) else []
        samplers += [getattr(sampler, "sampler", None) for sampler in samplers]  # of a batch sampler that was given
        generators = {getattr(sampler, "generator", None) for sampler in samplers}
        states = [(generator, generator.get_state()) for generator in generators if generator is not None]
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)
