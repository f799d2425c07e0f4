"""As many batches as it takes: until chance in the exact statistics is negligible in every layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_bnmonitor.repair.fixed_weights as fixed_weights
from lightning_bnmonitor import Report, examine, recalibrate
from tests.repair.exact_population import C, assert_written
from tests.repair.unchanged import Unchanged


def endless(size: int = 64, seed: int = 0, std: float = 1.0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(size, C, generator=generator) * std + 1


def counted(batches: Iterator[Tensor], taken: list[int]) -> Iterator[Tensor]:
    for x in batches:
        taken.append(len(x))
        yield x


def norm() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 2))


@pytest.mark.parametrize("size", [64, 512])
def test_it_stops_when_the_noise_of_what_was_seen_is_below_a_hundredth(size: int) -> None:
    taken: list[int] = []
    with Unchanged(model := norm(), entirely=True):
        report = examine(model, counted(endless(size), taken))
    # For independent normal values a mean and a variance of N values are off by sqrt(1.5 / N).
    assert 0.8 < math.sqrt(1.5 / sum(taken)) / 0.01 < 1.05
    assert report["0"].num_batches == len(taken)  # nothing is taken that is not looked at
    assert f"{len(taken)} batches with {sum(taken)} samples were looked at" in report.remarks[0]
    assert "not below" not in report.remarks[0]


def realised(report: Report, mean: float = 1.0, var: float = 1.0) -> float:
    """The RMS error that the statistics of a pass make on the truth."""
    layer = report["0"]
    scale = np.sqrt(var / layer.population_var.numpy())
    errors = (scale - 1) ** 2 + (layer.population_mean.numpy() - mean) ** 2 / layer.population_var.numpy()
    return float(np.sqrt(errors.mean()))


@pytest.mark.slow
def test_where_it_stops_the_error_is_a_hundredth_within_a_fifth() -> None:
    errors = [realised(examine(norm(), endless(256, seed=seed))) for seed in range(60)]
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("num", [1, 3, 8, 9, 20])
def test_if_the_data_end_before_it_says_so_and_what_was_reached(num: int) -> None:
    report = examine(norm(), itertools.islice(endless(), num))
    assert report["0"].num_batches == num
    if num > 1:
        assert f"{num} batches with {64 * num} samples" in report.remarks[0]
        assert report.remarks[0].endswith("not below 0.01: the data ended.")
        noise = report["0"].evidence["now_error"]
        assert f"{noise:.2g}" in report.remarks[0]
        assert noise == pytest.approx(math.sqrt(1.5 / (64 * num)), rel=0.5)


def test_layers_that_are_never_called_constant_or_not_finite_do_not_make_it_run_on() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.never, self.dead, self.bad = (nn.BatchNorm1d(C) for _ in range(4))

        def forward(self, x: Tensor) -> None:
            self.fine(x)
            self.dead(torch.full_like(x, 7.0))
            self.bad(x * torch.nan)

    taken: list[int] = []
    report = examine(Odd(), counted(endless(2000), taken))
    assert len(taken) == 8
    assert [report[name].verdict for name in ("never", "bad")] == ["unused", "non-finite"]
    assert "dead-channels" in report["dead"].flags
    only = nn.Sequential(nn.BatchNorm1d(C))
    taken.clear()
    assert examine(only, counted((x * torch.nan for x in endless()), taken))["0"].verdict == "non-finite"
    assert len(taken) == 8


def test_a_channel_that_is_not_finite_does_not_end_it_before_the_others_are_known() -> None:
    def batches() -> Iterator[Tensor]:
        for x in endless():
            x[:, 1] = torch.inf
            yield x

    report = examine(norm(), batches())
    assert report["0"].verdict == "non-finite"
    assert report["0"].num_samples > 10_000


def test_data_without_an_end_that_are_never_known_well_end_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_weights, "MAX_SAMPLES", 2000)
    report = examine(norm(), endless(50))
    assert 2000 <= report["0"].num_samples <= 4000
    assert 'so many are the most that `num_batches="auto"` takes' in report.remarks[0]


def test_a_layer_that_is_called_once_in_a_while_is_waited_for() -> None:
    class Rarely(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rarely, self.calls = nn.BatchNorm1d(C), nn.BatchNorm1d(C), 0

        def forward(self, x: Tensor) -> None:
            self.often(x)
            self.calls += 1
            if self.calls % 8 == 1:
                self.rarely(x)

    report = examine(Rarely(), endless(4000))
    assert report["often"].num_batches > 8
    assert report["rarely"].evidence["now_error"] <= 0.01


def test_recalibrate_takes_as_many_and_says_what_was_reached() -> None:
    model, taken = norm(), list[int]()
    result = recalibrate(model, counted(endless(), taken), num_batches="auto")
    assert result.num_batches == len(taken) < 400
    assert_written(model[0], list(itertools.islice(endless(), len(taken))))
    said = str(result).partition("\n\n")[0]
    assert f"1 BatchNorm layer recalibrated. {len(taken)} batches with {sum(taken)} samples" in said
    assert max(map(len, said.splitlines())) <= 120
    ended = str(recalibrate(model, list(itertools.islice(endless(), 10)), num_batches="auto"))
    assert "not below 0.01: the data ended." in ended


@pytest.mark.slow
def test_how_often_it_looks_grows_with_the_logarithm_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look waits for the device."""
    looks: list[int] = []
    look = fixed_weights.precision

    def counting(*args: object) -> object:
        looks.append(1)
        return look(*args)

    monkeypatch.setattr(fixed_weights, "precision", counting)
    report = examine(norm(), endless(16))
    assert report["0"].num_batches > 900
    assert len(looks) <= 12
