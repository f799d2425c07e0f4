"""TensorBoard's tab "BatchNorm": the page's files, and the documents of the runs.

Below ``data/plugin/batchnorm/``: ``runs``, ``history?run=R``, ``channels?run=R&layer=NAME``, in JSON, and the files of
the page, by name. What is not there is answered with 404 and ``{"error": sentence}``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.context import RequestContext
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lightning_bnmonitor.page.document import decode, upgraded
from lightning_bnmonitor.page.html import ASSETS
from lightning_bnmonitor.tensorboard.events import CHANNELS, HISTORY, PLUGIN_NAME, by_monitor, in_natural_order

_KINDS = {".js": "text/javascript", ".css": "text/css"}
_JSON = "application/json"


class _NotThereError(Exception):
    """What was asked for is not there; the sentence is the answer."""


class Series(NamedTuple):
    """The documents of one monitor in one run."""

    run: str
    """TensorBoard's name of the run."""
    tags: dict[str, str]
    """By kind, :data:`HISTORY` or :data:`CHANNELS`."""


class BatchNormPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """The tab, as TensorBoard takes it."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        super().__init__(context)
        self._provider = context.data_provider

    def get_plugin_apps(self) -> dict[str, Any]:
        """The routes: those that there are, and one for all others."""
        files = {f"/{path.name}": _served(partial(_file, path)) for path in ASSETS.iterdir() if path.suffix in _KINDS}
        return {
            **files,
            "/runs": _served(self._runs),
            "/history": _served(self._history),
            "/channels": _served(self._channels),
            "/*": _served(_nothing),
        }

    def is_active(self) -> bool:
        """Whether there are data of ours."""
        return PLUGIN_NAME in (self._provider.list_plugins(RequestContext(), experiment_id="") or ())

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """The name of the tab and the module that draws it."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="BatchNorm")

    def _runs(self, request: wrappers.Request) -> tuple[Any, str]:
        found = self._all_series(request)
        return {"runs": {name: {"tags": list(series.tags.values())} for name, series in found.items()}}, _JSON

    def _history(self, request: wrappers.Request) -> tuple[Any, str]:
        return upgraded(self._read(request, HISTORY)), _JSON

    def _channels(self, request: wrappers.Request) -> tuple[Any, str]:
        layer = request.args.get("layer", "")
        try:
            layers = decode(self._read(request, CHANNELS))["layers"]
        except ValueError as error:
            raise _NotThereError(str(error)) from error
        if layer not in layers:
            raise _NotThereError(f"There is no layer “{layer}” in the last window of which channels were written.")
        return layers[layer], _JSON

    def _all_series(self, request: wrappers.Request) -> dict[str, Series]:
        """By the name that the page shows, in the order of the runs."""
        context, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        runs = self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN_NAME)
        return {
            name: Series(run, tags)
            for run in sorted(runs, key=in_natural_order)
            for name, tags in by_monitor(run, sorted(runs[run])).items()
        }

    def _read(self, request: wrappers.Request, kind: str) -> bytes:
        """The newest document of a kind, as it is in the file."""
        name = request.args.get("run", "")
        series = self._all_series(request).get(name)
        if series is None or kind not in series.tags:
            raise _NotThereError(f"There is no run “{name}” with BatchNorm data yet.")
        tag = series.tags[kind]
        found = self._provider.read_tensors(
            plugin_util.context(request.environ),
            experiment_id=plugin_util.experiment_id(request.environ),
            plugin_name=PLUGIN_NAME,
            downsample=1,  # the newest is always among them
            run_tag_filter=provider.RunTagFilter(runs=[series.run], tags=[tag]),
        )
        try:
            data: bytes = found[series.run][tag][-1].numpy.item()
        except (KeyError, IndexError):  # it was deleted meanwhile
            raise _NotThereError(f"There is no run “{name}” with BatchNorm data any more.") from None
        return data


def _file(path: Path, _: wrappers.Request) -> tuple[Any, str]:
    return path.read_bytes(), _KINDS[path.suffix]


def _nothing(request: wrappers.Request) -> tuple[Any, str]:
    raise _NotThereError(f"There is nothing at “{request.path}”.")


def _served(answer: Callable[[wrappers.Request], tuple[Any, str]]) -> Any:
    """An application that answers reading requests with some content of some type; bytes of JSON are compressed."""

    @wrappers.Request.application
    def app(request: wrappers.Request) -> Any:
        if request.method not in ("GET", "HEAD"):
            error = {"error": f"{request.method} does nothing here: GET and HEAD do."}
            return http_util.Respond(request, error, _JSON, code=405, headers=[("Allow", "GET, HEAD")])
        try:
            content, kind = answer(request)
        except _NotThereError as missing:
            return http_util.Respond(request, {"error": str(missing)}, _JSON, code=404)
        if kind == _JSON and isinstance(content, bytes):
            if request.accept_encodings.best_match(["deflate"]):  # which is just that
                return http_util.Respond(request, content, kind, content_encoding="deflate")
            content = zlib.decompress(content)
        return http_util.Respond(request, content, kind)

    return app
