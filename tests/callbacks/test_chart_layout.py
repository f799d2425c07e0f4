"""TensorBoard's layout of charts, where several monitors set one."""

from __future__ import annotations

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from lightning_bnmonitor.callbacks.chart_layout import set_layout


def layouts(logger):
    """The categories of each layout in the file that a logger writes."""
    logger.experiment.flush()
    path = logger.experiment.file_writer.event_writer._file_name
    values = [value for event in EventFileLoader(path).Load() for value in event.summary.value]
    return [
        [category.title for category in layout_pb2.Layout.FromString(value.tensor.string_val[0]).category]
        for value in values
        if value.tag == metadata.CONFIG_SUMMARY_TAG
    ]


def test_what_monitors_set_with_one_writer_is_shown_together_and_their_own_is_replaced(tmp_path):
    logger, other = TensorBoardLogger(tmp_path, name="one"), TensorBoardLogger(tmp_path, name="other")
    set_layout(logger, "bn", per_layer=True, validates=False)
    set_layout(logger, "z", per_layer=False, validates=False)
    set_layout(logger, "bn", per_layer=False, validates=False)
    set_layout(other, "z", per_layer=False, validates=False)
    assert layouts(logger)[-1] == ["BatchNorm health (z)", "BatchNorm health"]
    assert layouts(other) == [["BatchNorm health (z)"]]
