/** What is shown beside each other: the windows of a run, those of another, and what differs. */

import { orBelow } from "./decode.js";
import { runColor } from "./theme.js";

/** Columns. A row in them is a series: values; cause, attention and index (`member`) of the worst layer, -1 for none. */
class Pane {
	#series = new Map();

	/** Values of a row, or null if there is none of its layers. */
	series(row) {
		if (!this.#series.has(row)) this.#series.set(row, this.compute(row));
		return this.#series.get(row);
	}
}

class RunPane extends Pane {
	isDifference = false;

	constructor(run, metric, windows, title, place) {
		super();
		Object.assign(this, { run, metric, windows, title, color: runColor(place) });
		this.steps = windows.map((window) => run.steps[window]);
		this.lastColumn = windows.length - 1;
	}

	/** The largest value, and cause and attention of the worst layer, of each column. */
	compute(row) {
		const { run, windows } = this;
		const known = run.values(this.metric);
		const layers = row.names.map((name) => run.indexOf.get(name)).filter((layer) => layer !== undefined);
		if (!layers.length) return null;
		const series = { values: new Float32Array(windows.length).fill(NaN), attention: new Uint8Array(windows.length) };
		for (const name of ["cause", "member"]) series[name] = new Int32Array(windows.length).fill(-1);
		windows.forEach((window, column) => {
			let [attention, worst] = [-1, -Infinity];
			for (const layer of layers) {
				const cause = run.cause(window, layer);
				if (cause < 0) continue;
				const value = known[window * run.names.length + layer] ?? NaN;
				const its = Number(run.needsAttention(window, layer));
				if (!(series.values[column] >= value || isNaN(value))) series.values[column] = value;
				if (its < attention || (its === attention && !(value > worst))) continue;
				[attention, worst] = [its, orBelow(value)];
				[series.cause[column], series.attention[column], series.member[column]] = [cause, its, layer];
			}
		});
		return series;
	}
}

/** A second pane less a first; `partners`: its column for each of the first's, -1 for none. */
export class DifferencePane extends Pane {
	isDifference = true;

	constructor(first, second, partners, title, steps = first.steps) {
		super();
		Object.assign(this, { first, second, partners, title, steps });
		this.lastColumn = Math.max(partners.findLastIndex((partner) => partner >= 0), 0);
	}

	/** Differences of a row, or null if one of the two has none of its layers. */
	compute(row) {
		const [first, second] = [this.first.series(row), this.second.series(row)];
		if (!first || !second) return null;
		const values = first.values.map((value, column) => {
			const other = second.values[this.partners[column]] ?? NaN;
			return other === value ? 0 : other - value;
		});
		return { values, cause: values.map(() => -1), attention: values.map(() => 0), member: first.member };
	}
}

/** For each step of one run the column of another whose step is nearest, -1 if none is near. */
export function partnersOf(steps, others) {
	const spacing = others.length > 1 ? (others.at(-1) - others[0]) / (others.length - 1) : Infinity;
	return steps.map((step) => {
		const distances = others.map((other) => Math.abs(other - step));
		const nearest = Math.min(...distances);
		return nearest <= spacing / 2 ? distances.indexOf(nearest) : -1;
	});
}

/** The panes of a run, and of `other` or `otherWindow` (unless null, -1); `places` among the colours. */
export function panesOf(run, other, otherWindow, window, { metric, view }, places) {
	const pane = (of, windows, title) => new RunPane(of, metric, windows, title, places[Number(of === other)]);
	if (otherWindow >= 0) {
		const [before, after] = [otherWindow, window].map((each) => pane(run, [each], `step ${run.steps[each]}`));
		return [before, after, new DifferencePane(before, after, [0], "change", after.steps)];
	}
	const first = pane(run, [...run.steps.keys()], other ? run.name : "");
	if (!other) return [first];
	const second = pane(other, [...other.steps.keys()], other.name);
	if (view !== "difference") return [first, second];
	return [new DifferencePane(first, second, partnersOf(run.steps, other.steps), `${other.name} less ${run.name}`)];
}
