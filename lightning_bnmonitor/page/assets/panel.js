/** What is known of a layer: words, what to do, its metrics over the windows, its channels. */

import { drawChannels } from "./channels.js";
import { Chart, logarithmic, windows } from "./charts.js";
import { codeOf, dot, el, prose, segmented, table, tr } from "./dom.js";
import { difference, distance, general, whole } from "./numbers.js";
import { causeColor, css, lineColor } from "./theme.js";

const FLOOR = 0.001; // where the logarithmic axis begins
const HEIGHT = 230;

/** The panel of what `View.shown` gives, so many pixels wide. */
export function drawPanel(shown, width, actions) {
	const { run, layer, view } = shown;
	const kind = `${shown.module}${run.types[layer]} · ${whole(run.channels[layer])} channels`;
	const views = shown.views.map(({ value, label }) => [value, label]);
	return [
		el("h2", run.names[layer]),
		el("div.below", el("span.quiet", kind), segmented("Window", views, view.value, actions.view)),
		...words(run, layer, view, actions),
		shown.others.length ? comparison(shown) : numbersOf(run, layer, view.window),
		metricsChart(shown, width, actions),
		...channelCharts(shown, width),
		evidence(view.said),
	].filter(Boolean);
}

function words(run, layer, { said, window }, actions) {
	const cause = said ? said.cause : window < 0 ? -1 : run.cause(window, layer);
	if (cause < 0) return [el("p.quiet", "The layer is not in this window.")];
	const { name, letter } = run.causes[cause];
	const badges = (said?.words ?? name).split(", ").map((word) => {
		const own = word === name && [dot(causeColor(run.causes[cause])), word, letter && el("b", letter)];
		return own ? el("span.badge", own) : el("span.badge.flag", word);
	});
	const calm = window >= 0 && !run.needsAttention(window, layer) && el("span.quiet", "needs no attention");
	const head = el("div.badges", badges, calm);
	if (!said) return [head, el("p.quiet", "Explained are the latest and the worst window.")];
	return [head, said.explanation && el("p.explanation", prose(said.explanation)), said.remedy && remedy(said.remedy, actions)];
}

function remedy(text, actions) {
	const copied = codeOf(text).join("\n") || text;
	const button = el("button.copy", { title: `Copy:\n${copied}`, onclick: () => actions.copy(copied, button) }, "Copy");
	return el("div.remedy", el("p", prose(text)), button);
}

function numbersOf(run, layer, window) {
	const numbers = run.metrics.map((metric) => {
		const value = run.value(metric, window, layer);
		return el("div", el("dt", metric), el(value >= run.warning && metric !== "noise" ? "dd.large" : "dd", distance(value)));
	});
	return el("dl.numbers", numbers);
}

function comparison({ run, layer, view, others: [other], title }) {
	const own = { title, run, layer, window: view.window };
	const both = other.isEarlier ? [other, own] : [own, other];
	const isKnown = (of) => of.layer >= 0 && of.window >= 0 && of.run.cause(of.window, of.layer) >= 0;
	const rows = run.metrics.map((metric) => {
		const [a, b] = both.map((of) => (isKnown(of) ? of.run.value(metric, of.window, of.layer) : NaN));
		const kind = !(Math.abs(b - a) >= 0.03) ? "number" : b < a ? "number.better" : "number.worse";
		return tr(["", metric], ["number", distance(a)], ["number", distance(b)], [kind, difference(b - a)]);
	});
	const causes = both.map((of) => ["number", isKnown(of) ? of.run.causes[of.run.cause(of.window, of.layer)].name : "–"]);
	const heads = [...both.map((of) => of.title), "change"].map((text) => el("th.number", { title: text }, text));
	return table("comparison", [tr(["", "verdict"], ...causes, [""]), ...rows], el("th"), ...heads);
}

function metricsChart({ run, layer, view, others: [other] }, width, actions) {
	const courses = new Map(run.metrics.map((metric) => [metric, run.course(metric, layer)]));
	const metrics = run.metrics.filter((metric) => metric !== "noise" && courses.get(metric).some((value) => !isNaN(value)));
	const top = Math.max(1, ...[...courses.values()].flat().filter(isFinite)) * 1.4;
	const chart = new Chart({
		width,
		height: HEIGHT,
		x: (pixels) => windows(run.steps, pixels),
		y: (pixels) => logarithmic([FLOOR, top], pixels),
		xLabel: "training step at the end of the window",
		label: `Metrics of ${run.names[layer]} over the windows`,
	});
	const xs = [...run.steps.keys()];
	const keys = metrics.map((metric) => [el("i", { style: { background: lineColor(metric) } }), metric]);
	if (courses.has("noise")) {
		chart.band(xs, xs.map(() => FLOOR), courses.get("noise"));
		keys.push([el("i.block"), "noise floor"]);
	}
	chart.level(run.warning, "warning").level(run.alert, "alert");
	if (view.window >= 0) chart.cursor(view.window);
	for (const metric of metrics) {
		const known = xs.filter((x) => !isNaN(courses.get(metric)[x]));
		const its = metric.startsWith("val") ? known : xs; // not every window is validated: its points are joined
		const ys = its.map((x) => courses.get(metric)[x]);
		chart.line(its, ys, { color: lineColor(metric), width: metric === "eval_error" ? 2 : 1.3, name: metric });
		if (known.length <= 24) chart.dots(its, ys, { color: lineColor(metric), width: 5 });
	}
	if (other?.partners && other.layer >= 0) {
		const ys = other.partners.map((partner) => other.run.value("eval_error", partner, other.layer));
		chart.line(xs, ys, { color: lineColor("eval_error"), width: 2, dash: "5 4", name: "other" });
		keys.push([el("i.dashed"), `eval_error of ${other.title}`]);
	}
	chart.element.onclick = ({ clientX }) => actions.step(run.steps[chart.x.index(clientX - chart.element.getBoundingClientRect().left)]);
	return el("section.charts", el("h3", "Over the windows"), el("div.keys", keys.map((key) => el("span.key", key))), chart.element);
}

function channelCharts({ channels, view: { said }, others: [other], title }, width) {
	if (channels === undefined) return [el("p.quiet", "…")];
	const kept = said && channels ? ["latest", "worst"].map((which) => channels[which]).filter(Boolean) : [];
	const set = kept.find((each) => each.step === said.step) ?? kept[0];
	const theirs = other?.channels?.latest;
	if (!set && !theirs) return said ? [el("p.quiet", "No channels were kept of this layer.")] : [];
	const late = set && set.step !== said.step && el("p.quiet", `Channels, as kept of step ${whole(set.step)}:`);
	const own = [late, ...drawChannels(set, width)];
	return theirs ? [el("h3.other", title), ...own, el("h3.other", other.title), ...drawChannels(theirs, width)] : own;
}

function evidence(said) {
	if (!said?.evidence.length) return null;
	const rows = said.evidence.map(([name, value, definition]) => tr(["", name], ["number", general(value)], ["quiet", definition]));
	return el("details", el("summary", `Evidence: ${rows.length} numbers`), table("evidence", rows));
}
