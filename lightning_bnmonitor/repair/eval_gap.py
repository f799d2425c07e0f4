"""What an attribution has found: losses from eval mode to training mode, what lies between them, and the words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_bnmonitor.report.figures import plot_contributions
from lightning_bnmonitor.report.layer_report import jsonable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUNNING_STATS = "running statistics"
OTHER_STATS = "other statistics of the evaluation data"
OTHER_DATA = "the evaluation data otherwise"
BY_BATCH = "normalising by the batch"
MODULES = "dropout, other modules in training mode"
_MARGIN = 2.0  # standard errors beyond which a part is no chance
_SHARE = 0.02  # of the loss that it is a part of: from which on a part is worth a word
_HIDING = 0.1  # of the largest part: from which on one of opposite sign is said


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


class Part(NamedTuple):
    """A part of what eval mode is worse than training mode."""

    name: str
    """What it comes from."""
    reduction: float
    """By how much the loss is smaller without it."""
    stderr: float
    """Standard error of that."""

    @property
    def is_significant(self) -> bool:
        """Whether it is no chance, in either direction."""
        return math.isfinite(self.reduction) and abs(self.reduction) > _MARGIN * self.stderr


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What :func:`attribute_eval_gap` has found. Printed, it is a cause, a number, what to do, and a table.

    Losses in eval mode are those of the evaluation data, which are ``batches`` themselves if no others were given. A
    part of the loss is spoken of as a cause if it is more than chance (two standard errors) and more than 2 % of the
    loss that it is a part of: of ``eval_loss`` what running statistics cost; of the larger of ``exact_loss`` and
    ``train_loss`` all other parts, which lie between these. (What sampling noise of 0.01 leaves after
    ``recalibrate(..., num_batches="auto")`` moves a loss by up to 1 %.)
    """

    eval_loss: float
    """Loss in eval mode as it is."""
    dropout_loss: float
    """The same, with dropout on: all modules but BatchNorm as in training."""
    exact_loss: float
    """Loss in eval mode with exact statistics of ``batches`` in all layers."""
    own_loss: float
    """Loss in eval mode with exact statistics of the evaluation data."""
    exact_train_loss: float
    """Loss of ``batches`` in eval mode with exact statistics of them."""
    batch_loss: float
    """Loss of ``batches`` where BatchNorm normalises by the batch and all else is in eval mode."""
    train_loss: float
    """Loss of ``batches`` in training mode."""
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
    remaining: tuple[Part, ...]
    """What lies between ``exact_loss`` and ``train_loss``, and no running statistics of training data explain."""
    has_evaluation: bool
    """Whether evaluation data were given."""
    repair: str
    """The call that makes running statistics exact, as code."""

    @property
    def is_significant(self) -> bool:
        """Whether running statistics are a cause: the gap is more than chance, and than 2 % of ``eval_loss``."""
        return is_cause(self.gap, self.gap_stderr, self.eval_loss)

    @property
    def worst(self) -> str | None:
        """The layer that is responsible for most; None if there is nothing to explain."""
        return max(self.contributions, key=lambda part: part.reduction).name if self.contributions else None

    @property
    def largest(self) -> Part | None:
        """The largest part of what eval mode is worse than training mode; None if all may be chance, or are small."""
        own = [Part(RUNNING_STATS, self.gap, self.gap_stderr)] if self.is_significant else []
        return max([*own, *self._other_causes], key=lambda part: part.reduction, default=None)

    def to_dict(self) -> dict[str, Any]:
        """What was found, in JSON's types: all fields by their names, and ``explanation``, the first words printed."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found["contributions"] = [part._asdict() for part in self.contributions]
        found["rest"] = self.rest and self.rest._asdict()
        found["remaining"] = [part._asdict() for part in self.remaining]
        numbers: dict[str, Any] = jsonable(found)
        return {"explanation": " ".join(_sentences(self)), **numbers}

    def __str__(self) -> str:
        from tabulate import tabulate

        layers = [
            (
                f"- {part.name}",
                "",
                f"{part.reduction:.4g}",
                f"{part.stderr:.2g}",
                "" if share is None else f"{share:.0%}",
                f"{part.eval_error:.4f}",
            )
            for part, share in zip(self._layers, self._shares, strict=True)
        ]
        steps = [
            [(f"- {name}", "", f"{value:.4g}", f"{stderr:.2g}") for name, value, stderr in part] for part in self._steps
        ]
        rows: list[tuple[str, ...]] = []
        between: list[Sequence[tuple[str, ...]]] = [layers, *steps, ()]
        for (name, level), after in zip(self._states, between, strict=True):
            rows += [(name, f"{level:.4g}"), *after]
        rows.append(("eval mode with dropout on", f"{self.dropout_loss:.4g}"))
        if not self.has_evaluation:
            rows.append(("eval mode with these data's own statistics", f"{self.own_loss:.4g}"))
        headers = ["", "loss", "explains", "stderr", "of the gap", "eval_error"]
        rows = [(*row, *[""] * (len(headers) - len(row))) for row in rows]
        align = ("left", *["right"] * (len(headers) - 1))
        table = tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
        return f"{' '.join(_sentences(self))}\n\n{table}"

    @property
    def _other_causes(self) -> list[Part]:
        """What no running statistics of training data explain, and is more than chance and than 2 % of the loss."""
        larger = max(abs(self.exact_loss), abs(self.train_loss))
        return [part for part in self.remaining if is_cause(part.reduction, part.stderr, larger)]

    @property
    def _layers(self) -> list[Contribution]:
        return [*self.contributions, *([self.rest] if self.rest else [])]

    @property
    def _shares(self) -> list[float | None]:
        """Of the gap, for each of the layers; None where layers of opposite sign make up for each other."""
        shares = [part.reduction / self.gap if self.gap else math.nan for part in self._layers]
        are_shares = math.isfinite(self.gap) and all(-0.005 <= share < 1.005 for share in shares)
        return [max(share, 0.0) if are_shares else None for share in shares]

    @property
    def _states(self) -> list[tuple[str, float]]:
        """Losses from eval mode to training mode."""
        states = [("eval mode as it is", self.eval_loss), ("exact statistics", self.exact_loss)]
        if self.has_evaluation:
            states += [
                ("statistics of the evaluation data", self.own_loss),
                ("training data, exact statistics", self.exact_train_loss),
            ]
        return [*states, ("training mode", self.train_loss)]

    @property
    def _steps(self) -> list[Sequence[Part]]:
        """What lies between these from the second on."""
        return [*([part] for part in self.remaining[:-2]), self.remaining[-2:]]

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The loss from eval mode to training mode, step by step, as a matplotlib figure.

        Args:
            ax: The axes to draw in; None makes a figure.

        Returns:
            The figure and the axes.
        """
        layers = [(part.name, part.reduction) for part in self._layers]
        return plot_contributions(
            self._states, [layers, *([(part.name, part.reduction) for part in step] for step in self._steps)], ax
        )


