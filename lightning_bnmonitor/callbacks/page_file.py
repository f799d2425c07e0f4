"""The page as a file, for loggers that take files: those of Weights & Biases, MLflow and Comet."""

from __future__ import annotations

import io
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def takes_files(logger: Any) -> bool:
    """Whether a logger takes files."""
    try:
        experiment = type(getattr(logger, "experiment", None))
    except Exception:  # what cannot be written to takes nothing
        return False
    return hasattr(experiment, "log_asset") or hasattr(experiment, "log_artifact")


def log_page(logger: Any, prefix: str, page: str) -> None:
    """Log a page by the public methods of what ``logger.experiment`` is.

    Args:
        logger: One that :func:`takes_files`.
        prefix: What our tags begin with: it is in the name of the file unless it is "bn".
        page: The page.
    """
    suffix = "" if prefix == "bn" else "-" + re.sub(r"[^\w.-]", "_", prefix)
    name = f"batchnorm{suffix}.html"
    experiment = logger.experiment
    if hasattr(experiment, "log_asset"):  # Comet's; it uploads later, and copies what is no file
        experiment.log_asset(io.StringIO(page), file_name=name)
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(page, encoding="utf-8")
        if hasattr(type(logger), "run_id"):  # MLflow's, which knows several runs
            experiment.log_artifact(logger.run_id, str(path))
        else:  # W&B's
            experiment.log_artifact(str(path), type="report")
