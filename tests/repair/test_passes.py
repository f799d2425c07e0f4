"""How a model is run on a batch by default."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_bnmonitor.repair.passes import forward_of


class Seen(nn.Module):
    """Keeps what it is called with. It is on a device that every computer has, and no batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device="meta"))

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Record:
    values: Tensor
    name: str


class Graph:
    """As the batches of some libraries: moves itself, and may forget to return itself."""

    def __init__(self, forgets: bool) -> None:
        self.values = torch.ones(2)
        self.forgets = forgets

    def to(self, device: torch.device) -> Graph | None:
        self.values = self.values.to(device)
        return None if self.forgets else self


class Attributes(dict):
    """A mapping whose keys are attributes, so that it seems to have any method."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: pytest.fail("was called")


def devices(data: Any) -> Any:
    if isinstance(data, Tensor):
        return data.device
    if isinstance(data, Graph):
        return data.values.device
    if isinstance(data, Record):
        return devices(data.values), data.name
    if isinstance(data, dict):
        return {name: devices(value) for name, value in data.items()}
    return [devices(value) for value in data] if isinstance(data, (list, tuple)) else data


BATCHES = {
    "tensor": torch.ones(2),
    "list": [torch.ones(2), torch.ones(2)],
    "nested": [{"x": [torch.ones(2), "name", None, 3]}, torch.ones(2)],
    "named tuple": [Pair(torch.ones(2), torch.ones(3)), 1],
    "record": Record(torch.ones(2), "name"),
    "graph": Graph(forgets=False),
    "forgetful graph": Graph(forgets=True),
    "attributes": [Attributes(x=torch.ones(2)), 1],
    "text": "text",
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_is_moved_as_lightning_moves_it(kind: str) -> None:
    model = Seen()
    forward_of(model, copy.deepcopy(BATCHES[kind]))
    moved = move_data_to_device(copy.deepcopy(BATCHES[kind]), torch.device("meta"))
    expected = moved[0] if isinstance(moved, (list, tuple)) else moved
    (got,) = model.args
    assert type(got) is type(expected)
    assert devices(got) == devices(expected)


def test_a_mapping_is_passed_by_name_and_a_model_without_tensors_gets_the_batch_as_it_is() -> None:
    model = Seen()
    forward_of(model, {"x": torch.ones(2), "y": 3})
    assert devices(model.kwargs) == {"x": torch.device("meta"), "y": 3}
    del model.weight
    batch = torch.ones(2)
    forward_of(model, batch)
    assert model.args[0] is batch
