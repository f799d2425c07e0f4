"""What is seen in TensorBoard: served on the loopback interface, opened in headless Chromium."""

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from selenium.webdriver.support.wait import WebDriverWait

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.dashboard_fits import Net, data, fit
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS

EXAMPLES = Path(__file__).parents[2] / "examples"
MOMENTA = {"stem": 0.02, "body_1": 0.1, "body_2": 0.1, "body_3": 0.1, "head": 0.02}
METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio", "val_error", "val_shift")
SUMMARY = (
    "act_rmse_max",
    "eval_error_max",
    "eval_error_median",
    "eval_error_p90",
    "mean_shift_max",
    "unhealthy_layers",
)


def version_of(package):
    return tuple(int(part) for part in metadata.version(package).split(".")[:3])


pytestmark = [
    *EXPECTED_WARNINGS,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None or not Path("/usr/bin/chromedriver").exists(),
        reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def screenshot():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import screenshot
    finally:
        sys.path.remove(str(EXAMPLES))
    return screenshot


class Validated(Net):
    """Five layers, two of which do not get warm in three epochs."""

    def __init__(self):
        super().__init__(MOMENTA)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def val_dataloader(self):
        return data()


@pytest.fixture(scope="module")
def url(screenshot, tmp_path_factory):
    """TensorBoard over a short run."""
    logdir = tmp_path_factory.mktemp("logs")
    fit(TensorBoardLogger(logdir), BatchNormMonitor(), model=Validated(), max_epochs=3)
    with screenshot.tensorboard(logdir) as url:
        yield url


@pytest.fixture(scope="module")
def page(screenshot):
    page = screenshot.browser(1280, 1000)
    yield page
    page.quit()


@pytest.fixture
def look(screenshot, url, page, tmp_path_factory):
    """Opens a tab, takes its picture for whoever wants to look at it, and returns the cards."""

    def open_tab(tab, minimum=1, query=""):
        cards = screenshot.open_tab(page, url, tab, minimum, query)
        folder = Path(os.environ.get("SCREENSHOTS", tmp_path_factory.getbasetemp()))
        path = folder / f"{tab}-{page.get_window_size()['width']}.png"
        screenshot.shoot(page, path)
        colors = Image.open(path).convert("RGB").getcolors(maxcolors=2**24)
        assert len(colors) > 100, "an empty page"
        return cards

    return open_tab


def test_the_scalars_tab_has_a_card_for_each_tag_and_those_of_the_model_come_before_those_of_layers(look):
    tags = [tag for tag in look("scalars", len(SUMMARY)) if tag.startswith("bn")]
    assert tags[: len(SUMMARY)] == [f"bn/{name}" for name in SUMMARY]


@pytest.mark.skipif(
    version_of("tensorboard") < (2, 17, 1) and version_of("protobuf") >= (5,),
    reason="TensorBoard shows layouts beside protobuf 5 from 2.17.1 on",
)
def test_the_custom_scalars_tab_has_the_layout_of_the_model_and_of_its_layers(look, page, screenshot):
    charts = look("custom_scalars", 2 + len(METRICS))
    assert charts == ["eval_error over the layers: maximum, 90 %, median", "layers that need attention", *METRICS]
    # A symbol is drawn for each line; of the charts that the window has no room for, none are.
    symbols = f'{screenshot.SHOWN} return shown.filter(e => e.matches("path.symbol")).length'
    WebDriverWait(page, screenshot.TIMEOUT).until(lambda page: page.execute_script(symbols) >= 3 + 1)


@pytest.mark.parametrize("width", [1280, 800])
def test_the_images_tab_shows_the_heatmap(look, page, screenshot, width):
    page.set_window_size(width, 1000)
    widths = look("images")
    tags = f'{screenshot.SHOWN} return shown.filter(e => e.matches("tf-image-loader")).map(e => e.tag)'
    assert page.execute_script(tags) == ["bn/heatmap"]
    assert 300 < widths[0] <= 1000


def test_the_text_tab_shows_the_sentence_and_the_table_before_the_explanations(look):
    text = look("text", 2)[0]
    parts = (
        "2 of 5 BatchNorm layers need attention",
        "layer\tverdict\teval_error",
        "stem\twarming-up",
        "Set momentum=",
    )
    positions = [text.find(part) for part in parts]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert all(layer in text for layer in MOMENTA)


@pytest.mark.skipif(version_of("tensorboard") < (2, 15), reason="the page has other controls before TensorBoard 2.15")
def test_the_time_series_tab_draws_our_lines(look):
    cards = look("timeseries", 2, "tagFilter=eval_error")
    assert all(card.startswith(("bn\n/eval_error", "bn.eval_error\n/")) for card in cards), cards
