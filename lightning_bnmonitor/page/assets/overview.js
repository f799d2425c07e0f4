/** All rows in a strip beside the heatmap, each by its worst last value: where to scroll to. */

import { element } from "./dom.js";
import { colorOf, luminance } from "./theme.js";

const WIDTH = 12;

/** The strip of a scroller. */
export function createOverview(scroller) {
  const canvas = element("canvas");
  const seen = element("div.seen");
  const strip = element("div.overview", { title: "All layers, by their last value: click to go there" }, canvas, seen);
  const go = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = strip.getBoundingClientRect();
    scroller.scrollTop = ((event.clientY - box.top) / box.height) * scroller.scrollHeight - scroller.clientHeight / 2;
  };
  strip.addEventListener("pointerdown", go);
  strip.addEventListener("pointermove", go);

  /** Move the frame of what is seen. */
  function follow() {
    const share = strip.clientHeight / Math.max(scroller.scrollHeight, 1);
    seen.style.transform = `translateY(${scroller.scrollTop * share}px)`;
    seen.style.height = `${scroller.clientHeight * share}px`;
  }

  /** Draw all rows; hidden if they are all in sight. */
  function update(rows, pane) {
    strip.classList.toggle("needless", scroller.scrollHeight <= scroller.clientHeight + 1);
    const height = strip.clientHeight;
    if (strip.classList.contains("needless") || !height || !pane) return;
    canvas.width = WIDTH;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const worst = new Array(height).fill(NaN);
    rows.forEach((row, index) => {
      const value = pane.series(row)?.values[pane.lastColumn] ?? NaN;
      const from = Math.floor((index / rows.length) * height);
      const to = Math.max(Math.floor(((index + 1) / rows.length) * height), from + 1);
      for (let y = from; y < to; y++) if (!(Math.abs(worst[y]) >= Math.abs(value))) worst[y] = value;
    });
    worst.forEach((value, y) => {
      const color = colorOf(value, pane.isDifference);
      if (!color) return;
      context.fillStyle = color;
      const strong = pane.isDifference || Math.abs(luminance(color) - luminance(colorOf(0))) > 0.25 || value >= 0.1;
      context.fillRect(0, y, WIDTH, strong ? 2 : 1);
    });
    follow();
  }

  return { element: strip, update, follow };
}
