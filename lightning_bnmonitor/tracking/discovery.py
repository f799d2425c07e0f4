"""Which layers of a model are monitored, and under which names."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_bnmonitor.compat import WRAPPERS, BatchNorm

log = logging.getLogger(__name__)

ROOT = "(root)"
"""Name of a layer that is itself the monitored model."""


def find_layers(model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None) -> dict[str, BatchNorm]:
    """The BatchNorm layers of a model by name, each once, in the order of its modules.

    Says which normalisation layers there are that are not BatchNorm: in a warning if there is no BatchNorm.

    Raises:
        ValueError: If a pattern matches no BatchNorm layer, naming those there are.
    """
    layers, others = _normalisation_layers(model)
    listed = ", ".join(f"{count} {name}" for name, count in others.items())
    if not layers:
        instead = (
            f"the normalisation layers it has instead are not monitored: {listed}"
            if listed
            else "nor other normalisation"
        )
        warnings.warn(f"No BatchNorm layer to monitor in {type(model).__name__} ({instead}).", stacklevel=2)
        return layers
    if others:
        log.info("Normalisation layers that are not BatchNorm are not monitored: %s.", listed)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"`{argument}` pattern {pattern!r} matches no BatchNorm layer. The layers are: {', '.join(layers)}."
                )
    chosen = {
        name: module
        for name, module in layers.items()
        if (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
    }
    if not chosen:
        warnings.warn(
            f"`include` and `exclude` leave no BatchNorm layer to monitor of {', '.join(layers)}.", stacklevel=2
        )
    return chosen


def _normalisation_layers(model: nn.Module) -> tuple[dict[str, BatchNorm], Counter[str]]:
    """BatchNorm layers by name, and class names of other normalisation layers with their numbers."""
    layers: dict[str, BatchNorm] = {}
    others: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm):
            name = ".".join(part for part in path.split(".") if part not in WRAPPERS)
            layers[path if name in layers else name or ROOT] = module
        elif re.search(r"(?i)^[^_].*norm(\d+d)?$", type(module).__name__) and not any(module.children()):
            others[type(module).__name__] += 1
    return layers, others
