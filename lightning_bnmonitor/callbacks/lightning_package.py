"""Lightning's names from the package that is installed: ``lightning.pytorch``, or else ``pytorch_lightning``.

They have one class each of the same name, and callbacks of one run in the Trainer of the other, as long as nobody asks
which they are of: no file here does.
"""

from __future__ import annotations

try:
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch.loggers import Logger as Logger
except ModuleNotFoundError:
    from pytorch_lightning import Callback as Callback  # type: ignore[assignment]
    from pytorch_lightning import LightningModule as LightningModule  # type: ignore[assignment]
    from pytorch_lightning import Trainer as Trainer  # type: ignore[assignment]
    from pytorch_lightning.loggers import Logger as Logger  # type: ignore[assignment]
