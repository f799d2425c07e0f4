"""Checkpoints that a Trainer has written, what is in them, and commands run on them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bnmonitor.commands import main
from tests.commands import projects

STATS = ("running_mean", "running_var")


def trained(
    folder: Path, model: Any, *callbacks: Any, data: Any = None, epochs: int = 1, ckpt_path: Path | None = None
) -> Path:
    """The checkpoint that a short training has left after its last epoch."""
    saving = ModelCheckpoint(dirpath=folder, filename="last", every_n_epochs=epochs)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks, saving],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data or projects.Data(), ckpt_path=ckpt_path)
    return folder / "last.ckpt"


def seeded(model: type, **arguments: Any) -> Any:
    seed_everything(0, verbose=False)
    return model(**arguments)


def bnmonitor(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit status, output, errors."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    return status, output, errors


def read(path: Path, weights_only: bool = True) -> dict[str, Any]:
    return torch.load(path, weights_only=weights_only)


def documents(page: Path) -> dict[str, Any]:
    """The runs in a page that was written, by name: what is known of their windows."""
    (data,) = re.findall('<script type="application/json" id="bnmonitor-data">(.*?)</script>', page.read_text("utf-8"))
    return {name: run["history"] for name, run in json.loads(data)["runs"].items()}


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two contents of checkpoints differ, to the bit, as paths."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        return [] if same and torch.equal(bits(one), bits(other)) else [path]
    if isinstance(one, dict):
        found = [] if list(one) == list(other) and vars_of(one) == vars_of(other) else [path]
        return found + [
            each for key in one if key in other for each in differences(one[key], other[key], f"{path}/{key}")
        ]
    if isinstance(one, (list, tuple)):
        found = [] if len(one) == len(other) else [path]
        return found + [
            each for i, pair in enumerate(zip(one, other, strict=False)) for each in differences(*pair, f"{path}/{i}")
        ]
    return [] if one == other or repr(one) == repr(other) == "nan" else [path]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8)


def vars_of(one: Any) -> Any:
    return getattr(one, "__dict__", None)


def exact_stats(
    weights: dict[str, Any], x: torch.Tensor, batch_size: int = 16, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Running statistics that `Net` should have, in float64 and two passes over all values; batches in their order.

    The second layer receives what the first normalises by the batch.
    """
    weights = {name.removeprefix(prefix): value.double().numpy() for name, value in weights.items()}
    batches = x.double().numpy().reshape(-1, batch_size, x.shape[1])
    mean, var = batches.mean(1, keepdims=True), batches.var(1, keepdims=True)
    normalised = (batches - mean) / np.sqrt(var + 1e-5) * weights["first.weight"] + weights["first.bias"]
    second = normalised.reshape(x.shape) @ weights["body.weight"].T + weights["body.bias"]
    values = {"first": x.double().numpy(), "second": second}
    return {
        f"{prefix}{name}.{stat}": computed
        for name, value in values.items()
        for stat, computed in zip(STATS, (value.mean(0), value.var(0, ddof=1)), strict=True)
    }


def assert_exact(weights: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(weights[name].double().numpy(), values, rtol=2e-6, atol=2e-6, err_msg=name)
