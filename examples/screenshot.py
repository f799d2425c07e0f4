"""Take the pictures of README.md and examples/README.md: TensorBoard pages of two runs in headless Chromium, notebooks.

The runs are those of ``examples/synthetic.py`` and of ``examples/pathologies.py --logdir lightning_logs``. It needs
Chromium and its driver (Debian: ``apt-get install chromium chromium-driver``) and the extra ``test``. It serves and
asks on the loopback interface alone.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

TAGS = r"accuracy|unhealthy|eval_error/(body\.4|head|stem)"
SHOW_OUTLIERS = '//mat-checkbox[contains(., "Ignore outliers")]//input'
CLOSE_SETTINGS = '//button[@aria-label="Close side pane"]'
TIMEOUT = 120  # seconds
SHOWN = """
    // What a page shows: all elements, those in shadow trees, too.
    function* all(root) {
        for (const element of root.querySelectorAll("*")) {
            yield element;
            if (element.shadowRoot) yield* all(element.shadowRoot);
        }
    }
    const shown = [...all(document)].filter(element => element.getClientRects().length);
"""
# What has to be there before a picture is taken of a tab, in JavaScript: a list of what was found.
FOUND = {
    "timeseries": """
        [...new Set(shown.filter(e => e.matches("line-chart svg path[d]")).map(e => e.closest("card-view")))].map(
            card => card.innerText
        )
    """,
    "scalars": 'shown.filter(e => e.matches("tf-scalar-card")).map(e => e.getAttribute("tag") || e.tag)',
    "custom_scalars": 'shown.filter(e => e.matches("tf-custom-scalar-multi-line-chart-card")).map(e => e.title)',
    "images": 'shown.filter(e => e.matches("img") && e.naturalWidth > 100).map(e => e.naturalWidth)',
    "text": 'shown.filter(e => e.matches("tf-text-loader .text, .markdown-container, table")).map(e => e.innerText)',
}


def browser(width: int, height: int) -> Chrome:
    """Chromium without a window or a network; without WebGL, so that TensorBoard's lines are elements to wait for."""
    options = ChromeOptions()
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-3d-apis", "hide-scrollbars", "no-first-run"):
        options.add_argument(f"--{argument}")
    for argument in ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--window-size={width},{height}")
    return Chrome(options=options, service=ChromeService("/usr/bin/chromedriver"))


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """TensorBoard on the loopback interface, as soon as it has found a run: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ("--host", "127.0.0.1", "--port", str(port), "--logdir", str(logdir))
    command = [sys.executable, "-m", "tensorboard.main", *where]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, give_up = f"http://127.0.0.1:{port}", time.monotonic() + TIMEOUT
    try:
        while not _is_served(url):
            if time.monotonic() > give_up or server.poll() is not None:
                raise TimeoutError(f"TensorBoard has found no run in {logdir}.")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def open_tab(page: Chrome, url: str, tab: str, minimum: int = 1, query: str = "") -> list[str]:
    """Open a tab of TensorBoard and wait until it shows so many cards: returns what they are."""
    page.get("about:blank")  # another fragment alone would not load the page anew
    page.get(f"{url}/?{query}#{tab}")
    if tab == "timeseries":
        for setting in (SHOW_OUTLIERS, CLOSE_SETTINGS):
            wait = WebDriverWait(page, TIMEOUT)
            wait.until(lambda page, setting=setting: page.find_elements(By.XPATH, setting))[0].click()
    script = f"{SHOWN} return ({FOUND[tab].strip()});"
    return WebDriverWait(page, TIMEOUT).until(
        lambda page: found if len(found := page.execute_script(script)) >= minimum else False
    )


def open_batchnorm(page: Chrome, url: str, layer: str) -> None:
    """Open our own tab, which is a frame, with a layer selected, and wait until it shows that."""
    page.get("about:blank")
    page.get(f"{url}/#batchnorm&p.batchnorm.show={quote(f'layer={layer}')}")
    wait = WebDriverWait(page, TIMEOUT)
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "iframe"))
    page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "iframe"))
    wait.until(lambda page: page.find_elements(By.XPATH, f'//h2[text()="{layer}"]'))
    page.switch_to.default_content()


def shoot(page: Chrome, path: Path) -> None:
    """Save a picture of what the page shows."""
    time.sleep(3)  # until cards have taken their room and lines are drawn
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save_screenshot(str(path))


def _is_served(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/data/runs", timeout=5) as answer:
            return answer.read().strip() != b"[]"
    except OSError:
        return False


def main() -> None:
    """Serve, look, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default=Path("lightning_logs"), type=Path, help="default: %(default)s")
    parser.add_argument("--output", default=Path(__file__).parent / "images", type=Path, help="default: %(default)s")
    args = parser.parse_args()

    page = browser(1560, 1190)
    try:
        with tensorboard(args.logdir / "synthetic") as url:
            page.set_window_size(1280, 960)
            open_batchnorm(page, url, "stem.1")
            shoot(page, args.output / "batchnorm.png")
            page.set_window_size(1560, 1190)
            open_tab(page, url, "timeseries", 6, f"tagFilter={quote(TAGS)}&smoothing=0")
            shoot(page, args.output / "tensorboard.png")
            page.set_window_size(1280, 860)
            for tab in ("custom_scalars", "images", "text"):
                open_tab(page, url, tab, query="smoothing=0")
                shoot(page, args.output / f"{tab}.png")
        with tensorboard(args.logdir / "pathologies") as url:
            page.set_window_size(1280, 1440)
            open_tab(page, url, "images")
            page.execute_script(f'{SHOWN} shown.find(e => e.matches("paper-checkbox")).click();')
            shoot(page, args.output / "pathologies.png")
    finally:
        page.quit()


if __name__ == "__main__":
    main()
