"""A logger that fails is warned of once and ends no run; an interrupt comes through."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_bnmonitor import BatchNormMonitor
from lightning_bnmonitor.callbacks import dashboard
from lightning_bnmonitor.report.history import History
from tests.callbacks.dashboard_fits import (
    BATCHES,
    OURS,
    STEPS,
    At,
    LikeMlflow,
    LikeWandb,
    Net,
    assert_same,
    board,
    fit,
    stop,
    weights,
)
from tests.callbacks.event_files import events
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS

pytestmark = EXPECTED_WARNINGS


class Broken(RuntimeError):  # noqa: N818
    pass


def failing(base, methods, error):
    """A class of loggers or writers some methods of which raise."""

    def fail(self, *args, **kwargs):
        raise error

    return type(f"Failing{base.__name__}", (base,), dict.fromkeys(methods, fail))


class Writes(TensorBoardLogger):
    """A TensorBoardLogger with a writer of another class."""

    def __init__(self, folder, writer_class, **kwargs):
        super().__init__(folder, **kwargs)
        self._experiment = writer_class(log_dir=self.log_dir)


def messages(caught):
    return [str(w.message) for w in caught if "did not log" in str(w.message)]


@pytest.fixture(scope="module")
def unmonitored():
    """What training without the monitor leaves after so many epochs."""
    return cache(lambda max_epochs: weights(*fit(False, max_epochs=max_epochs)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "what", "first"),
    [
        (["add_image"], {"heatmap"}, True),
        (["add_text"], {"report"}, False),
        (["add_custom_scalars"], {"charts"}, True),
        (["add_image", "add_text", "add_custom_scalars"], {"heatmap", "report", "charts"}, True),
        (["add_image", "add_text", "add_custom_scalars"], {"heatmap", "report", "charts"}, False),
    ],
)
def test_what_a_writer_cannot_take_is_warned_of_once_and_all_else_is_logged(
    tmp_path, run, unmonitored, methods, what, first
):
    broken = Writes(tmp_path / "broken", failing(SummaryWriter, methods, Broken("no")))
    whole, other = TensorBoardLogger(tmp_path / "whole"), LikeWandb()
    loggers = [broken, whole, other] if first else [whole, other, broken]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = weights(*fit(loggers, BatchNormMonitor(), max_epochs=4))
    assert sorted(messages(caught)) == sorted(f"Writes did not log the BatchNorm {kind}: Broken('no')" for kind in what)
    assert_same(outcome, unmonitored(4))
    found, expected = events(broken.log_dir), events(whole.log_dir)
    assert found.scalars == expected.scalars == run.events.scalars
    assert len(found.texts["bn/report"]) == 4 * ("report" not in what)
    assert len(found.images["bn/heatmap"]) == len(expected.images["bn/heatmap"]) * ("heatmap" not in what)
    assert len(found.layouts) == ("charts" not in what)
    assert expected.texts == run.events.texts
    assert expected.at("bn/heatmap")[-1] == STEPS[-1]
    assert expected.categories() == OURS
    assert [text[-1] for text in other.texts] == STEPS
    assert other.images[-1][2] == STEPS[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("log_image", "heatmap"), ("log_text", "report")])
def test_what_a_logger_cannot_take_is_warned_of_once_and_all_else_is_logged(unmonitored, method, kind):
    broken, whole = failing(LikeWandb, [method], Broken("no"))(), LikeWandb()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = weights(*fit([broken, whole], BatchNormMonitor(every_n_train_batches=8)))
    assert messages(caught) == [f"FailingLikeWandb did not log the BatchNorm {kind}: Broken('no')"]
    assert_same(outcome, unmonitored(2))
    assert broken.of_ours() == whole.of_ours()
    assert len(whole.of_ours()) == 4
    assert len(whole.texts) == 4
    assert len(broken.texts) == 4 * (kind == "heatmap")
    assert len(broken.images) == len(whole.images) * (kind == "report")
    assert whole.images[-1][2] == STEPS[1]


class Lost(TensorBoardLogger):
    """Loses what it writes to, in the midst of the run."""

    is_lost = False

    @property
    def experiment(self):
        if self.is_lost:
            raise Broken("no")
        return super().experiment

    def save(self):
        pass

    def finalize(self, status):
        pass


@pytest.mark.parametrize("batch", [3, BATCHES + 3], ids=["in the first window", "in the second window"])
def test_a_logger_that_loses_its_writer_does_not_end_the_run(tmp_path, unmonitored, batch):
    broken, whole = Lost(tmp_path), LikeWandb()
    lose = At(batch, lambda _: setattr(broken, "is_lost", True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = weights(*fit([broken, whole], BatchNormMonitor(), lose, log_every_n_steps=1000))
    assert_same(outcome, unmonitored(2))
    assert any("Lost did not log the BatchNorm report" in message for message in messages(caught))
    assert len(whole.texts) == 2
    assert whole.images[-1][2] == STEPS[1]


@pytest.mark.parametrize(
    ("method", "batches_over"),  # what tells of a window waits for a validation until the epoch ends
    [("add_image", BATCHES), ("add_text", BATCHES), ("add_custom_scalars", BATCHES - 1)],
)
def test_a_keyboard_interrupt_while_a_writer_logs_comes_through(tmp_path, method, batches_over, restored_signals):
    logger = Writes(tmp_path, failing(SummaryWriter, [method], KeyboardInterrupt()))
    count, model = At(0, stop), Net()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(logger, BatchNormMonitor(), count, model=model)
    assert count.count == batches_over
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["log_image", "log_text"])
def test_a_keyboard_interrupt_while_a_logger_logs_comes_through(method, restored_signals):
    count = At(0, stop)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(failing(LikeWandb, [method], KeyboardInterrupt())(), BatchNormMonitor(), count)
    assert count.count == BATCHES


@pytest.mark.parametrize(
    ("what", "owner", "name"),
    [("heatmap", dashboard, "draw"), ("history", History, "document"), ("page", History, "page")],
)
def test_what_cannot_be_made_does_not_end_the_run_and_all_else_is_logged(tmp_path, monkeypatch, what, owner, name):
    def fail(*args):
        raise Broken("no")

    class Spoil(Callback):
        def on_train_end(self, trainer, pl_module):
            monkeypatch.setattr(owner, name, fail)

    monkeypatch.setattr(dashboard, "_SHARE", 0.0)  # what is not the first is made at the end
    logger, files = board(tmp_path), LikeMlflow()
    with pytest.warns(UserWarning, match=f"The BatchNorm {what} could not be made: Broken"):
        fit([logger, files], Spoil(), BatchNormMonitor())
    found, both = events(logger.log_dir), STEPS[:2]
    assert found.at("bn/report") == both
    assert found.at("bn/heatmap") == (both[:1] if what == "heatmap" else both)
    assert found.documents["batchnorm/history"][-1][0] == (both[0] if what == "history" else both[1])
    assert len(files.experiment.files) == (what == "heatmap")  # a page has a document in it
