"""The callbacks in two processes under DDP: one dashboard, the exact statistics of all data, failures of one rank."""

import datetime
import os
import pickle
import socket
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_bnmonitor import BatchNormMonitor, PreciseBatchNorm
from tests.callbacks import dashboard_fits
from tests.callbacks.dashboard_fits import OURS, LikeWandb, verdicts
from tests.callbacks.event_files import events
from tests.callbacks.precise_fits import (
    ALL,
    BATCH_SIZE,
    BATCHES,
    Net,
    Trace,
    close,
    fit,
    is_exact,
    same,
    samples,
    saved,
    train_data,
    trainer_for,
    val_data,
)
from tests.processes import CONTEXT

pytestmark = pytest.mark.slow
WORLD_SIZE = 2


def run_rank(rank, folder, port):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": WORLD_SIZE,
        "LOCAL_WORLD_SIZE": WORLD_SIZE,
    }
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (place | address).items()})
    results = {"dashboard": with_dashboard(folder), **with_precise(folder), "failed": with_a_failing_pass(rank, folder)}
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


def strategy(**options):
    return DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=30), **options)


def with_dashboard(folder):
    """The first in its process, so that nothing has been drawn before."""
    logger, monitor = LikeWandb(), BatchNormMonitor()
    loggers = [TensorBoardLogger(folder, name="run", version=0), logger]
    dashboard_fits.fit(loggers, monitor, devices=WORLD_SIZE, strategy=strategy(), max_epochs=3)
    return {
        "drawn": "matplotlib.backends.backend_agg" in sys.modules,
        "images": [step for _, _, step, _ in logger.images],
        "texts": [text[-1] for text in logger.texts],
        "text": logger.texts[-1][2][0][0] if logger.texts else None,
        "verdicts": verdicts(monitor.report()),
        "history": {
            "document": monitor.history.document(),
            "channels": monitor.history.channels(),
            "csv": monitor.history.to_csv(),
        },
    }


def with_precise(folder):
    def run(name, *callbacks):
        monitor, trace = BatchNormMonitor(), Trace()
        options = {"devices": WORLD_SIZE, "strategy": strategy(broadcast_buffers=False)}
        data = train_data(WORLD_SIZE * BATCHES * BATCH_SIZE)
        _, model = fit(Path(folder, name), *callbacks, monitor, trace, data=data, **options)
        return {
            "validated": model.validated,
            "left": {key: value.clone() for key, value in model.state_dict().items()},
            "trace": trace.states,
            "report": monitor.report().to_dict(),
        }

    return {
        "without": run("without"),
        "with": run("with", PreciseBatchNorm(ALL)),
        "restored": run("restored", PreciseBatchNorm(ALL, restore=True), ModelCheckpoint(Path(folder, "saved"))),
    }


def with_a_failing_pass(rank, folder):
    bad = PreciseBatchNorm(dataloader=[torch.ones(2, 1, 6) if rank == 0 else "no batch"])
    try:
        trainer = trainer_for(Path(folder), bad, devices=WORLD_SIZE, strategy=strategy())
        trainer.fit(Net(), train_data(), val_data())
    except RuntimeError as error:
        return str(error)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has seen, and the folder that they have written to."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=run_rank, args=(rank, str(folder), port)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    give_up = time.monotonic() + 180
    for process in processes:
        process.join(timeout=max(give_up - time.monotonic(), 0))
    hangs = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert not any(hangs)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD_SIZE)], folder


def test_of_two_ranks_only_the_first_draws_and_writes(ranks):
    (first, second), folder = [result["dashboard"] for result in ranks[0]], ranks[1]
    steps = [dashboard_fits.BATCHES // 2 * epoch - 1 for epoch in (1, 2, 3)]
    assert first["texts"] == steps
    assert (first["images"][0], first["images"][-1]) == (steps[0], steps[-1])
    assert first["drawn"]
    assert (second["texts"], second["images"], second["drawn"]) == ([], [], False)
    assert first["verdicts"] == second["verdicts"]
    found = events(folder / "run" / "version_0")
    assert len(list((folder / "run" / "version_0").glob("events.*"))) == 1
    assert found.at("bn/report") == steps
    assert found.texts["bn/report"][-1][1] == first["text"]
    assert found.categories() == OURS


def without_courses(channels):
    layers = channels["layers"].items()
    return {name: {which: its | {"course": None} for which, its in sets.items()} for name, sets in layers}


def test_the_history_is_the_same_on_all_ranks_and_what_the_first_writes(ranks):
    (first, second), folder = [result["dashboard"]["history"] for result in ranks[0]], ranks[1]
    assert first["document"]["windows"]["step"] == [dashboard_fits.BATCHES // 2 * epoch - 1 for epoch in (1, 2, 3)]
    assert (first["document"], first["csv"]) == (second["document"], second["csv"])
    # How the batches went over the window is told of each rank's own.
    assert without_courses(first["channels"]) == without_courses(second["channels"])
    assert first["channels"] != second["channels"]
    found = events(folder / "run" / "version_0").documents
    assert found["batchnorm/history"][-1][1] == first["document"]
    assert found["batchnorm/channels"][-1][1] == first["channels"]


def test_all_ranks_have_the_exact_statistics_of_all_their_data(ranks):
    results, folder = ranks
    x = samples(WORLD_SIZE * BATCHES * BATCH_SIZE).tensors[0].double().numpy()
    for how in ("with", "restored"):
        first, second = (result[how] for result in results)
        for one, two in zip([*first["validated"], first["left"]], [*second["validated"], second["left"]], strict=True):
            assert same(one, two, ["num_batches_tracked"]) == []
            assert is_exact(one, x)
    [path] = folder.glob("saved/*.ckpt")
    checkpoint = saved(path)["state_dict"]
    assert is_exact(checkpoint, x)
    assert same(checkpoint, results[0]["restored"]["left"]) == []


def test_on_all_ranks_training_is_bit_identical_with_restore(ranks):
    for result in ranks[0]:
        mine, plain = Trace(), Trace()
        mine.states, plain.states = result["restored"]["trace"], result["without"]["trace"]
        mine.check(plain)
        assert close(result["restored"]["report"], result["without"]["report"])


def test_if_the_pass_fails_on_one_rank_it_fails_on_all(ranks):
    assert "Another rank" in ranks[0][0]["failed"]
    assert "cannot take batch 0" in ranks[0][1]["failed"]
