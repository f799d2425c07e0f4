/** Charts of a layer's channels. */

import { Chart, extent, linear, logarithmic } from "./charts.js";
import { channelsOf } from "./decode.js";
import { el } from "./dom.js";
import { count, whole } from "./numbers.js";
import { css, lineColor } from "./theme.js";

const NAMED = 4; // channels
const HEIGHT = 210;

/** All charts of a set of channels as in the document, so many pixels wide. */
export function drawChannels(encoded, width) {
	const set = channelsOf(encoded);
	if (!set?.index.length) return [];
	const { values: v, course, index, of } = set;
	const half = Math.max(Math.floor((width - 16) / 2), 180);
	const all = `${index.length < of ? `the ${whole(index.length)} worst of ` : ""}${count(of, "channel")}`;
	const stdErrors = v.stderr_var?.map((error, i) => error / Math.sqrt(v.running_var[i])); // two of them: 2·error / (2·std)
	const pair = (names, means, stds, errors, badness, color) => [
		scatter(half, index, [`${names[0]} mean`, means[0]], [`${names[1]} mean`, means[1]], errors?.[0], badness, color),
		scatter(half, index, [`${names[0]} std`, roots(stds[0])], [`${names[1]} std`, roots(stds[1])], errors?.[1], badness, color),
	];
	const sections = [];
	if (v.exact_mean && v.running_mean) {
		const errors = v.stderr_mean && [v.stderr_mean.map((error) => 2 * error), stdErrors];
		const charts = pair(["exact", "running"], [v.exact_mean, v.running_mean], [v.exact_var, v.running_var], errors, v.eval_error, "eval_error");
		sections.push([`Running against exact statistics: ${all}`, "On the line they agree; bars are 2 standard errors.", charts]);
	}
	if (course?.batches.length) {
		const charts = [drawCourse(half, set, "mean", (value) => value), drawCourse(half, set, "var", Math.sqrt)];
		sections.push([`Over the window: channel ${course.channel}`, "Batches beside the exact and the running value.", charts]);
	}
	if (v.exact_mean && v.val_mean) {
		const charts = pair(["training", "validation"], [v.exact_mean, v.val_mean], [v.exact_var, v.val_var], null, v.val_error ?? v.eval_error, "val_error");
		sections.push(["Validation beside training", "On the line they are alike.", charts]);
	}
	return sections.map(([title, note, charts]) => el("section.charts", el("h3", title), el("p.note", note), el("div.pair", charts)));
}

/** One value of each channel against another; the worst are named. */
function scatter(width, index, [xLabel, xs], [yLabel, ys], errors, badness, metric) {
	const { log, range } = common(xs, ys);
	const scale = (pixels) => (log ? logarithmic : linear)(range, pixels);
	const chart = new Chart({ width, height: HEIGHT, x: scale, y: scale, xLabel, yLabel, label: `${yLabel} of channels against their ${xLabel}` });
	chart.line(range, range, { color: css("--strong"), width: 1 });
	if (errors) {
		const lows = ys.map((y, i) => Math.max(y - errors[i], log ? range[0] : -Infinity));
		chart.bars(xs, lows, ys.map((y, i) => y + errors[i]), { color: css("--noise"), width: xs.length > 64 ? 2 : 4 });
	}
	const known = [...(badness?.keys() ?? [])].filter((i) => !isNaN(badness[i]) && isFinite(xs[i]) && isFinite(ys[i]));
	const worst = known.sort((a, b) => badness[b] - badness[a]).slice(0, NAMED);
	const pick = (wanted) => [...xs].map((x, i) => (worst.includes(i) === wanted ? x : NaN));
	chart.dots(pick(false), ys, { color: css("--quiet"), width: xs.length > 512 ? 2.5 : 4 });
	chart.dots(pick(true), ys, { color: lineColor(metric), width: 5.5 });
	const named = [];
	for (const i of worst) {
		const [x, y] = [chart.x(xs[i]), chart.y(ys[i])];
		if (named.some((other) => Math.abs(other[0] - x) < 26 && Math.abs(other[1] - y) < 11)) continue;
		named.push([x, y]);
		chart.name(xs[i], ys[i], String(index[i]));
	}
	return chart.element;
}

/** The range of both axes; logarithmic for positive values of several magnitudes. */
function common(xs, ys) {
	const finite = [...xs, ...ys].filter(isFinite);
	const [low, high] = extent(finite, 0);
	return low > 0 && high / low > 50 ? { log: true, range: [low / 1.3, high * 1.3] } : { log: false, range: extent(finite) };
}

function drawCourse(width, { course, index, values }, moment, transform) {
	const at = index.indexOf(course.channel);
	const of = (name) => transform(values[`${name}_${moment}`]?.[at] ?? NaN);
	const label = moment === "mean" ? "mean" : "std";
	const ends = course.batches.map((_, i) => course.batches.slice(0, i + 1).reduce((a, b) => a + b));
	const middles = ends.map((end, i) => end - course.batches[i] / 2);
	const ys = course[moment].map(transform);
	const [exact, running, stderr] = [of("exact"), of("running"), values[`stderr_${moment}`]?.[at]];
	const error = (moment === "mean" ? 2 * stderr : stderr / running) || 0;
	const both = [0, ends.at(-1)];
	const chart = new Chart({
		width,
		height: HEIGHT,
		x: (pixels) => linear(both, pixels),
		y: (pixels) => linear(extent([...ys, exact, running - error, running + error]), pixels),
		xLabel: "batch in the window",
		yLabel: `batch ${label}`,
	});
	chart.band(both, [running - error, running - error], [running + error, running + error]);
	chart.line(both, [exact, exact], { color: css("--quiet"), width: 1, dash: "2 3" });
	chart.line(both, [running, running], { color: lineColor("eval_error"), dash: "6 4" });
	chart.line(middles, ys, { color: css("--quiet"), width: 1 }).dots(middles, ys, { color: css("--quiet"), width: 5 });
	for (const [value, word] of [[exact, "exact"], [running, "running"]]) if (isFinite(value)) chart.name(both[1], value, word);
	return chart.element;
}

const roots = (values) => values.map((value) => Math.sqrt(Math.max(value, 0)));
