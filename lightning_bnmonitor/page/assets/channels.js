/** Charts of a layer's channels: running against exact, the course of a window, validation beside training. */

import { channelsOf } from "./decode.js";
import { element } from "./dom.js";
import { Chart, extent, linear, logarithmic } from "./charts.js";
import { count, whole } from "./numbers.js";
import { css, lineColor } from "./theme.js";

const NAMED = 4; // channels
const HEIGHT = 210;

/**
 * All charts of a set of channels, each with a heading.
 * @param {object|null} encoded As in the document of channels.
 * @param {number} width In pixels, of two charts beside each other.
 */
export function drawChannels(encoded, width) {
  const set = channelsOf(encoded);
  if (!set || !set.index.length) return [];
  const shown = set.index.length < set.of ? `the ${whole(set.index.length)} worst of ${count(set.of, "channel")}` : count(set.of, "channel");
  const half = Math.max(Math.floor((width - 16) / 2), 180);
  const { values } = set;
  const running = values.running_mean && values.exact_mean;
  const validated = values.val_mean && values.exact_mean;
  return [
    running && section(`Running against exact statistics: ${shown}`, "On the line they agree; bars are ± 2 standard errors, which is as far as chance puts them.", [
      scatter(half, set, ["exact mean", values.exact_mean], ["running mean", values.running_mean], doubled(values.stderr_mean), values.eval_error),
      scatter(half, set, ["exact std", roots(values.exact_var)], ["running std", roots(values.running_var)], stdErrors(values.running_var, values.stderr_var), values.eval_error),
    ]),
    set.course && set.course.batches.length > 0 && section(`Over the window: channel ${set.course.channel}`, "Batches of training, beside the exact and the running value that the window ended with.", [
      course(half, set, "mean", (value) => value),
      course(half, set, "std", Math.sqrt),
    ]),
    validated && section("Validation beside training", "On the line the layer receives in validation what it receives in training.", [
      scatter(half, set, ["training mean", values.exact_mean], ["validation mean", values.val_mean], null, values.val_error ?? values.eval_error, "val_error"),
      scatter(half, set, ["training std", roots(values.exact_var)], ["validation std", roots(values.val_var)], null, values.val_error ?? values.eval_error, "val_error"),
    ]),
  ].filter(Boolean);
}

function section(title, explanation, charts) {
  return element("section.charts", {}, element("h3", { title: explanation }, title), element("div.pair", {}, charts));
}

/** One value of each channel against another, with the line on which they agree. */
function scatter(width, set, [xLabel, xs], [yLabel, ys], errors, badness, metric = "eval_error") {
  const lows = ys.map((y, i) => y - (errors?.[i] || 0));
  const highs = ys.map((y, i) => y + (errors?.[i] || 0));
  const range = common(xs, ys);
  const scale = range.log ? (pixels) => logarithmic(range.of, pixels) : (pixels) => linear(range.of, pixels);
  const chart = new Chart({ width, height: HEIGHT, x: scale, y: scale, xLabel, yLabel, label: `${yLabel} of each channel against its ${xLabel}` });
  chart.line(range.of, range.of, { color: css("--grid-strong"), width: 1 });
  if (errors) chart.bars(xs, range.log ? lows.map((low) => Math.max(low, range.of[0])) : lows, highs, { color: css("--noise"), width: xs.length > 64 ? 2 : 4 });
  const worst = worstOf(badness, NAMED);
  const marked = new Set(worst);
  const color = lineColor(metric);
  const pick = (values, wanted) => [...values].map((value, i) => (marked.has(i) === wanted ? value : NaN));
  chart.dots(pick(xs, false), ys, { color: css("--ink-quiet"), size: xs.length > 512 ? 2.5 : 4, name: "channels" });
  chart.dots(pick(xs, true), ys, { color, size: 5.5, name: "worst" });
  const taken = [];
  for (const i of worst) {
    if (!Number.isFinite(xs[i]) || !Number.isFinite(ys[i])) continue;
    const at = [chart.x(xs[i]), chart.y(ys[i])];
    if (taken.some(([x, y]) => Math.abs(x - at[0]) < 26 && Math.abs(y - at[1]) < 11)) continue;
    taken.push(at);
    chart.name(xs[i], ys[i], String(set.index[i]));
  }
  return chart.element;
}

/** The range of both axes; logarithmic for positive values of several magnitudes. */
function common(xs, ys) {
  const finite = [...xs, ...ys].filter(Number.isFinite);
  const positive = finite.filter((value) => value > 0);
  const [low, high] = extent(positive, 0);
  if (positive.length === finite.length && finite.length && high / low > 50) return { log: true, of: [low / 1.3, high * 1.3] };
  return { log: false, of: extent(finite) };
}

/** Batches of the worst channel over the window. */
function course(width, set, label, transform) {
  const { channel, batches, mean, var: variance } = set.course;
  const at = set.index.indexOf(channel);
  const ends = batches.map((_, i) => batches.slice(0, i + 1).reduce((a, b) => a + b, 0));
  const middles = ends.map((end, i) => end - batches[i] / 2);
  const ys = (label === "mean" ? mean : variance).map(transform);
  const of = (name) => (at < 0 || !set.values[name] ? NaN : set.values[name][at]);
  const key = label === "mean" ? "mean" : "var";
  const exact = transform(of(`exact_${key}`));
  const running = transform(of(`running_${key}`));
  const error = 2 * (label === "mean" ? of("stderr_mean") : of("stderr_var") / (2 * running)) || 0;
  const chart = new Chart({
    width,
    height: HEIGHT,
    x: (pixels) => linear([0, ends.at(-1)], pixels),
    y: (pixels) => linear(extent([...ys, exact, running - error, running + error]), pixels),
    xLabel: "batch in the window",
    yLabel: `batch ${label}`,
  });
  const ends2 = [0, ends.at(-1)];
  if (error) chart.band(ends2, [running - error, running - error], [running + error, running + error]);
  if (Number.isFinite(exact)) chart.line(ends2, [exact, exact], { color: css("--ink-quiet"), width: 1, dash: "2 3", name: "exact" });
  if (Number.isFinite(running)) chart.line(ends2, [running, running], { color: lineColor("eval_error"), dash: "6 4", name: "running" });
  chart.line(middles, ys, { color: css("--ink-quiet"), width: 1, name: "batches" });
  chart.dots(middles, ys, { color: css("--ink-quiet"), size: 5 });
  for (const [value, word] of [[exact, "exact"], [running, "running"]]) if (Number.isFinite(value)) chart.name(ends.at(-1), value, word);
  return chart.element;
}

function worstOf(badness, number) {
  if (!badness) return [];
  const known = [...badness.keys()].filter((i) => !Number.isNaN(badness[i]));
  return known.sort((a, b) => badness[b] - badness[a]).slice(0, number);
}

const roots = (values) => values.map((value) => Math.sqrt(Math.max(value, 0)));
const doubled = (errors) => errors && errors.map((error) => 2 * error);
const stdErrors = (variances, errors) => errors && errors.map((error, i) => error / Math.sqrt(variances[i]));
