/** Charts in SVG: axes, lines, bands, dots. */

import { svg } from "./dom.js";
import { general, ticks, whole } from "./numbers.js";

const [LEFT, RIGHT, TOP, BOTTOM] = [44, 10, 8, 30]; // margins

export function linear([low, high], [from, to]) {
	const scale = (value) => from + ((value - low) / (high - low || 1)) * (to - from);
	scale.ticks = (about) => ticks(low, high, about).map((value) => [value, general(value)]);
	return scale;
}

/** A logarithmic scale; what is outside stands at its ends. */
export function logarithmic([low, high], [from, to]) {
	const scale = (value) => from + (Math.log(Math.min(Math.max(value, low), high) / low) / Math.log(high / low)) * (to - from);
	scale.ticks = () => {
		const decades = ticks(Math.log10(low), Math.log10(high), 5).filter(Number.isInteger).map((exponent) => 10 ** exponent);
		return (decades.length > 1 ? decades : [low, high]).map((value) => [value, general(Number(value.toPrecision(2)))]);
	};
	return scale;
}

/** Windows, evenly spaced, by their steps. */
export function windows(steps, [from, to]) {
	const gap = (to - from) / Math.max(steps.length - 1, 1);
	const scale = (index) => (steps.length > 1 ? from + index * gap : (from + to) / 2);
	scale.ticks = (about) => {
		const every = Math.max(Math.ceil(steps.length / about), 1);
		return [...steps.entries()].filter(([index]) => !((steps.length - 1 - index) % every)).map(([index, step]) => [index, whole(step)]);
	};
	scale.index = (pixel) => Math.min(Math.max(Math.round((pixel - from) / gap), 0), steps.length - 1);
	return scale;
}

/** From the least to the largest of the values that are finite, with some room. */
export function extent(values, room = 0.06) {
	const finite = values.filter(isFinite).sort((a, b) => a - b);
	if (!finite.length) return [0, 1];
	const [low, high] = [finite[0], finite.at(-1)];
	const more = (high - low) * room || (high === low ? Math.abs(high) * 0.1 || 1 : 0);
	return [low - more, high + more];
}

/** A chart with axes: `x` and `y` make scales of pixels. */
export class Chart {
	constructor({ width, height, x, y, xLabel, yLabel, label = yLabel }) {
		[this.left, this.right, this.top, this.bottom] = [LEFT, width - RIGHT, TOP + (yLabel ? 14 : 0), height - BOTTOM];
		this.x = x([this.left, this.right]);
		this.y = y([this.bottom, this.top]);
		this.element = svg("svg.chart", { width, height, role: "img", "aria-label": label });
		for (const [value, text] of this.y.ticks(4)) {
			const at = Math.round(this.y(value)) + 0.5;
			this.#line("grid", this.left, at, this.right, at).#text("tick", this.left - 6, at + 3.5, text, "end");
		}
		for (const [value, text] of this.x.ticks(Math.max(Math.floor((this.right - this.left) / 56), 2))) {
			const at = this.x(value);
			this.#line("grid", at, this.bottom, at, this.bottom + 3).#text("tick", at, this.bottom + 14, text, "middle");
		}
		this.#text("label", this.right, this.bottom + 27, xLabel ?? "", "end").#text("label", 4, 11, yLabel ?? "");
	}

	/** A line through points, interrupted where a value is not known. */
	line(xs, ys, style) {
		let path = "";
		ys.forEach((y, i) => {
			if (isNaN(y)) return;
			const isAlone = !(i + 1 in ys) || isNaN(ys[i + 1]);
			const joins = i > 0 && !isNaN(ys[i - 1]);
			path += `${joins ? "L" : "M"}${this.#point(xs[i], y)}${isAlone && !joins ? "h0" : ""}`;
		});
		return this.#stroke("line", path, style);
	}

	/** The area between two lines; of a single point four pixels to both sides. */
	band(xs, lows, highs) {
		let path = "";
		for (let i = 0; i < xs.length; i++) {
			const start = i;
			while (isFinite(lows[i]) && isFinite(highs[i])) i++;
			const its = [...xs.keys()].slice(start, i);
			const upper = its.map((k) => this.#point(xs[k], highs[k]));
			const lower = its.map((k) => this.#point(xs[k], lows[k])).reverse();
			if (its.length === 1) path += `M${upper}m-4 0h8V${this.y(lows[start])}h-8z`;
			else if (its.length) path += `M${[...upper, ...lower].join("L")}z`;
		}
		this.element.append(svg("path.band", { d: path }));
		return this;
	}

	dots(xs, ys, style) {
		return this.bars(xs, ys, ys, style, "dots");
	}

	/** Vertical bars from low to high, as one path. */
	bars(xs, lows, highs, style, kind = "bars") {
		const known = [...xs.keys()].filter((i) => [xs[i], lows[i], highs[i]].every(isFinite));
		return this.#stroke(kind, known.map((i) => `M${this.#point(xs[i], lows[i])}V${this.y(highs[i]).toFixed(1)}`).join(""), style);
	}

	level(value, text) {
		const at = this.y(value);
		return this.#line("level", this.left, at, this.right, at).#text("tick", this.right - 4, at - 3, text, "end");
	}

	cursor(value) {
		return this.#line("cursor", this.x(value), this.top, this.x(value), this.bottom);
	}

	name(x, y, text) {
		const [left, top] = [this.x(x), Math.max(this.y(y) - 4, this.top + 8)];
		const isAtRight = left > this.right - 30;
		return this.#text("point", left + (isAtRight ? -6 : 6), top, text, isAtRight ? "end" : "start");
	}

	#point(x, y) {
		return `${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
	}

	#stroke(kind, d, { color, width = 1.5, dash, name }) {
		const style = { stroke: color, "stroke-width": `${width}px` };
		this.element.append(svg(`path.${kind}`, { d, style, "data-name": name, "stroke-dasharray": dash }));
		return this;
	}

	#line(kind, x1, y1, x2, y2) {
		this.element.append(svg(`line.${kind}`, { x1, y1, x2, y2 }));
		return this;
	}

	#text(kind, x, y, text, anchor = "start") {
		this.element.append(svg(`text.${kind}`, { x, y, "text-anchor": anchor }, text));
		return this;
	}
}
