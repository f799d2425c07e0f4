/** The table as CSV, the picture as SVG. */

import { columnEdge, letterOf, placePanes } from "./cells.js";
import { drawn, element } from "./dom.js";
import { whole } from "./numbers.js";
import { colorOf, css, inkOn } from "./theme.js";

const ROW = 16;
const [TOP, BOTTOM] = [44, 30];

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
    const known = [row.label, row.isModule ? "" : run?.types[layer], row.isModule ? "" : run?.channels[layer], cause < 0 ? "" : run.causes[cause].name];
    return [...known, ...values.map((value) => (Number.isNaN(value) ? "" : Number(value.toPrecision(4))))];
  });
  const quoted = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ""));
  return [["layer", "type", "channels", "cause", ...titles], ...lines].map((line) => line.map(quoted).join(",")).join("\r\n") + "\r\n";
}

/** The whole heatmap as an SVG document. */
export function pictureOf(rows, panes, title) {
  const longest = Math.max(...rows.map((row) => row.label.length), 8);
  const left = Math.min(12 + longest * 6.6, 420);
  const places = placePanes(panes, 900, 60).map((place) => ({ ...place, left: place.left + left }));
  const width = places.at(-1).left + places.at(-1).width + 16;
  const svg = drawn("svg", { width, height: TOP + rows.length * ROW + BOTTOM, "font-family": css("--font"), "font-size": 11, fill: css("--ink") });
  svg.append(drawn("rect", { width: "100%", height: "100%", fill: css("--surface") }), drawn("text", { x: 12, y: 18, "font-size": 13, "font-weight": 600 }, title));
  const paths = new Map();
  const marks = [];
  rows.forEach((row, index) => {
    const y = TOP + index * ROW;
    marks.push(drawn("text", { x: left - 6, y: y + 11.5, "text-anchor": "end" }, row.label));
    for (const place of places) addRow(place, row, y, paths, marks);
  });
  for (const [color, path] of paths) svg.append(drawn("path", { d: path, fill: color }));
  for (const { pane, left: start, width: its, column } of places) {
    if (pane.title) marks.push(drawn("text", { x: start, y: 36 }, pane.title));
    const every = Math.max(Math.ceil(60 / column), 1);
    for (let at = pane.steps.length - 1; at >= 0; at -= every) {
      marks.push(drawn("text", { x: start + its - (pane.steps.length - at - 0.5) * column, y: TOP + rows.length * ROW + 14, "text-anchor": "middle" }, whole(pane.steps[at])));
    }
  }
  svg.append(...marks);
  return new XMLSerializer().serializeToString(svg);
}

function addRow(place, row, y, paths, marks) {
  const { pane } = place;
  const series = pane.series(row);
  if (!series) return;
  const color = (column) => colorOf(series.values[column], pane.isDifference);
  for (let column = 0; column < series.values.length; ) {
    const start = column++;
    while (column < series.values.length && color(column) === color(start)) column++;
    const [from, to] = [columnEdge(place, start), columnEdge(place, column)];
    if (color(start)) paths.set(color(start), `${paths.get(color(start)) ?? ""}M${from} ${y}h${to - from}v${ROW - 1}h${from - to}z`);
  }
  series.cause.forEach((cause, column) => {
    if (pane.isDifference || (column && cause === series.cause[column - 1]) || place.column < 10) return;
    const letter = letterOf(pane.run, cause);
    const x = columnEdge(place, column) + 4;
    if (letter) marks.push(drawn("text", { x, y: y + 11.5, fill: inkOn(color(column) ?? css("--surface")) }, letter));
  });
}

/** Hand a file to the reader. */
export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
