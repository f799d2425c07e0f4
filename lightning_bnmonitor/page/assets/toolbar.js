/** What is shown and how: metric, order, modules, filter, comparison, export; and what the colours mean. */

import { METRICS } from "./decode.js";
import { dot, el, segmented } from "./dom.js";
import { whole } from "./numbers.js";
import { modulesOf } from "./rows.js";
import { causeColor, differenceColors, differenceLevels, LEVELS, stepColors } from "./theme.js";

const ORDERS = [
	["model", "model order", "As the model calls them"],
	["worst", "worst", "The worst of the last window first"],
	["name", "name", "By name"],
];
const VIEWS = [
	["side", "side by side"],
	["difference", "difference"],
];

/** The lines above the heatmap: made once and updated, so that the filter keeps the cursor. */
export class Toolbar {
	constructor(state, actions) {
		this.state = state;
		const choice = (title, key, convert) =>
			el("select", { "aria-label": title, title, onchange: (event) => state.set({ [key]: convert(event.target.value) }) });
		[this.metrics, this.order, this.view] = [el("span"), el("span"), el("span")];
		this.depth = choice("Fold modules", "depth", Number);
		this.versus = choice("Compare with", "versus", String);
		this.filter = el("input", {
			type: "search",
			placeholder: "Filter: name, layer4.*",
			"aria-label": "Filter layers by a part of the name, a pattern, or a cause",
			oninput: () => state.set({ filter: this.filter.value }),
		});
		const exports = el(
			"span.exports",
			el("button", { title: "The heatmap as a table: a row for each layer, a column for each window", onclick: actions.table }, "CSV"),
			el("button", { title: "The whole heatmap as a picture", onclick: actions.picture }, "SVG"),
		);
		this.element = el("div.toolbar", this.metrics, this.order, this.depth, this.filter, this.versus, this.view, exports);
		this.legend = el("div.legend");
	}

	/** Show what there is to choose from. */
	update(run, others, names, step, isCompared) {
		const { state } = this;
		const choose = (key) => (value) => state.set({ [key]: value });
		const metrics = run.metrics.map((metric) => [metric, metric, METRICS.get(metric)]);
		this.metrics.replaceChildren(segmented("Metric", metrics, state.metric, choose("metric")));
		this.order.replaceChildren(segmented("Order", ORDERS, state.sort, choose("sort")));
		this.view.replaceChildren(...(isCompared ? [segmented("View", VIEWS, state.view, choose("view"))] : []));
		if (this.filter.value !== state.filter) this.filter.value = state.filter;
		const option = (value, label, chosen) => el("option", { value, selected: String(value) === String(chosen) }, label);
		const group = (label, options) => (options.length ? [el("optgroup", { label }, options)] : []);
		const deepest = Math.min(Math.max(...names.map((name) => modulesOf(name).length), 0), 6);
		const depths = Array.from({ length: deepest }, (_, i) => option(i + 1, `depth ${i + 1}`, state.depth));
		this.depth.replaceChildren(option(0, "all layers", state.depth), ...depths);
		this.depth.hidden = !deepest;
		const steps = run.steps.filter((each) => each !== step).reverse();
		this.versus.replaceChildren(
			option("", "compare with …", state.versus),
			...group("another run", others.map((name) => option(`run:${name}`, name, state.versus))),
			...group("another window", steps.map((each) => option(`step:${each}`, `step ${whole(each)}`, state.versus))),
		);
		this.versus.hidden = this.versus.options.length < 2;
	}

	/** Explain colours and letters; causes ({cause, layers}) are buttons that filter. */
	explain(run, causes, isDifference) {
		const { state } = this;
		const buttons = causes.map(({ cause, layers }) => {
			const { name, letter } = cause;
			const title = `Show only layers that were ${name} in any window`;
			const onclick = () => state.set({ cause: state.cause === name ? "" : name });
			const mark = name !== "healthy" && letter && el("b", letter);
			const properties = { title, onclick, "aria-pressed": String(state.cause === name), "data-cause": name };
			return el("button.key", properties, dot(causeColor(cause)), mark, name, el("span.quiet", whole(layers)));
		});
		const names = new Map([[run.warning, "warning"], [run.alert, "alert"]]);
		const levels = isDifference ? ["", ...differenceLevels] : LEVELS;
		const steps = (isDifference ? differenceColors() : stepColors()).map((color, i) => {
			const text = String(levels[i]).replace("-", "−").replace("0.", ".");
			return el("span.step", { title: names.get(levels[i]) }, el("i", { style: { background: color } }), text);
		});
		this.legend.replaceChildren(el("div.scale", steps), el("div.keys", buttons));
	}
}
