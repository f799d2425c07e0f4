/** What is shown beside each other: the windows of a run, those of another, and what differs. */

import { orBelow } from "./decode.js";
import { runColor } from "./theme.js";

// A row in the columns of a pane is a series: values, and cause and attention of the layer (`member`, an index) that is
// worst there; -1 where none is.

/** Windows of a run, one column each. */
export class RunPane {
	isDifference = false;
	#series = new Map();

	/** Of some windows of a run; `place` among the colours. */
	constructor(run, metric, windows, { title = "", place = 0 } = {}) {
		Object.assign(this, { run, metric, windows, title, place });
		this.steps = windows.map((window) => run.steps[window]);
		this.lastColumn = windows.length - 1;
	}

	/** Colour of the run. */
	get color() {
		return runColor(this.place);
	}

	/** Values of a row, or null if the run has none of its layers. */
	series(row) {
		const id = `${row.isModule} ${row.names.length} ${row.key}`;
		if (!this.#series.has(id)) this.#series.set(id, this.#worst(row));
		return this.#series.get(id);
	}

	#worst(row) {
		const { run, windows } = this;
		const layers = row.names.map((name) => run.indexOf.get(name)).filter((layer) => layer !== undefined);
		if (!layers.length) return null;
		const values = new Float32Array(windows.length).fill(NaN);
		const cause = new Int16Array(windows.length).fill(-1);
		const attention = new Uint8Array(windows.length);
		const member = new Int32Array(windows.length).fill(-1);
		const known = run.values(this.metric);
		windows.forEach((window, column) => {
			let worst = [-1, -Infinity];
			for (const layer of layers) {
				const its = run.cause(window, layer);
				if (its < 0) continue;
				const value = known ? known[window * run.names.length + layer] : NaN;
				if (!(values[column] >= value) && !Number.isNaN(value)) values[column] = value;
				const rank = [Number(run.needsAttention(window, layer)), orBelow(value)];
				if (member[column] < 0 || rank[0] > worst[0] || (rank[0] === worst[0] && rank[1] > worst[1])) {
					worst = rank;
					[cause[column], attention[column], member[column]] = [its, rank[0], layer];
				}
			}
		});
		return { values, cause, attention, member };
	}
}

/** A second pane less a first, column by column of the first. */
export class DifferencePane {
	isDifference = true;
	color = "";
	#series = new Map();

	/** `partners`: the second’s column for each of the first’s, -1 for none. */
	constructor(first, second, partners, title) {
		Object.assign(this, { first, second, partners, title });
		this.steps = first.steps;
		this.windows = first.windows;
		this.lastColumn = Math.max(partners.findLastIndex((partner) => partner >= 0), 0);
	}

	/** Differences of a row, or null if one of the two has none of its layers. */
	series(row) {
		const id = `${row.isModule} ${row.names.length} ${row.key}`;
		if (!this.#series.has(id)) this.#series.set(id, this.#difference(this.first.series(row), this.second.series(row)));
		return this.#series.get(id);
	}

	#difference(first, second) {
		if (!first || !second) return null;
		const values = first.values.map((value, column) => {
			const partner = this.partners[column];
			const other = partner < 0 ? NaN : second.values[partner];
			return other === value ? 0 : other - value;
		});
		const none = new Int16Array(values.length).fill(-1);
		return { values, cause: none, attention: new Uint8Array(values.length), member: first.member };
	}
}

/** For each step of one run the column of another whose step is nearest, -1 if none is as near as its neighbours. */
export function partnersOf(steps, others) {
	return steps.map((step) => {
		let nearest = -1;
		others.forEach((other, column) => {
			if (nearest < 0 || Math.abs(other - step) < Math.abs(others[nearest] - step)) nearest = column;
		});
		if (nearest < 0 || others[nearest] === step) return nearest;
		const gaps = [others[nearest] - others[nearest - 1], others[nearest + 1] - others[nearest]];
		const gap = Math.max(...gaps.filter((each) => each > 0), others.length > 1 ? 0 : step);
		return Math.abs(others[nearest] - step) <= gap / 2 ? nearest : -1;
	});
}

/** The panes of a run, of `other` or `otherWindow` (if not null, -1) beside it; `places` among the colours. */
export function panesOf(run, other, otherWindow, window, state, places) {
	const all = (each) => each.steps.map((_, index) => index);
	if (otherWindow >= 0) {
		const before = new RunPane(run, state.metric, [otherWindow], { title: `step ${run.steps[otherWindow]}`, place: places[0] });
		const after = new RunPane(run, state.metric, [window], { title: `step ${run.steps[window]}`, place: places[0] });
		return [before, after, new DifferencePane(before, after, [0], "change")];
	}
	const first = new RunPane(run, state.metric, all(run), { title: other ? run.name : "", place: places[0] });
	if (!other) return [first];
	const second = new RunPane(other, state.metric, all(other), { title: other.name, place: places[1] });
	if (state.view !== "difference") return [first, second];
	return [new DifferencePane(first, second, partnersOf(run.steps, other.steps), `${other.name} less ${run.name}`)];
}
