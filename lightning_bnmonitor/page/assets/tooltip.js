/** What a cell says when the pointer is over it. */

import { letterOf } from "./cells.js";
import { element } from "./dom.js";
import { difference, distance, whole } from "./numbers.js";
import { causeColor } from "./theme.js";

/** Elements that describe a row's cell in a column of a pane. */
export function describeCell(row, pane, column) {
  const series = pane.series(row);
  const head = element("strong", {}, row.label);
  const step = element("div.quiet", {}, `step ${whole(pane.steps[column])}${pane.run && pane.title ? ` · ${pane.title}` : ""}`);
  if (!series) return [head, step, element("div", {}, "This run has no such layer.")];
  if (pane.isDifference) return [head, step, differenceTable(row, pane, column)];
  const { run } = pane;
  const layer = series.member[column];
  if (layer < 0) return [head, step, element("div", {}, "The layer is not in this window.")];
  const window = pane.windows[column];
  const member = row.isModule && element("div.quiet", {}, `worst of ${row.names.length}: ${run.names[layer]}`);
  return [head, step, member, causeLine(run, series.cause[column], series.attention[column]), metricTable(run, window, layer, pane.metric)].filter(Boolean);
}

/** A cause by its colour, letter and name. */
export function causeLine(run, cause, attention) {
  const { name } = run.causes[cause];
  const letter = letterOf(run, cause);
  const dot = element("span.dot", { style: { background: causeColor(run.causes[cause]) } });
  return element("div.cause", {}, dot, `${name}${letter ? ` (${letter})` : ""}${attention ? ": needs attention" : ""}`);
}

function metricTable(run, window, layer, chosen) {
  const rows = run.metrics.map((metric) =>
    element(
      metric === chosen ? "tr.chosen" : "tr",
      {},
      element("td", {}, metric),
      element("td.number", {}, distance(run.value(metric, window, layer))),
    ),
  );
  return element("table", {}, element("tbody", {}, rows));
}

function differenceTable(row, pane, column) {
  const partner = pane.partners[column];
  const first = pane.first.series(row)?.values[column] ?? NaN;
  const second = partner < 0 ? NaN : (pane.second.series(row)?.values[partner] ?? NaN);
  const lines = [
    [pane.first.title, distance(first)],
    [partner < 0 ? pane.second.title : `${pane.second.title}${pane.second.steps[partner] === pane.steps[column] ? "" : ` (step ${whole(pane.second.steps[partner])})`}`, distance(second)],
    ["change", difference(second - first)],
  ];
  return element(
    "table",
    {},
    lines.map(([name, value]) => element("tr", {}, element("td", {}, name), element("td.number", {}, value))),
  );
}
