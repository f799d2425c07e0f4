"""The page in headless Chromium, without a network."""

import shutil
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from tests.page.opened import OpenedPage

DRIVER = Path("/usr/bin/chromedriver")
ARGUMENTS = (
    *("headless", "no-sandbox", "disable-gpu", "no-first-run", "hide-scrollbars"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    if shutil.which("chromium") is None or not DRIVER.exists():
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    for argument in (*ARGUMENTS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=ChromeService(str(DRIVER)))
    yield browser
    browser.quit()


@pytest.fixture
def opened(chromium, tmp_path):
    """An open page; in the end its console must be empty, and it must have asked nobody for anything."""
    chromium.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    behavior = {"behavior": "allow", "downloadPath": str(tmp_path)}
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    chromium.get_log("browser")
    page = OpenedPage(chromium, tmp_path)
    yield page
    assert [entry for entry in chromium.get_log("browser") if not page.foreseen.search(entry["message"])] == []
    assert [address for address in page.requests() if not address.startswith(page.allowed)] == []
    assert page.script("return window.broken") is None
