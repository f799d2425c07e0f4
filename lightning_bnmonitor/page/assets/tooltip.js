/** What a cell says when the pointer is over it. */

import { letterOf } from "./cells.js";
import { dot, el, table, tr } from "./dom.js";
import { difference, distance, whole } from "./numbers.js";
import { causeColor } from "./theme.js";

/** Elements that describe a row's cell in a column of a pane. */
export function describeCell(row, pane, column) {
	const series = pane.series(row);
	const titled = pane.run && pane.title ? ` · ${pane.title}` : "";
	const head = [el("strong", row.label), el("div.quiet", `step ${whole(pane.steps[column])}${titled}`)];
	if (!series) return [...head, "This run has no such layer."];
	if (pane.isDifference) return [...head, differences(row, pane, column)];
	const { run } = pane;
	const layer = series.member[column];
	if (layer < 0) return [...head, "The layer is not in this window."];
	const cause = run.causes[series.cause[column]];
	const letter = letterOf(run, series.cause[column]);
	const said = `${cause.name}${letter && ` (${letter})`}${series.attention[column] ? ": needs attention" : ""}`;
	const rows = run.metrics.map((metric) => {
		const number = distance(run.value(metric, pane.windows[column], layer));
		return tr([metric === pane.metric ? "chosen" : "", metric], [metric === pane.metric ? "number.chosen" : "number", number]);
	});
	const member = row.isModule ? [el("div.quiet", `worst of ${row.names.length}: ${run.names[layer]}`)] : [];
	return [...head, ...member, el("div.cause", dot(causeColor(cause)), said), table("metrics", rows)];
}

function differences(row, { first, second, partners, steps }, column) {
	const partner = partners[column];
	const before = first.series(row)?.values[column] ?? NaN;
	const after = partner < 0 ? NaN : (second.series(row)?.values[partner] ?? NaN);
	const elsewhere = partner >= 0 && second.steps[partner] !== steps[column] ? ` (step ${whole(second.steps[partner])})` : "";
	const lines = [[first.title, distance(before)], [second.title + elsewhere, distance(after)], ["change", difference(after - before)]];
	return table("metrics", lines.map(([name, value]) => tr(["", name], ["number", value])));
}
