/** The table as CSV, the picture as SVG. */

import { drawCells, placePanes } from "./cells.js";
import { el, svg } from "./dom.js";
import { whole } from "./numbers.js";
import { css } from "./theme.js";

const ROW = 16;
const TOP = 44;

/** What the heatmap shows: a row for each layer, a column for each window of each pane. */
export function tableOf(rows, panes) {
	const titles = panes.flatMap((pane) => pane.steps.map((step) => `${pane.title ? `${pane.title}: ` : ""}step ${step}`));
	const lines = rows.map((row) => {
		const pane = panes.find((each) => each.series(row));
		const series = pane?.series(row);
		const run = pane?.run ?? pane?.first.run;
		const layer = run?.indexOf.get(row.names[0]);
		const cause = series && !pane.isDifference ? series.cause[pane.lastColumn] : -1;
		const values = panes.flatMap((each) => [...(each.series(row)?.values ?? each.steps.map(() => NaN))]);
		return [row.label, run?.types[layer], row.isModule ? "" : run?.channels[layer], run?.causes[cause]?.name, ...values.map((value) => (isNaN(value) ? "" : Number(value.toPrecision(4))))];
	});
	const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : (value ?? ""));
	const table = [["layer", "type", "channels", "cause", ...titles], ...lines];
	return table.map((line) => `${line.map(quoted).join(",")}\r\n`).join("");
}

/** The whole heatmap as an SVG document. */
export function pictureOf(rows, panes, title) {
	const left = Math.min(20 + Math.max(...rows.map((row) => row.label.length)) * 6.6, 420);
	const places = placePanes(panes, 900, 60).map((place) => ({ ...place, left: place.left + left }));
	const [width, bottom] = [places.at(-1).left + places.at(-1).width + 16, TOP + rows.length * ROW];
	const pen = new Recorder();
	drawCells(pen, places, rows, TOP, ROW);
	Object.assign(pen, { fillStyle: css("--ink"), textAlign: "right" });
	rows.forEach((row, i) => pen.fillText(row.label, left - 6, TOP + (i + 0.5) * ROW));
	pen.textAlign = "center";
	for (const { pane, left: from, column } of places) {
		pen.fillText(pane.title, from + (column * pane.steps.length) / 2, TOP - 9);
		const every = Math.max(Math.ceil(60 / column), 1);
		for (let i = pane.steps.length - 1; i >= 0; i -= every) pen.fillText(whole(pane.steps[i]), from + (i + 0.5) * column, bottom + 10);
	}
	const ground = svg("rect", { width: "100%", height: "100%", fill: css("--page") });
	const head = svg("text", { x: 12, y: 18, "font-size": 13, fill: css("--ink") }, title);
	const properties = { viewBox: `0 0 ${width} ${bottom + 24}`, width, height: bottom + 24, "font-family": css("--font"), "font-size": 11 };
	return new XMLSerializer().serializeToString(svg("svg", properties, ground, head, pen.elements()));
}

/** What is drawn as on a canvas becomes elements: a path for each colour, and texts. */
class Recorder {
	#paths = new Map();
	#texts = [];

	fillRect(x, y, width, height) {
		const color = this.fillStyle;
		this.#paths.set(color, `${this.#paths.get(color) ?? ""}M${x} ${y}h${width}v${height}h${-width}z`);
	}

	fillText(text, x, y) {
		const anchor = { right: "end", center: "middle" }[this.textAlign] ?? "start";
		this.#texts.push(svg("text", { x, y: y + 3.5, "text-anchor": anchor, fill: this.fillStyle }, text));
	}

	elements() {
		return [...[...this.#paths].map(([fill, d]) => svg("path", { d, fill })), ...this.#texts];
	}
}

export function download(name, type, text) {
	const address = URL.createObjectURL(new Blob([text], { type }));
	el("a", { href: address, download: name }).click();
	setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Copy a text; whether that was possible. */
export async function copied(text) {
	try {
		await navigator.clipboard.writeText(text);
		return true;
	} catch {
		// Without a secure connection: by a selection, as ever.
		const area = el("textarea", text);
		document.body.append(area);
		area.select();
		const done = document.execCommand("copy");
		area.remove();
		return done;
	}
}
