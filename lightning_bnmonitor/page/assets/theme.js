/** Colours: steps of the heatmap, light or dark, and those of TensorBoard's runs. */

import { outerWindow } from "./host.js";

/** Where a new colour begins; the last is open above. */
export const LEVELS = [0, 0.03, 0.1, 0.25, 0.6, 1.5];
/** Ever darker on light, ever brighter on dark: they are told apart by their lightness alone. */
const STEPS = {
	light: ["#f6f4ea", "#dcd9c4", "#e9b44c", "#d1603d", "#8c2f5b", "#2b1243"],
	dark: ["#2c3036", "#444a54", "#86477f", "#d4604a", "#f0a944", "#fbeeb0"],
};
/** A decrease (good) to an increase (bad), by the same levels. */
const DIFFERENCES = {
	light: ["#08306b", "#2166ac", "#6baed6", "#c6dbef", "#f4f3ee", "#f7d9a8", "#e9a13b", "#c05a12", "#6b2b06"],
	dark: ["#cfe6ff", "#7fb8f0", "#3f82c4", "#2b5078", "#2c3036", "#65492a", "#a96f24", "#e79a35", "#ffe0a3"],
};
const DIFFERENCE_LEVELS = [-0.6, -0.25, -0.1, -0.03, 0.03, 0.1, 0.25, 0.6];
/** TensorBoard's default palette, in its order. */
const RUNS = {
	light: ["#425066", "#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a"],
	dark: ["#8e98a3", "#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a"],
};
const LINES = {
	light: { eval_error: "#0072b2", val_error: "#c44e00", val_shift: "#008a64", call_shift: "#b4558a", batch_jitter: "#a67400", noise: "#777777" },
	dark: { eval_error: "#62b9ee", val_error: "#ff8f4d", val_shift: "#3fc79a", call_shift: "#e08fba", batch_jitter: "#e6b422", noise: "#999999" },
};

const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
let mode = "light";

/** Follow TensorBoard's mode, or else the system's; call back whenever it changes. */
export function followMode(callback) {
	const body = outerWindow()?.document.body;
	const update = () => {
		const dark = body ? body.classList.contains("dark-mode") : prefersDark.matches;
		const changed = mode !== (dark ? "dark" : "light");
		mode = dark ? "dark" : "light";
		document.documentElement.dataset.mode = mode;
		if (changed) callback();
	};
	if (body) new MutationObserver(update).observe(body, { attributes: true, attributeFilter: ["class"] });
	prefersDark.addEventListener("change", update);
	update();
}

/** Colours of the steps from `LEVELS` on. */
export const stepColors = () => STEPS[mode];

/** Colours of differences: between each two of `differenceLevels` one, and beyond. */
export const differenceColors = () => DIFFERENCES[mode];
export const differenceLevels = DIFFERENCE_LEVELS;

/** Colour of a value, or of a difference; null for none. */
export function colorOf(value, isDifference = false) {
	if (Number.isNaN(value)) return null;
	if (isDifference) return DIFFERENCES[mode][DIFFERENCE_LEVELS.filter((level) => value >= level).length];
	let step = LEVELS.length - 1;
	while (step > 0 && value < LEVELS[step]) step--;
	return STEPS[mode][step];
}

/** Black or white, whichever is read better on a colour. */
export function inkOn(color) {
	return luminance(color) > 0.3 ? "#1a1a1a" : "#ffffff";
}

/** Colour of a run by its place among all runs. */
export const runColor = (index) => RUNS[mode][((index % 7) + 7) % 7];

/** Colour of a metric's line. */
export const lineColor = (metric) => LINES[mode][metric];

/** Colour of a cause: its own, unless it is too dark to be seen. */
export const causeColor = (cause) => (mode === "dark" && luminance(cause.color) < 0.06 ? "#b9b2c6" : cause.color);

/** Value of a CSS variable of the page. */
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Luminance of "#rrggbb" as WCAG defines it. */
export function luminance(color) {
	const [r, g, b] = [1, 3, 5].map((at) => {
		const part = parseInt(color.slice(at, at + 2), 16) / 255;
		return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
	});
	return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
