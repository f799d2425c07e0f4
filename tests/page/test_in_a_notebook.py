"""A history in a notebook: its HTML in a page as Jupyter puts it there, in a real browser, and in a sandbox."""

from __future__ import annotations

import html
import json

import pytest

from tests.page.test_page import COLORS
from tests.tensorboard.written_runs import ODD_NAMES, history

pytestmark = pytest.mark.slow

WITH_HTML = '<!DOCTYPE html><meta charset="utf-8"><h1>Notebook</h1>'
# As JupyterLab does with trusted output.
INSERTED = f'{WITH_HTML}<div></div><script>document.querySelector("div").innerHTML = OUTPUT</script>'
# As Colab and others do with all output.
SANDBOXED = f"{WITH_HTML}<iframe sandbox='allow-scripts' style='width: 100%; height: 800px' srcdoc=\"OUTPUT\"></iframe>"


@pytest.fixture(scope="module")
def made():
    return history({step: dict.fromkeys(ODD_NAMES, error) for step, error in ((10, 0.5), (20, 0.4), (30, 0.05))})


def in_notebook(opened, text, frames):
    """Open a page, and look into a frame in it, or into one in that."""
    path = opened.folder / "notebook.html"
    path.write_text(text, encoding="utf-8")
    opened.browser.get(path.as_uri())
    for _ in range(frames):
        opened.browser.switch_to.frame(opened.browser.find_element("css selector", "iframe"))
    opened.wait(opened.labels)


@pytest.fixture
def notebook(opened):
    yield opened
    opened.browser.switch_to.default_content()


@pytest.mark.parametrize("how", ["inserted", "in the file", "in a sandbox"])
def test_it_shows_itself_as_the_page(notebook, made, how):
    output = made._repr_html_()
    if how == "inserted":
        in_notebook(notebook, INSERTED.replace("OUTPUT", json.dumps(output).replace("</", "<\\/")), 1)
    elif how == "in the file":  # as nbconvert exports it
        in_notebook(notebook, WITH_HTML + output, 1)
    else:
        in_notebook(notebook, SANDBOXED.replace("OUTPUT", html.escape(output)), 2)
    assert notebook.labels() == list(ODD_NAMES)
    assert notebook.script("return [innerWidth > 800, innerHeight]") == [True, 720]
    assert notebook.color(0, 2, 3) == COLORS[1]
    notebook.script("document.querySelectorAll('.label')[1].click()")
    notebook.wait(lambda: notebook.selected() == ([ODD_NAMES[1]], ODD_NAMES[1]))
    notebook.click('button[data-value="worst"]')
    notebook.type("size")  # of none of them
    notebook.wait(lambda: notebook.text(".heatmap .quiet") == "No layer matches the filter.")