def is_cause(reduction: float, stderr: float, loss: float) -> bool:
    """Whether what a loss falls by is more than chance (two standard errors), and more than 2 % of the loss."""
    return reduction == math.inf or _SHARE * abs(loss) < reduction > _MARGIN * stderr


def _sentences(found: Attribution) -> list[str]:
    """The cause, the number, what to do; then what else there is."""
    if math.isnan(found.gap):
        return ["The loss in eval mode is not finite, and not with exact running statistics either."]
    if found.gap == -math.inf:
        return ["Nothing to explain: the loss is finite, but not with exact running statistics.", _then(found)]
    if found.gap == math.inf and found.worst is not None:
        first = f"Running statistics make the loss {found.eval_loss:.4g}: first those of {found.worst}."
        return [first, f"Repair: `{found.repair}`.", _then(found)]
    largest = found.largest
    if largest is None:
        said = _compared("eval mode", found.eval_loss, found.train_loss)
        return [f"Nothing to explain: {said}", _of_a_small_gap(found)]
    if largest.name == RUNNING_STATS:
        return [*_of_running_stats(found), _then(found), *_opposite(found)]
    cause = _CAUSES[largest.name].format(cost=f"{largest.reduction:.4g} ± {largest.stderr:.2g}")
    return [cause, *_besides(found, largest), *_opposite(found)]


