"""What a reader does with the page, and sees of it."""

import json
import re
import time
from urllib.parse import parse_qs, urlsplit

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from lightning_bnmonitor.page.html import page

TIMEOUT = 30  # seconds
# Where a cell is: row and column as the page lays them out, whatever is scrolled.
CELL = """
    const [row, column, columns] = arguments;
    const label = document.querySelectorAll(".labels > *")[row].getBoundingClientRect();
    const plot = document.querySelector(".plot").getBoundingClientRect();
    const width = Math.min((plot.width - 1) / columns, 88);
    return [plot.left + (column + 0.5) * width, label.top + label.height / 2, plot.left, plot.top];
"""
PIXEL = """
    const [x, y] = arguments, canvas = document.querySelector(".plot canvas");
    const scale = canvas.width / canvas.clientWidth;
    const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, -Math.round(x * scale), -Math.round(y * scale));
    return [...copy.getImageData(0, 0, 1, 1).data];
"""


class OpenedPage:
    """The page in a browser."""

    def __init__(self, browser, folder):
        self.browser, self.folder = browser, folder
        self.allowed = ("data:", "blob:")
        """What addresses may begin with that the page asks for."""
        self.foreseen = re.compile("$^")
        """What the browser may say in its console."""

    def open(self, runs, fragment="", title="test"):
        """Open a file of these runs: documents by name, or pairs of documents."""
        both = {name: each if isinstance(each, tuple) else (each, None) for name, each in runs.items()}
        documents = {name: {"history": history, "channels": channels} for name, (history, channels) in both.items()}
        path = self.folder / "page.html"
        path.write_text(page(documents, title), encoding="utf-8")
        self.go(f"{path.as_uri()}{fragment and '#'}{fragment}")

    def go(self, address, ready=".labels > *, .message h1"):
        self.browser.get("about:blank")
        self.browser.get(address)
        self.wait(lambda: self.texts(ready) and "Loading …" not in self.texts(".message h1"))

    def wait(self, condition):
        return WebDriverWait(self.browser, TIMEOUT, poll_frequency=0.05).until(lambda _: condition())

    def script(self, text, *arguments):
        return self.browser.execute_script(text, *arguments)

    def texts(self, selector):
        """Texts of the elements that are shown."""
        shown = "[...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length)"
        return self.script(f"return {shown}.map(e => e.textContent)", selector)

    def text(self, selector):
        (text,) = self.texts(selector)
        return text

    def labels(self):
        """Keys of the rows that are drawn."""
        return self.script("return [...document.querySelectorAll('.labels > *')].map(e => e.dataset.key)")

    def selected(self):
        """Key of the selected row, and the panel's heading."""
        keys = self.script(
            "return [...document.querySelectorAll('.labels > [aria-selected=true]')].map(e => e.dataset.key)"
        )
        return keys, self.text(".panel h2")

    def address(self):
        """What the address holds."""
        fragment = urlsplit(self.script("return location.href")).fragment
        return {key: values if len(values) > 1 else values[0] for key, values in parse_qs(fragment).items()}

    def requests(self):
        return self.script("return performance.getEntriesByType('resource').map(each => each.name)")

    def click(self, selector):
        self.browser.find_element(By.CSS_SELECTOR, selector).click()

    def button(self, text):
        found = "return [...document.querySelectorAll('button')].filter(each => each.innerText === arguments[0])"
        (button,) = self.script(found, text)  # at once: buttons of the panel are drawn anew at any time
        button.click()

    def choose(self, label, value):
        """An option of a list."""
        self.click(f'select[aria-label="{label}"] option[value={json.dumps(value)}]')

    def type(self, text):
        """Write a filter."""
        field = self.browser.find_element(By.CSS_SELECTOR, "input[type=search]")
        field.clear()
        field.send_keys(text)

    def press(self, *keys):
        for key in keys:
            ActionChains(self.browser).send_keys(getattr(Keys, key, key)).perform()

    def press_with_shift(self, key):
        ActionChains(self.browser).key_down(Keys.SHIFT).send_keys(getattr(Keys, key)).key_up(Keys.SHIFT).perform()

    def point(self, row, column, columns):
        """Move the pointer to a cell."""
        x, y, *_ = self.script(CELL, row, column, columns)
        actions = ActionChains(self.browser, duration=0)
        actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
        return actions

    def hover(self, row, column, columns):
        """The tooltip of a cell."""
        self.point(row, column, columns).perform()
        return self.text(".tooltip")

    def click_cell(self, row, column, columns):
        self.point(row, column, columns).click().perform()

    def color(self, row, column, columns):
        """Colour of a cell, at its upper left, where no letter is."""
        x, y, left, top = self.script(CELL, row, column, columns)
        red, green, blue, alpha = self.script(PIXEL, x - left, y - top - 6)
        return f"#{red:02x}{green:02x}{blue:02x}" if alpha else None

    def emulate(self, **features):
        """Media features, as prefers_color_scheme."""
        pairs = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": pairs})

    def downloaded(self, ending):
        """Name and text of the file that was handed out."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := list(self.folder.glob(f"*.{ending}"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        (path,) = found
        return path.name, path.read_bytes().decode()
