/** The heatmap: rows of layers, columns of windows; only what is visible is drawn. */

import { columnAt, columnEdge, drawCells, placePanes } from "./cells.js";
import { dot, el, shortened } from "./dom.js";
import { distance, whole } from "./numbers.js";
import { Overview } from "./overview.js";
import { css } from "./theme.js";
import { describeCell } from "./tooltip.js";

const WIDEST = 88; // pixels of a column
const HEIGHTS = [32, 28, 22, 18]; // of a row
const NAME_SHARE = 0.36; // of the width at most
const HELP = "Heatmap: arrow keys select, Enter folds modules, Escape takes back";

/** Shows what `update` is given; actions: `select(row, step)`, `fold(row, outer)`, `unselect()`. */
export class Heatmap {
	#rows = [];
	#panes = [];
	#places = [];
	#selected = {};
	#labelled = ""; // rows that have a label
	#isPending = false;
	#measured = ""; // size when it was laid out

	constructor(actions) {
		this.actions = actions;
		[this.heads, this.labels, this.mark, this.axis] = ["heads", "labels", "mark", "axis"].map((name) => el(`div.${name}`));
		this.canvas = el("canvas");
		this.cross = [el("div.cross", { hidden: true }), el("div.cross", { hidden: true })];
		const onclick = (event) => {
			const at = this.#at(event);
			if (at) this.#select(at.row, at.place.pane.steps[at.column]);
		};
		const pointing = { onclick, onpointermove: (event) => this.#hover(event), onpointerleave: () => this.#leave() };
		this.plot = el("div.plot", pointing, this.canvas, this.mark, this.cross);
		this.window = el("div.window", this.labels, this.plot);
		this.spacer = el("div.spacer", this.window);
		const scrolling = { onscroll: () => this.#later(), onkeydown: (event) => this.#press(event) };
		this.scroller = el("div.scroller", { tabindex: 0, role: "application", "aria-label": HELP, ...scrolling }, this.spacer);
		this.overview = new Overview(this.scroller);
		this.body = el("div.body", this.scroller, this.overview.element);
		this.spoken = el("div.spoken", { "aria-live": "polite" });
		this.tooltip = el("div.tooltip", { hidden: true });
		this.empty = el("p.quiet", { hidden: true }, "No layer matches the filter.");
		this.element = el("div.heatmap", this.heads, this.body, this.axis, this.empty, this.spoken, this.tooltip);
		new ResizeObserver(() => {
			if (this.#size !== this.#measured) this.#layOut();
		}).observe(this.element);
	}

	/** Show rows in panes; `selected` is the key of a row, and a step. */
	update(rows, panes, selected) {
		[this.#rows, this.#panes, this.#selected] = [rows, panes, selected];
		this.#layOut();
	}

	reveal() {
		const index = this.#index;
		const { scrollTop, clientHeight } = this.scroller;
		const top = index * this.rowHeight;
		if (index < 0 || (top >= scrollTop && top + this.rowHeight <= scrollTop + clientHeight)) return;
		this.scroller.scrollTop = top - Math.floor(clientHeight / 2);
	}

	get #size() {
		return `${this.element.clientWidth} ${this.element.clientHeight}`;
	}

	get #index() {
		return this.#rows.findIndex((row) => row.key === this.#selected.key);
	}

	/** The pane that has the selected step, or else the first. */
	get #place() {
		return this.#places.find(({ pane }) => pane.steps.includes(this.#selected.step)) ?? this.#places[0];
	}

	#layOut() {
		const rows = this.#rows;
		this.#leave();
		this.empty.hidden = rows.length > 0;
		this.axis.hidden = this.body.hidden = !rows.length;
		this.heads.hidden = !rows.length || !this.#panes.some((pane) => pane.title);
		const width = this.scroller.clientWidth;
		if (!rows.length) this.labels.replaceChildren();
		if (!width) return;
		const room = this.element.clientHeight - this.axis.offsetHeight - this.heads.offsetHeight;
		this.rowHeight = HEIGHTS.find((each) => rows.length * each <= room) ?? HEIGHTS.at(-1);
		this.body.style.height = this.spacer.style.height = `${rows.length * this.rowHeight}px`;
		this.#measured = this.#size;
		const { label, isModule } = rows.reduce((a, b) => (a.label.length < b.label.length ? b : a));
		const pen = this.canvas.getContext("2d");
		pen.font = `600 12px ${css("--font")}`;
		const longest = 30 + Math.max(40, pen.measureText(label).width * 1.08 + (isModule ? 28 : 0));
		this.names = Math.ceil(Math.min(longest, width * NAME_SHARE));
		this.characters = longest > this.names ? Math.floor((this.names - 30) / 7) : Infinity;
		this.element.style.setProperty("--names", `${this.names}px`);
		this.plotWidth = width - this.names;
		this.#places = placePanes(this.#panes, this.plotWidth - 1, WIDEST);
		this.#drawHeads();
		this.#drawAxis();
		this.#labelled = "";
		this.#draw();
		this.overview.update(rows, this.#panes.at(-1));
	}

	#later() {
		this.#leave();
		if (this.#isPending) return;
		this.#isPending = true;
		requestAnimationFrame(() => {
			this.#isPending = false;
			this.#draw();
		});
	}

	#draw() {
		const [all, unit] = [this.#rows.length * this.rowHeight, this.rowHeight];
		const height = Math.min(this.scroller.clientHeight, all);
		const top = Math.max(0, Math.min(this.scroller.scrollTop, all - height));
		const first = Math.floor(top / unit);
		const visible = this.#rows.slice(first, Math.ceil((top + height) / unit));
		const scale = window.devicePixelRatio || 1;
		this.window.style.height = `${height}px`;
		[this.canvas.width, this.canvas.height] = [Math.round(this.plotWidth * scale), Math.round(height * scale)];
		const context = this.canvas.getContext("2d");
		context.scale(scale, scale);
		drawCells(context, this.#places, visible, first * unit - top, unit);
		this.labels.style.transform = `translateY(${-top}px)`;
		const labelled = `${first} ${visible.length}`;
		if (labelled !== this.#labelled) this.labels.replaceChildren(...visible.map((row, i) => this.#label(row, first + i)));
		this.#labelled = labelled;
		this.#drawMark(top);
		this.overview.follow();
	}

	#label(row, index) {
		const title = row.isModule ? "Unfold (Enter)" : "Fold its module (Enter)";
		const onclick = (event) => {
			event.stopPropagation();
			this.actions.fold(row, event.shiftKey);
		};
		const unit = this.rowHeight;
		return el(
			row.isModule ? "div.label.module" : "div.label",
			{
				title: row.label,
				"data-key": row.key,
				"aria-selected": String(row.key === this.#selected.key),
				style: { top: `${index * unit}px`, height: `${unit}px`, "line-height": `${unit - 1}px` },
				onclick: () => this.#select(row),
			},
			el("button.fold", { tabindex: -1, title, onclick }, row.isModule ? "▸" : "▾"),
			el("span.name", shortened(row.label, this.characters)),
			row.isModule && el("span.size", whole(row.names.length)),
		);
	}

	/** The frame of the selected cell, or of the row where its step is not shown. */
	#drawMark(top) {
		const [index, place] = [this.#index, this.#place];
		this.mark.hidden = index < 0;
		if (index < 0) return;
		const column = place.pane.steps.indexOf(this.#selected.step);
		const left = columnEdge(place, Math.max(column, 0));
		const right = columnEdge(place, column < 0 ? place.pane.steps.length : column + 1);
		setBox(this.mark, left - 1, index * this.rowHeight - top - 1, Math.max(right - left, 3) + 1, this.rowHeight + 1);
	}

	#drawHeads() {
		const heads = this.#places.map(({ pane, left, width }, i) => {
			const room = (this.#places[i + 1]?.left ?? this.plotWidth) - left - 6;
			const style = { left: `${this.names + left}px`, "max-width": `${Math.max(room, width)}px` };
			return el("div.head", { style, title: pane.title }, pane.color && dot(pane.color), pane.title);
		});
		this.heads.replaceChildren(...heads);
	}

	#drawAxis() {
		const ticks = [];
		for (const { pane, left, column } of this.#places) {
			const room = 12 + 6.5 * Math.max(...pane.steps.map((step) => whole(step).length));
			let free = Infinity; // up to here there is nothing yet
			for (let i = pane.steps.length - 1; i >= 0; i--) {
				const center = Math.min(left + (i + 0.5) * column, this.plotWidth - room / 2 + 6);
				if (center + room / 2 > free || (center < room / 2 - 6 && pane.steps.length > 1)) continue;
				free = center - room / 2;
				ticks.push(el("span.tick", { style: { left: `${this.names + center}px` } }, whole(pane.steps[i])));
			}
		}
		this.axis.replaceChildren(el("span.caption", "step"), ...ticks);
	}

	#at(event) {
		const box = this.plot.getBoundingClientRect();
		const top = this.scroller.scrollTop;
		const index = Math.floor((event.clientY - box.top + top) / this.rowHeight);
		const found = columnAt(this.#places, event.clientX - box.left);
		return found && this.#rows[index] ? { ...found, index, row: this.#rows[index], top } : null;
	}

	#hover(event) {
		const at = this.#at(event);
		if (!at) return this.#leave();
		const { place, column, index, row, top } = at;
		const left = columnEdge(place, column);
		setBox(this.cross[0], 0, index * this.rowHeight - top, this.plotWidth, this.rowHeight - 1);
		setBox(this.cross[1], left, 0, Math.max(columnEdge(place, column + 1) - left, 1), this.window.clientHeight);
		this.tooltip.replaceChildren(...describeCell(row, place.pane, column));
		this.#leave(false);
		const { offsetWidth: width, offsetHeight: height } = this.tooltip;
		const x = event.clientX + 16 + width > window.innerWidth ? event.clientX - 12 - width : event.clientX + 16;
		const y = Math.min(event.clientY + 16, window.innerHeight - height - 6);
		this.tooltip.style.transform = `translate(${Math.max(x, 4)}px, ${Math.max(y, 4)}px)`;
	}

