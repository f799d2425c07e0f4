/** What a cell says when the pointer is over it. */

import { dot, el, table, tr } from "./dom.js";
import { difference, distance, whole } from "./numbers.js";
import { causeColor } from "./theme.js";

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
	const said = `${cause.name}${cause.letter && ` (${cause.letter})`}${series.attention[column] ? ": needs attention" : ""}`;
	const rows = run.metrics.map((metric) => {
		const number = distance(run.value(metric, pane.windows[column], layer));
		const chosen = metric === pane.metric ? ".chosen" : "";
		return tr([chosen.slice(1), metric], [`number${chosen}`, number]);
	});
	const member = row.isModule ? [el("div.quiet", `worst of ${row.names.length}: ${run.names[layer]}`)] : [];
	return [...head, ...member, el("div.cause", dot(causeColor(cause)), said), table("metrics", rows)];
}

function differences(row, { first, second, partners }, column) {
	const before = first.series(row)?.values[column] ?? NaN;
	const after = second.series(row)?.values[partners[column]] ?? NaN;
	const lines = [[first.title, distance(before)], [second.title, distance(after)], ["change", difference(after - before)]];
	return table("metrics", lines.map(([name, value]) => tr(["", name], ["number", value])));
}
