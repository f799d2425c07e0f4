"""Ways in which users compile a model."""

import torch
from torch import nn


def by_wrapping(model: nn.Module, backend: str = "eager", fullgraph: bool = False) -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


def in_place(model: nn.Module, backend: str = "eager", fullgraph: bool = False) -> nn.Module:
    model.compile(backend=backend, fullgraph=fullgraph)
    return model


def its_forward(model: nn.Module, backend: str = "eager", fullgraph: bool = False) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=fullgraph)
    return model


def its_parts(model: nn.Module, backend: str = "eager", fullgraph: bool = False) -> nn.Module:
    """Each child on its own."""
    for name, part in model.named_children():
        setattr(model, name, torch.compile(part, backend=backend, fullgraph=fullgraph))
    return model
