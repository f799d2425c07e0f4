"""The page in a frame of TensorBoard's: its address, its colours, its mode, its reloads; and its errors."""

import re

import pytest

from tests.page import made_documents as made
from tests.page.served import served
from tests.page.test_page import COLORS, with_channels

pytestmark = pytest.mark.slow

PALETTE = ["#425066", "#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a"]  # TensorBoard's own


@pytest.fixture
def runs():
    return {"b/<i>": with_channels(made.five_layers()), "a": (made.two_sick_of_53(), None)}


@pytest.fixture
def site(opened, runs):
    with served(runs, ["without", "a", "b/<i>"]) as address:
        opened.allowed = (address, "data:", "blob:")
        yield address
        opened.browser.switch_to.default_content()


def enter(opened, address):
    """Open the outer page and look into its frame."""
    opened.browser.switch_to.default_content()
    opened.browser.get("about:blank")
    opened.browser.get(address)
    opened.browser.switch_to.frame(0)
    opened.wait(lambda: opened.texts(".labels > *, .message h1") and "Loading …" not in opened.texts(".message h1"))


def outer(opened, script):
    return opened.script(script.replace("window", "window.parent"))


def test_the_first_run_is_shown_with_sentences_of_all(opened, site):
    enter(opened, site)
    assert opened.labels()[0] == "stem.1"
    opened.wait(lambda: "…" not in opened.texts(".said"))
    assert opened.texts(".run .name") == ["b/<i>", "a"]
    assert opened.texts(".said") == [
        made.five_layers()["windows"]["headline"][-1],
        "2 of 53 BatchNorm layers need attention: 2 lagging.",
    ]


def test_channels_are_asked_for(opened, site):
    enter(opened, site)
    opened.wait(lambda: "Validation beside training" in opened.texts(".panel h3"))
    opened.foreseen = re.compile(r"/channels\?.* 404 ")
    opened.click('button[data-run="a"]')
    opened.wait(lambda: "No channels were kept of this layer." in opened.texts(".panel p"))


def test_runs_have_tensorboards_colours(opened, site):
    enter(opened, site)
    dots = "return [...document.querySelectorAll('.run .dot')].map(e => getComputedStyle(e).backgroundColor)"
    expected = [f"rgb({', '.join(str(int(PALETTE[place][i : i + 2], 16)) for i in (1, 3, 5))})" for place in (2, 1)]
    opened.wait(lambda: opened.script(dots) == expected)


def test_its_mode_is_followed_whatever_the_systems(opened, site):
    opened.emulate(prefers_color_scheme="dark")
    enter(opened, site)
    assert opened.color(1, 0, 12) == COLORS[0]
    outer(opened, "window.document.body.classList.add('dark-mode')")
    opened.wait(lambda: opened.color(1, 0, 12) != COLORS[0])
    outer(opened, "window.document.body.classList.remove('dark-mode')")
    opened.wait(lambda: opened.color(1, 0, 12) == COLORS[0])


def test_the_selection_is_in_tensorboards_address_beside_what_it_keeps_there(opened, site):
    enter(opened, f"{site}#batchnorm&tagFilter=x%26y")
    opened.click_cell(3, 4, 12)
    link = outer(opened, "return window.location.href")
    assert link.startswith(f"{site}#batchnorm&tagFilter=x%26y&p.batchnorm.show=")
    assert link.count("=") == 2  # as TensorBoard takes it apart
    enter(opened, link)
    assert opened.selected() == (["body.7"], "body.7")
    assert "[step 320]" in str(opened.texts('[aria-label="Window"] [aria-pressed="true"]')).replace(
        "'worst: ", "'"
    ).replace("'", "")


def test_a_reload_shows_the_new_window_and_keeps_the_selection(opened, site, runs):
    enter(opened, site)
    opened.click_cell(3, 4, 12)
    runs["b/<i>"] = with_channels(made.five_layers(13))
    outer(opened, "window.reload()")
    opened.wait(lambda: "832" in opened.texts(".axis span"))
    assert opened.selected() == (["body.7"], "body.7")
    assert outer(opened, "return window.replies") >= 1  # TensorBoard waits for an answer


def test_a_run_that_comes_later_is_found(opened, site, runs):
    later = dict(runs)
    runs.clear()
    enter(opened, site)
    assert opened.text(".message h1") == "No BatchNorm data yet"
    runs.update(later)
    outer(opened, "window.reload()")
    opened.wait(lambda: opened.labels())


def test_an_error_of_the_server_is_told_and_a_reload_takes_it_back(opened, site, runs):
    good, runs["b/<i>"] = runs["b/<i>"], ({"format": 3}, None)
    enter(opened, site)
    assert opened.text(".message h1") == "The run “b/<i>” cannot be shown"
    runs["b/<i>"] = good
    outer(opened, "window.reload()")
    opened.wait(lambda: opened.labels())
