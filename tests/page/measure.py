"""How fast 1000 layers by 400 windows are: ``python -m tests.page.measure`` prints milliseconds of the browser.

The first paint is Chromium's own ("first-contentful-paint" is that of the drawn page: it is empty before), from the
opening of the file on; the rest are the medians and the largest of as many events, each with the layout that it causes.
"""

import tempfile
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from tests.page import made_documents as made
from tests.page.conftest import ARGUMENTS, DRIVER
from tests.page.opened import OpenedPage

TIMES = """
    const [what, number] = arguments, times = [];
    const plot = document.querySelector(".plot"), scroller = document.querySelector(".scroller");
    const box = plot.getBoundingClientRect(), field = document.querySelector("input");
    const at = i => ({
        clientX: box.left + (i * 37) % (box.width - 2), clientY: box.top + (i * 53) % (box.height - 2), bubbles: true,
    });
    const events = {
        hover: i => plot.dispatchEvent(new PointerEvent("pointermove", at(i))),
        click: i => plot.dispatchEvent(new MouseEvent("click", at(i))),
        key: i => scroller.dispatchEvent(new KeyboardEvent("keydown", {key: ["ArrowDown", "ArrowLeft"][i % 2]})),
        filter: i => {
            field.value = ["conv", "unit1"][i % 2];
            field.dispatchEvent(new Event("input"));
        },
        worst: i => document.querySelector(`[data-value=${["model", "worst"][i % 2]}]`).click(),
    };
    for (let i = 0; i < number; i++) {
        const start = performance.now();
        events[what](i);
        document.body.getBoundingClientRect();
        times.push(performance.now() - start);
    }
    times.sort((a, b) => a - b);
    return [times[Math.floor(number / 2)], times.at(-1)];
"""
SCROLL = """
    const done = arguments[0], scroller = document.querySelector(".scroller"), times = [];
    let before = performance.now(), left = 60;
    requestAnimationFrame(function frame(now) {
        times.push(performance.now() - before);
        before = performance.now();
        scroller.scrollTop += 140;
        if (left--) requestAnimationFrame(frame);
        else done([times.sort((a, b) => a - b)[30], times.at(-1)]);
    });
"""


def main():
    """Open, measure, print."""
    options = ChromeOptions()
    with tempfile.TemporaryDirectory() as folder:
        for argument in (*ARGUMENTS, f"user-data-dir={folder}/chromium", "window-size=1280,900"):
            options.add_argument(f"--{argument}")
        browser = Chrome(options=options, service=ChromeService(str(DRIVER)))
        try:
            page = OpenedPage(browser, Path(folder))
            page.open({"run": made.thousand_layers()})
            paint = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
            page.wait(lambda: page.script(f"{paint.replace('.startTime', '')} !== undefined"))
            print(f"first paint  {page.script(paint):6.0f}")
            for what, number in (("hover", 200), ("click", 40), ("key", 40), ("filter", 20), ("worst", 20)):
                print("{:<12} {:6.1f} (at most {:.1f})".format(what, *page.script(TIMES, what, number)))
            print("{:<12} {:6.1f} (at most {:.1f})".format("scroll", *browser.execute_async_script(SCROLL)))
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
