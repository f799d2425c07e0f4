/** Colours: steps of the heatmap, light or dark, and those of TensorBoard's runs. */

import { outerWindow } from "./host.js";

/** Where a new colour begins; the last is open above. */
export const LEVELS = [0, 0.03, 0.1, 0.25, 0.6, 1.5];
const STEP_LEVELS = LEVELS.slice(1);
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
export const DIFFERENCE_LEVELS = [-0.6, -0.25, -0.1, -0.03, 0.03, 0.1, 0.25, 0.6];
/** TensorBoard's default palette, in its order. */
const RUNS = ["#425066", "#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a"];
const SLATE = "#8e98a3"; // the first, in its dark mode
const LINES = {
	light: { eval_error: "#0072b2", val_error: "#c44e00", val_shift: "#008a64", call_shift: "#b4558a", group_shift: "#5b4bb8", batch_jitter: "#a67400" },
	dark: { eval_error: "#62b9ee", val_error: "#ff8f4d", val_shift: "#3fc79a", call_shift: "#e08fba", group_shift: "#a89cf5", batch_jitter: "#e6b422" },
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

/** Colours of the steps from `LEVELS` on, or of those between `DIFFERENCE_LEVELS` and beyond. */
export const stepColors = (isDifference) => (isDifference ? DIFFERENCES : STEPS)[mode];

/** Colour of a value, or of a difference; null for none. */
export function colorOf(value, isDifference = false) {
	if (isNaN(value)) return null;
	const levels = isDifference ? DIFFERENCE_LEVELS : STEP_LEVELS;
	return stepColors(isDifference)[levels.findLastIndex((level) => value >= level) + 1];
}

/** Black or white, whichever is read better on a colour. */
export const inkOn = (color) => (luminance(color) > 0.3 ? "#1a1a1a" : "#ffffff");

export const runColor = (index) => (mode === "dark" && index % RUNS.length === 0 ? SLATE : RUNS[index % RUNS.length]);

export const lineColor = (metric) => LINES[mode][metric];

/** Colour of a cause: its own, unless it is too dark to be seen. */
export const causeColor = (cause) => (mode === "dark" && luminance(cause.color) < 0.06 ? "#b9b2c6" : cause.color);

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Luminance of "#rrggbb" as WCAG defines it. */
function luminance(color) {
	const [r, g, b] = [1, 3, 5].map((at) => {
		const part = parseInt(color.slice(at, at + 2), 16) / 255;
		return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
	});
	return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
