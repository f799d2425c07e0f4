"""What torchmetrics' own tests ask of every metric: kinds of metrics, a reference for each, and runs on two ranks.

The checks are those of ``MetricTester`` in torchmetrics' repository, ``tests/unittests/_helpers/testers.py``.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric

from tests import processes
from tests.statistics.known_moments import normal
from tests.statistics.two_pass import rows

NO_DATA = "was called before the ``update`` method"
BATCHES = {"uneven": ((3, 2), (17, 1, 4)), "even": ((3, 2), (17, 1)), "one rank without data": ((5, 2), ())}
RUNS = {
    "uneven": ("uneven", {}),
    "one rank without data": ("one rank without data", {}),
    "dist_sync_on_step": ("even", {"dist_sync_on_step": True}),
    "sync_on_compute=False": ("uneven", {"sync_on_compute": False}),
    "compute_on_cpu": ("uneven", {"compute_on_cpu": True}),
    "compute_with_cache": ("uneven", {"compute_with_cache": True}),
}


@dataclass(frozen=True)
class Kind:
    """A metric, made with torchmetrics' arguments, of so many channels; its result from all values, ``(n, C)``."""

    metric: Callable[..., Metric]
    channels: int
    reference: Callable[[np.ndarray], Any]

    def batch(self, size, seed, dtype=torch.float64):
        return normal((size, self.channels, 2), 50.0 + seed % 7, seed=seed, dtype=dtype)

    def expected(self, *batches):
        return self.reference(np.concatenate([rows(x) for x in batches]))


def assert_result(value, expected):
    """Tensors of the expected shape and values, in the expected tuple or dictionary."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key, part in expected.items():
            assert_result(value[key], part)
    elif isinstance(expected, tuple):
        assert isinstance(value, tuple)
        for part, expected_part in zip(value, expected, strict=True):
            assert_result(part, expected_part)
    else:
        assert value.dtype == torch.float64
        assert not value.requires_grad
        assert value.shape == np.shape(expected)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


def batches_of(kind, run, rank):
    sizes = BATCHES[RUNS[run][0]][rank]
    return [kind.batch(size, seed=10 * rank + i) for i, size in enumerate(sizes)]


def batch_after(kind, rank):
    return kind.batch(2, seed=100 + rank)


def on_two_ranks(kinds, folder):
    """For each rank, what each of ``kinds`` gave in each of ``RUNS``: see :func:`_record`."""
    processes.start(_run_rank, kinds, str(folder), world_size=2)
    assert multiprocessing.active_children() == []
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def _run_rank(rank, kinds, folder):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    warnings.filterwarnings("ignore", message=f".*{NO_DATA}")
    results = {(name, run): _record(kind, run, rank) for name, kind in kinds.items() for run in RUNS}
    with open(f"{folder}/{rank}.pickle", "wb") as file:
        pickle.dump(results, file)
    torch.distributed.destroy_process_group()


def _record(kind, run, rank):
    metric = pickle.loads(pickle.dumps(kind.metric(**RUNS[run][1])))
    forwarded = [metric(batch) for batch in batches_of(kind, run, rank)]
    before = {name: state.clone() for name, state in metric.metric_state.items()}
    computed = metric.compute()
    after = {name: state.clone() for name, state in metric.metric_state.items()}
    metric.update(batch_after(kind, rank))
    return {
        "forwarded": forwarded,
        "before": before,
        "computed": computed,
        "after": after,
        "computed again": metric.compute(),
        "saved": dict(metric.state_dict()),
    }
