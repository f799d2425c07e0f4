"""Documents as TensorBoard's events: their tags, and whose they are."""

from __future__ import annotations

import re

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

from lightning_bnmonitor.page.document import FORMAT

PLUGIN_NAME = "batchnorm"
HISTORY, CHANNELS = "batchnorm/history", "batchnorm/channels"
"""Tags of the two documents of a run. Where several monitors write, a prefix follows that is not "bn"."""


def tag(kind: str, prefix: str) -> str:
    """The tag of a kind of document, :data:`HISTORY` or :data:`CHANNELS`, of the monitor that logs with a prefix."""
    return kind if prefix == "bn" else f"{kind}/{prefix}"


def summary(tag: str, data: bytes) -> Summary:
    """An encoded document as a ``Summary``. Without its ``data_class`` TensorBoard would drop it."""
    plugin_data = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=b'{"format": %d}' % FORMAT)
    metadata = SummaryMetadata(data_class=DATA_CLASS_TENSOR, plugin_data=plugin_data)
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[data])
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def by_monitor(run: str, tags: list[str]) -> dict[str, dict[str, str]]:
    """Tags by kind, under the name of the run; of further monitors in it, with their prefix behind that."""
    monitors: dict[str, dict[str, str]] = {}
    for tag in tags:
        for kind in (HISTORY, CHANNELS):
            if tag == kind or tag.startswith(f"{kind}/"):
                monitors.setdefault(tag[len(kind) + 1 :], {})[kind] = tag
    alone = len(monitors) == 1
    return {run if alone or not prefix else f"{run} ({prefix})": kinds for prefix, kinds in monitors.items()}


def in_natural_order(name: str) -> list[tuple[int, str]]:
    """A key by which "run 9" comes before "run 10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
