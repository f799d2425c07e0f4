"""How a model is run on batches as in training, without a Trainer that trains."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import Any

import torch
from torch import nn

from lightning_bnmonitor.commands.messages import CommandError, told
from lightning_bnmonitor.repair.passes import Forward, forward_of, generators_as_before, on_device_of, training_only

_BEFORE, _MOVE, _AFTER = "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"


class Runner:
    """Prepares batches by the hooks of a LightningModule or data module, and runs the model on them.

    A Trainer is attached that trains nothing: hooks may ask it what stage it is in, and what is logged goes nowhere.

    Args:
        model: The model, on its device.
        data: The data module, if there is one.
        trainer: The Trainer that is attached to both; None if the model is no LightningModule.
        forward: How to run the model: ``"training_step"``, ``"model"``, or a function of the model and a batch.
    """

    def __init__(self, model: nn.Module, data: object, trainer: Any, forward: str | Forward) -> None:
        self.model = model
        self.forward = forward
        self.steps_alike = False
        """Whether validation data go through ``training_step``, too, so that its losses can be compared."""
        self._trainer = trainer
        self._hooks = (
            {
                name: getattr(data if data is not None and overrides(data, name) else model, name)
                for name in (_BEFORE, _MOVE, _AFTER)
            }
            if trainer
            else {}
        )
        self._is_validating = False
        self._index = self._loader_index = 0

    def prepared(self, batch: Any, index: int, loader_index: int, is_validating: bool) -> Any:
        """A batch on the model's device, as the hooks make it; the next to be run."""
        self._is_validating, self._index, self._loader_index = is_validating, index, loader_index
        if self._trainer is not None:
            setattr(self._trainer, "validating" if is_validating else "training", True)
            device = self.model.device
            batch = self._hooks[_BEFORE](batch, loader_index)
            batch = self._hooks[_MOVE](batch, device, loader_index)
            batch = self._hooks[_AFTER](batch, loader_index)
        return on_device_of(self.model, batch)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on the batch that was prepared last."""
        if callable(self.forward):
            return self.forward(model, batch)
        if self.forward == "model":
            return forward_of(model, batch)
        is_validation_step = self._is_validating and not self.steps_alike and overrides(model, "validation_step")
        step = getattr(model, "validation_step" if is_validation_step else "training_step")
        given = (batch, self._index, self._loader_index)
        return step(*given[: _num_positional(step)])


class Batches:
    """Batches of one or several loaders, prepared, the same each time.

    Args:
        loaders: The loaders, one after another.
        runner: What prepares them.
        is_validating: Whether they are validation data.
        num_batches: At most so many; None for all.
        label: What a progress bar calls them; None for no bar.
    """

    def __init__(
        self,
        loaders: list[Iterable[Any]],
        runner: Runner,
        is_validating: bool = False,
        num_batches: int | None = None,
        label: str | None = None,
    ) -> None:
        self._loaders = loaders
        self._runner = runner
        self._is_validating = is_validating
        self._num_batches = num_batches
        self._label = label
        self.num_given = 0
        """Batches that it gave when it was iterated last."""

    def __length_hint__(self) -> int:
        lengths = [length_hint(loader) for loader in self._loaders]
        known = sum(lengths) if all(lengths) else self._num_batches or 0
        return known if self._num_batches is None else min(known, self._num_batches)

    def __iter__(self) -> Iterator[Any]:
        from tqdm.auto import tqdm

        places = itertools.islice(self._places(), self._num_batches)
        total = length_hint(self) or None
        self.num_given = 0
        with tqdm(places, self._label, total, leave=False, disable=True if self._label is None else None) as bar:
            for loader_index, index, batch in bar:
                self.num_given += 1
                yield self._runner.prepared(batch, index, loader_index, self._is_validating)

    def _places(self) -> Iterator[tuple[int, int, Any]]:
        for loader_index, loader in enumerate(self._loaders):
            with generators_as_before(loader):
                for index, batch in enumerate(loader):
                    yield loader_index, index, batch


def settle(runner: Runner, batches: Batches) -> str | None:
    """Find out by one batch how the model can be run, where that was not said.

    Returns:
        Why ``training_step`` is not what is run, in a sentence; None if it is.

    Raises:
        CommandError: If the model cannot be run, or there is no batch.
    """
    model = runner.model
    has_step = overrides(model, "training_step") and getattr(model, "automatic_optimization", True)
    runner.forward = "training_step" if has_step else "model"
    first = one_of(batches)
    failed = _failure(runner, first)
    if failed is None:
        return None
    if has_step:
        runner.forward = "model"
        if _failure(runner, first) is None:
            return (
                f"`training_step` cannot be run by itself ({told(failed)}): the model is called with the first of each "
                "batch. If that is not how it is trained, give --forward."
            )
    raise CommandError(
        f"{type(model).__name__} cannot take a batch of the training data, a {type(first).__name__}: {told(failed)}. "
        "Are they its data? Give --forward module:function, a function of the model and a batch that runs it."
    ) from failed


def one_of(batches: Iterable[Any]) -> Any:
    """The first batch.

    Raises:
        CommandError: If there is none.
    """
    try:
        for batch in batches:
            return batch
    except Exception as error:
        raise CommandError(f"The training data give no batch: {told(error)}.") from error
    raise CommandError("The training data give no batch: they are empty.")


@torch.no_grad()
def _failure(runner: Runner, batch: Any) -> Exception | None:
    """Why the model cannot be run on a batch, in eval mode: what it raises, or that it changes its own weights."""
    weights = list(runner.model.parameters())
    before = [each.clone() for each in weights]
    failed: Exception | None = None
    with training_only(runner.model, ()):
        try:
            runner(runner.model, batch)
        except Exception as error:
            failed = error
    for now, then in zip(weights, before, strict=True):
        if not torch.allclose(now, then, rtol=0, atol=0, equal_nan=True):
            now.copy_(then)
            failed = failed or RuntimeError("it changes weights")
    return failed


def _num_positional(function: Callable[..., Any]) -> int:
    """How many arguments a step takes by position, at least the batch: whatever their names, as in a Trainer."""
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    named = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    return max(named, 2 if inspect.Parameter.VAR_POSITIONAL in kinds else 1)


def overrides(instance: object, name: str) -> bool:
    """Whether an object has a hook that is not Lightning's."""
    if name in getattr(instance, "__dict__", {}):
        return True
    definer = next((base for base in type(instance).__mro__ if name in vars(base)), object)
    return definer is not object and definer.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
