"""The repair as a Lightning callback: exact running statistics before each validation, and at the end of training."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_bnmonitor.arguments import check_bool, check_positive_or_auto, check_positive_or_none
from lightning_bnmonitor.callbacks.lightning_package import Callback, LightningModule, Trainer
from lightning_bnmonitor.callbacks.schedule import is_training_over
from lightning_bnmonitor.compat import BatchNorm, averaging_callbacks, prepared_batch, swapping_callbacks
from lightning_bnmonitor.repair.fixed_weights import NumBatches
from lightning_bnmonitor.repair.passes import Forward, forward_of
from lightning_bnmonitor.repair.recalibration import Recalibration, recalibrate_layers
from lightning_bnmonitor.repair.selection import select, warn_of_misfits
from lightning_bnmonitor.tracking.buffers import copied_stats, write_stats
from lightning_bnmonitor.tracking.discovery import find_layers


class PreciseBatchNorm(Callback):
    """Replaces running statistics by exact ones before every validation and at the end of ``fit``.

    So what is validated, and what is saved after validation and after training, has the statistics of the weights it
    has: see :func:`~lightning_bnmonitor.recalibrate`, which this calls. The idea is that of Wu and Johnson, "Rethinking
    'Batch' in BatchNorm" (2021). It goes with ``ModelCheckpoint``.

    **Averaged weights** are what it repairs where a callback puts them into the model before validation
    (``WeightAveraging``, ``EMAWeightAveraging``): these are validated and saved, and the running statistics of those
    that are trained stay their own. With ``StochasticWeightAveraging``, which puts them there when training ends, it
    repairs the weights that are trained before validation, and the averaged ones at the end of ``fit``. A warning says
    which when training starts.

    It acts when the first batch of a validation comes, after all other callbacks but checkpoints, wherever it stands in
    the list: after :class:`~lightning_bnmonitor.BatchNormMonitor` has ended its window, and after averaged weights are
    in place, whichever hook has put them there. (Those that ``validation_step`` itself puts in place come too late.) A
    monitor does not count its forward passes, and knows where the running statistics come from.

    Args:
        num_batches: Batches that the statistics are taken from, on each rank; fewer if there are fewer. ``"auto"``: as
            many as it takes until chance makes an error of at most 0.01 in every layer (see
            :func:`~lightning_bnmonitor.examine`), each time anew.
        every_n_epochs: Only in every n-th epoch, counted as ``ModelCheckpoint`` does, and at the end of ``fit``. None:
            before every validation.
        dataloader: Where batches come from: anything that can be iterated again and again. None: a fresh loader over
            the training data set, with a copy of the training loader's sampler, no workers, and random states as before
            afterwards. (A data set that draws from a generator of its own is a case for an explicit loader.)
        restore: Whether training goes on with its own running statistics, as if nothing had happened: they come back
            before the next training batch, also after a resume from a checkpoint that has the exact ones. Training is
            then bit-identical to training without this callback. False: it goes on from the exact ones. Running
            statistics that something else has written since (averaged weights that are swapped back) stay as they are.
        forward: How to run the model on a batch, a function of the two; by default as of
            :func:`~lightning_bnmonitor.recalibrate`: not ``training_step``, which may log or step.
        frozen: Whether to repair layers, too, that are frozen (in eval mode in the last training batch) or stale (they
            update no running statistics). What follows a frozen layer then goes on training with what is written,
            unless ``restore`` is True.

    Without a validation loop, the checkpoint of the last epoch has the exact statistics if it is known to be the last
    by then, and not if an ``EarlyStopping`` decides that at the epoch's end, nor those of averaged weights that
    ``WeightAveraging`` puts in place later; the model that ``fit`` leaves always does.

    Layers that are left alone, as they are frozen or stale, are looked at in the same pass, until a warning has named
    those that are off by more than 0.1 (if there are no others, once). One batch is tried when training starts, so that
    what cannot work fails then.

    Raises:
        ValueError: If ``num_batches`` is neither a positive integer nor ``"auto"``, ``every_n_epochs`` is not a
            positive integer, ``restore`` or ``frozen`` no bool, ``dataloader`` can be iterated only once; when training
            starts, if the default loader cannot be made: the training data are an iterable data set, several loaders,
            or no ``DataLoader``.
        RuntimeError: When training starts, if the model cannot take a batch.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_bnmonitor import PreciseBatchNorm
        >>> trainer = Trainer(callbacks=[PreciseBatchNorm(num_batches=100)])
    """

    def __init__(
        self,
        num_batches: int | Literal["auto"] = 200,
        every_n_epochs: int | None = None,
        dataloader: Iterable[Any] | None = None,
        restore: bool = False,
        forward: Forward | None = None,
        frozen: bool = False,
    ) -> None:
        check_positive_or_auto("num_batches", num_batches)
        check_positive_or_none("every_n_epochs", every_n_epochs)
        check_bool("restore", restore)
        check_bool("frozen", frozen)
        if isinstance(dataloader, Iterator):
            raise ValueError(
                f"`dataloader` must be something that can be iterated again and again, got {dataloader!r}."
            )
        self._num_batches = num_batches
        self._every_n_epochs = every_n_epochs or 1
        self._dataloader = dataloader
        self._forward = forward or forward_of
        self._is_restoring = restore
        self._includes_frozen = frozen
        self._recalibration: Recalibration | None = None
        self._layers: list[BatchNorm] = []
        self._frozen: set[BatchNorm] = set()  # as of the last training batch
        self._has_trained = False  # since the last recalibration
        self._has_looked = self._has_warned = False  # in this fit, at layers that are left alone
        # Of each layer the running statistics of training, and those in their place, `(2, C)`.
        self._training: dict[str, Tensor] = {}
        self._exact: dict[str, Tensor] = {}

    @property
    def recalibration(self) -> Recalibration | None:
        """What was done last; None before."""
        return self._recalibration

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {"training": dict(self._training), "exact": dict(self._exact)}
        return kept if self._training else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training, self._exact = dict(state_dict.get("training", {})), dict(state_dict.get("exact", {}))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._has_trained = False  # a fit that was interrupted may have
        checkpoints = list(trainer.checkpoint_callbacks)
        others = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if callback is not self and callback not in checkpoints and getattr(callback, "owner", None) is not self
        ]
        first = [_Restorer(self)] if self._is_restoring else []
        trainer.callbacks = [*first, *others, self, *checkpoints]  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = list(find_layers(pl_module, None, None).values())
        self._has_trained = self._has_looked = self._has_warned = False
        self._frozen = {layer for layer in self._layers if not layer.training}
        if self._layers:
            _warn_of_averages(trainer)
            self._recalibrate(trainer, pl_module, num_batches=1).restore()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._has_trained = True
        self._frozen = {layer for layer in self._layers if not layer.training}

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # The earliest hook that comes after all others in which a validation begins: callbacks and the module itself
        # may put other weights in place there.
        self._before_validation(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation(trainer, pl_module)  # with other ranks, on one that has had no batch

    def _before_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and self._has_trained and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._repair(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_trained and is_training_over(trainer, epoch_ended=True):
            self._repair(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Whatever was done before: averaged weights have just been put in place, perhaps.
        self._repair(trainer, pl_module)

    def put_back(self, pl_module: LightningModule) -> None:
        """Give layers the running statistics of training back, unless something else has overwritten the exact ones."""
        layers = find_layers(pl_module, None, None) if self._training else {}
        for name, training in self._training.items():
            layer = layers.get(name)
            if (
                layer is not None
                and (stats := copied_stats(layer)) is not None
                and torch.equal(stats, self._exact[name])
            ):
                write_stats(layer, training)
        self._training, self._exact = {}, {}

    def _repair(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = find_layers(pl_module, None, None) if self._layers else {}
        before = {name: stats for name, layer in layers.items() if (stats := copied_stats(layer)) is not None}
        self._recalibration = done = self._recalibrate(trainer, pl_module, self._num_batches)
        self._has_trained = False
        self._has_looked = True
        if done.misfits:
            self._has_warned = True
            if trainer.is_global_zero:
                call = "PreciseBatchNorm(frozen=True)"
                warn_of_misfits("PreciseBatchNorm", done.misfits, done.left_alone, call)
        if not self._is_restoring:
            self._recalibration.tell_trackers()
            return
        self._recalibration.tell_trackers_of_loan()
        for name in self._recalibration.after:
            if name not in self._recalibration.left_alone:
                if name not in self._training or not torch.equal(before[name], self._exact[name]):
                    self._training[name] = before[name]
                exact = copied_stats(layers[name])
                assert exact is not None
                self._exact[name] = exact

    def _recalibrate(
        self, trainer: Trainer, pl_module: LightningModule, num_batches: int | Literal["auto"]
    ) -> Recalibration:
        found = find_layers(pl_module, None, None) if self._layers else {}
        selection = select(found, self._frozen, self._includes_frozen)
        if self._has_warned or (self._has_looked and not selection.layers):
            selection = selection._replace(aside={})

        def forward(model: nn.Module, batch: Any) -> Any:
            with _training_stage(trainer):  # hooks that make batches may ask
                batch = prepared_batch(pl_module, trainer.precision_plugin.convert_input(batch))
                batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                return self._forward(model, batch)

        if trainer.overfit_batches or trainer.fast_dev_run:  # type: ignore[attr-defined]
            most = int(trainer.num_training_batches)
            num_batches = most if num_batches == "auto" else min(num_batches, most)
        batches = self._loader(trainer) if found else ()
        if num_batches != "auto":
            batches = _first(batches, num_batches)
        how_many: NumBatches = "auto" if num_batches == "auto" else None  # all of them
        return recalibrate_layers(pl_module, batches, forward, how_many, selection, all_ranks=trainer.world_size > 1)

    def _loader(self, trainer: Trainer) -> Iterable[Any]:
        """What batches are taken from: the loader that was given, or one like that of training."""
        if self._dataloader is not None:
            return self._dataloader
        training = trainer.train_dataloader
        explicit = "Give PreciseBatchNorm a `dataloader` of its own."
        if not isinstance(training, DataLoader):
            raise ValueError(
                f"The training data are a {type(training).__name__}, from which no loader can be made. {explicit}"
            )
        dataset = training.dataset
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"The training data are an iterable data set ({type(dataset).__name__}): to iterate it would take "
                f"batches from training. {explicit}"
            )
        how = training.batch_sampler if training.batch_sampler is not None else training.sampler
        try:  # a copy: so the one of training goes on as if nothing had happened
            how = copy.deepcopy(how, {id(dataset): dataset})
        except Exception as error:
            raise ValueError(f"The sampler of the training data cannot be copied ({error!r}). {explicit}") from error
        drawn: dict[str, Any] = (
            {"batch_sampler": how} if training.batch_sampler is not None else {"batch_size": None, "sampler": how}
        )
        generator = torch.Generator().manual_seed(trainer.current_epoch)
        return DataLoader(dataset, collate_fn=training.collate_fn, generator=generator, **drawn)


class _Restorer(Callback):
    """The first in the list of callbacks: all that follow it see the running statistics of training."""

    def __init__(self, owner: PreciseBatchNorm) -> None:
        self.owner = owner

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.owner.put_back(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.owner.put_back(pl_module)


def _warn_of_averages(trainer: Trainer) -> None:
    """Tell which weights are repaired, if some are averaged."""
    swapping, at_end = swapping_callbacks(trainer), averaging_callbacks(trainer)
    if not trainer.is_global_zero or not (swapping or at_end):
        return
    if swapping:
        which = (
            f"averaged weights of {type(swapping[0]).__name__}, which are validated and saved: before each validation "
            "and at the end of `fit`. The weights in training keep their own."
        )
    else:
        which = (
            "weights in training, before each validation, and of the averaged weights of "
            f"{type(at_end[0]).__name__} once, at the end of `fit`."
        )
    warnings.warn(f"BatchNorm gets exact running statistics of the {which}", stacklevel=4)


def _first(loader: Iterable[Any], num_batches: int) -> Iterator[Any]:
    """The first batches of a loader. Its iterator, which may draw random numbers, is made when the first is needed."""
    yield from itertools.islice(loader, num_batches)


@contextmanager
def _training_stage(trainer: Trainer) -> Iterator[None]:
    stage = trainer.state.stage
    trainer.training = True
    try:
        yield
    finally:
        trainer.state.stage = stage
