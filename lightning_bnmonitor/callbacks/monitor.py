"""The monitor as a Lightning callback: when windows and validations begin and end."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from typing_extensions import override

from lightning_bnmonitor.arguments import (
    as_patterns,
    check_bool,
    check_callable_or_none,
    check_choice,
    check_not_negative,
)
from lightning_bnmonitor.callbacks.batch_group import BatchGroup, GroupFunction
from lightning_bnmonitor.callbacks.lightning_package import Callback, LightningModule, Trainer
from lightning_bnmonitor.callbacks.output import Output, without_weights_left
from lightning_bnmonitor.callbacks.schedule import WindowSchedule, is_of_sample, is_training_over, num_evaluated
from lightning_bnmonitor.callbacks.unhealthy import OnUnhealthy
from lightning_bnmonitor.capture.batch_moments import CaptureMode
from lightning_bnmonitor.compat import swapping_callbacks
from lightning_bnmonitor.report.history import History
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.tracker import BatchNormTracker


class BatchNormMonitor(Callback):
    r"""Monitors how far the running statistics of every BatchNorm layer are from the exact statistics of its inputs.

    A window is one epoch unless told otherwise. It ends after its last training batch, before validation; what
    validation, the sanity check, testing and prediction compute does not count. Training with the monitor is
    bit-identical to training without it. At the end of ``fit`` the report of the last window is printed.

    Args:
        every_n_epochs: Epochs in a window. Neither this nor ``every_n_train_batches`` means one.
        every_n_train_batches: Training batches in a window, instead of epochs.
        include: ``fnmatch`` patterns of the names of layers to monitor; None for all.
        exclude: ``fnmatch`` patterns of the names of layers to leave out.
        capture: ``"auto"``, or ``"pass"`` to make a pass over every input: see
            :class:`~lightning_bnmonitor.BatchNormTracker`.
        per_layer: Whether to log scalars for each layer; ``"auto"``: up to 100 layers.
        dashboard: Whether to log more than scalars to loggers that take it, on rank 0: TensorBoard's tab "BatchNorm",
            the image ``bn/heatmap`` (layers by windows; each of these in at most 1 % of the time), the text
            ``bn/report``, TensorBoard's layout of charts; at the end of ``fit`` the page as a file, to W&B, MLflow and
            Comet. The layout replaces one that was set before the first window has ended; one that is set later stands.
        validation_batches: Batches of each validation loader, spread evenly over it, in each validation, on each rank,
            that are compared with training, by a pass over the inputs of each layer; 0 for none.
        log_key_prefix: What the logged names begin with, not empty.
        on_unhealthy: What to do at a window's end, after a validation that follows it, and after ``validate`` or
            ``test`` alone, if layers need attention: ``"warn"`` of each layer and cause once, ``"ignore"``, or
            ``"raise"`` :class:`UnhealthyBatchNormError` with the report on every rank.
        group: ``group(batch, batch_idx)`` names what a whole training batch is of, such as its source, domain or
            augmentation (a string or a number; None: nothing). Reports then tell how far each group is from all, of 8
            groups a window, and of all others as one. If it fails, that is warned of, and training goes on without.
        mask: Where inputs are padded: a function of the training batch that returns which positions count, a bool
            tensor ``(B, T)``, say. See :class:`~lightning_bnmonitor.BatchNormTracker`.
        guard: Whether running statistics are put back as they were before a call whose batch has NaN or Inf, which is
            counted and warned of (flag ``guarded``): see :class:`~lightning_bnmonitor.BatchNormTracker`. This changes
            what is trained, and nothing as long as all is finite.

    **On several ranks** a report tells of all of them together, and is the same on each: see
    :meth:`BatchNormTracker.close() <lightning_bnmonitor.BatchNormTracker.close>`. That takes two collectives a window
    (four with ``group``), and two a validation, which every rank joins, also one that had no batches. With
    ``every_n_train_batches`` all ranks need as many batches.

    **Averaged weights**, which ``WeightAveraging`` and ``EMAWeightAveraging`` put into the model while it is validated,
    have layers of their own in the report, ``"<name> (averaged)"``: what their running statistics are off there. Those
    that are trained then have no ``val_error``.

    **Resumed** from a checkpoint, it goes on as if nothing had happened: its state is in Lightning's checkpoints. On
    several ranks that is rank 0's: what the others saw earlier in the window is not in its report.

    **Logged Metrics**, once a window, to every logger of the Trainer, at the step of Lightning's own epoch-end values.
    The first six are also in ``trainer.callback_metrics`` (for ``ModelCheckpoint`` and ``EarlyStopping``) from the end
    of the first window on. A layer's value is the RMS over its channels (``log_var_ratio``: the mean absolute value).

    - ``bn/eval_error_max``, ``bn/eval_error_p90``, ``bn/eval_error_median``: over the layers, the RMS error of the
      normalised activation that ``eval()`` makes, in its own standard deviations. 0.1 is worth a warning, 0.25 an
      alert.
    - ``bn/act_rmse_max``: the largest RMS error of the normalised activation against the whole window.
    - ``bn/mean_shift_max``: the largest distance of the running mean, in population standard deviations.
    - ``bn/val_error_max``: the largest RMS error of the normalised activation that the running statistics, as they were
      when validation began, made on what a layer received there, whatever the reason. Logged when validation ends.
    - ``bn/call_shift_max``: how far the calls of a layer within a training step are apart at most, where there are
      several (real and fake, left and right), in the same unit.
    - ``bn/group_shift_max``: how far the batches of a group are from all at most, with ``group``: the RMS error of the
      normalised activation that the statistics of all batches make on them.
    - ``bn/val_shift_max``: the largest distance of what a layer receives in validation from what it receives in
      training: the RMS error of the normalised activation that the present statistics of training make there. Logged
      when validation ends.
    - ``bn/unhealthy_layers``: the number of layers that need attention (see ``LayerReport.verdict``). Logged again if
      the validation after the window has changed it.
    - ``bn.eval_error/<layer>``, ``bn.act_rmse/<layer>``, ``bn.mean_shift/<layer>``: the same for each layer.
    - ``bn.val_error/<layer>``, ``bn.val_shift/<layer>``: the same for each layer, after validation;
      ``bn.val_error_averaged/<layer>``, ``bn.val_shift_averaged/<layer>`` if that had averaged weights.
    - ``bn.group_shift/<layer>``: the same for each layer, with ``group``.
    - ``bn.log_var_ratio/<layer>``: log of the running variance over the population variance.

    Layers that were not called in a window or have no running statistics enter no metric.

    Raises:
        ValueError: If an ``every_n_*`` is not a positive integer or both are given, if ``capture``, ``per_layer``,
            ``dashboard``, ``guard`` or ``on_unhealthy`` is unknown, or ``log_key_prefix`` empty; when ``fit`` starts,
            if a pattern matches no BatchNorm layer, or with DeepSpeed.
        TypeError: If ``include`` or ``exclude`` is neither None nor strings, or ``group`` or ``mask`` neither None nor
            a function.
        UnhealthyBatchNormError: At the end of a window, of a validation that follows it, or of ``validate`` and
            ``test`` alone, with ``on_unhealthy="raise"``, if a layer needs attention.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_bnmonitor import BatchNormMonitor
        >>> trainer = Trainer(callbacks=[BatchNormMonitor()])
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_train_batches: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        capture: CaptureMode = "auto",
        per_layer: bool | str = "auto",
        dashboard: bool = True,
        validation_batches: int = 16,
        log_key_prefix: str = "bn",
        on_unhealthy: OnUnhealthy = "warn",
        group: GroupFunction | None = None,
        mask: Callable[[Any], Any] | None = None,
        guard: bool = False,
    ) -> None:
        check_choice("capture", capture, get_args(CaptureMode))
        check_not_negative("validation_batches", validation_batches)
        check_callable_or_none("mask", mask)
        check_bool("guard", guard)
        self._schedule = WindowSchedule(every_n_epochs, every_n_train_batches)
        self._include = as_patterns("include", include)
        self._exclude = as_patterns("exclude", exclude)
        self._capture = capture
        self._mask = mask
        self._guard = guard
        self._validation_batches = validation_batches
        self._log_key_prefix = log_key_prefix
        self._group = BatchGroup(group)
        self._output = Output(log_key_prefix, per_layer, dashboard, on_unhealthy)
        self._tracker: BatchNormTracker | None = None
        self._report: Report | None = None
        self._has_validated = False  # whether there was a batch in the present validation
        self._state: dict[str, Any] = {}  # while there is no tracker: what `fit` ended with, or is to begin with

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            every_n_epochs=self._schedule.every_n_epochs,
            every_n_train_batches=self._schedule.every_n_train_batches,
            include=self._include,
            exclude=self._exclude,
            log_key_prefix=self._log_key_prefix,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._tracker is None:
            return self._state
        parts = {**self._schedule.state_dict(), **self._output.state_dict()}
        return {**parts, "tracker": self._tracker.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._tracker is not None and self._tracker.is_attached:  # some strategies load late
            self._resume(state_dict)
        else:
            self._state = state_dict

    def report(self) -> Report:
        """The report of the last finished window; before the first has ended, of the window so far, if any."""
        if self._report is not None:
            return self._report
        return self._tracker.report() if self._tracker is not None else Report([])

    @property
    def history(self) -> History:
        """All windows of this ``fit``, or of the last one: ``monitor.history.to_html("batchnorm.html")``."""
        return self._output.history

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise ValueError(
                "BatchNormMonitor does not support DeepSpeed: nobody has shown yet that it counts right there. Use "
                'another strategy ("ddp", "fsdp"), or leave the monitor out.'
            )
        if stage == "fit":  # what was loaded before, for a test say, is not what this begins with
            self._state = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()  # a fit that was interrupted may not have
        self._tracker = self._report = None
        self._schedule.begin()
        self._output.begin(trainer, validates=self._validation_batches > 0 and bool(trainer.enable_validation))
        tracker = BatchNormTracker(pl_module, self._include, self._exclude, self._capture, self._mask, self._guard)
        self._tracker = tracker.attach()
        if collectives.num_ranks() > 1:
            collectives.group()  # made now, while no rank is ahead of others
        state, self._state = self._state, {}
        self._resume(state)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # As they were: an EarlyStopping that finds no value in the first validation would raise.
        self._output.publish(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._schedule.epoch_begins()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not earlier: at an epoch's start other callbacks may still write the buffers (SWA), or call the model.
        assert self._tracker is not None
        if self._schedule.is_due:
            self._tracker.reset()
            self._schedule.window_begins()
        self._tracker.see_inputs(batch, self._group.name_of(batch, batch_idx))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._tracker is not None
        self._tracker.put_back()  # before callbacks average them, also if this step is skipped (AMP)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._tracker is not None
        self._tracker.step()
        if self._schedule.ends_with_batch(trainer):
            self._end_window(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _is_alone(trainer):
            self._begin_alone(pl_module)
            return
        # A window that the end of training cuts short ends here, before what follows its last batch.
        if is_training_over(trainer, epoch_ended=trainer.is_last_batch):
            self._end_window(trainer)
        self._has_validated = False
        if self._tracker is not None and self._compares(trainer) and swapping_callbacks(trainer):
            self._tracker.before_averaged()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._tracker is None or not self._compares(trainer):
            return
        if batch_idx == 0:
            self._tracker.start_validation(dataloader_idx)
            self._has_validated = True
        elif is_of_sample(batch_idx, num_evaluated(trainer)[dataloader_idx], self._validation_batches):
            self._tracker.go_on_with_validation()
        else:
            self._tracker.stop_validation()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        all_ranks = trainer.world_size > 1
        if self._tracker is None or not self._compares(trainer) or not (self._has_validated or all_ranks):
            return
        report = self._tracker.validation_report(all_ranks, num_loaders=len(num_evaluated(trainer)))
        if _is_alone(trainer):
            if report:
                self._print(trainer, report, "what was evaluated")
                self._output.react(trainer, report)
            return
        if self._schedule.is_due:  # and mid-window, `report()` goes on to be that of the last one
            self._report = report
        self._output.show_validation(trainer, report, is_of_window=self._schedule.is_due)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_alone(pl_module)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_epoch_end(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._schedule.ends_with_epoch(trainer):
            self._end_window(trainer, batches_over=1)
        self._output.no_validation_follows(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._schedule.training_ends()
        self._end_window(trainer, batches_over=1)
        self._output.finish(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tracker is not None and self._tracker.has_other_weights():
            self._report = without_weights_left(self.report())
        self._print(trainer, self.report(), "running statistics in the last window")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()
        if _is_alone(trainer):  # what a fit has shown stays
            self._tracker = None
        self._output.finish(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()
        if stage != "fit":  # what was looked at was printed; what a fit has shown stays
            self._tracker = None
            return
        self._report = self.report()
        self._state = self.state_dict()
        self._tracker = None
        self._output.end()

    def __getstate__(self) -> dict[str, Any]:
        # A copy monitors nothing: it has the configuration and the last report.
        output = copy.copy(self._output)
        output.end()
        output.history = copy.deepcopy(self.history)
        own = {"_schedule": copy.copy(self._schedule), "_output": output, "_tracker": None, "_state": {}}
        return self.__dict__ | own

    def _compares(self, trainer: Trainer) -> bool:
        """Whether this validation is looked at."""
        return self._validation_batches > 0 and not trainer.sanity_checking

    def _begin_alone(self, pl_module: LightningModule) -> None:
        """A ``validate`` or ``test`` begins, without a ``fit``."""
        if self._validation_batches:
            self._detach()
            tracker = BatchNormTracker(pl_module, self._include, self._exclude, self._capture)
            self._tracker, self._has_validated = tracker.attach(), False

    @staticmethod
    def _print(trainer: Trainer, report: Report, of: str) -> None:
        if trainer.is_global_zero:
            print(f"\nBatchNorm: {of}\n\n{report.brief()}")

    def _end_window(self, trainer: Trainer, batches_over: int = 0) -> None:
        """Close the window, if it has any batch, and log it at the step of its last: so many batches ago."""
        several_ranks = trainer.world_size > 1
        is_any, is_elsewhere = self._schedule.close(several_ranks)
        if self._tracker is None or not is_any:
            return
        if self._schedule.is_due:  # on this rank it has not begun
            self._tracker.reset()
        self._schedule.is_due = True
        report = self._tracker.close(all_ranks=several_ranks)
        if is_elsewhere and not any(layer.num_samples for layer in report.values()):
            return  # there were no batches on any rank
        self._report = report
        self._output.show_window(trainer, report, batches_over)

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Go on with the window of a checkpoint, if one was loaded."""
        if not state:
            return
        assert self._tracker is not None
        try:
            self._tracker.load_state_dict(state["tracker"])
        except ValueError as error:  # of another version: no reason not to train
            warnings.warn(f"The BatchNorm statistics in the checkpoint are left out: {error}", stacklevel=2)
            return
        self._schedule.load_state_dict(state)
        self._output.load_state_dict(state)

    def _detach(self) -> None:
        if self._tracker is not None:
            self._tracker.detach()


def _is_alone(trainer: Trainer) -> bool:
    """Whether ``validate`` or ``test`` was called."""
    return trainer.state.fn in ("validate", "test")
