/** What is known of a layer: words, what to do, its metrics over the windows, its channels. */

import { drawChannels } from "./channels.js";
import { Chart, logarithmic, windows } from "./charts.js";
import { codeOf, element, prose, segmented } from "./dom.js";
import { difference, distance, general, whole } from "./numbers.js";
import { causeColor, css, lineColor } from "./theme.js";
import { letterOf } from "./cells.js";

const FLOOR = 0.001; // where the logarithmic axis begins
const HEIGHT = 230;

/**
 * The panel of a layer.
 * @param {object} shown
 * @param {Run} shown.run
 * @param {number} shown.layer Its index.
 * @param {object[]} shown.views What can be looked at: {value, label, window, said}.
 * @param {object} shown.view The one that is.
 * @param {object[]} shown.others Compared with: {title, run, layer, window, color}.
 * @param {object|null} shown.channels Its sets of channels; undefined while they are loaded.
 * @param {number} width In pixels.
 */
export function drawPanel(shown, width, actions) {
  const { run, layer, view } = shown;
  const kind = `${run.types[layer]} · ${whole(run.channels[layer])} channels`;
  const views = shown.views.map(({ value, label, title }) => [value, label, title]);
  return [
    element("h2", { title: run.names[layer] }, run.names[layer]),
    element("div.below", {}, element("span.quiet", {}, kind), segmented("Window", views, view.value, actions.view)),
    ...words(run, layer, view, actions),
    shown.others.length ? comparison(shown) : numbersOf(run, layer, view.window),
    metricsChart(shown, width, actions),
    ...channelCharts(shown, width),
    evidence(run, view.said),
  ];
}

function words(run, layer, { said, window }, actions) {
  const cause = said ? said.cause : window < 0 ? -1 : run.cause(window, layer);
  if (cause < 0) return [element("p.quiet", {}, "The layer is not in this window.")];
  const attention = window >= 0 && run.needsAttention(window, layer);
  const style = { background: causeColor(run.causes[cause]) };
  const letter = letterOf(run, cause);
  const badges = (said?.words ?? run.causes[cause].name).split(", ").map((word, index) =>
    element(index ? "span.badge.flag" : "span.badge", {}, !index && element("span.dot", { style }), word, !index && letter && element("b", {}, letter)),
  );
  const calm = !attention && element("span.quiet", {}, "needs no attention");
  const head = element("div.badges", {}, badges, calm);
  if (!said) return [head, element("p.quiet", {}, "Words are kept of the latest window and of the layer’s worst.")];
  return [head, said.explanation && element("p.explanation", {}, prose(said.explanation)), said.remedy && remedy(said.remedy, actions)];
}

function remedy(text, actions) {
  const copied = codeOf(text).join("\n") || text;
  const button = element("button.copy", { type: "button", title: `Copy: ${copied}`, onclick: () => actions.copy(copied, button) }, "Copy");
  return element("div.remedy", {}, element("p", {}, prose(text)), button);
}

function numbersOf(run, layer, window) {
  return element(
    "dl.numbers",
    {},
    run.metrics.map((metric) => {
      const value = window < 0 ? NaN : run.value(metric, window, layer);
      return element("div", {}, element("dt", {}, metric), element(value >= run.warning && metric !== "noise" ? "dd.large" : "dd", {}, distance(value)));
    }),
  );
}

/** The metrics of two runs or windows and what changed. */
function comparison({ run, layer, view, others, title }) {
  const [other] = others;
  const before = other.isEarlier ? other : { title, run, layer, window: view.window };
  const after = other.isEarlier ? { title, run, layer, window: view.window } : other;
  const value = (of, metric) => (of.layer < 0 || of.window < 0 ? NaN : of.run.value(metric, of.window, of.layer));
  const cause = (of) => (of.layer < 0 || of.window < 0 || of.run.cause(of.window, of.layer) < 0 ? "–" : of.run.causes[of.run.cause(of.window, of.layer)].name);
  const head = ["", before.title, after.title, "change"].map((text, i) => element(i ? "th.number" : "th", { title: text }, text));
  const rows = run.metrics.map((metric) => {
    const [a, b] = [value(before, metric), value(after, metric)];
    const change = Math.abs(b - a) < 0.03 ? "td.number" : b < a ? "td.number.better" : "td.number.worse";
    return element("tr", {}, element("td", {}, metric), element("td.number", {}, distance(a)), element("td.number", {}, distance(b)), element(change, {}, difference(b - a)));
  });
  const causes = element("tr", {}, element("td", {}, "verdict"), element("td.number", {}, cause(before)), element("td.number", {}, cause(after)), element("td"));
  return element("table.comparison", {}, element("thead", {}, element("tr", {}, head)), element("tbody", {}, causes, rows));
}

