"""The engine: takes what a model's BatchNorm layers receive, and reports. Needs no Lightning."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, get_args

import torch
from torch import nn

from lightning_bnmonitor.arguments import as_patterns, check_bool, check_callable_or_none, check_choice
from lightning_bnmonitor.capture.attachment import Attachment
from lightning_bnmonitor.capture.batch_moments import CaptureMode
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.assessment import assess
from lightning_bnmonitor.tracking.batch_groups import group_name
from lightning_bnmonitor.tracking.discovery import find_layers
from lightning_bnmonitor.tracking.recorder import STATE_VERSION, Recorder
from lightning_bnmonitor.tracking.validation import with_validation

_NO_MODEL = "The model of this BatchNormTracker no longer exists. Make a new tracker."


class BatchNormTracker:
    """Exact statistics of every BatchNorm layer's inputs beside its running statistics, in any PyTorch loop.

    A call counts while the model (the root, not the layer) is in training mode and :meth:`paused` is not in force, so
    that validation does not, and frozen layers inside a training model do. Nothing that is computed changes: hooks only
    read, and never wait for the device within a step.

    State is 600 bytes a channel, about 850 bytes a layer, up to 58 KiB for what the model is given, and the batch
    moments of up to 72 calls (8 bytes a channel each, twice as many in float64 or by a pass): as many as keep it below
    1 KiB a channel + 64 KiB; beside that 32 bytes a channel for each group of batches, of nine at most, where
    :meth:`see_inputs` tells of groups. It is float64, on the layers' device (on the CPU for MPS, which has none).

    Args:
        model: The root module. It is not kept alive; its BatchNorm layers are, for the report. If it is compiled, pass
            what ``torch.compile`` returned.
        include: ``fnmatch`` patterns of the names of layers to monitor; None for all.
        exclude: ``fnmatch`` patterns of the names of layers to leave out.
        capture: ``"auto"`` takes the batch moments in the cheapest way that is exact; ``"pass"`` makes a pass of its
            own over every input: slower, and the reference for the others. What ``torch.compile`` has compiled takes
            them in its graph either way.
        mask: Where inputs are padded: a function of the batch (of what :meth:`see_inputs` is told) that returns which
            positions count, a bool tensor ``(B, T)``, say: what fits which layer is told at
            :class:`~lightning_bnmonitor.capture.masks.BatchMasks`. A report then has the statistics without padding,
            too (``LayerReport.unpadded``), and says where padding does harm (flag ``padded``). That takes passes over
            each layer's input, and up to 272 bytes a channel. What is compiled is not looked at.
        guard: Whether a call whose batch has NaN or Inf is to leave the layer's running statistics and
            ``num_batches_tracked`` as they were: they are put back before its next call, and before anything here or
            :meth:`step`, :meth:`put_back` or an optimizer's step ends, without waiting for the device. Such calls are
            in no statistics, and counted (flag ``guarded``). Nothing else changes, by a bit. What ``torch.compile`` has
            compiled is put back as it was before the compiled module was called. It takes 8 bytes a channel more, and
            the device is waited for once in 36 to 72 steps.

    Raises:
        TypeError: If ``include`` or ``exclude`` is neither None nor strings, or ``mask`` neither None nor a function.
        ValueError: If ``capture`` is unknown, or ``guard`` no bool.

    Example::

        >>> import torch
        >>> from lightning_bnmonitor import BatchNormTracker
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> with BatchNormTracker(model) as tracker:
        ...     for _ in range(10):
        ...         _ = model(torch.randn(8, 4))
        >>> report = tracker.report()
        >>> report["1"].num_batches, report["1"].num_samples
        (10, 80)
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        capture: CaptureMode = "auto",
        mask: Callable[[Any], Any] | None = None,
        guard: bool = False,
    ) -> None:
        check_choice("capture", capture, get_args(CaptureMode))
        check_callable_or_none("mask", mask)
        check_bool("guard", guard)
        self._include = as_patterns("include", include)
        self._exclude = as_patterns("exclude", exclude)
        self._capture = capture
        self._mask = mask
        self._guard = guard
        self._model = weakref.ref(model)
        self._recorder = Recorder(model, by_pass=capture == "pass", mask=mask, is_guarded=guard)
        self._attachment: Attachment | None = None
        self._closing: Report | None = None  # the report of a window that has ended, once it was asked for
        self._validated: Report | None = None  # the same, with a validation after it
        self._before_averaged: Report | None = None  # if a validation with averaged weights follows
        self._pending: Mapping[str, Any] | None = None  # a state that waits for `attach`

    def __enter__(self) -> BatchNormTracker:
        return self.attach()

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNormTracker:
        # A detached one, of the copy of the model if that is what is copied.
        model = self._model()
        if model is None:
            raise RuntimeError(_NO_MODEL)
        kept = memo.get(id(model), model)
        twin = BatchNormTracker(kept, self._include, self._exclude, self._capture, self._mask, self._guard)
        twin.load_state_dict(self.state_dict())
        return twin

    @property
    def is_attached(self) -> bool:
        """Whether hooks are on the model."""
        return self._attachment is not None

    def attach(self) -> BatchNormTracker:
        """Put hooks on the model's layers and begin a window; after :meth:`detach`, go on with the one it interrupted.

        Harmless when attached. What ``torch.compile`` compiled before is compiled once more.

        Returns:
            This tracker.

        Raises:
            RuntimeError: If the model no longer exists.
            ValueError: If a pattern matches no BatchNorm layer.
        """
        if self._attachment is not None:
            return self
        model = self._model()
        if model is None:
            raise RuntimeError(_NO_MODEL)
        self._recorder.follow(find_layers(model, self._include, self._exclude))
        hooks = {layer.module: layer.hook for layer in self._recorder.layers}
        recorder = self._recorder
        self._attachment = Attachment(
            model,
            recorder.gate,
            hooks,
            recorder.mask_hooks(),
            see=recorder.see_arguments,
            drain=recorder.drain,
            after_step=recorder.merge_if_full,
            guard=recorder.guard,
        )
        self._recorder.is_attached = True
        if self._pending is not None:
            self._restore(self._pending)
        return self

    def detach(self) -> None:
        """Remove every hook and keep the statistics. Harmless when detached."""
        if self._attachment is not None:
            self._recorder.put_back()
            self._recorder.drain()
            self._attachment.remove()
            self._attachment = None
            self._recorder.is_attached = False
            self._recorder.places.forget()

    def step(self) -> None:
        """Tell that a training step has ended, one batch with all that belongs to it.

        A loop that does so is told when a window was resumed from a state saved in the middle of a step (flag
        ``interrupted-batch``), and whether the calls of a layer within a step differ (flag ``calls-differ``): those
        that no step of a ``torch.optim`` optimizer lies between. It is a good time to merge what waits, too, as after
        these, which are noticed without it.
        """
        self._recorder.step_ended()

    def put_back(self) -> None:
        """With ``guard=True``: put back now what calls with NaN or Inf have made of running statistics.

        A loop needs it where no optimizer's step, :meth:`step` or call of the model comes before something else reads
        the running statistics: a step that ``torch.amp.GradScaler`` skips, and then an average of the weights.
        Harmless at any time but within a backward pass.
        """
        self._recorder.put_back()

    def see_inputs(self, batch: object, group: object = None) -> None:
        """Tell what a training step is given, before it: a batch ``(B, *)``, or any structure with its tensors.

        By this a report tells data that come in an order from weights that move. It is needed only where the model
        itself is not called, but parts of it: what the model is given is seen without. With ``mask`` every batch has
        to be told: that is asked here, and what it returns holds until :meth:`step`. The first 64 samples of a batch
        are looked at, and 256 values of each, in each of the first 64 steps, a quarter of those up to 128, an eighth of
        those up to 256, and so on.

        Args:
            batch: What the step is given.
            group: What the whole batch is of: a source, a domain, an augmentation. Reports then tell how far each group
                is from all (``group_shift``), of 8 groups a window at most, and of all others as one. It holds until
                the step ends (:meth:`step`), or until this is called again. It takes 32 bytes a channel and group. A
                batch of SyncBatchNorm is that of all ranks: there it tells something if they have the same group.

        Raises:
            TypeError: If ``group`` is no name: a list, a tuple, a tensor of several numbers or not on the CPU, ...
        """
        self._recorder.see_inputs(batch, None if group is None else group_name(group))

    def paused(self) -> AbstractContextManager[None]:
        """A context in which no call counts."""
        return self._recorder.paused()

    def flush(self) -> None:
        """Merge what waits into the window, all layers at once. This changes no result, whenever it is done."""
        self._recorder.flush()

    @torch.inference_mode(False)
    def close(self, all_ranks: bool = False) -> Report:
        """End the window and report it. What is called until :meth:`reset` does not count.

        If something else writes running statistics in between, this is noticed when the next window begins.

        Args:
            all_ranks: Whether to report on all ranks of the default process group of ``torch.distributed`` together:
                the population is that of all their data, running statistics, verdicts and numbers of calls are those
                of rank 0. Every rank has to call this, and gets the same report, also one whose layers were never
                called. It takes two collectives: a gather to rank 0 of 56 bytes a channel from each rank, and a
                broadcast of 80; with ``mask`` another gather, of 48, and the broadcast is of 96; if any rank was told
                of groups of batches, a gather of 288 and a broadcast of 224 more. One that a rank never joins ends
                with the timeout of the process group. Without a process group, and for a window that has ended, it is
                as if False.

        Raises:
            RuntimeError: If another rank has failed.
        """
        if not self._recorder.is_closed:
            self._closing = self._recorder.end_window(all_ranks and collectives.num_ranks() > 1)
        return self.report()

    @torch.inference_mode(False)
    def reset(self) -> None:
        """End the window, if that has not been done, and begin another.

        What this one has shown decides how the next one looks. If the absolute mean exceeded 100 times sqrt(var + eps)
        in any channel of a layer (10 times if its inputs had one position a sample or were in channels-last format),
        its moments are taken by a pass. If its buffers were updated u times a call (activation checkpointing), its
        momentum is taken to be that of u updates.
        """
        self.close()
        self._recorder.begin_window()
        self._closing = self._validated = self._before_averaged = None

    @torch.inference_mode(False)
    def before_averaged(self) -> None:
        """Tell that averaged weights are about to be put into the model, for the validation that follows.

        :meth:`validation_report` then tells what comes in it of layers of their own, ``"<name> (averaged)"``.
        """
        self._before_averaged = self._of_window()

    def start_validation(self, loader: int = 0) -> None:
        """Look at what is called in eval mode from now on, by a pass over each input.

        Calls are pooled as they come: until :meth:`validation_report`, this takes 64 bytes a channel and loader.
        Calls within :meth:`paused` are not looked at. The running statistics are taken as they are with the first call
        (16 bytes a channel). Whether they, and weight and bias of a layer, are those that training has left is known if
        the window has ended: call :meth:`close` before weights are swapped.

        Args:
            loader: The validation loader whose batches follow, counted from 0. What was seen of it before is dropped,
                and what was seen of others is kept.
        """
        self.stop_validation()
        self._recorder.start_validation(loader, self._before_averaged is not None)

    def stop_validation(self) -> None:
        """Look at no more of it, until :meth:`go_on_with_validation`. Harmless when repeated."""
        self._recorder.drain()
        self._recorder.gate.validating = False

    def go_on_with_validation(self) -> None:
        """Look at what is called in eval mode again, as batches of the last loader that was started."""
        self._recorder.go_on_with_validation()

    def has_other_weights(self) -> bool:
        """Whether layers have other weights than the window has ended with, as averaged ones, without a repair since.

        A report tells nothing of them. False while the window is open.
        """
        return self._recorder.has_other_weights()

    @torch.inference_mode(False)
    def validation_report(self, all_ranks: bool = False, num_loaders: int | None = None) -> Report:
        """:meth:`report`, and how far off is what was looked at since :meth:`start_validation`.

        From the running statistics as they were then (``val_error``: on several ranks rank 0's), and from training.

        If the window has ended, it is the report from then on.

        Args:
            all_ranks: Whether all ranks call this, and tell of what they have seen together: a gather to rank 0 of 56
                bytes a channel and loader, and a broadcast of 32. Of an open window, rank 0's part is compared.
            num_loaders: How many validation loaders there are. All ranks have to tell of as many: give it where one may
                have seen no batch of one of them. None: as many as were seen.
        """
        self.stop_validation()
        layers, together = self._recorder.layers, all_ranks and collectives.num_ranks() > 1
        seen = max((loader + 1 for layer in layers for loader in layer.validation), default=0)
        before, self._before_averaged = self._before_averaged, None
        report = self._of_window() if before is None else before
        report = with_validation(report, layers, together, num_loaders or max(seen, 1), before is not None)
        if self._recorder.is_closed:
            self._validated = report
        for layer in layers:
            layer.end_validation()
        return report

    @torch.inference_mode(False)
    def report(self) -> Report:
        """Where the running statistics stand against what the layers have received in this window, on this rank.

        After :meth:`close`, where they stood then.
        """
        return self._validated or self._of_window()

    def _of_window(self) -> Report:
        if self._closing is not None:
            return self._closing
        self.put_back()
        self.flush()
        recorder = self._recorder
        if not recorder.is_closed:
            recorder.look_at_weights()
        report, _ = assess(recorder.layers, recorder.windows, ended=recorder.is_closed)
        self._closing = report if recorder.is_closed else None
        return report

    def state_dict(self) -> dict[str, Any]:
        """The window so far, as one CPU tensor and primitives: for a checkpoint in mid-window.

        Of several ranks it is this one's: no rank waits for another.
        """
        return dict(self._pending) if self._pending is not None else self._recorder.state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a saved window in the place of the present one; before :meth:`attach`, as soon as that is called.

        A layer of the model that the state does not know begins with an empty window. What is saved of layers that the
        model does not have, or with another width, is left out. A warning names them all. What another rank had seen
        is left out, too: on this one the window begins anew.

        Raises:
            ValueError: If the state is not one that :meth:`state_dict` of this version returned.
        """
        if state_dict.get("version") != STATE_VERSION:
            raise ValueError(
                f"`state_dict` must be what BatchNormTracker.state_dict() returned, of version {STATE_VERSION}; "
                f"got version {state_dict.get('version')!r}."
            )
        if self._attachment is not None:
            self._restore(state_dict)
        else:
            self._pending = state_dict

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._pending = self._closing = self._validated = None
        if differences := self._recorder.restore(state):
            warnings.warn(
                f"BatchNorm layers have changed since the state was saved; {'; '.join(differences)}.", stacklevel=3
            )
