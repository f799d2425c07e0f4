"""A server that answers as TensorBoard does around the plugin: a frame, messages, no script from elsewhere."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

from lightning_bnmonitor.page.html import ASSETS

POLICY = (
    "default-src 'self';font-src 'self' data:;img-src 'self' data: blob:;object-src 'none';"
    "style-src 'self' data: 'unsafe-inline';connect-src 'self';script-src 'self' 'unsafe-eval' 'nonce-frame'"
)
TYPES = {"js": "text/javascript", "css": "text/css"}
OUTER = """<!DOCTYPE html><head><link rel="icon" href="data:,"></head><body><tb-webapp></tb-webapp>
<style>iframe { position: fixed; inset: 0; width: 100%; height: 100%; border: 0; }</style>
<iframe src="data/plugin_entry.html?name=batchnorm"></iframe>
<script nonce="frame">
    window.addEventListener("message", event => {
        if (event.data !== "experimental.bootstrap") return;
        const port = event.ports[0];
        port.onmessage = message => {
            const {type, id, isReply} = JSON.parse(message.data);
            if (isReply) window.replies = (window.replies ?? 0) + 1;
            else if (type === "experimental.GetRuns")
                port.postMessage(JSON.stringify({type, id, payload: ORDER, error: null, isReply: true}));
        };
        window.reload = () => port.postMessage(
            JSON.stringify({type: "experimental.DataReloaded", id: 7, payload: null, error: null, isReply: false}));
    });
</script></body>"""
INNER = """<!DOCTYPE html>
<head><base href="plugin/batchnorm/" /></head>
<body><script type="module" nonce="frame">import("./index.js").then((m) => void m.render());</script></body>"""


@contextmanager
def served(runs, order):
    """Serve documents of runs ({name: (history, channels)}); `order` are the names of all runs, with and without.

    Yields the address. The runs may be changed meanwhile.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            name = url.path.rsplit("/", 1)[-1]
            if url.path == "/":
                self.answer(OUTER.replace("ORDER", json.dumps(order)), "text/html")
            elif url.path == "/data/plugin_entry.html":
                self.answer(INNER, "text/html")
            elif name == "runs":
                self.json({"runs": {run: {"tags": ["batchnorm/history"]} for run in runs}})
            elif name == "history" and query["run"] in runs:
                self.json(runs[query["run"]][0])
            elif name == "channels" and query["run"] in runs:
                sets = (runs[query["run"]][1] or {"layers": {}})["layers"].get(query["layer"])
                self.json(sets or {"error": f"No channels of {query['layer']}."}, 200 if sets else 404)
            elif (path := ASSETS / name).is_file():
                self.answer(path.read_text(encoding="utf-8"), TYPES[path.suffix[1:]])
            else:
                self.json({"error": f"There is no {name}."}, 404)

        def json(self, value, status=200):
            self.answer(json.dumps(value), "application/json", status)

        def answer(self, text, kind, status=200):
            body = text.encode()
            self.send_response(status)
            for header, value in {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(body)),
                "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-cache, must-revalidate",
            }.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
