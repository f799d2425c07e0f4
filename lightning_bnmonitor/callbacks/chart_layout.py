"""TensorBoard's layout of charts: its page "custom scalars"."""

from __future__ import annotations

import re
import weakref
from typing import Any

from lightning_bnmonitor.compat import logger_prefix
from lightning_bnmonitor.diagnosis.evidence import METRICS

Layout = dict[str, dict[str, list[Any]]]
"""Of each category its charts, and of each chart its kind and the patterns of its tags."""

_set: weakref.WeakKeyDictionary[Any, Layout] = weakref.WeakKeyDictionary()  # by writer, what all monitors have set


def set_layout(logger: Any, prefix: str, per_layer: bool, validates: bool) -> None:
    """Set the layout of a logger that writes to TensorBoard, once for a ``fit``.

    TensorBoard shows the last layout of a run. So this replaces one that was set before, but for what other monitors
    have set with this writer, and one that is set later stands.

    Args:
        logger: Nothing is done with one that does not write to TensorBoard.
        prefix: What our tags begin with.
        per_layer: Whether there are scalars for each layer.
        validates: Whether there are scalars of validation.
    """
    writer: Any = getattr(logger, "experiment", None)
    if not hasattr(type(writer), "add_custom_scalars"):
        return
    prefix = tag_of(logger, prefix)
    ours = layout(prefix, per_layer=True, validates=True)
    others = {title: charts for title, charts in _set.get(writer, {}).items() if title not in ours}
    _set[writer] = {**others, **layout(prefix, per_layer, validates)}
    writer.add_custom_scalars(_set[writer])


def layout(prefix: str, per_layer: bool, validates: bool) -> Layout:
    """The charts of the tags with a prefix, as ``SummaryWriter.add_custom_scalars`` takes them."""
    suffix = "" if prefix == "bn" else f" ({prefix})"
    prefix = re.escape(prefix)
    errors = [f"^{prefix}/eval_error_{of}$" for of in ("max", "p90", "median")]
    charts: Layout = {
        f"BatchNorm health{suffix}": {
            "eval_error over the layers: maximum, 90 %, median": ["Multiline", errors],
            "layers that need attention": ["Multiline", [f"^{prefix}/unhealthy_layers$"]],
        }
    }
    if per_layer:
        metrics = (*METRICS, *(["val_error", "val_shift"] if validates else []))
        charts[f"BatchNorm layers{suffix}"] = {metric: ["Multiline", [rf"^{prefix}\.{metric}/"]] for metric in metrics}
    return charts


def tag_of(logger: Any, tag: str) -> str:
    """A tag with the prefix that the logger gives to those of scalars."""
    prefix = logger_prefix(logger)
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}{tag}" if prefix else tag
