"""Take the picture in README.md: TensorBoard's page of a run of ``examples/synthetic.py``, in headless Chromium.

It needs Chromium and its driver (Debian: ``apt-get install chromium chromium-driver``) and the extra ``docs``. It
serves and asks on the loopback interface alone.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

TAGS = r"accuracy|unhealthy|eval_error/(body\.4|head|stem)"
NUM_CARDS = 6
SHOW_OUTLIERS = '//mat-checkbox[contains(., "Ignore outliers")]//input'
CLOSE_SETTINGS = '//button[@aria-label="Close side pane"]'
CARDS_WITH_LINES = """
    return [...document.querySelectorAll("line-chart")].filter(chart => chart.querySelector("svg path[d]")).length
"""
WIDTH, HEIGHT = 1560, 1190
TIMEOUT = 120  # seconds


def browser() -> Chrome:
    """Chromium without a window or a network; without WebGL, so that TensorBoard's lines are elements to wait for."""
    options = ChromeOptions()
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-3d-apis", "hide-scrollbars", "no-first-run"):
        options.add_argument(f"--{argument}")
    for argument in ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--window-size={WIDTH},{HEIGHT}")
    return Chrome(options=options, service=ChromeService("/usr/bin/chromedriver"))


def is_served(url: str) -> bool:
    """Whether TensorBoard answers and has found a run."""
    try:
        with urllib.request.urlopen(f"{url}/data/runs", timeout=5) as answer:
            return answer.read().strip() != b"[]"
    except OSError:
        return False


def main() -> None:
    """Serve, look, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="lightning_logs", help="default: %(default)s")
    parser.add_argument("--output", default=Path(__file__).parent / "images" / "tensorboard.png", type=Path)
    args = parser.parse_args()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--logdir",
        args.logdir,
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    chromium = browser()
    try:
        wait = WebDriverWait(chromium, TIMEOUT)
        wait.until(lambda _: is_served(url))
        chromium.get(f"{url}/?tagFilter={quote(TAGS)}&smoothing=0#timeseries")
        for setting in (SHOW_OUTLIERS, CLOSE_SETTINGS):
            wait.until(lambda page, setting=setting: page.find_elements(By.XPATH, setting))[0].click()
        wait.until(lambda page: page.execute_script(CARDS_WITH_LINES) >= NUM_CARDS)
        time.sleep(3)  # until the cards have taken the room of the settings
        args.output.parent.mkdir(exist_ok=True)
        chromium.save_screenshot(str(args.output))
    finally:
        chromium.quit()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
