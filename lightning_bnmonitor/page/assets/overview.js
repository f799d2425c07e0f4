/** All rows in a strip beside the heatmap, each by its last value: where to scroll to. */

import { el } from "./dom.js";
import { colorOf } from "./theme.js";

const WIDTH = 12;

/** The strip of a scroller. */
export class Overview {
	constructor(scroller) {
		this.scroller = scroller;
		this.canvas = el("canvas");
		this.seen = el("div.seen");
		this.element = el("div.overview", { title: "All layers, by their last value: click to go there" }, this.canvas, this.seen);
		this.element.addEventListener("click", ({ clientY }) => {
			const { top, height } = this.element.getBoundingClientRect();
			scroller.scrollTop = ((clientY - top) / height) * scroller.scrollHeight - height / 2;
		});
	}

	/** Draw all rows, the worst of those that share a pixel; hidden if they are all in sight. */
	update(rows, pane) {
		const { scrollHeight, clientHeight: height } = this.scroller;
		const isNeeded = scrollHeight > height + 1;
		this.element.classList.toggle("needless", !isNeeded);
		if (!isNeeded) return;
		[this.canvas.width, this.canvas.height] = [WIDTH, height];
		const worst = new Array(height).fill(NaN);
		rows.forEach((row, index) => {
			const value = pane.series(row)?.values[pane.lastColumn] ?? NaN;
			const from = Math.floor((index / rows.length) * height);
			const to = Math.max(Math.floor(((index + 1) / rows.length) * height), from + 2); // two pixels at least
			for (let y = from; y < Math.min(to, height); y++) if (!(Math.abs(worst[y]) >= Math.abs(value))) worst[y] = value;
		});
		const context = this.canvas.getContext("2d");
		worst.forEach((value, y) => {
			context.fillStyle = colorOf(value, pane.isDifference) ?? "transparent";
			context.fillRect(0, y, WIDTH, 1);
		});
		this.follow();
	}

	/** Move the frame of what is seen. */
	follow() {
		const { scrollTop, scrollHeight, clientHeight: height } = this.scroller;
		const share = height / Math.max(scrollHeight, 1);
		this.seen.style.transform = `translateY(${scrollTop * share}px)`;
		this.seen.style.height = `${height * share}px`;
	}
}
