/** What follows from the selection: runs, rows, panes, and what is shown of a layer. */

import { larger, orBelow } from "./decode.js";
import { difference, whole } from "./numbers.js";
import { DifferencePane, panesOf, partnersOf } from "./panes.js";
import { countModules, filtered, foldedRows, sorted } from "./rows.js";
import { runColor } from "./theme.js";

const UNCHANGED = 0.03; // a difference that is too small to be called one

export class View {
	/** Of the entries of the run that is shown, and of the one that it is compared with, or null; and the view before. */
	constructor(entry, other, state, before) {
		const { run } = entry;
		this.run = run;
		this.state = state;
		this.other = other?.run?.names.length && other.run.steps.length ? other.run : null;
		this.otherWindow = run.windowAt(Number(state.other("step") ?? NaN));
		this.names = [...run.names, ...(this.other?.names ?? []).filter((name) => !run.indexOf.has(name))];
		this.layer = this.names.find((name) => name === state.layer) ?? this.#first();
		this.window = this.#window();
		const places = [entry.place, other?.place ?? 0];
		const { metric, versus, view, sort, filter, cause, depth, folds } = state;
		const from = this.otherWindow >= 0 && this.window;
		this.key = JSON.stringify([metric, versus, view, sort, filter, cause, depth, folds, from, places.map(runColor)]);
		if (before?.key === this.key && before.run === run && before.other === this.other) {
			Object.assign(this, { sizes: before.sizes, panes: before.panes, rows: before.rows });
		} else {
			this.sizes = countModules(this.names);
			this.panes = panesOf(run, this.other, this.otherWindow, this.window, state, places);
			const known = filtered(this.names, state, (name) => (run.indexOf.has(name) ? run.causesOf(run.indexOf.get(name)) : []));
			this.rows = sorted(foldedRows(known, this.sizes, state), sort, this.panes.at(-1));
		}
		this.row = this.rows.find((row) => row.isModule && row.key === state.layer) ?? null;
		if (this.row) this.layer = this.#worstOf(this.row);
		this.row ??= this.rows.find((row) => row.names.includes(this.layer)) ?? null;
	}

	get step() {
		return this.run.steps[this.window];
	}

	get title() {
		const { run, other, otherWindow, state } = this;
		const against = other ? `, ${other.name}` : otherWindow >= 0 ? `, step ${run.steps[otherWindow]} and step ${this.step}` : "";
		return `${state.metric}: ${run.name}${against}`;
	}

	/** Causes that occur, and how many layers had each. */
	causesWithLayers() {
		const { run } = this;
		const all = [...run.names.keys()].map((layer) => run.causesOf(layer));
		const counted = run.causes.map((cause) => ({ cause, layers: all.filter((its) => its.includes(cause.name)).length }));
		return counted.filter(({ layers }) => layers);
	}

	/** What a comparison has shown, in a sentence; "" if there is none. */
	changes() {
		const [first, second, third] = this.panes;
		let pane = third ?? first;
		if (second && !third) pane = new DifferencePane(first, second, partnersOf(this.run.steps, this.other.steps));
		if (!pane.isDifference) return "";
		const layers = foldedRows(this.names, new Map(), this.state);
		const changed = layers.map((row) => [row.label, pane.series(row)?.values[pane.lastColumn] ?? NaN]);
		const part = (word, sign) => {
			const its = changed.filter(([, value]) => value * sign >= UNCHANGED).sort((a, b) => (b[1] - a[1]) * sign);
			const most = its.length ? ` (${its.length > 1 ? "most " : ""}${its[0][0]} by ${difference(its[0][1])})` : "";
			return `${whole(its.length)} ${word}${most}`;
		};
		const same = changed.filter(([, value]) => Math.abs(value) < UNCHANGED).length;
		const from = this.other ? "At" : `From step ${whole(this.run.steps[this.otherWindow])} to`;
		return `${from} step ${whole(pane.steps[pane.lastColumn])}, of ${layers.length} layers: ${part("better", -1)}, ${part("worse", 1)}, ${whole(same)} within ${UNCHANGED}.`;
	}

	/** All that the panel shows of a layer; `channelsOf(run, name)` has its channels. */
	shown(layer, channelsOf) {
		const { run, state, window, other } = this;
		const [latest, worst] = [run.said("latest", layer), run.said("worst", layer)];
		const views = [{ value: "latest", label: `latest: step ${whole(run.steps[run.last])}`, window: run.last, said: latest }];
		if (worst) views.push({ value: "worst", label: `worst: step ${whole(worst.step)}`, window: worst.window, said: worst });
		let view = views.find(({ value }) => value === state.window) ?? (window === run.last ? views[0] : null);
		if (!view) {
			view = { value: state.window, label: `step ${whole(this.step)}`, window, said: worst?.window === window ? worst : null };
			views.push(view);
		}
		const others = [];
		if (other) {
			const partners = partnersOf(run.steps, other.steps);
			const its = { layer: other.indexOf.get(this.layer) ?? -1, window: partners[view.window] ?? -1, partners };
			others.push({ title: other.name, run: other, channels: channelsOf(other, this.layer), ...its });
		} else if (this.otherWindow >= 0) {
			others.push({ title: `step ${whole(run.steps[this.otherWindow])}`, run, layer, window: this.otherWindow, isEarlier: true });
		}
		const title = other ? run.name : `step ${whole(run.steps[view.window] ?? view.said.step)}`;
		const module = this.row?.isModule ? `in ${this.row.label} · ` : "";
		return { run, layer, title, module, views, view, others, channels: channelsOf(run, this.layer) };
	}

	/** The layer to look at first: of the selected module, or else the worst. */
	#first() {
		const { run, state } = this;
		const inside = state.layer && this.names.find((name) => name.startsWith(`${state.layer}.`));
		const errors = run.names.map((_, layer) => orBelow(run.error(run.last, layer)));
		return inside || run.names[run.sick(run.last)[0] ?? errors.indexOf(errors.reduce(larger))];
	}

	/** The layer of a module that is worst in the window that is looked at. */
	#worstOf(row) {
		const pane = this.panes.find((each) => each.run === this.run);
		const member = pane?.series(row)?.member[Math.max(pane.windows.indexOf(this.window), 0)];
		return this.run.names[member] ?? row.names[0];
	}

	#window() {
		const { run, state } = this;
		const worst = state.window === "worst" && run.said("worst", run.indexOf.get(this.layer));
		const found = worst ? worst.window : run.windowAt(Number(state.window));
		return found < 0 ? run.last : found;
	}
}
