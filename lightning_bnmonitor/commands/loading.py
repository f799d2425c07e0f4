"""A trained model with its data, as commands were told to find them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_bnmonitor.commands.checkpoint import Checkpoint, load_weights
from lightning_bnmonitor.commands.hosting import attached_trainer, loaders_of, set_up
from lightning_bnmonitor.commands.making import class_path, imported, made, read_config
from lightning_bnmonitor.commands.messages import CommandError, say, told
from lightning_bnmonitor.commands.running import Batches, Runner, overrides, settle
from lightning_bnmonitor.compat import BatchNorm


@dataclass
class Subject:
    """What a command looks at."""

    model: nn.Module
    """In the mode that it was made in, on its device, with the weights that are looked at."""
    checkpoint: Checkpoint | None
    runner: Runner
    training: list[Iterable[Any]]
    """Loaders."""
    validation: list[Iterable[Any]]
    """Loaders; none if there are no validation data, or they are not asked for."""
    missing: list[str]
    """Names of running statistics that the checkpoint lacks."""

    def say_which_weights(self) -> None:
        """Tell, where the checkpoint holds several, which are looked at."""
        several = [] if self.checkpoint is None else list(self.checkpoint.states)
        if len(several) > 1:
            say(f"Looked at are {several[0]}, not {several[1]}.")

    def batches(self, num_batches: int | None = None, label: str | None = None) -> Batches:
        """Training data, at most so many batches, with a progress bar if there is a label."""
        return Batches(self.training, self.runner, num_batches=num_batches, label=label)

    def evaluation(self, num_batches: int | None = None, label: str | None = None) -> Batches | None:
        """Validation data, likewise; None if there are none."""
        return Batches(self.validation, self.runner, True, num_batches, label) if self.validation else None


def load(arguments: argparse.Namespace) -> Subject:
    """Make the model and the data, load the weights, and find out how to run it.

    Args:
        arguments: As of :func:`~lightning_bnmonitor.commands.options.add_subject`.

    Raises:
        CommandError: If any of it cannot be done: what, and what to give instead.
    """
    checkpoint = None if arguments.ckpt_path is None else Checkpoint(arguments.ckpt_path, arguments.weights_only)
    forward = arguments.forward or ""
    if forward not in ("", "training_step", "model"):
        forward = imported("--forward", forward)
    device = _device(arguments.device)
    model, data = _made(arguments, checkpoint)
    trainer = attached_trainer(model, data, device)
    source = set_up(model, data)
    missing = _with_weights(model, checkpoint)
    if not any(isinstance(module, BatchNorm) for module in model.modules()):
        raise CommandError(f"There is no BatchNorm layer in {type(model).__name__}: nothing to look at.")
    try:
        model.to(device)
    except Exception as error:
        raise CommandError(f"The model cannot be moved to --device {device}: {told(error)}.") from error
    runner = Runner(model, data, trainer, forward)
    training = loaders_of(source, "train_dataloader", "training")
    validation = loaders_of(source, "val_dataloader", "validation") if getattr(arguments, "validation", False) else []
    subject = Subject(model, checkpoint, runner, training, validation, missing)
    if not forward and (reason := settle(runner, subject.batches(1))):
        say(reason)
    return subject


def _made(arguments: argparse.Namespace, checkpoint: Checkpoint | None) -> tuple[nn.Module, Any]:
    """The model, not yet with its weights, and the data, None if there are none of their own."""
    config = {} if arguments.config is None else read_config(arguments.config)
    makers = {what: _maker(what, getattr(arguments, what), config, arguments.config) for what in ("model", "data")}
    _seed(config.get("seed_everything"))
    found: dict[str, Any] = {}
    for what, maker in makers.items():
        kept = ({}, None) if checkpoint is None else checkpoint.hyper_parameters(what)
        found[what] = None if maker is None else made(f"--{what}", maker, config.get(what), *kept)
    if not isinstance(found["model"], nn.Module):
        raise CommandError(f"--model has given a {type(found['model']).__name__}: it must be a model, or make one.")
    return found["model"], found["data"]


def _maker(what: str, option: str | None, config: Mapping[str, Any], path: Path | None) -> Callable[..., Any] | None:
    """The class or function of the ``"model"`` or the ``"data"``; None if there is none of the data."""
    if option is not None:
        return imported(f"--{what}", option)
    section = config.get(what)
    if section is None:
        if what == "data":
            return None
        raise CommandError("Which model? Give --config config.yaml of LightningCLI, or --model package.module:Class.")
    named = class_path(section)
    if named is None:
        raise CommandError(
            f"{path} has the arguments of the {what}, but not its class, as the command was made for one: give "
            f"--{what} package.module:Class, too."
        )
    return imported(f"--{what}", named, f"`{what}` in {path},")


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise CommandError(f"--device must be cpu, cuda, cuda:1 or the like, got {name!r}.") from error


def _seed(seed: object) -> None:
    """As LightningCLI does before it makes anything: data may be divided by chance."""
    from lightning_bnmonitor.callbacks.lightning_package import seed_everything

    if isinstance(seed, int) and not isinstance(seed, bool):
        seed_everything(seed, workers=True, verbose=False)


def _with_weights(model: nn.Module, checkpoint: Checkpoint | None) -> list[str]:
    """Load the weights that the checkpoint is evaluated with. Returns what is missing of running statistics."""
    if checkpoint is None:
        return []
    content: dict[str, Any] = checkpoint.content
    weights = next(iter(checkpoint.states.values()))
    if overrides(model, "on_load_checkpoint"):
        content = copy.deepcopy(content)  # what it changes is not what is written
        try:
            model.on_load_checkpoint(content)  # type: ignore[operator]
        except Exception as error:
            raise CommandError(f"`on_load_checkpoint` of {type(model).__name__} has failed: {told(error)}.") from error
        weights = content["state_dict"]
    missing = load_weights(model, weights, checkpoint.path)
    layers = [name.removesuffix(".running_mean") for name in missing if name.endswith("running_mean")]
    if layers:
        several = f"{len(layers)} BatchNorm layer{'s' * (len(layers) > 1)}"
        say(
            f"{checkpoint.path} lacks the running statistics of {several}, as of {layers[0]}: eval() "
            "runs with the initial zeros and ones. `bnmonitor repair` adds them."
        )
    return missing
