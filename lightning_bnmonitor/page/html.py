"""One self-contained file: the page, its modules and its data."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
"""Where the page's modules and its style sheet are."""
_IMPORT = re.compile(r'(\bfrom ")\./([a-z_]+\.js)(";)')
_PREFIX = "bnmonitor/"  # of the modules' names in the file
# Nothing is fetched, and what is not in the file does not run.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def page(runs: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """The page as one HTML file that needs no other.

    Args:
        runs: By name, each with its documents: ``history``, and ``channels`` or None.
        title: What stands in the browser's title.

    Raises:
        ValueError: If there are numbers in it that JSON lacks.
    """
    modules = {path.name: path.read_text(encoding="utf-8") for path in sorted(ASSETS.glob("*.js"))}
    imports = {"imports": {_PREFIX + name: _as_url(text) for name, text in modules.items()}}
    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
<script type="importmap">{_as_json(imports)}</script>
</head>
<body>
<noscript>This page needs JavaScript.</noscript>
<script type="application/json" id="bnmonitor-data">{_as_json({"runs": runs, "title": title})}</script>
<script type="module">import {{ render }} from "{_PREFIX}index.js"; render();</script>
</body>
</html>
"""


def _as_url(module: str) -> str:
    """A module's text as an address; what it imports it finds by the import map."""
    text = _IMPORT.sub(rf"\1{_PREFIX}\2\3", module)
    return "data:text/javascript;charset=utf-8;base64," + base64.b64encode(text.encode()).decode()


def _as_json(value: Any) -> str:
    """JSON that no name can end early: it has no ``<``."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
