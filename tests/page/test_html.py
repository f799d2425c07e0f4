"""The file, without a browser."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lightning_bnmonitor.page.html import ASSETS, page
from tests.page import made_documents as made


class Scripts(HTMLParser):
    """Contents of a file's script elements, as a browser finds them, and what the file refers to."""

    def __init__(self, text):
        super().__init__()
        self.found, self.addresses, self._open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "script":
            self._open = [attributes, ""]

    def handle_data(self, data):
        if self._open:
            self._open[1] += data

    def handle_endtag(self, tag):
        if tag == "script":
            self.found.append(tuple(self._open))
            self._open = None


def test_all_assets_together_are_small():
    sizes = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sum(sizes.values()) <= 100 * 1024, sizes


def test_modules_are_short():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ASSETS.glob("*.js")}
    assert "index.js" in lines
    assert max(lines.values()) <= 350, lines


def test_modules_import_only_each_other():
    names = {path.name for path in ASSETS.glob("*.js")}
    for path in ASSETS.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r'^import .*? from "(.*?)";$', text, re.MULTILINE)
        assert {name.removeprefix("./") for name in imported} <= names
        assert len(imported) == len(re.findall(r"\bimport\b(?!\.meta)", text))


def test_names_become_text_and_never_markup():
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\((?!\))|new Function|setTimeout\(['\"]"
    for path in ASSETS.glob("*.js"):
        assert not re.search(sinks, path.read_text(encoding="utf-8")), path.name


def test_data_are_found_in_the_file_as_they_were_given():
    document = made.odd_names()
    runs = {"</script><b>": {"history": document, "channels": None}}
    scripts = Scripts(page(runs, "a < b & c")).found
    assert [attributes["type"] for attributes, _ in scripts] == ["importmap", "application/json", "module"]
    assert json.loads(scripts[1][1]) == {"runs": runs, "title": "a < b & c"}


def test_nothing_is_referred_to_that_is_not_in_the_file():
    text = page({}, "empty")
    scripts = Scripts(text)
    imports = json.loads(scripts.found[0][1])["imports"]
    assert set(imports) == {f"bnmonitor/{path.name}" for path in ASSETS.glob("*.js")}
    assert all(address.startswith("data:") for address in [*imports.values(), *scripts.addresses])
    assert not re.search(r"url\(|@import", text)


def test_a_number_that_json_lacks_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        page({"run": {"history": {"value": np.nan}, "channels": None}}, "bad")
