"""The rows of averaged weights: layers as they are validated and saved, beside the layers that are trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.page.document import AVERAGED
from lightning_bnmonitor.report.layer_report import LayerReport


def averaged_row(layer: LayerReport) -> LayerReport:
    """A layer with averaged weights, of which is known what was validated with them: they were not trained.

    Args:
        layer: That with the weights that are trained, with values of a validation with the averaged ones.
    """
    numbers, running = torch.full_like(layer.numbers, torch.nan), layer.val_running
    if running is not None:
        numbers[2:4] = running
    return replace(
        layer,
        name=layer.name + AVERAGED,
        averaged_of=layer.name,
        num_batches=0,
        num_samples=0,
        has_running_stats=running is not None,
        diagnosis=Diagnosis("averaged", (), False, {"averaged": 1.0, "num_features": float(layer.num_features)}),
        numbers=numbers,
        blocks=None,
        group_moments=None,
        unpadded=None,
        trained=layer.numbers[4:6].clone(),
    )


def one_of_each(layers: Iterable[LayerReport]) -> list[LayerReport]:
    """Each layer once: with the weights that are trained, or with the averaged ones if these alone need attention."""
    ordered = list(layers)
    chosen = {layer.name: layer for layer in ordered if layer.averaged_of is None}
    for layer in ordered:
        name = layer.averaged_of
        if name is not None and (name not in chosen or (layer.needs_attention and not chosen[name].needs_attention)):
            chosen[name] = layer
    return list(chosen.values())
