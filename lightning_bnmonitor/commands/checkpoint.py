"""A checkpoint: read, loaded into its model, and written anew with other running statistics."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bnmonitor.commands.messages import CommandError, say, told
from lightning_bnmonitor.commands.outcome import check_folder
from lightning_bnmonitor.compat import BatchNorm

_STATS = ("running_mean", "running_var", "num_batches_tracked")
_AVERAGED, _TRAINED = "state_dict", "current_model_state"  # as WeightAveraging names them
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside its `module`
_MAX_LISTED = 3


class Checkpoint:
    """What a checkpoint of Lightning's Trainer holds, or a file with nothing but a ``state_dict``.

    Args:
        path: The file.
        weights_only: Whether nothing but tensors and plain values is to be in it.

    Raises:
        CommandError: If it cannot be read.
    """

    def __init__(self, path: Path, weights_only: bool) -> None:
        self.path = path
        self.content = _read(path, weights_only)
        has_weights = isinstance(self.content.get("state_dict"), Mapping)
        if not has_weights and not _is_bare(self.content):
            nested = next((name for name, value in self.content.items() if _is_bare(value)), None)
            there = "model.state_dict()" if nested is None else f"torch.load({str(path)!r})[{nested!r}]"
            raise CommandError(
                f"{path} has no `state_dict`, but {_listed(map(str, self.content))}: give a checkpoint of Lightning's "
                f"Trainer, or a file of `torch.save({there}, path)`."
            )
        self._is_bare = not has_weights

    @property
    def states(self) -> dict[str, dict[str, Any]]:
        """The weights that it holds, by what they are: of ``WeightAveraging`` the averaged ones, then the others."""
        if self._is_bare:
            return {"the weights": self.content}
        weights = self.content[_AVERAGED]
        if isinstance(trained := self.content.get(_TRAINED), dict) and "averaging_state" in self.content:
            return {
                f"the averaged weights (`{_AVERAGED}`)": weights,
                f"the weights in training (`{_TRAINED}`)": trained,
            }
        return {"the weights": weights}

    def hyper_parameters(self, of: str) -> tuple[dict[str, Any], str | None]:
        """What ``save_hyperparameters`` has kept of the ``"model"`` or the ``"data"``.

        Returns:
            Values by name, and the one argument that they were given in; None if each is an argument.
        """
        prefix = "" if of == "model" else "datamodule_"
        kept = self.content.get(f"{prefix}hyper_parameters")
        name = self.content.get("hparams_name" if of == "model" else "datamodule_hparams_name")
        return (dict(kept) if isinstance(kept, Mapping) else {}), name


def load_weights(model: nn.Module, weights: Mapping[str, Any], path: Path) -> list[str]:
    """Load weights, and say what is missing of running statistics: those of the model then stay as they are.

    If all names begin otherwise than those of the model, they are taken for the same without that.

    Returns:
        The names that the model has for running statistics that are not among the weights.

    Raises:
        CommandError: If anything else is missing (unless the model has ``strict_loading=False``), or does not fit.
    """
    of_file, of_model = _prefixes(weights, model)
    if of_file != of_model:
        first = next(name for name in weights if name.startswith(of_file))
        say(
            f"{path} has `{first}` where {type(model).__name__} has `{of_model}{first.removeprefix(of_file)}`: all "
            "names are matched this way."
        )
        weights = {f"{of_model}{key.removeprefix(of_file)}": weights[key] for key in weights if key != _COUNTER}
    try:
        found = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        _, *troubles = (line.strip().rstrip(".") for line in str(error).splitlines())
        listed = _listed(troubles) or told(error)
        raise CommandError(f"The weights in {path} do not fit {type(model).__name__}: {listed}. {_OTHER}") from error
    stats = _all_stats_names(model)
    missing = [name for name in found.missing_keys if name not in stats]
    unexpected = list(found.unexpected_keys)
    if getattr(model, "strict_loading", True) and (missing or unexpected):
        lacks = f" lacks {_listed(missing)}" if missing else ""
        has = f" has {_listed(unexpected)}, which the model has not" if unexpected else ""
        raise CommandError(
            f"{path} is no checkpoint of this {type(model).__name__}: it{lacks}{',' * bool(missing and unexpected)}"
            f"{has}. {_of_a_part(weights, model) or _OTHER}"
        )
    return [name for name in found.missing_keys if name in stats]


def stats_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The names that running statistics have in a ``state_dict``, by layer: of a shared layer several of each."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BatchNorm):
            found = [f"{path}.{name}".lstrip(".") for name in _STATS if getattr(module, name) is not None]
            names.setdefault(module, []).extend(found)
    return names


def put_stats(weights: dict[str, Any], model: nn.Module, layers: Iterable[nn.Module], missing: Collection[str]) -> None:
    """Replace the running statistics of layers among weights by those that the model has now, in the same precision.

    The number of updates is added where it is missing, and left as it is where it is not.

    Args:
        weights: What is changed.
        model: The model.
        layers: The layers.
        missing: Names that the model has for running statistics that are not among the weights, and are added.

    Raises:
        CommandError: If others are not among them.
    """
    names = stats_names(model)
    of_file, of_model = _prefixes(weights, model)
    for layer in layers:
        for name in names[layer]:
            key = f"{of_file}{name.removeprefix(of_model)}"
            new = getattr(layer, name.rpartition(".")[2]).detach().cpu()
            if name.endswith("num_batches_tracked"):
                weights.setdefault(key, new.clone())
                continue
            if key not in weights and name not in missing:
                raise CommandError(f"The checkpoint has its weights by other names: no {name} is among them.")
            old = weights.get(key)
            weights[key] = new.to(old.dtype if isinstance(old, Tensor) else new.dtype, copy=True)


def check_output(output: Path, source: Path, force: bool) -> None:
    """Raise CommandError if a repaired checkpoint cannot be written to a file."""
    check_folder(output)
    if output.exists() and output.samefile(source):
        raise CommandError(f"{output} is the checkpoint itself, which is not repaired in place: give another file.")
    if output.exists() and not force:
        raise CommandError(f"{output} is there already: give another file, or --force to replace it.")


def write(checkpoint: Checkpoint, output: Path) -> None:
    """Write a checkpoint as a whole, or nothing.

    Raises:
        CommandError: If it cannot be written.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.", delete=False) as file:
            temporary = Path(file.name)
            torch.save(checkpoint.content, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(checkpoint.path, temporary)
        temporary.replace(output)
    except (OSError, RuntimeError, pickle.PicklingError) as error:
        raise CommandError(f"{output} could not be written: {told(error)}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _prefixes(weights: Mapping[str, Any], model: nn.Module) -> tuple[str, str]:
    """What all names begin with among weights (``module.`` of DDP, say), and in the model.

    Both are empty if names are the same as they are, or have nothing in common without it either.
    """
    keys, names = weights.keys() - {_COUNTER}, model.state_dict().keys()
    of_file, of_model = _common(keys), _common(names)
    without = {f"{of_model}{key.removeprefix(of_file)}" for key in keys}
    return (of_file, of_model) if names.isdisjoint(keys) and not names.isdisjoint(without) else ("", "")


def _common(names: Iterable[str]) -> str:
    """What all names begin with, up to a dot."""
    paths = [name.split(".")[:-1] for name in names]
    pairs = zip(min(paths, default=[]), max(paths, default=[]), strict=False)
    return "".join(f"{part}." for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _of_a_part(weights: Mapping[str, Any], model: nn.Module) -> str:
    """How to get at the model's weights if they are there, by longer names, among others; empty if they are not."""
    needed = model.state_dict().keys() - _all_stats_names(model)
    one = next(iter(needed), "")
    for start in (key.removesuffix(one) for key in weights if key.endswith(f".{one}")):
        if all(f"{start}{name}" in weights for name in needed):
            return (
                f"Those whose names begin with `{start}` are the model's: give a file of them alone, by "
                f"`torch.save({{name[{len(start)}:]: value for name, value in weights.items() if "
                f"name.startswith({start!r})}}, path)`."
            )
    return ""


def _all_stats_names(model: nn.Module) -> set[str]:
    return {name for layer in stats_names(model).values() for name in layer}


_OTHER = "Is it of another project, or were other arguments given to the model?"


def _read(path: Path, weights_only: bool) -> dict[str, Any]:
    if path.is_dir():
        raise CommandError(
            f"{path} is a folder, of a sharded checkpoint perhaps: "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}` makes one file of it."
        )
    if not path.exists():
        raise CommandError(f"There is no checkpoint {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise CommandError(f"{path} is no checkpoint: {told(error)}.") from error
        raise CommandError(
            f"{path} has more in it than tensors and plain values, or is no checkpoint: {_first_line(error)}. If you "
            "trust who made it, add --no-weights-only."
        ) from error
    except Exception as error:
        raise CommandError(f"{path} cannot be read as a checkpoint: {told(error)}.") from error
    if not isinstance(content, dict):
        raise CommandError(
            f"{path} holds a {type(content).__name__}, not a dict with a `state_dict`: write one by "
            "`torch.save(model.state_dict(), path)`."
        )
    return content


def _is_bare(content: object) -> bool:
    """Whether it is a ``state_dict``."""
    return isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())


def _first_line(error: Exception) -> str:
    """What cannot be loaded, of PyTorch's page of advice, which is for code."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].splitlines()
    first = next((line.strip() for line in lines if line.strip()), type(error).__name__)
    return first.partition(" Please use `torch.")[0].rstrip(".")


def _listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    several = list(names)
    more = f" and {len(several) - _MAX_LISTED} more" if len(several) > _MAX_LISTED else ""
    return ", ".join(several[:_MAX_LISTED]) + more
