"""Lightning's own loggers for W&B, MLflow and Comet, around stand-ins for these libraries: nothing leaves the machine.

The loggers are those that are installed, unchanged. Of the libraries there is what they and we call, with the
parameters that wandb 0.31, mlflow 3.17 and comet_ml 3.58 have; anything else raises.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

from lightning.pytorch.loggers import CometLogger, MLFlowLogger, WandbLogger


class WandbRun:
    id = name = "run"
    config = SimpleNamespace(update=lambda params, allow_val_change=False: None)

    def __init__(self):
        self.logged, self.files = [], []

    def log(self, data, step=None, commit=None):
        self.logged.append(data)

    def log_artifact(self, artifact_or_path, name=None, type=None, aliases=None, tags=None):
        self.files.append((Path(artifact_or_path).name, Path(artifact_or_path).read_text(encoding="utf-8"), type))


class WandbImage:
    def __init__(self, data_or_path, mode=None, caption=None, grouping=None, classes=None, boxes=None, masks=None):
        self.data = data_or_path


class WandbTable:
    def __init__(self, columns=None, data=None, rows=None, dataframe=None):
        self.columns, self.data = columns, data


class MlflowClient:
    def __init__(self, tracking_uri=None, registry_uri=None):
        self.logged, self.files = [], []

    def get_run(self, run_id):
        return SimpleNamespace(info=SimpleNamespace(experiment_id="experiment", run_id=run_id))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        self.logged.append({metric.key: metric.value for metric in metrics})

    def log_artifact(self, run_id, local_path, artifact_path=None):
        self.files.append((Path(local_path).name, Path(local_path).read_text(encoding="utf-8"), run_id))

    def set_terminated(self, run_id, status=None, end_time=None):
        """The run is over."""


class CometExperiment:
    project_name = "project"

    def __init__(self):
        self.logged, self.files = [], []

    def get_key(self):
        return "key"

    def log_other(self, key, value, include_context=True):
        """What it was made by."""

    def flush(self):
        """All is uploaded."""

    def __internal_api__log_parameters__(self, parameters, framework=None, flatten_nested=None, source=None):
        """None of ours."""

    def __internal_api__log_metrics__(self, dic, step=None, epoch=None, prefix=None, framework=None):
        self.logged.append(dict(dic))

    def __internal_api__set_model_graph__(self, graph, overwrite=False, framework=None):
        """None of ours."""

    def log_artifact(self, artifact):
        raise TypeError("an artifact of Comet's is no file")

    def log_asset(self, file_data, file_name=None, overwrite=False, copy_to_tmp=True, step=None, metadata=None):
        self.files.append((file_name, file_data.read()))


def _module(name, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def _entity(key, value, timestamp=None, step=None):
    return SimpleNamespace(key=key, value=value)


LIBRARIES = [
    _module("wandb", Image=WandbImage, Table=WandbTable, run=None),
    _module("wandb.sdk"),
    _module("wandb.sdk.lib", RunDisabled=type(None)),
    _module("wandb.wandb_run", Run=WandbRun),
    _module("mlflow", set_tracking_uri=lambda uri: None),
    _module("mlflow.tracking", MlflowClient=MlflowClient),
    _module("mlflow.entities", Metric=_entity, Param=_entity),
    _module(
        "comet_ml",
        ExperimentConfig=lambda **kwargs: SimpleNamespace(offline_directory=None),
        start=lambda **kwargs: CometExperiment(),
    ),
]


class LoggersOfLightning:
    """The three loggers, while the stand-ins are imported instead of the libraries."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._patches = [patch.dict(sys.modules, {module.__name__: module for module in LIBRARIES})]
        for cls, name in ((WandbLogger, "_WANDB"), (MLFlowLogger, "_MLFLOW"), (CometLogger, "_COMET")):
            self._patches.append(patch.object(sys.modules[cls.__module__], f"{name}_AVAILABLE", True))

    def __enter__(self):
        for each in self._patches:
            each.start()
        return [
            WandbLogger(save_dir=self._folder, experiment=WandbRun()),
            MLFlowLogger(save_dir=str(self._folder), run_id="the run"),
            CometLogger(),
        ]

    def __exit__(self, *_):
        for each in reversed(self._patches):
            each.stop()