_CAUSES = {
    OTHER_STATS: (
        "The evaluation data have other statistics than the training data: that costs {cost} of the loss. Prepare both "
        "alike. If such data are what the model will be given, repair: "
        "`lightning_bnmonitor.recalibrate(model, evaluation_loader)`."
    ),
    OTHER_DATA: (
        "With statistics of their own, too, the evaluation data have a loss that is {cost} higher than that of the "
        "training data: overfitting, or data of another kind, and no matter of BatchNorm."
    ),
    BY_BATCH: (
        "Normalising by the batch, which eval mode does not do, is worth {cost} of the loss: the network relies on "
        "what its batch has in common, and no running statistics repair that. Mix what is in a batch, take larger "
        "ones, train on with running statistics (`layer.eval()` for all BatchNorm layers after every `model.train()`), "
        "or use `nn.GroupNorm`."
    ),
    MODULES: (
        "Dropout or other modules, which act otherwise in training mode, are worth {cost} of the loss, and no running "
        "statistics explain it. Look for what depends on `self.training`, and put dropout behind the last BatchNorm "
        "layer."
    ),
}


def _compared(what: str, loss: float, train_loss: float) -> str:
    """How a loss in eval mode, no part of which is a cause, compares with that in training mode."""
    worse = loss - train_loss
    if not math.isfinite(worse):
        return f"{what} has a loss of {loss:.4g}, training mode of {train_loss:.4g}."
    if worse > _SHARE * abs(loss):
        return (
            f"{what} is {worse:.4g} worse than training mode, but no part of that is both more than chance and "
            "more than 2 % of the loss."
        )
    return f"{what} is as good as training mode."


def _of_a_small_gap(found: Attribution) -> str:
    """What exact running statistics would do where they do not matter."""
    if found.gap == 0:
        return "Exact running statistics change nothing."
    if abs(found.gap) <= _MARGIN * found.gap_stderr:
        return f"{_what_exact_ones_do(found)}, which may be chance."
    return f"{_what_exact_ones_do(found)}{', less than 2 % of it' if found.gap > 0 else ''}."


def _what_exact_ones_do(found: Attribution) -> str:
    change = "raise" if found.gap < 0 else "lower"
    return f"Exact running statistics {change} the loss by {abs(found.gap):.4g} ± {found.gap_stderr:.2g}"


def _of_running_stats(found: Attribution) -> Iterable[str]:
    """Of a gap that is explained by running statistics first of all."""
    cost = f"{found.gap:.4g} ± {found.gap_stderr:.2g}"
    if not found.contributions:
        yield f"The loss differs by {cost}, and no layer was called that could be the reason."
        return
    top = max(found.contributions, key=lambda part: part.reduction)
    share = dict(zip(found._layers, found._shares, strict=True))[top]
    if share is not None:
        yield f"Running statistics cost {cost} of the loss, {share:.0%} of that by {top.name}."
    else:
        yield (
            f"Running statistics cost {cost} of the loss, first those of {top.name} ({top.reduction:.4g}); some layers "
            "make up for a part of others."
        )
    yield f"Repair: `{found.repair}`."
    if found.eval_loss - found.dropout_loss > found.gap / 2:
        yield (
            f"With dropout on, eval mode has a loss of {found.dropout_loss:.4g}: the running statistics are those of "
            "activations under dropout."
        )


def _then(found: Attribution) -> str:
    """What is left with exact statistics."""
    left = found.exact_loss - found.train_loss
    listed = _listed(found._other_causes)
    if not listed or not math.isfinite(left):
        return _compared("With exact ones, eval mode", found.exact_loss, found.train_loss)
    if left > 0:
        return f"{left:.4g} more than in training mode remain, which no running statistics explain: {listed}."
    return f"With exact ones remains what no running statistics explain: {listed}."


def _besides(found: Attribution, largest: Part) -> Iterable[str]:
    """What else costs something, if it is not running statistics first of all."""
    listed = _listed(part for part in found._other_causes if part != largest)
    if listed:
        yield f"Besides: {listed}."
    yield f"{_what_exact_ones_do(found)}: `{found.repair}`." if found.is_significant else _of_a_small_gap(found)


def _opposite(found: Attribution) -> Iterable[str]:
    """What hides a tenth or more of the largest part in the difference between the modes."""
    worth = _HIDING * found.largest.reduction if found.largest else 0.0
    listed = _listed(part for part in found.remaining if part.is_significant and part.reduction < -worth)
    if listed:
        yield (
            f"The other way round: {listed}; so the losses in eval mode and in training mode differ by "
            f"{found.eval_loss - found.train_loss:.4g}."
        )


def _listed(parts: Iterable[Part]) -> str:
    """Parts with their numbers, the largest first."""
    ordered = sorted(parts, key=lambda part: -abs(part.reduction))
    return ", ".join(f"{part.name} ({part.reduction:.4g})" for part in ordered)
