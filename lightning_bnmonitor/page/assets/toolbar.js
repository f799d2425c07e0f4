/** What is shown and how: metric, order, modules, filter, comparison, export; and what the colours mean. */

import { METRICS } from "./decode.js";
import { element, segmented } from "./dom.js";
import { whole } from "./numbers.js";
import { modulesOf } from "./rows.js";
import { causeColor, differenceColors, differenceLevels, LEVELS, stepColors } from "./theme.js";

/**
 * The line above the heatmap. It is made once and updated, so that the filter keeps the cursor.
 * @param {State} state
 * @param {object} actions `table()` and `picture()` export.
 */
export class Toolbar {
  constructor(state, actions) {
    this.state = state;
    this.metrics = element("span");
    this.order = element("span");
    this.filter = element("input", {
      type: "search",
      placeholder: "Filter: name, layer4.*, cause",
      "aria-label": "Filter layers by a part of the name, a pattern, or a cause",
      oninput: () => state.set({ filter: this.filter.value }),
    });
    this.depth = element("select", { "aria-label": "Modules", title: "Fold modules of this depth", onchange: () => state.set({ depth: Number(this.depth.value), folds: [] }) });
    this.versus = element("select", { "aria-label": "Compare with", onchange: () => state.set({ versus: this.versus.value }) });
    this.view = element("span");
    const exports = [
      element("button", { type: "button", title: "What the heatmap shows as a table: a row for each layer, a column for each window", onclick: actions.table }, "CSV"),
      element("button", { type: "button", title: "The whole heatmap as a picture", onclick: actions.picture }, "SVG"),
    ];
    this.element = element(
      "div.toolbar",
      {},
      this.metrics,
      this.order,
      this.depth,
      this.filter,
      this.versus,
      this.view,
      element("span.exports", {}, exports),
    );
    this.legend = element("div.legend");
  }

  /** Show what there is to choose from. */
  update(run, others, names, windowStep) {
    const { state } = this;
    const choose = (key) => (value) => state.set({ [key]: value });
    this.metrics.replaceChildren(
      segmented("Metric", run.metrics.map((metric) => [metric, metric, METRICS.get(metric)]), state.metric, choose("metric")),
    );
    const orders = [
      ["model", "model order", "As the model calls them"],
      ["worst", "worst", "The worst of the last window first"],
      ["name", "name", "By name"],
    ];
    this.order.replaceChildren(segmented("Order", orders, state.sort, choose("sort")));
    if (this.filter.value !== state.filter) this.filter.value = state.filter;
    const deepest = Math.min(Math.max(...names.map((name) => modulesOf(name).length), 0), 6);
    const depths = Array.from({ length: deepest }, (_, i) => option(i + 1, `modules of depth ${i + 1}`, state.depth));
    this.depth.replaceChildren(option(0, "all layers", state.depth), ...depths);
    this.depth.hidden = !deepest;
    const steps = run.steps.filter((step) => step !== windowStep).reverse();
    this.versus.replaceChildren(
      option("", "compare with …", state.versus),
      ...group("another run", others.map((name) => option(`run:${name}`, name, state.versus))),
      ...group("another window", steps.map((step) => option(`step:${step}`, `step ${whole(step)}`, state.versus))),
    );
    this.versus.hidden = this.versus.options.length < 2;
    const views = [["side", "side by side"], ["difference", "difference"]];
    this.view.replaceChildren(...(state.otherRun === null ? [] : [segmented("View", views, state.view, choose("view"))]));
  }

  /** Explain colours and letters; causes are buttons that filter. */
  explain(run, causes, isDifference) {
    const { state } = this;
    const buttons = causes.map(({ cause, layers }) =>
      element(
        "button.key",
        {
          type: "button",
          "aria-pressed": String(state.cause === cause.name),
          title: `Show only the ${layers} layers that were ${cause.name} in any window`,
          "data-cause": cause.name,
          onclick: () => state.set({ cause: state.cause === cause.name ? "" : cause.name }),
        },
        element("span.dot", { style: { background: causeColor(cause) } }),
        cause.letter && cause.name !== "healthy" && element("b", {}, cause.letter),
        `${cause.name}`,
        element("span.quiet", {}, whole(layers)),
      ),
    );
    this.legend.replaceChildren(isDifference ? scaleOf(differenceColors(), ["", ...differenceLevels], run) : scaleOf(stepColors(), LEVELS, run), element("div.keys", {}, buttons));
  }
}

function scaleOf(colors, levels, run) {
  const names = new Map([[run.warning, "warning"], [run.alert, "alert"]]);
  return element(
    "div.scale",
    {},
    colors.map((color, index) => {
      const level = levels[index];
      const text = level === "" ? "" : String(level).replace("-", "−").replace("0.", ".");
      return element("span.step", { title: names.get(level) ?? "" }, element("i", { style: { background: color } }), element("span", {}, text));
    }),
  );
}

function option(value, label, chosen) {
  return element("option", { value, selected: String(value) === String(chosen) }, label);
}

function group(label, options) {
  return options.length ? [element("optgroup", { label }, options)] : [];
}
