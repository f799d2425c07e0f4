/** One sentence on each run. */

import { dot, el } from "./dom.js";
import { count, distance, whole } from "./numbers.js";
import { runColor } from "./theme.js";

const NAMED = 3; // layers

/** The head: a line for each run ({name, place, run, error}), and where to look in the one that is shown. */
export function drawHeader(entries, shown, other, actions) {
	const lines = entries.length > 1 && el("div.runs", entries.map((entry) => runLine(entry, entry === shown, entry === other, actions)));
	return el("header", lines, shown?.run?.steps.length && shown.run.names.length ? sentence(shown.run, actions, !lines) : null);
}

function runLine({ name, place, run, error }, isShown, isCompared, actions) {
	const said = error?.replaceAll("`", "") ?? (run ? (run.headlines.at(-1) ?? "No window yet.") : "…");
	return el(
		error ? "button.run.failed" : "button.run",
		{ "aria-pressed": String(isShown), title: name, "data-run": name, onclick: () => actions.choose(name) },
		dot(runColor(place)),
		el("span.name", name),
		el("span.role", isCompared ? "compared" : ""),
		el("span.said", { title: said }, said),
	);
}

function sentence(run, actions, withHeadline) {
	const sick = run.sick(run.last);
	const named = sick.slice(0, NAMED).map((layer) => {
		const name = el("button.link", { onclick: () => actions.show(run.names[layer]) }, run.names[layer]);
		const error = run.error(run.last, layer);
		const since = run.steps[run.since(run.last, layer)];
		return el("span.one", name, `${isNaN(error) ? "" : ` by ${distance(error)}`} since step ${whole(since)}`);
	});
	const more = sick.length > NAMED && el("span.one", `${whole(sick.length - NAMED)} more`);
	const errors = run.names.map((_, layer) => run.error(run.last, layer)).filter((error) => !isNaN(error));
	const calm = errors.length ? `Errors in eval() up to ${distance(Math.max(...errors))}.` : "";
	return el(
		"div.sentence",
		withHeadline && el("h1", run.headlines.at(-1) ?? ""),
		el("p", sick.length ? ["Off in eval(): ", named, more] : calm),
		el("p.quiet", `${count(run.names.length, "layer")}, ${count(run.steps.length, "window")}, up to step ${whole(run.steps.at(-1))}`),
	);
}
