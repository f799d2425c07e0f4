/** What is selected, and how the address holds it. */

const DEFAULTS = {
	run: "", // the first
	versus: "", // "run:NAME" or "step:STEP": what is compared with
	view: "side", // of two runs: "side" or "difference"
	metric: "eval_error",
	sort: "model", // "model", "worst" or "name"
	filter: "",
	cause: "",
	layer: "",
	window: "latest", // "latest", "worst" or a step
	depth: 0, // of modules that are folded
};

export class State {
	#address;
	onChange = () => {};

	constructor(address) {
		this.#address = address;
		this.#read();
		address.onChange(() => {
			this.#read();
			this.onChange();
		});
	}

	set(changes) {
		Object.assign(this, changes);
		this.#address.write(this.toString());
		this.onChange();
	}

	/** Whether a module is folded: by the depth of all, or by itself. */
	isFolded(module) {
		return (module.split(".").length === this.depth) !== this.folds.includes(module);
	}

	/** The "run" or the "step" that is compared with, or null. */
	other(kind) {
		return this.versus.startsWith(`${kind}:`) ? this.versus.slice(kind.length + 1) : null;
	}

	/** Everything that is not as at first, as in an address. */
	toString() {
		const query = new URLSearchParams();
		for (const [key, value] of Object.entries(DEFAULTS)) if (this[key] !== value) query.set(key, this[key]);
		for (const module of this.folds) query.append("fold", module);
		return query.toString();
	}

	#read() {
		const query = new URLSearchParams(this.#address.read());
		for (const [key, value] of Object.entries(DEFAULTS)) {
			const text = query.get(key);
			this[key] = text === null ? value : typeof value === "number" ? Number(text) || 0 : text;
		}
		this.folds = query.getAll("fold");
	}
}
