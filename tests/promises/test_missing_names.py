"""A name of torch's that is gone from a later version ends no run: it is said once what that means, and goes on."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_bnmonitor import compat
from tests import processes
from tests.promises.without_names import IN_COMPAT, WHILE_IMPORTED, train

SENTENCES = {
    "_C._autograd._top_saved_tensors_default_hooks": "are taken by a pass over each layer's input",
    "_C._autograd.SavedTensor.unpack_hook": (
        "`forward` of their own are measured by a pass" if torch.__version__ >= "2.10" else ""
    ),
    "saved results of a kernel's node": "are taken by a pass over each layer's input",
    "_input_metadata of a node": "are taken by a pass over each layer's input",
    "_C._current_graph_task_id": "count twice",
    "_C._are_functorch_transforms_active": "`torch.func` are not told from others",
    "_C._get_tracing_state": "`torch.jit.trace` are not told from others",
    "_dynamo.config.skip_nnmodule_hook_guards": "attach one before the first compiled call",
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", [*WHILE_IMPORTED, *IN_COMPAT])
def test_trainings_go_on_without(name: str) -> None:
    if name == "compiler._is_exporting_flag" and torch.__version__ < "2.12":
        pytest.skip("compiled code takes the public function to be True there")
    processes.start(train, name, SENTENCES.get(name, ""), world_size=1)


def test_every_name_that_means_something_when_it_is_gone_is_tried() -> None:
    source = Path(compat.__file__).read_text()
    assert set(re.findall(r'_private\(\s*"([^"]+)"', source)) <= set(WHILE_IMPORTED)


def test_a_step_is_known_without_lightnings_own_count() -> None:
    trainer = SimpleNamespace(global_step=7, fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()))
    assert compat.batches_that_stepped(trainer) == 7


def test_ranks_exchange_over_the_cpu_where_their_group_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(dist.distributed_c10d, "_get_object_coll_device")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert compat.device_for_objects(dist.group.WORLD).type == "cpu"
    finally:
        dist.destroy_process_group()
