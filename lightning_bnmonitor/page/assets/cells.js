/** Cells of the heatmap on a canvas: colours, letters, numbers. */

import { brief } from "./numbers.js";
import { colorOf, css, inkOn } from "./theme.js";

const LETTER = 10; // width in pixels that a letter needs
const NUMBER = 44; // and a number
const PAD = 5; // beside them
const GAP = 14; // between panes

/** Where panes lie: their left edges and the width of a column, in pixels. */
export function placePanes(panes, width, widest) {
	const room = width - GAP * (panes.length - 1);
	const columns = panes.reduce((sum, pane) => sum + pane.steps.length, 0);
	const column = Math.min(room / Math.max(columns, 1), widest);
	let left = 0;
	return panes.map((pane) => {
		const place = { pane, left, column, width: column * pane.steps.length };
		left += place.width + GAP;
		return place;
	});
}

/** Where a column begins, on whole pixels. */
export const columnEdge = (place, column) => Math.round(place.left + column * place.column);

/** Pane and column at a position; null between panes. */
export function columnAt(places, x) {
	const place = places.find((each) => x >= each.left && x < each.left + each.width);
	return place ? { place, column: Math.min(Math.floor((x - place.left) / place.column), place.pane.steps.length - 1) } : null;
}

/** Draw rows from `top` on, so high each, on a context whose unit is a CSS pixel. */
export function drawCells(context, places, rows, top, height) {
	const font = `${Math.min(11, height - 5)}px ${css("--font")}`;
	for (const place of places) {
		rows.forEach((row, index) => {
			const series = place.pane.series(row);
			if (!series) return;
			const y = top + index * height;
			drawRuns(context, place, series, y, height);
			if (height < 14) return;
			context.font = font;
			context.textBaseline = "middle";
			drawMarks(context, place, series, y + height / 2 + 0.5);
		});
	}
}

/** Neighbouring cells of one colour are one rectangle, unless they are wide. */
function drawRuns(context, place, series, y, height) {
	const gap = place.column >= 14 ? 1 : 0;
	const { values } = series;
	for (let column = 0; column < values.length; ) {
		const color = colorOf(values[column], place.pane.isDifference);
		const start = column++;
		while (!gap && column < values.length && colorOf(values[column], place.pane.isDifference) === color) column++;
		const left = columnEdge(place, start);
		if (color) {
			context.fillStyle = color;
			context.fillRect(left, y, columnEdge(place, column) - left - gap, height - 1);
		} else if (series.cause[start] >= 0) {
			context.fillStyle = css("--line"); // it was there, and nothing is known of it
			context.fillRect(left, y + Math.floor(height / 2), columnEdge(place, column) - left - gap, 1);
		}
	}
}

/** A letter where a cause begins and there is room, and numbers in wide cells. */
function drawMarks(context, place, series, middle) {
	const { pane } = place;
	let free = 0; // up to here something is written
	for (let column = 0; column < series.values.length; column++) {
		const left = columnEdge(place, column);
		const value = series.values[column];
		const color = colorOf(value, pane.isDifference) ?? css("--page");
		context.fillStyle = inkOn(color);
		if (place.column >= NUMBER && !isNaN(value)) {
			context.textAlign = "right";
			context.fillText(brief(value, pane.isDifference), columnEdge(place, column + 1) - PAD, middle);
		}
		if (pane.isDifference || (column && series.cause[column] === series.cause[column - 1])) continue;
		const letter = pane.run.causes[series.cause[column]]?.letter;
		if (!letter || left < free) continue;
		let end = column + 1;
		while (end < series.cause.length && series.cause[end] === series.cause[column]) end++;
		if (columnEdge(place, end) - left < LETTER) continue;
		context.textAlign = "left";
		const x = place.column >= NUMBER ? left + PAD : left + Math.max((place.column - 8) / 2, 1);
		context.fillText(letter, x, middle);
		free = left + LETTER;
	}
}
