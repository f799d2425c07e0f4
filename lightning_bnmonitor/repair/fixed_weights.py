"""What layers receive in one pass of data at fixed weights, and what their running statistics are against that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bnmonitor.capture.kernel_inputs import kernel_inputs
from lightning_bnmonitor.capture.saved import has_own_forward
from lightning_bnmonitor.compat import BatchNorm
from lightning_bnmonitor.repair.selection import STALE
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.statistics.channel_layout import FloatArray
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.affine import has_frozen_weights
from lightning_bnmonitor.tracking.assessment import Received, compare, precision
from lightning_bnmonitor.tracking.buffers import History
from lightning_bnmonitor.tracking.measurement import LayerState
from lightning_bnmonitor.tracking.recorder import Recorder
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from lightning_bnmonitor.tracking.validation import with_validation
from lightning_bnmonitor.tracking.windows import Windows

NumBatches = int | Literal["auto"] | None
"""At most so many batches; all; or as many as make the noise of their statistics negligible."""
NOISE = 0.01
"""As large an RMS error of the normalised activation may chance in the statistics make, in any layer."""
MAX_SAMPLES = 100_000
"""No more samples are looked at to come there: data may have no end."""
_FIRST_LOOK = 8  # batches
_GROWTH = 1.25, 2.0  # from look to look, whatever the noise promises
_SPOILING = ("tiny-batch", "ordered-batches", "grouped-batches")  # verdicts on how batches are made
_INITIAL = np.array([[0.0], [1.0]])


class OnePass:
    """What layers receive while data pass through a model with fixed weights, from a pass over each input.

    Args:
        model: The root module, in the modes that it has between passes.
        layers: The layers by name. Every call of theirs counts within :meth:`counting`, whatever the model's mode.
        unchanging: Those that update nothing in training, by name, and whether they are frozen or stale.
        together: Whether all ranks do the same, each with its own data, and get one report of them all.
        mask: What tells of a batch which positions count; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, BatchNorm],
        unchanging: Mapping[str, str],
        together: bool,
        mask: Callable[[Any], Any] | None = None,
    ) -> None:
        self._model = model
        self._unchanging = unchanging
        self._together = together
        self._is_training = model.training
        self._is_trained = model.training and any(weights.requires_grad for weights in model.parameters())
        self._root = nn.Identity()  # in training mode: calls count
        self._recorder = Recorder(self._root, by_pass=True, at_fixed_weights=True, mask=mask)
        self._recorder.follow(layers)
        self._model_calls = 0
        self.num_batches = 0
        """Batches that were run, on this rank."""
        self._why_no_more = ""
        self.has_ended = False
        """Whether all data of this rank were run."""

    def steps(self, batches: Iterable[Any], num_batches: NumBatches) -> Iterator[Any]:
        """So many batches. When the next is asked for, the model has been run on this one.

        With ``"auto"``, how noisy the statistics are is looked at after 8 batches, and again when, by that, it may do:
        on several ranks by all of them together, until it does or none has any more data.

        Raises:
            OtherRankError: If another rank says that it has failed.
        """
        return self._steps(iter(batches), num_batches)

    def _steps(self, left: Iterator[Any], num_batches: NumBatches) -> Iterator[Any]:
        look = _FIRST_LOOK if num_batches == "auto" else num_batches
        while True:
            wanted = None if look is None else look - self.num_batches
            for batch in () if self.has_ended else itertools.islice(left, wanted):
                self._recorder.see_inputs(batch)
                yield batch
                self._recorder.step_ended()
                self.num_batches += 1
            self.has_ended = look is None or self.num_batches < look
            if num_batches != "auto" or look is None:
                return
            noise, num_samples, is_over = self._look()
            if noise <= NOISE:
                return
            if is_over or num_samples >= MAX_SAMPLES:
                why = "the data ended" if is_over else 'so many are the most that `num_batches="auto"` takes'
                self._why_no_more = f", not below {NOISE}: {why}"
                return
            look = math.ceil(look * min(max((noise / NOISE) ** 2, _GROWTH[0]), _GROWTH[1]))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context in which calls count. What is compiled has to run eagerly in it."""
        mask_hooks = self._recorder.mask_hooks()
        with ExitStack() as stack:
            stack.callback(self._model.register_forward_hook(self._count_model_call).remove)
            for layer in self._recorder.layers:
                if has_own_forward(layer.module):
                    no_kernel = partial(setattr, layer.hook, "own_forward", True)
                    stack.enter_context(kernel_inputs(layer.module, layer.hook, no_kernel))
                else:
                    handle = layer.module.register_forward_hook(layer.hook, with_kwargs=True)
                    stack.callback(handle.remove)
                if layer.module in mask_hooks:
                    handle = layer.module.register_forward_hook(mask_hooks[layer.module], with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The same, of an evaluation of the model, which :meth:`with_evaluation` then compares."""
        self._recorder.start_validation(0)
        self._root.eval()
        with self.counting():
            yield

    def check_complete(self, names: Collection[str]) -> None:
        """Raise RuntimeError if there was a call of one of these layers that could not be counted."""
        for layer in self._recorder.layers:
            if layer.name in names and layer.hook.skipped:
                raise RuntimeError(
                    f"{layer.hook.skipped} calls of layer {layer.name!r} could not be counted: what it receives is not "
                    "(N, C, ...), has no values of its own, or is too large for a pass over it. Nothing was changed. "
                    "Argument `exclude` leaves it alone."
                )

    def report(self) -> Report:
        """The running statistics as they are now, from before the pass, against what was received."""
        self._recorder.flush()
        report = compare(*self._seen, False, self._together, self._as_known)
        return Report(report.values(), report.rank, self._remarks(report))

    def report_of_averages(self, together: bool) -> Report:
        """The running statistics as they are now, the average of what was received, against that.

        Args:
            together: Whether all ranks call this, if they do the same at all.
        """
        for layer in self._recorder.layers:
            layer.counts = layer.counts._replace(last_num_samples=0)  # which is in them as any other
        return compare(*self._seen, True, self._together and together)

    def with_evaluation(self, report: Report) -> Report:
        """A report with what was received in the evaluation."""
        return with_validation(report, self._recorder.layers, self._together, num_loaders=1)

    def precision_of(self, report: Report) -> str:
        """A sentence on how well the statistics are known, and from how many samples; empty if nothing was called."""
        called = {name: layer.evidence for name, layer in report.items() if "now_error" in layer.evidence}
        if not called:
            return ""
        num_batches, size = (next(iter(called.values()))[name] for name in ("batches", "batch_size"))
        noise, worst = max((evidence["now_error"], name) for name, evidence in called.items())
        return (
            f"{num_batches:.0f} batches with {num_batches * size:.0f} samples were looked at: chance in these makes an "
            f"error of {noise:.2g} at most (in `{worst}`){self._why_no_more}."
        )

    @property
    def _seen(self) -> tuple[Sequence[TrackedLayer], Windows]:
        return self._recorder.layers, self._recorder.windows

    def _look(self) -> tuple[float, float, bool]:
        """How noisy the statistics are in the worst layer, of how many samples, and whether there are no more.

        Of all ranks together.
        """
        if self._together and not collectives.all_succeeded(True):
            raise OtherRankError
        is_over = collectives.all_succeeded(self.has_ended) if self._together else self.has_ended
        self._recorder.flush()
        noise, num_samples = precision(*self._seen, self._together)
        return noise, num_samples, is_over

    def _remarks(self, report: Report) -> Iterator[str]:
        """How certain it all is, and what it does not tell."""
        if precise := self.precision_of(report):
            yield precise
        if not any(layer.num_samples for layer in report.values()):
            yield "No BatchNorm layer was reached by these batches: see what `forward` runs."
        few = next((layer for layer in report.values() if layer.verdict == "insufficient-data"), None)
        if few is not None:
            yield f"{few.explanation} {few.remedy}"
        spoiled = next((layer for layer in report.values() if layer.verdict in _SPOILING), None)
        if spoiled is not None:
            yield (
                f"The layers after {spoiled.name} receive what such batches have normalised ({spoiled.verdict}): what "
                "is said of them may come from that. Look again when it is mended."
            )
        unseen = (
            "One pass at fixed weights does not show the training: whether it ran in eval mode or made other calls "
            "than are made here (a second forward pass, activation checkpointing), whether running statistics lag "
            "behind the weights, or something else has written them. `BatchNormMonitor` in training tells."
        )
        if not self._is_training:
            unseen += (
                " The model is in eval mode: frozen layers are not told from others. Leave out by `exclude` what was "
                "frozen, as what follows has learned with its statistics as they are."
            )
        yield unseen

    def _count_model_call(self, *_: Any) -> None:
        self._model_calls += 1

    def _as_known(self, state: LayerState, received: Received) -> LayerState:
        """A layer with what is known of its training without having seen any."""
        layer, its = state.layer, state.circumstances
        why, momentum = self._unchanging.get(layer.name), _momentum_of(layer)
        last = layer.counts.last_num_samples if self.has_ended else 0
        layer.counts = layer.counts._replace(momentum=momentum, last_num_samples=last)
        if layer.start.history is None and state.now.buffers is not None:
            layer.start = layer.start._replace(history=_history(layer, state.now.buffers, received, momentum, last))
        goes_on = self._is_trained and layer.module.training and why is None and bool(state.now.num_tracked)
        known = its._replace(
            calls={**its.calls, "skipped": layer.hook.skipped},
            training_calls=its.training_calls if why in (None, STALE) else 0,
            updates_nothing=why is not None,
            effective_momentum=momentum,
            has_frozen_weights=goes_on and has_frozen_weights(layer.module),
            calls_per_model_call=layer.num_calls / self._model_calls if self._model_calls else math.nan,
        )
        return state._replace(circumstances=known)


