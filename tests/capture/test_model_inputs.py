"""Which tensors of a batch are its inputs."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bnmonitor.capture.model_inputs import inputs_in

B = 6
X = torch.randn(B, 3)
IMAGES = torch.randn(B, 3, 4, 4)
IDS = torch.randint(0, 100, (B, 5))
LABELS = torch.randint(0, 10, (B,))
Pair = namedtuple("Pair", ["image", "target"])


@dataclass
class Sample:
    image: Tensor
    target: Tensor
    names: list[str] = field(default_factory=lambda: ["a"] * B)
    nothing: Any = None


def assert_found(batch: object, *expected: Tensor) -> None:
    """These tensors themselves, in this order, or views of them."""
    found = inputs_in(batch)
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in expected]
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, LABELS),
        [LABELS, X],
        {"x": X, "y": LABELS},
        OrderedDict(y=LABELS, x=X),
        UserDict(x=X, y=LABELS),
        Pair(X, LABELS),
        Sample(X, LABELS),
        ([{"x": (X,)}], LABELS),
        {"batch": Sample(X, LABELS), "index": 3, "path": "a"},
        ((X, LABELS), {}),
        ((), {"x": X, "train": True, "y": LABELS}),
        (X, None, "text", 1.5, b"bytes", {1, 2}, Sample, torch.float32),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_the_input_is_found_in_a_batch_of_any_structure(batch: object) -> None:
    assert_found(batch, X)


@pytest.mark.parametrize(
    "label",
    [
        LABELS,
        LABELS.int(),
        LABELS.bool(),
        LABELS[:, None],
        LABELS.float(),
        LABELS.float()[:, None],
        LABELS.double()[:, None, None],
        LABELS.to(torch.uint8),
        torch.randint(0, 2, (B, 4)),  # several classes at once, or token ids, beside numbers
        torch.ones(B, 4, dtype=torch.bool),
        torch.tensor(0.5),
        torch.tensor(3),
        torch.randn(B, 0),
        torch.randn(B, 3, dtype=torch.complex64),
    ],
    ids=lambda label: f"{label.dtype} {tuple(label.shape)}",
)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("x", [X, IMAGES, IMAGES.to(torch.uint8), X.half(), X.bfloat16(), X.double()])
def test_labels_and_what_is_no_number_are_left_out(x: Tensor, label: Tensor, first: bool) -> None:
    assert_found((label, x) if first else (x, label), x)


def test_several_inputs_are_found_in_their_order_up_to_four() -> None:
    assert_found({"a": X, "b": (IMAGES, LABELS)}, X, IMAGES)
    several = [torch.randn(B, 2) for _ in range(6)]
    assert_found(several, *several[:4])


def test_inputs_with_as_many_samples_as_the_first_are_found() -> None:
    weights = torch.randn(10)
    assert_found((X, torch.randn(B + 1, 3), IMAGES, torch.randn(1, 3), weights), X, IMAGES)
    assert_found((X[:2], IMAGES), X[:2])


def test_token_ids_are_inputs_where_there_are_no_numbers() -> None:
    mask = torch.ones(B, 5, dtype=torch.bool)
    assert_found((IDS, LABELS), IDS)
    assert_found({"input_ids": IDS, "mask": mask, "y": LABELS.float()}, IDS)
    padding = torch.ones_like(IDS)
    assert_found({"input_ids": IDS, "attention_mask": padding}, IDS, padding)


def test_a_number_a_sample_is_an_input_where_there_is_nothing_else() -> None:
    age, income = torch.rand(B), torch.rand(B, 1)
    assert_found((age, LABELS), age)
    assert_found((income, age), income)


NOTHING = {
    "None": lambda: None,
    "text": lambda: "text",
    "number": lambda: 3,
    "empty": lambda: ({}, (), []),
    "labels": lambda: (LABELS, LABELS[:, None]),
    "scalar": lambda: torch.tensor(1.0),
    "no samples": lambda: torch.randn(0, 3),
    "complex": lambda: torch.randn(B, 3, dtype=torch.complex64),
    "bool": lambda: torch.ones(B, 3, dtype=torch.bool),
    "sparse": lambda: torch.randn(B, 3).to_sparse(),
    "sparse in rows": lambda: torch.randn(B, 3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(B, 3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.randn(B, 3, device="meta"),
    "token ids on meta": lambda: IDS.to("meta"),
    "a number a sample on meta": lambda: torch.randn(B, device="meta"),
    "a subclass": lambda: nn.Parameter(torch.randn(B, 3)),
    "a class": lambda: Sample,
    "a generator": lambda: (x for x in [X]),
}


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_has_no_values_that_can_be_looked_at_is_left_out(kind: str) -> None:
    batch = NOTHING[kind]()
    assert inputs_in(batch) == []
    assert inputs_in([{"x": batch}]) == []


def test_beside_what_cannot_be_looked_at_the_rest_is() -> None:
    assert_found((torch.randn(B, 3).to_sparse(), X), X)
    assert inputs_in((torch.randn(B, 3, device="meta"), X)) == []


def test_fake_tensors_are_none() -> None:
    with FakeTensorMode() as mode:
        assert inputs_in(torch.randn(B, 3)) == []
    assert inputs_in(mode.from_tensor(X)) == []


class Looked:
    """A function that looks at what it is given."""

    def __init__(self) -> None:
        self.found: list[list[Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.found.append(inputs_in((x, LABELS)))
        return x.square().sum()


TRANSFORMS = {
    "vmap": lambda function: torch.func.vmap(function)(torch.randn(2, B, 3)),
    "grad": lambda function: torch.func.grad(function)(X),
    "jvp": lambda function: torch.func.jvp(function, (X,), (X,)),
    "vmap of grad": lambda function: torch.func.vmap(torch.func.grad(function))(torch.randn(2, B, 3)),
    "functionalize": lambda function: torch.func.functionalize(function)(X),
    "jit.trace": lambda function: torch.jit.trace(lambda x: function(x), X, check_trace=False),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_within_transforms_and_while_tracing_there_are_none(transform: str) -> None:
    function = Looked()
    TRANSFORMS[transform](function)
    assert function.found
    assert all(found == [] for found in function.found)
    assert_found((X, LABELS), X)


def test_inputs_are_neither_copied_nor_changed() -> None:
    x = torch.randn(B, 3, 4, 4, requires_grad=True)
    view = x[:, :, 1:].transpose(2, 3)
    version = view._version
    assert_found((view, LABELS), view)
    assert (view._version, view.requires_grad, x.grad) == (version, True, None)
