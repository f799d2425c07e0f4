/** The documents of a run as typed arrays, and questions to them. */

export const FORMAT = 1;
/** Metrics in the order of their buttons, and what each compares. */
export const METRICS = new Map([
	["eval_error", "Running statistics against training: what eval() gets wrong"],
	["val_error", "Running statistics against validation"],
	["val_shift", "Training against validation"],
	["call_shift", "The calls of a step against each other"],
	["batch_jitter", "Single batches against all: training normalises by what eval() cannot have"],
	["noise", "The part of eval_error that is chance"],
]);
const ABSENT = 255;
const ATTENTION = 128;

/** What cannot be shown, in words for the reader. */
export class Unreadable extends Error {}

/** Bytes of a base64 text. */
export function bytesOf(text) {
	const binary = atob(text);
	const bytes = new Uint8Array(binary.length);
	for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
	return bytes;
}

/** Values of two planes of bfloat16: all high bytes, then all low bytes. */
export function floatsOfPlanes(text) {
	const bytes = bytesOf(text);
	const count = bytes.length >> 1;
	const bits = new Uint32Array(count);
	for (let i = 0; i < count; i++) bits[i] = (bytes[i] << 24) | (bytes[count + i] << 16);
	return new Float32Array(bits.buffer);
}

/** Values of float32 bytes, little endian. */
export function floatsOf(text) {
	const bytes = bytesOf(text);
	const view = new DataView(bytes.buffer);
	return Float32Array.from({ length: bytes.length >> 2 }, (_, i) => view.getFloat32(4 * i, true));
}

/** A number of JSON, where "NaN" and "Infinity" are words. */
export const numberOf = (value) => (value === null || value === undefined ? NaN : Number(value));

/** All that is remembered of a run's windows. */
export class Run {
	constructor(name, document) {
		checkFormat(document);
		this.name = name;
		this.document = document;
		this.steps = document.windows.step;
		this.headlines = document.windows.headline;
		this.names = document.layers.name;
		this.types = document.layers.type;
		this.channels = document.layers.channels;
		this.causes = document.causes;
		this.metrics = [...METRICS.keys()].filter((metric) => metric in document.metrics);
		this.warning = document.thresholds.warning;
		this.alert = document.thresholds.alert;
		this.last = document.latest ? document.latest.window : this.steps.length - 1;
		this.indexOf = new Map(this.names.map((name, index) => [name, index]));
		this.cells = bytesOf(document.cause);
		this.decoded = new Map();
	}

	/** Values of a metric, window after window; null if nobody has it. */
	values(metric) {
		if (!(metric in this.document.metrics)) return null;
		if (!this.decoded.has(metric)) this.decoded.set(metric, floatsOfPlanes(this.document.metrics[metric]));
		return this.decoded.get(metric);
	}

	/** A metric of a layer in a window, NaN if it is not known. */
	value(metric, window, layer) {
		const values = this.values(metric);
		return values ? values[window * this.names.length + layer] : NaN;
	}

	/** A metric of a layer over all windows. */
	course(metric, layer) {
		return this.steps.map((_, window) => this.value(metric, window, layer));
	}

	/** Index of a layer's cause in a window, -1 if the layer is not in it. */
	cause(window, layer) {
		const cell = this.cells[window * this.names.length + layer];
		return cell === ABSENT ? -1 : cell & (ATTENTION - 1);
	}

	/** Whether a layer needs attention in a window. */
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
		const layers = this.names.map((_, layer) => layer).filter((layer) => this.needsAttention(window, layer));
		const errors = new Map(layers.map((layer) => [layer, orBelow(this.error(window, layer))]));
		return layers.sort((a, b) => errors.get(b) - errors.get(a));
	}

	/** Index of the window that ended at a step, -1 if there is none. */
	windowAt(step) {
		return this.steps.indexOf(step);
	}

	/** What is said of a layer in its latest or worst window: words and texts, or null. */
	said(which, layer) {
		const kept = this.document[which]?.layers?.[layer];
		if (!kept) return null;
		const text = (index) => (index >= 0 ? this.document.texts[index] : "");
		return {
			window: which === "latest" ? this.last : this.windowAt(kept.window),
			step: which === "latest" ? this.steps[this.last] : kept.window,
			cause: kept.cause,
			words: kept.words,
			explanation: text(kept.explanation),
			remedy: text(kept.remedy),
			evidence: Object.entries(kept.evidence ?? {}).map(([name, value]) => [name, numberOf(value)]),
		};
	}

	/** What a number of the evidence is. */
	definition(name) {
		return this.document.evidence?.[name] ?? "";
	}
}

/** The larger of two numbers, where NaN is none. */
export const larger = (a, b) => (a >= b || Number.isNaN(b) ? a : b);

/** A number to sort by: NaN below all others. */
export const orBelow = (value) => (Number.isNaN(value) ? -Infinity : value);

/** One of a layer's sets of channels, as arrays; null if there is none. */
export function channelsOf(set) {
	if (!set) return null;
	const values = Object.fromEntries(Object.entries(set.values).map(([name, text]) => [name, floatsOf(text)]));
	const count = values.exact_mean?.length ?? 0;
	const course = set.course && {
		channel: set.course.channel,
		batches: set.course.batches,
		mean: set.course.mean.map(numberOf),
		var: set.course.var.map(numberOf),
	};
	return { step: set.step, of: set.of, index: set.index ?? [...Array(count).keys()], values, course };
}

/** Refuse what a later version has written. */
export function checkFormat(document) {
	if (!document || typeof document !== "object") throw new Unreadable("There is no document of this run.");
	if (document.error) throw new Unreadable(document.error);
	if (document.format > FORMAT) {
		throw new Unreadable(
			`A newer lightning_bnmonitor wrote this run (format ${document.format}; this page reads ${FORMAT}). ` +
				"Update the one that shows it: `pip install --upgrade lightning-bnmonitor`.",
		);
	}
	if (document.format !== FORMAT) throw new Unreadable(`The format of this run is not known: ${document.format}.`);
}
