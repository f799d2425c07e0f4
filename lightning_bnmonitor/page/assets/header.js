/** One sentence on each run. */

import { drawn, element } from "./dom.js";
import { count, distance, whole } from "./numbers.js";
import { runColor } from "./theme.js";

const NAMED = 3; // layers

/**
 * The head of the page.
 * @param {object[]} entries Of the runs: {name, place, run, error}; run and error are null while it is loaded.
 * @param {State} state
 * @param {object} actions `choose(run)`, `select(layer)`.
 */
export function drawHeader(entries, state, actions) {
  const shown = entries.find((entry) => entry.name === state.run);
  const several = entries.length > 1;
  return element(
    "header",
    {},
    several && element("div.runs", { role: "listbox", "aria-label": "Runs" }, entries.map((entry) => runLine(entry, state, actions))),
    shown?.run && shown.run.names.length > 0 && sentence(shown.run, actions, !several),
  );
}

function runLine(entry, state, actions) {
  const role = entry.name === state.run ? "A" : entry.name === state.otherRun ? "B" : "";
  const said = entry.error ?? (entry.run ? (entry.run.headlines.at(-1) ?? "No window yet.") : "…");
  return element(
    entry.error ? "button.run.failed" : "button.run",
    { type: "button", role: "option", "aria-selected": String(entry.name === state.run), title: entry.name, "data-run": entry.name, onclick: () => actions.choose(entry.name) },
    element("span.dot", { style: { background: runColor(entry.place) } }),
    element("span.name", {}, entry.name),
    state.otherRun !== null && element("span.role", {}, role),
    entry.run ? spark(entry.run) : element("span"),
    element("span.said", {}, said),
  );
}

/** How many layers needed attention, over the windows. */
function spark(run) {
  const [width, height] = [64, 14];
  const counts = run.steps.map((_, window) => run.names.reduce((sum, _name, layer) => sum + run.needsAttention(window, layer), 0));
  const most = Math.max(...counts, 1);
  const points = counts.map((number, i) => `${(i / Math.max(counts.length - 1, 1)) * width},${height - 1 - (number / most) * (height - 3)}`);
  return drawn(
    "svg.spark",
    { width, height, "aria-hidden": "true" },
    drawn("polyline", { points: points.length > 1 ? points.join(" ") : `0,${height - 1} ${points[0] ?? "0,0"}` }),
  );
}

/** The model in words, and where to look. */
function sentence(run, actions, withHeadline) {
  const sick = run.sick(run.last);
  const named = sick.slice(0, NAMED).map((layer) => {
    const since = run.since(run.last, layer);
    const name = element("button.link", { type: "button", onclick: () => actions.select(run.names[layer]) }, run.names[layer]);
    const error = run.error(run.last, layer);
    const words = Number.isNaN(error) ? "" : ` by ${distance(error)}`;
    return element("span.one", {}, name, `${words} since step ${whole(run.steps[since])}`);
  });
  const more = sick.length > NAMED && element("span.one", {}, `and ${sick.length - NAMED} more`);
  const errors = run.names.map((_, layer) => run.error(run.last, layer)).filter((error) => !Number.isNaN(error));
  const largest = errors.length ? `, errors in eval() up to ${distance(Math.max(...errors))}` : "";
  const off = sick.length
    ? ["Off in eval(): ", named, more]
    : `${count(run.names.length, "layer")}${largest}.`;
  const size = `${count(run.steps.length, "window")}, up to step ${whole(run.steps.at(-1))}`;
  return element(
    "div.sentence",
    {},
    withHeadline && element(sick.length ? "h1.sick" : "h1", {}, run.headlines.at(-1) ?? ""),
    element("p", {}, off),
    element("p.quiet", {}, size),
  );
}
