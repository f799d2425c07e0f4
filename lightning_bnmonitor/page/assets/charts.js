/** Charts in SVG: axes, lines, bands, dots. */

import { drawn } from "./dom.js";
import { distance, general, ticks, whole } from "./numbers.js";

const MARGIN = { left: 44, right: 10, top: 8, bottom: 30 };

/** A linear scale from values to pixels. */
export function linear([low, high], [from, to]) {
  const span = high - low || 1;
  const scale = (value) => from + ((value - low) / span) * (to - from);
  scale.ticks = (about) => ticks(low, high, about).map((value) => [value, general(value)]);
  return scale;
}

/** A logarithmic scale; values below its beginning stand at its beginning. */
export function logarithmic([low, high], [from, to]) {
  const scale = (value) => from + (Math.log(Math.min(Math.max(value, low), high) / low) / Math.log(high / low)) * (to - from);
  scale.ticks = () => {
    const decades = [];
    for (let power = Math.ceil(Math.log10(low) - 1e-9); power <= Math.log10(high) + 1e-9; power++) decades.push(10 ** power);
    const every = Math.ceil(decades.length / 6);
    const values = decades.length > 1 ? decades.filter((_, i) => !(i % every)) : [low, high];
    return values.map((value) => [value, value >= 0.001 && value < 1e4 ? general(value) : distance(value)]);
  };
  return scale;
}

/** From the least to the largest of the values that are finite, with some room. */
export function extent(values, room = 0.06) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [0, 1];
  const more = (high - low) * room || Math.abs(high) * 0.1 || 1;
  return [low - more, high + more];
}

/** An empty chart with axes; `x` and `y` are given the pixels that they may use and return scales. */
export class Chart {
  constructor({ width, height, x, y, xLabel, yLabel, label }) {
    this.left = MARGIN.left;
    this.right = width - MARGIN.right;
    this.top = MARGIN.top + (yLabel ? 14 : 0);
    this.bottom = height - MARGIN.bottom;
    this.x = x([this.left, this.right]);
    this.y = y([this.bottom, this.top]);
    this.element = drawn("svg.chart", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label ?? yLabel });
    this.#axes(xLabel, yLabel);
  }

  /** Add elements. */
  add(...elements) {
    this.element.append(...elements);
    return this;
  }

  #axes(xLabel, yLabel) {
    for (const [value, text] of this.y.ticks(4)) {
      const y = Math.round(this.y(value)) + 0.5;
      this.add(drawn("line.grid", { x1: this.left, x2: this.right, y1: y, y2: y }));
      this.add(drawn("text.tick", { x: this.left - 6, y: y + 3.5, "text-anchor": "end" }, text));
    }
    for (const [value, text] of this.x.ticks(Math.max(Math.floor((this.right - this.left) / 80), 2))) {
      const x = this.x(value);
      this.add(drawn("line.grid", { x1: x, x2: x, y1: this.bottom, y2: this.bottom + 3 }));
      this.add(drawn("text.tick", { x, y: this.bottom + 14, "text-anchor": "middle" }, text));
    }
    if (xLabel) this.add(drawn("text.label", { x: this.right, y: this.bottom + 27, "text-anchor": "end" }, xLabel));
    if (yLabel) this.add(drawn("text.label", { x: 4, y: 11 }, yLabel));
  }

  /** A line through points, interrupted where a value is not known; single points are dots. */
  line(xs, ys, { color, width = 1.5, dash, name } = {}) {
    let path = "";
    let before = false;
    ys.forEach((y, i) => {
      const known = !Number.isNaN(y);
      const after = i + 1 < ys.length && !Number.isNaN(ys[i + 1]);
      const point = known && `${this.x(xs[i]).toFixed(1)} ${this.y(y).toFixed(1)}`;
      if (known) path += before ? `L${point}` : after ? `M${point}` : `M${point}h0`;
      before = known;
    });
    return this.add(drawn("path.line", { d: path, "data-name": name, "stroke-dasharray": dash, style: { stroke: color, "stroke-width": `${width}px` } }));
  }

  /** The area between two lines. */
  band(xs, lows, highs, className = "band") {
    let path = "";
    for (let i = 0; i < xs.length; ) {
      const start = i;
      while (i < xs.length && Number.isFinite(lows[i]) && Number.isFinite(highs[i])) i++;
      const its = [...Array(i - start).keys()].map((k) => start + k);
      if (its.length === 1) its.push(start);
      const point = (k, y, shift) => `${(this.x(xs[k]) + shift).toFixed(1)} ${this.y(y).toFixed(1)}`;
      const single = i - start === 1 ? 4 : 0;
      const upper = its.map((k, n) => point(k, highs[k], n ? single : -single));
      const lower = its.map((k, n) => point(k, lows[k], n ? single : -single)).reverse();
      if (its.length) path += `M${[...upper, ...lower].join("L")}Z`;
      i++;
    }
    return this.add(drawn(`path.${className}`, { d: path }));
  }

  /** Dots, as one path. */
  dots(xs, ys, { color, size = 4, name } = {}) {
    let path = "";
    xs.forEach((x, i) => {
      if (Number.isFinite(x) && Number.isFinite(ys[i])) path += `M${this.x(x).toFixed(1)} ${this.y(ys[i]).toFixed(1)}h0`;
    });
    return this.add(drawn("path.dots", { d: path, "data-name": name, style: { stroke: color, "stroke-width": `${size}px` } }));
  }

  /** Vertical bars from low to high, as one path. */
  bars(xs, lows, highs, { color, width = 2 } = {}) {
    let path = "";
    xs.forEach((x, i) => {
      const known = [x, lows[i], highs[i]].every(Number.isFinite);
      if (known) path += `M${this.x(x).toFixed(1)} ${this.y(lows[i]).toFixed(1)}V${this.y(highs[i]).toFixed(1)}`;
    });
    return this.add(drawn("path.bars", { d: path, style: { stroke: color, "stroke-width": `${width}px` } }));
  }

  /** A horizontal line with a word at its right end. */
  level(value, text) {
    const y = this.y(value);
    this.add(drawn("line.level", { x1: this.left, x2: this.right, y1: y, y2: y }));
    return this.add(drawn("text.tick", { x: this.right, y: y - 3, "text-anchor": "end" }, text));
  }

  /** A vertical line with what is selected. */
  cursor(value) {
    const x = this.x(value);
    return this.add(drawn("line.cursor", { x1: x, x2: x, y1: this.top, y2: this.bottom }));
  }

  /** A word beside a point. */
  name(x, y, text) {
    const [left, top] = [this.x(x), this.y(y)];
    const atRight = left > this.right - 30;
    return this.add(drawn("text.point", { x: left + (atRight ? -6 : 6), y: Math.max(top - 4, this.top + 8), "text-anchor": atRight ? "end" : "start" }, text));
  }
}

/** A scale of steps, evenly spaced: of each window the same room. */
export function windows(steps, [from, to]) {
  const gap = (to - from) / Math.max(steps.length - 1, 1);
  const scale = (index) => (steps.length > 1 ? from + index * gap : (from + to) / 2);
  scale.ticks = (about) => {
    const every = Math.max(Math.ceil(steps.length / Math.min(about, 6)), 1);
    return steps.map((step, index) => [index, whole(step)]).filter((_, index) => (steps.length - 1 - index) % every === 0);
  };
  scale.index = (pixel) => Math.min(Math.max(Math.round((pixel - from) / gap), 0), steps.length - 1);
  return scale;
}
