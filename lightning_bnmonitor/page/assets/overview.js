/** All rows in a strip beside the heatmap, each by its last value: where to scroll to. */

import { el } from "./dom.js";
import { colorOf } from "./theme.js";

const WIDTH = 12;

export class Overview {
	constructor(scroller) {
		this.scroller = scroller;
		this.canvas = el("canvas");
		this.seen = el("div.seen");
		const onclick = ({ clientY }) => {
			const { top, height } = this.element.getBoundingClientRect();
			scroller.scrollTop = ((clientY - top) / height) * scroller.scrollHeight - height / 2;
		};
		this.element = el("div.overview", { title: "All layers, by their last value: click to go there", onclick }, this.canvas, this.seen);
	}

	/** Draw all rows, the worst last, which is seen where they share pixels; hidden if all are in sight. */
	update(rows, pane) {
		const { scrollHeight, clientHeight: height } = this.scroller;
		const isNeeded = scrollHeight > height + 1;
		this.element.style.visibility = isNeeded ? "" : "hidden";
		if (!isNeeded) return;
		[this.canvas.width, this.canvas.height] = [WIDTH, height];
		const context = this.canvas.getContext("2d");
		const unit = height / rows.length;
		const values = rows.map((row) => pane.series(row)?.values[pane.lastColumn] ?? NaN);
		const known = [...rows.keys()].filter((row) => !isNaN(values[row]));
		for (const row of known.sort((a, b) => Math.abs(values[a]) - Math.abs(values[b]))) {
			context.fillStyle = colorOf(values[row], pane.isDifference);
			context.fillRect(0, Math.floor(row * unit), WIDTH, Math.max(Math.ceil(unit), 2));
		}
		this.follow();
	}

	follow() {
		const { scrollTop, scrollHeight, clientHeight: height } = this.scroller;
		const share = height / Math.max(scrollHeight, 1);
		this.seen.style.transform = `translateY(${scrollTop * share}px)`;
		this.seen.style.height = `${height * share}px`;
	}
}
