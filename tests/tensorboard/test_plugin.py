"""The tab's server: in TensorBoard's own application, by both of its loaders, with werkzeug's client."""

from __future__ import annotations

import json
import logging
import time
import zlib

import pytest
from tensorboard import default, program
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from werkzeug.test import Client

from lightning_bnmonitor.page.html import ASSETS
from lightning_bnmonitor.tensorboard import Loader, plugin
from tests.tensorboard.written_runs import GOOD, ODD_NAMES, SICK, history, write

BELOW = "/data/plugin/batchnorm/"
RUNS = {"run 2": GOOD, "run 10": SICK, "deep/<er> & ü": {5: dict.fromkeys(ODD_NAMES, 0.5)}}


@pytest.fixture(scope="module", params=["false", "true"])
def load_fast(request):
    """Whether TensorBoard's loader is that in Rust, or that in Python."""
    if request.param == "true":
        pytest.importorskip("tensorboard_data_server")
    return request.param


@pytest.fixture(scope="module")
def logdir(load_fast, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    for name, windows in RUNS.items():
        write(folder / name, history(windows))
    write(folder / "two", history(GOOD), history(SICK, prefix="z"))
    write(folder / "z alone", history(SICK, prefix="z"))
    write(folder / "newer", history(GOOD), format=3)
    write(folder / "older", history(SICK), format=1)
    write(folder / "without")
    return folder


NAMES = ["deep/<er> & ü", "newer", "older", "run 2", "run 10", "two", "two (z)", "z alone"]


@pytest.fixture(scope="module")
def client(load_fast, logdir):
    """TensorBoard's application."""
    apps = []

    class Server(program.TensorBoardServer):
        def __init__(self, app, flags):
            apps.append(app)

        def serve_forever(self):
            raise AssertionError("nobody has asked for that")

        def get_url(self):
            return ""

    board = program.TensorBoard(plugins=default.get_plugins(), server_class=Server)
    board.configure(argv=["", f"--logdir={logdir}", f"--load_fast={load_fast}", "--reload_interval=1"])
    board._make_server()
    client = Client(*apps)
    deadline = time.monotonic() + 60
    while len(client.get(BELOW + "runs").json["runs"]) < len(NAMES):
        assert time.monotonic() < deadline, "TensorBoard has not read its files"
        time.sleep(0.1)
    return client


def asked(client, route, **query):
    return client.get(BELOW + route, query_string=query)


def test_the_tab_is_listed_and_active(client):
    listing = client.get("/data/plugins_listing").json["batchnorm"]
    assert listing["enabled"]
    assert listing["tab_name"] == "BatchNorm"
    path = listing["loading_mechanism"]["module_path"]
    assert client.get(path).status_code == 200


def test_runs_are_those_with_data_in_natural_order_and_each_monitor_by_itself(client):
    runs = asked(client, "runs").json["runs"]
    assert list(runs) == NAMES
    assert set(runs["run 2"]["tags"]) == {"batchnorm/history", "batchnorm/channels"}
    assert set(runs["two (z)"]["tags"]) == {"batchnorm/history/z", "batchnorm/channels/z"}


@pytest.mark.parametrize("run", [*RUNS, "two", "two (z)", "z alone"])
@pytest.mark.parametrize("encoding", ["gzip, deflate, br", "gzip", None])
def test_a_history_is_the_newest_document_of_its_run(client, run, encoding):
    windows = RUNS.get(run, GOOD if run == "two" else SICK)
    expected = history(windows, prefix="z" if "z" in run else "bn").document()
    answer = client.get(
        BELOW + "history", query_string={"run": run}, headers={"Accept-Encoding": encoding} if encoding else {}
    )
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    data = answer.data
    if answer.headers.get("Content-Encoding") == "deflate":
        assert "deflate" in encoding
        data = zlib.decompress(data)
    elif answer.headers.get("Content-Encoding") == "gzip":
        data = zlib.decompress(data, 31)
    assert json.loads(data) == expected


def test_a_document_of_a_newer_format_is_handed_on_for_the_page_to_say_so(client):
    assert asked(client, "history", run="newer").json["format"] == 3
    answer = asked(client, "channels", run="newer", layer="stem")
    assert answer.status_code == 404
    assert "format 3" in answer.json["error"]


def test_what_version_0_5_has_written_is_answered_in_todays_format(client):
    assert asked(client, "history", run="older").json == history(SICK).document()
    assert asked(client, "channels", run="older", layer="stem").json == history(SICK).channels()["layers"]["stem"]


@pytest.mark.parametrize("layer", ODD_NAMES)
def test_channels_are_those_of_one_layer_whatever_its_name(client, layer):
    name = "deep/<er> & ü"
    expected = history(RUNS[name]).channels()["layers"][layer]
    assert asked(client, "channels", run=name, layer=layer).json == expected


@pytest.mark.parametrize(
    ("route", "query", "named"),
    [
        ("history", {}, "“”"),
        ("history", {"run": "none"}, "none"),
        ("history", {"run": "without"}, "without"),
        ("history", {"run": "../run 2"}, "../run 2"),
        ("channels", {"run": "none", "layer": "stem"}, "none"),
        ("channels", {"run": "run 2", "layer": "none"}, "none"),
        ("channels", {"run": "run 2"}, "“”"),
        ("nothing.js", {}, "nothing.js"),
        ("", {}, ""),
        ("../../../index.html", {}, ""),
        ("%2e%2e/document.py", {}, "document.py"),
        ("..%2fdocument.py", {}, "document.py"),
        ("assets/index.js", {}, "index.js"),
        ("page.html", {}, "page.html"),
    ],
)
def test_what_is_not_there_is_answered_by_404_and_a_sentence(client, route, query, named):
    answer = asked(client, route, **query)
    assert answer.status_code == 404
    if answer.mimetype == "application/json":
        assert named in answer.json["error"]
        assert answer.json["error"].endswith(".")
    else:
        assert route in ("", "../../../index.html")  # not below what is ours


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("route", ["runs", "history?run=run 2", "index.js", "none"])
def test_only_reading_is_answered(client, method, route):
    answer = client.open(BELOW + route, method=method)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD"}
    assert method in answer.json["error"]


@pytest.mark.parametrize("route", ["runs", "index.js"])
def test_heads_are_answered_without_a_body(client, route):
    answer = client.head(BELOW + route)
    assert (answer.status_code, answer.data) == (200, b"")


def test_all_files_of_the_page_are_served_as_what_they_are(client):
    kinds = {".js": "text/javascript", ".css": "text/css"}
    paths = [path for path in ASSETS.iterdir() if path.is_file()]
    assert {path.name for path in paths} > {"index.js", "source.js", "page.css"}
    for path in paths:
        answer = asked(client, path.name)
        assert (answer.status_code, answer.mimetype) == (200, kinds[path.suffix])
        assert answer.data == path.read_bytes()
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_run_that_is_being_written_shows_its_new_window(client, logdir):
    folder = logdir / "written"
    deadline = time.monotonic() + 60

    def wait_for(windows):
        while True:
            answer = asked(client, "history", run="written")
            if answer.status_code == 200 and answer.json["windows"]["step"] == list(windows):
                return
            assert time.monotonic() < deadline
            time.sleep(0.2)

    write(folder, history({10: SICK[10]}))
    wait_for([10])
    write(folder, history(SICK))
    wait_for([10, 20, 30])


# ------------------------------------------------------------------------------------------------------ without its app


def context_of(folder):
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    return base_plugin.TBContext(data_provider=provider, logdir=str(folder), multiplexer=multiplexer)


def test_it_is_active_where_there_are_data_of_ours(tmp_path):
    write(tmp_path / "ours", history(GOOD))
    write(tmp_path / "others")
    assert Loader().load(context_of(tmp_path / "ours")).is_active()
    assert not Loader().load(context_of(tmp_path / "others")).is_active()


def test_a_plugin_that_cannot_be_loaded_is_told_of_and_leaves_tensorboard_alone(monkeypatch, caplog, tmp_path):
    def fail(*args):
        raise ImportError("no numpy")

    monkeypatch.setattr(plugin.BatchNormPlugin, "__init__", fail)
    with caplog.at_level(logging.WARNING):
        assert Loader().load(context_of(tmp_path)) is None
    assert "no tab BatchNorm" in caplog.text
    assert "no numpy" in caplog.text