class OtherRankError(RuntimeError):
    """Another rank has failed, and knows that all know."""

    def __init__(self) -> None:
        super().__init__("Another rank could not run its batches: see its error. Nothing was changed.")


@contextmanager
def agreement(together: bool) -> Iterator[None]:
    """A context for what each rank does on its own: if it fails on one, it fails on all, and none is left waiting."""
    try:
        yield
    except OtherRankError:
        raise
    except Exception:
        if together:
            collectives.all_succeeded(False)
        raise
    if together and not collectives.all_succeeded(True):
        raise OtherRankError


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """A context without gradients in which a model's buffers may be written, if there are inference tensors, too."""
    with torch.inference_mode(any(buffer.is_inference() for buffer in model.buffers())), torch.no_grad():
        yield


def _momentum_of(layer: TrackedLayer) -> float:
    """The weight that the last batch had in the running statistics."""
    momentum = layer.module.momentum
    return 1 / max(layer.start.num_tracked or 0, 1) if momentum is None else momentum


def _history(
    layer: TrackedLayer, running: Tensor, received: Received, momentum: float, last_num_samples: int
) -> History:
    r"""What running statistics are made of that were updated K times with momentum m, by batches like those received.

    The initial values have a weight of :math:`A = (1 - m)^K`, if that explains most of what the running statistics are
    off (they may have been replaced since); the squared weights of batches add up to :math:`(1 - A^2)\, m / (2 - m)`.
    With momentum None: 0 and 1 / K. Running statistics whose updates were not counted are taken to have had many. The
    last batch, if its size is known, comes last there, too.
    """
    num, count = layer.start.num_tracked, received.samples_per_batch
    if not 0 < momentum <= 1 or count <= 1:
        return History(0.0, 0.0, 0.0)
    initial_weight, squares = 0.0, 1 / max(num or 1, 1)
    if layer.module.momentum is not None:
        initial_weight = (1 - momentum) ** num if num else 0.0
        squares = momentum / (2 - momentum) * (1 - initial_weight**2)
        if not _has_initial_part(running.numpy(), received.value, initial_weight, layer.module.eps):
            initial_weight = 0.0
    noise = squares / count, squares / (count - 1)
    if last_num_samples > 1:
        own, rest = momentum**2, (1 - momentum) ** 2
        noise = own / last_num_samples + rest * noise[0], own / (last_num_samples - 1) + rest * noise[1]
    return History(initial_weight, *noise)


def _has_initial_part(running: FloatArray, received: FloatArray, weight: float, eps: float) -> bool:
    """Whether a part of the initial values explains most of what running statistics, ``(2, C)``, are off."""
    scaled = received[1] + eps
    unit = np.stack([np.sqrt(scaled), 2 * scaled])
    apart, initial = (running - received) / unit, weight * (_INITIAL - received) / unit
    is_known = np.isfinite(apart) & np.isfinite(initial)
    apart, initial = apart[is_known], initial[is_known]
    return bool(np.square(apart - initial).sum() <= np.square(apart).sum() / 2)
