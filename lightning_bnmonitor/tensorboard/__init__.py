"""What TensorBoard shows of us beyond its own pages: the documents of runs in event files, and a tab of their own.

Nothing here imports torch or Lightning, so that TensorBoard starts as fast as without us.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins.base_plugin import TBContext, TBLoader

_log = logging.getLogger(__name__)


class Loader(TBLoader):  # type: ignore[misc]
    """What TensorBoard finds by the entry point ``tensorboard_plugins``. The rest is imported when it loads plugins."""

    def load(self, context: TBContext) -> Any:
        """The plugin; None if it cannot be loaded: an exception would stop TensorBoard, for a tab that it can lack."""
        try:
            from lightning_bnmonitor.tensorboard.plugin import BatchNormPlugin

            return BatchNormPlugin(context)
        except Exception as error:
            _log.warning("TensorBoard has no tab BatchNorm: %r", error)
            return None
