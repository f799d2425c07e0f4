"""What a Trainer would do before the first batch: hooks that make data and layers, and loaders."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_bnmonitor.commands.messages import CommandError, say, told
from lightning_bnmonitor.commands.running import overrides


def attached_trainer(model: Any, data: Any, device: torch.device) -> Any:
    """A Trainer that model and data module know, and that logs nothing; None for models that take none."""
    from lightning_bnmonitor.callbacks.lightning_package import Trainer

    if not hasattr(type(model), "transfer_batch_to_device"):
        return None
    where: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if device.type in ("cuda", "mps"):
        where = {"accelerator": device.type, "devices": [device.index or 0]}
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # what it has to say of itself
    try:
        trainer: Any = Trainer(barebones=True, **where)
    except Exception as error:
        raise CommandError(f"No Trainer can be made for --device {device}: {told(error)}.") from error
    finally:
        logging.disable(disabled)
    trainer.training = True
    model.trainer = trainer
    if hasattr(type(data), "transfer_batch_to_device"):
        data.trainer, trainer.datamodule = trainer, data
    return trainer


def set_up(model: nn.Module, data: Any) -> Any:
    """Call the hooks that make data and layers, in the order of a Trainer. Returns what has the loaders."""
    if hasattr(data, "train_dataloader"):
        for hook, given in (("prepare_data", ()), ("setup", ("fit",))):
            if (error := _error_of(data, hook, *given)) is not None:
                raise CommandError(f"`{hook}` of {type(data).__name__} has failed: {told(error)}.") from error
    for hook, given in (("setup", ("fit",)), ("configure_model", ())):
        if (error := _error_of(model, hook, *given)) is not None:
            say(f"`{hook}` of {type(model).__name__} has failed, and is left out: {told(error)}.")
    return model if data is None else data


def _error_of(owner: object, hook: str, *given: str) -> Exception | None:
    """What a hook has raised, if it is not Lightning's."""
    try:
        if overrides(owner, hook):
            getattr(owner, hook)(*given)
    except Exception as error:
        return error
    return None


def loaders_of(source: Any, hook: str, what: str) -> list[Iterable[Any]]:
    """What a data module, a model, or a function of the user's gives to iterate; nothing if it has none of the kind."""
    if not overrides(source, hook):
        if what == "validation":
            return []
        if not hasattr(source, hook) and not isinstance(source, nn.Module):
            if isinstance(source, Iterable):
                return [source]
            raise CommandError(
                f"--data has given a {type(source).__name__}: it must be a LightningDataModule, a DataLoader, or a "
                "function that returns one."
            )
        raise CommandError(
            f"{type(source).__name__} has no `train_dataloader`. Which data? Give --data package.module:DataModule, or "
            "a function that returns a DataLoader of training data."
        )
    try:
        loaders = getattr(source, hook)()
    except Exception as error:
        hint = " --no-validation leaves them out." if what == "validation" else ""
        raise CommandError(f"`{hook}` of {type(source).__name__} has failed: {told(error)}.{hint}") from error
    if type(loaders).__name__ == "CombinedLoader":
        return [_Combined(loaders)]
    if what == "validation":
        return _one_after_another(loaders)
    if isinstance(loaders, (list, tuple, dict)):
        from lightning_bnmonitor.callbacks.lightning_package import CombinedLoader

        return [_Combined(CombinedLoader(loaders, "max_size_cycle"))]
    if not isinstance(loaders, Iterable):
        raise CommandError(f"`{hook}` of {type(source).__name__} has given a {type(loaders).__name__}: no loader.")
    return [loaders]


class _Combined:
    """Batches of several loaders at a time, as a Trainer trains on them."""

    def __init__(self, loaders: Any) -> None:
        self._loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        for batch, *_ in self._loaders:
            yield batch


def _one_after_another(loaders: Any) -> list[Iterable[Any]]:
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return list(loaders)
    return [] if loaders is None else [loaders]
