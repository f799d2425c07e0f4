"""A network of three layers, options, inputs and writes as hypothesis draws them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

SHAPES = {"a": (3,), "b": (2, 3), "c": (2, 2, 2)}  # of a sample
MOMENTA = [0.1, 0.5, 0.0, None]
SEEDS = st.integers(0, 2**32 - 1)


class Network(nn.Module):
    """Three layers, each of which is given its own input."""

    def __init__(self, dtype: torch.dtype, options: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        kinds = {"a": nn.BatchNorm1d, "b": nn.BatchNorm1d, "c": nn.BatchNorm2d}
        self.layers = nn.ModuleDict(
            {name: kind(SHAPES[name][0], dtype=dtype, **options.get(name, {})) for name, kind in kinds.items()}
        )

    def forward(self, inputs: list[tuple[str, torch.Tensor]], fails: bool = False) -> list[torch.Tensor]:
        outputs = [self.layers[name](x) for name, x in inputs]
        if fails:
            raise ZeroDivisionError
        return outputs


OPTIONS = st.fixed_dictionaries(
    {
        name: st.fixed_dictionaries(
            {
                "momentum": st.sampled_from([0.1, *MOMENTA]),
                "affine": st.booleans(),
                "track_running_stats": st.sampled_from([True, True, True, False]),
            }
        )
        for name in SHAPES
    }
)


def draw_input(rng, name, size, loc, dtype):
    return torch.from_numpy(rng.normal(loc, 1.0, (size, *SHAPES[name]))).to(dtype)
