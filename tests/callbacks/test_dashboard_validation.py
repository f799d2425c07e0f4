"""The text of a window waits for the validation that follows its last batch, and tells what that has shown."""

import contextlib

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.dashboard_fits import StoppedError, board
from tests.callbacks.event_files import events, rendered
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.recorded_fits import LAYERS, Net, train_data, trainer_for, val_data

pytestmark = EXPECTED_WARNINGS

OF_WINDOW = ["layer", "verdict", "eval_error", "noise"]
VALIDATED = [*OF_WINDOW, "val_error", "val_shift"]


def texts_of(tmp_path, monitor, *callbacks, validates=True, **options):
    """The texts of a fit of 6 batches an epoch, by step, as TensorBoard shows them."""
    logger = board(tmp_path)
    trainer = trainer_for(tmp_path, monitor, *callbacks, logger=logger, **options)
    with contextlib.suppress(StoppedError):
        trainer.fit(Net(), train_data(), val_data() if validates else None)
    return {step: rendered(text) for step, text in events(logger.log_dir).texts["bn/report"]}


@pytest.mark.parametrize(
    ("arguments", "options", "headers"),
    [
        ({}, {"max_epochs": 2}, {5: VALIDATED, 11: VALIDATED}),
        ({}, {"max_epochs": 2, "validates": False}, {5: OF_WINDOW, 11: OF_WINDOW}),
        ({}, {"max_epochs": 2, "check_val_every_n_epoch": 2}, {5: OF_WINDOW, 11: VALIDATED}),
        ({}, {"max_epochs": 2, "val_check_interval": 3}, {5: VALIDATED, 11: VALIDATED}),
        ({}, {"max_epochs": 2, "max_steps": 8}, {5: VALIDATED, 7: OF_WINDOW}),
        ({"every_n_train_batches": 2}, {}, {1: OF_WINDOW, 3: OF_WINDOW, 5: VALIDATED}),
        ({"every_n_train_batches": 4}, {"max_epochs": 2}, {3: OF_WINDOW, 7: OF_WINDOW, 11: VALIDATED}),
        ({"validation_batches": 0}, {}, {5: OF_WINDOW}),
    ],
)
def test_a_text_tells_of_the_validation_that_follows_the_last_batch_of_its_window(
    tmp_path, arguments, options, headers
):
    texts = texts_of(tmp_path, BatchNormMonitor(**arguments), **options)
    assert {step: page.rows[0] for step, page in texts.items()} == headers
    for page in texts.values():
        assert ("Validation differs from training in 2 of them" in page.strong[0]) == (page.rows[0] == VALIDATED)
        assert sorted(row[0] for row in page.rows[1:]) == sorted(LAYERS)


def test_the_text_of_a_window_whose_validation_breaks_is_not_lost(tmp_path):
    class Breaks(Callback):
        def on_validation_batch_end(self, *args):
            raise StoppedError

    texts = texts_of(tmp_path, BatchNormMonitor(), Breaks())
    assert {step: page.rows[0] for step, page in texts.items()} == {5: OF_WINDOW}
