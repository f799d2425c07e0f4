/** The documents of a run as typed arrays, and questions to them. */

const FORMAT = 2;
/** Metrics in the order of their buttons, and what each compares. */
export const METRICS = new Map([
	["eval_error", "Running statistics against training"],
	["val_error", "Running statistics against validation"],
	["val_shift", "Training against validation"],
	["call_shift", "The calls of a step against each other"],
	["group_shift", "Groups of batches against all"],
	["batch_jitter", "Single batches against all of them"],
	["noise", "The part of eval_error that is chance"],
]);
const [ABSENT, ATTENTION] = [255, 128];
const CODES = new Uint8Array(128);
[..."ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"].forEach((each, code) => (CODES[each.charCodeAt(0)] = code));

/** What cannot be shown, in words for the reader. */
export class Unreadable extends Error {}

export class Run {
	#metrics = new Map();
	#causes = new Map();

	constructor(name, document) {
		checkFormat(document);
		const { windows, layers, thresholds, causes } = document;
		Object.assign(this, thresholds, { name, document, causes, steps: windows.step, headlines: windows.headline });
		Object.assign(this, { names: layers.name, types: layers.type, channels: layers.channels });
		this.metrics = [...METRICS.keys()].filter((metric) => metric in document.metrics);
		this.last = document.latest.window;
		this.indexOf = new Map(this.names.map((each, index) => [each, index]));
		this.cells = wordsOf(document.cause, this.steps.length * this.names.length).map((word) => word >>> 24);
	}

	/** A metric of all layers, window after window; nothing if nobody has it. */
	values(metric) {
		if (!this.#metrics.has(metric)) this.#metrics.set(metric, floatsOf(this.document.metrics[metric] ?? "", this.cells.length));
		return this.#metrics.get(metric);
	}

	/** A metric of a layer in a window, NaN if it is not known. */
	value(metric, window, layer) {
		return this.values(metric)[window * this.names.length + layer] ?? NaN;
	}

	course(metric, layer) {
		return this.steps.map((_, window) => this.value(metric, window, layer));
	}

	/** Index of a layer's cause in a window, -1 if the layer is not in it. */
	cause(window, layer) {
		const cell = this.cells[window * this.names.length + layer];
		return cell === ABSENT ? -1 : cell % ATTENTION;
	}

	/** Names of the causes that a layer had in any window. */
	causesOf(layer) {
		if (!this.#causes.has(layer)) {
			const its = new Set();
			for (let cell = layer; cell < this.cells.length; cell += this.names.length) its.add(this.cells[cell] % ATTENTION);
			this.#causes.set(layer, this.causes.filter((_, cause) => its.has(cause)).map(({ name }) => name));
		}
		return this.#causes.get(layer);
	}

	needsAttention(window, layer) {
		const cell = this.cells[window * this.names.length + layer];
		return cell !== ABSENT && cell >= ATTENTION;
	}

	/** How wrong eval() is for a layer: the larger of eval_error and val_error. */
	error(window, layer) {
		return larger(this.value("eval_error", window, layer), this.value("val_error", window, layer));
	}

	/** The first of the windows, up to this one, in all of which a layer needed attention. */
	since(window, layer) {
		let first = window;
		while (first > 0 && this.needsAttention(first - 1, layer)) first--;
		return first;
	}

	/** Layers that need attention in a window, the worst first. */
	sick(window) {
		const layers = [...this.names.keys()].filter((layer) => this.needsAttention(window, layer));
		return layers.sort((a, b) => orBelow(this.error(window, b)) - orBelow(this.error(window, a)) || 0);
	}

	/** Index of the window that ended at a step, -1 if there is none. */
	windowAt(step) {
		return this.steps.indexOf(step);
	}

	/** What is said of a layer in its "latest" or "worst" window: words and texts, or null. */
	said(which, layer) {
		const kept = this.document[which].layers[layer];
		if (!kept) return null;
		const step = which === "latest" ? this.steps[this.last] : kept.window;
		const text = (index) => this.document.texts[index] ?? "";
		const evidence = Object.entries(kept.evidence ?? {}).map(([name, value]) => [name, Number(value), this.document.evidence[name]]);
		return { ...kept, step, window: this.windowAt(step), explanation: text(kept.explanation), remedy: text(kept.remedy), evidence };
	}
}

/** The larger of two numbers, where NaN is none. */
export const larger = (a, b) => (a >= b || isNaN(b) ? a : b);

/** A number to sort by: NaN below all others. */
export const orBelow = (value) => (isNaN(value) ? -Infinity : value);

/** One of a layer's sets of channels, as arrays; null if there is none. */
export function channelsOf(set) {
	if (!set) return null;
	const index = set.index ?? [...Array(set.of).keys()];
	const values = Object.fromEntries(Object.entries(set.values).map(([name, text]) => [name, floatsOf(text, index.length)]));
	const course = set.course && { ...set.course, mean: set.course.mean.map(Number), var: set.course.var.map(Number) };
	return { ...set, index, values, course };
}

function checkFormat(document) {
	if (document?.format > FORMAT) {
		throw new Unreadable(
			`A newer lightning_bnmonitor wrote this run (format ${document.format}; this page reads ${FORMAT}). ` +
				"Update the one that shows it: `pip install --upgrade lightning-bnmonitor`.",
		);
	}
	if (document?.format !== FORMAT) throw new Unreadable("This is no document of a run, or one of an unknown format.");
}

/** So many numbers of 32 bits: a character for every six bits of each, the highest of all first; the others are zero. */
function wordsOf(text, count) {
	const words = new Uint32Array(count);
	for (let at = 0; at < text.length; at++) words[at % count] |= (CODES[text.charCodeAt(at)] << 26) >>> (6 * Math.floor(at / count));
	return words;
}

const floatsOf = (text, count) => new Float32Array(wordsOf(text, count).buffer);