	#leave(isHidden = true) {
		for (const each of [...this.cross, this.tooltip]) each.hidden = isHidden;
	}

	#select(row, step) {
		this.scroller.focus({ preventScroll: true });
		this.actions.select(row, step);
	}

	#press(event) {
		if (event.ctrlKey || event.metaKey || event.altKey || !this.#rows.length) return;
		const page = Math.max(Math.floor(this.scroller.clientHeight / this.rowHeight) - 1, 1);
		const down = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page }[event.key];
		const right = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
		const row = this.#rows[this.#index];
		if (event.key === "Escape") this.actions.unselect();
		else if (event.key === "Enter" || event.key === " ") {
			if (row) this.actions.fold(row, event.shiftKey);
		} else if (down || right) this.#move(down, right);
		else return;
		event.preventDefault();
	}

	#move(down, right) {
		const within = (index, list) => list[Math.min(Math.max(index, 0), list.length - 1)];
		const { steps } = this.#place.pane;
		if (down) this.actions.select(within(this.#index < 0 ? 0 : this.#index + down, this.#rows));
		else if (this.#index >= 0) this.actions.select(this.#rows[this.#index], within(steps.indexOf(this.#selected.step) + right, steps));
		this.reveal();
		const { pane } = this.#place;
		const value = pane.series(this.#rows[this.#index])?.values[pane.steps.indexOf(this.#selected.step)];
		this.spoken.textContent = `${this.#selected.key}, step ${this.#selected.step}: ${distance(value ?? NaN)}`;
	}
}

function setBox(box, left, top, width, height) {
	box.style.transform = `translate(${left}px, ${top}px)`;
	[box.style.width, box.style.height] = [`${width}px`, `${height}px`];
}
