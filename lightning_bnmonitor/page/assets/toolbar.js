/** What is shown and how; and what the colours mean. */

import { METRICS } from "./decode.js";
import { dot, el, segmented } from "./dom.js";
import { whole } from "./numbers.js";
import { modulesOf } from "./rows.js";
import { causeColor, DIFFERENCE_LEVELS, LEVELS, stepColors } from "./theme.js";

const ORDERS = [["model", "model order"], ["worst", "worst"], ["name", "name"]];
const VIEWS = [["side", "side by side"], ["difference", "difference"]];

/** The lines above the heatmap: made once and updated, so that the filter keeps the cursor. */
export class Toolbar {
	#choices = "";

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
			"aria-label": "Filter by a part of the name, a pattern, or a cause",
			oninput: () => state.set({ filter: this.filter.value }),
		});
		this.exports = el(
			"span.exports",
			el("button", { title: "The heatmap as a table", onclick: actions.table }, "CSV"),
			el("button", { title: "The heatmap as a picture", onclick: actions.picture }, "SVG"),
		);
		this.element = el("div.toolbar", this.metrics, this.order, this.depth, this.filter, this.versus, this.view);
		this.legend = el("div.legend");
	}

	update(run, others, names, isCompared) {
		const { state } = this;
		const choose = (key) => (value) => state.set({ [key]: value });
		const metrics = run.metrics.map((metric) => [metric, metric, METRICS.get(metric)]);
		this.metrics.replaceChildren(segmented("Metric", metrics, state.metric, choose("metric")));
		this.order.replaceChildren(segmented("Order", ORDERS, state.sort, choose("sort")));
		this.view.replaceChildren(...(isCompared ? [segmented("View", VIEWS, state.view, choose("view"))] : []));
		if (this.filter.value !== state.filter) this.filter.value = state.filter;
		const choices = JSON.stringify([others, names, run.steps]);
		if (this.#choices !== choices) this.#offer(run, others, names);
		this.#choices = choices;
		[this.depth.value, this.versus.value] = [state.depth, state.versus];
	}

	#offer(run, others, names) {
		const option = (value, label) => el("option", { value }, label);
		const group = (label, options) => (options.length ? [el("optgroup", { label }, options)] : []);
		const deepest = Math.min(Math.max(...names.map((name) => modulesOf(name).length)), 6);
		const depths = Array.from({ length: deepest }, (_, i) => option(i + 1, `depth ${i + 1}`));
		this.depth.replaceChildren(option(0, "all layers"), ...depths);
		this.depth.hidden = !deepest;
		this.versus.replaceChildren(
			option("", "compare with …"),
			...group("another run", others.map((name) => option(`run:${name}`, name))),
			...group("another window", run.steps.map((step) => option(`step:${step}`, `step ${whole(step)}`)).reverse()),
		);
		this.versus.hidden = others.length + run.steps.length < 2;
	}

	/** Explain colours and letters; causes ({cause, layers}) are buttons that filter. */
	explain(run, causes, isDifference) {
		const { state } = this;
		const buttons = causes.map(({ cause, layers }) => {
			const { name, letter } = cause;
			const title = `Only layers that were ${name} once`;
			const onclick = () => state.set({ cause: state.cause === name ? "" : name });
			const properties = { title, onclick, "aria-pressed": String(state.cause === name), "data-cause": name };
			return el("button.key", properties, dot(causeColor(cause)), letter && el("b", letter), name, el("span.quiet", whole(layers)));
		});
		const names = new Map([[run.warning, "warning"], [run.alert, "alert"]]);
		const levels = isDifference ? ["", ...DIFFERENCE_LEVELS] : LEVELS;
		const steps = stepColors(isDifference).map((color, i) => {
			const text = String(levels[i]).replace("-", "−").replace("0.", ".");
			return el("span.step", { title: names.get(levels[i]) }, el("i", { style: { background: color } }), text);
		});
		this.legend.replaceChildren(el("div.scale", steps), el("div.keys", buttons), this.exports);
	}
}