function metricsChart({ run, layer, view, others }, width, actions) {
  const metrics = run.metrics.filter((metric) => metric !== "noise");
  const courses = new Map(metrics.map((metric) => [metric, run.course(metric, layer)]));
  const present = metrics.filter((metric) => courses.get(metric).some((value) => !Number.isNaN(value)));
  const compared = others.filter((other) => other.run !== run && other.layer >= 0);
  const finite = [...courses.values()].flat().filter(Number.isFinite);
  const top = Math.max(1, ...finite) * 1.4;
  const chart = new Chart({
    width,
    height: HEIGHT,
    x: (pixels) => windows(run.steps, pixels),
    y: (pixels) => logarithmic([FLOOR, top], pixels),
    xLabel: "training step at the end of the window",
    label: `Metrics of ${run.names[layer]} over the windows`,
  });
  const xs = run.steps.map((_, index) => index);
  if (run.metrics.includes("noise")) chart.band(xs, xs.map(() => FLOOR), run.course("noise", layer));
  chart.level(run.warning, "warning").level(run.alert, "alert");
  if (view.window >= 0) chart.cursor(view.window);
  for (const metric of present) {
    chart.line(xs, courses.get(metric), { color: lineColor(metric), width: metric === "eval_error" ? 2 : 1.3, name: metric });
    if (xs.length <= 24) chart.dots(xs, courses.get(metric), { color: lineColor(metric), size: 5 });
  }
  for (const other of compared) {
    const ys = run.steps.map((_, column) => (other.partners[column] < 0 ? NaN : other.run.value("eval_error", other.partners[column], other.layer)));
    chart.line(xs, ys, { color: lineColor("eval_error"), width: 2, dash: "5 4", name: "other" });
  }
  chart.element.addEventListener("click", (event) => {
    const box = chart.element.getBoundingClientRect();
    actions.step(run.steps[chart.x.index(((event.clientX - box.left) / box.width) * width)]);
  });
  const keys = present.map((metric) => element("span.key", {}, element("i", { style: { background: lineColor(metric) } }), metric));
  if (run.metrics.includes("noise")) keys.push(element("span.key", {}, element("i.block", { style: { background: css("--noise") } }), "noise floor"));
  for (const other of compared) keys.push(element("span.key", {}, element("i.dashed"), `eval_error of ${other.title}`));
  return element("section.charts", {}, element("h3", {}, "Over the windows"), element("div.keys", {}, keys), chart.element);
}

function channelCharts({ channels, view, others }, width) {
  if (channels === undefined) return [element("p.quiet", {}, "…")];
  const which = view.value === "worst" || (view.said && view.said === view.worst) ? "worst" : "latest";
  const set = view.said && channels ? (channels[which]?.step === view.said.step ? channels[which] : channels.latest) : null;
  const [other] = others;
  const theirs = other?.channels?.latest;
  if (!set && !theirs) return view.said ? [element("p.quiet", {}, "No channels were kept of this window.")] : [];
  const stale = set && set.step !== view.said.step ? [element("p.quiet", {}, `Channels were kept of step ${whole(set.step)}.`)] : [];
  if (!theirs) return [...stale, ...drawChannels(set, width)];
  return [...stale, ...drawChannels(set, width), element("h3.other", {}, other.title), ...drawChannels(theirs, width)];
}

function evidence(run, said) {
  if (!said?.evidence.length) return null;
  const rows = said.evidence.map(([name, value]) =>
    element("tr", {}, element("td", {}, name), element("td.number", {}, general(value)), element("td.quiet", {}, run.definition(name))),
  );
  return element("details", {}, element("summary", {}, `Evidence: ${rows.length} numbers`), element("table.evidence", {}, element("tbody", {}, rows)));
}

/** The layers of a folded module, the worst first; a click on one shows it. */
export function drawModule(row, pane, column, actions) {
  const { run } = pane;
  const window = pane.windows[column];
  const layers = row.names.map((name) => run.indexOf.get(name)).filter((layer) => layer !== undefined);
  const rank = (layer) => [Number(run.needsAttention(window, layer)), run.value(pane.metric, window, layer) || 0];
  layers.sort((a, b) => rank(b)[0] - rank(a)[0] || rank(b)[1] - rank(a)[1]);
  const rows = layers.map((layer) => {
    const cause = run.cause(window, layer);
    const name = element("button.link", { type: "button", onclick: () => actions.select(run.names[layer]) }, run.names[layer]);
    const dot = cause >= 0 && element("span.dot", { style: { background: causeColor(run.causes[cause]) } });
    return element("tr", {}, element("td", {}, name), element("td", {}, dot, cause < 0 ? "–" : run.causes[cause].name), element("td.number", {}, distance(run.value(pane.metric, window, layer))));
  });
  const head = element("tr", {}, ["layer", "verdict"].map((text) => element("th", {}, text)), element("th.number", {}, pane.metric));
  return [
    element("h2", {}, row.label),
    element("div.below", {}, element("span.quiet", {}, `${row.names.length} layers, at step ${whole(run.steps[window])}`)),
    element("table.comparison", {}, element("thead", {}, head), element("tbody", {}, rows)),
  ];
}
