"""A torch that lacks one of the names that ``compat.py`` uses, in a process of its own, and trainings there."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

STEPS = 6
PACKAGE = "lightning_bnmonitor"


def without_entries(mapping: dict[str, Any], *names: str) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.dict(mapping, {name: value for name, value in mapping.items() if name not in names}, clear=True)


def without(owner: Any, name: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    @contextlib.contextmanager
    def lacking() -> Iterator[None]:
        value = getattr(owner, name)
        delattr(owner, name)
        try:
            yield
        finally:
            setattr(owner, name, value)

    return lacking


def patched(owner: Any, name: str, value: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, value)


def _settings() -> dict[str, Any]:
    return torch._dynamo.config._config


WHILE_IMPORTED: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "_C._autograd._top_saved_tensors_default_hooks": without(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    "_C._autograd.SavedTensor.unpack_hook": patched(torch._C._autograd, "SavedTensor", object),
    "_C._current_graph_task_id": without(torch._C, "_current_graph_task_id"),
    "_C._are_functorch_transforms_active": without(torch._C, "_are_functorch_transforms_active"),
    "_C._get_tracing_state": without(torch._C, "_get_tracing_state"),
    "compiler._is_exporting_flag": without(torch.compiler, "_is_exporting_flag"),
    "_dynamo.config.skip_nnmodule_hook_guards": lambda: without_entries(_settings(), "skip_nnmodule_hook_guards"),
    "_dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint": lambda: without_entries(
        _settings(), "skip_fwd_side_effects_in_bwd_under_checkpoint"
    ),
    "nn.Module._buffers, _parameters, _forward_pre_hooks": patched(nn.Module, "__init__", lambda self: None),
}
"""Names that torch itself needs: they are gone while ``compat.py`` looks for them."""

IN_COMPAT: dict[str, dict[str, Any]] = {
    "saved results of a kernel's node": {"SAVED_MEAN": "_gone", "SAVED_INVSTD": "_gone"},
    "_input_metadata of a node": {"shape_of_output": lambda node: None},
    "names of compiled modules": {
        "has_compiled_forward": lambda module: False,
        "compiled_call": lambda module: None,
    },
}
"""What is looked for at each call, in the place of which ``compat.py`` has what it would find."""


def _compat(name: str) -> None:
    """Load ``compat.py`` without the name, for the package to find it loaded."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "compat.py"
    own = importlib.util.spec_from_file_location(f"{PACKAGE}.compat", path)
    assert own is not None
    assert own.loader is not None
    module = importlib.util.module_from_spec(own)
    with WHILE_IMPORTED.get(name, contextlib.nullcontext)():
        own.loader.exec_module(module)
    vars(module).update(IN_COMPAT.get(name, {}))
    sys.modules[f"{PACKAGE}.compat"] = module


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Net(nn.Module):
    def __init__(self, is_checkpointed: bool) -> None:
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), Activated(4))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.is_checkpointed else self.body(x)


def train(rank: int, name: str, sentence: str) -> None:
    """Trainings that the name matters to: all is exact, and the sentence is said that it is known by ("": none)."""
    _compat(name)
    from lightning_bnmonitor import BatchNormTracker, recalibrate

    sentences: set[str] = set()
    counts_twice = "count twice" in sentence
    is_compilers = any(part in name for part in ("compile", "_dynamo"))
    for kind in ("plain", "compiled" if is_compilers else "checkpointed"):
        torch.manual_seed(0)
        model = Net(kind == "checkpointed")
        run = torch.compile(model, backend="aot_eager") if kind == "compiled" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        received: list[np.ndarray] = []
        tracker = BatchNormTracker(run)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracker.attach()
        sentences.update(str(each.message) for each in caught if "torch" in str(each.message))
        for step in range(STEPS):
            x = torch.randn(8 + step % 2, 3, 8, 8)
            with torch.no_grad():
                received.append(model.body[0](x).double().numpy())
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        report = tracker.close()
        tracker.detach()
        counts = {layer.num_batches for layer in report.values()}
        assert counts == ({STEPS, 2 * STEPS} if counts_twice and kind == "checkpointed" else {STEPS})
        values = np.concatenate([np.moveaxis(batch, 1, 0).reshape(4, -1) for batch in received], axis=1)
        np.testing.assert_allclose(report["body.1"].population_mean.numpy(), values.mean(axis=1), atol=1e-6)
        if not (counts_twice and kind == "checkpointed"):
            np.testing.assert_allclose(report["body.1"].population_var.numpy(), values.var(axis=1, ddof=1), rtol=2e-6)
        recalibrate(run, [torch.randn(8, 3, 8, 8)])
    assert len(sentences) == (1 if sentence else 0), sentences
    assert sentence in "".join(sentences)
