"""Lightning's names from the package that is in use, ``lightning.pytorch`` or ``pytorch_lightning``.

They have one class each of the same name. From Lightning 2.6 on, the Trainer of one takes callbacks of the other, as
long as nobody asks which they are of: no file here does. Before, it refuses those that have a state.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING


def _in_use() -> str:
    """The package that is imported already, ``lightning.pytorch`` before the other; or else that can be imported."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if sys.modules.get(name) is not None:
            return name
    try:
        import_module("lightning.pytorch")
    except ModuleNotFoundError:
        return "pytorch_lightning"
    return "lightning.pytorch"


if TYPE_CHECKING or _in_use() == "lightning.pytorch":
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch import seed_everything as seed_everything
    from lightning.pytorch.loggers import Logger as Logger
    from lightning.pytorch.utilities import CombinedLoader as CombinedLoader
else:
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning import LightningModule as LightningModule
    from pytorch_lightning import Trainer as Trainer
    from pytorch_lightning import seed_everything as seed_everything
    from pytorch_lightning.loggers import Logger as Logger
    from pytorch_lightning.utilities import CombinedLoader as CombinedLoader
