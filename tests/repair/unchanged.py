"""Everything about a model, and all random states: what a repair must leave as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.repair.exact_population import layers_of


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def buffers_of(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(buffer) for name, buffer in model.named_buffers()}


class Everything:
    """What there is about a model, random states and these generators, as it was when this was made."""

    def __init__(self, model: nn.Module, *generators: torch.Generator) -> None:
        self.model, self.generators = model, generators
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        modules, layers = dict(self.model.named_modules()), layers_of(self.model)
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        name, keys, *rest = np.random.get_state()
        return {
            "parameters": {name: bits(p) for name, p in parameters.items()},
            "buffers": buffers_of(self.model),
            "gradients": {name: None if p.grad is None else bits(p.grad) for name, p in parameters.items()},
            "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
            "identities": {name: id(tensor) for name, tensor in [*parameters.items(), *buffers.items()]},
            "dtypes": {name: buffer.dtype for name, buffer in buffers.items()},
            "modes": {name: module.training for name, module in modules.items()},
            "vars": {name: sorted(vars(module)) for name, module in modules.items()},
            "hooks": {name: [*m._forward_hooks, *m._forward_pre_hooks] for name, m in modules.items()},
            "momentum": {name: layer.momentum for name, layer in layers.items()},
            "tracks": {name: layer.track_running_stats for name, layer in layers.items()},
            "eps": {name: layer.eps for name, layer in layers.items()},
            "random": (bits(torch.get_rng_state()), random.getstate(), name, keys.tolist(), rest),
            "generators": [bits(generator.get_state()) for generator in self.generators],
            "gradients are on": torch.is_grad_enabled(),
        }

    def assert_same(self, but_running_statistics: bool = False) -> None:
        after = self.state()
        for what, before in self.before.items():
            if what == "buffers" and but_running_statistics:
                assert counted(after[what]) == counted(before), what
            else:
                assert after[what] == before, what


def counted(buffers: dict[str, bytes]) -> dict[str, bytes]:
    return {name: value for name, value in buffers.items() if not name.endswith(("running_mean", "running_var"))}


class Unchanged:
    """Around a call: nothing changes but running statistics; if ``entirely``, nor do they."""

    def __init__(self, model: nn.Module, entirely: bool = False) -> None:
        self.model, self.entirely = model, entirely

    def __enter__(self) -> None:
        self.everything = Everything(self.model)

    def __exit__(self, *exc: object) -> None:
        self.everything.assert_same(but_running_statistics=not self.entirely)
