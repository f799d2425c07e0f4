/** Loads runs and draws what is selected. */

import { Run, Unreadable } from "./decode.js";
import { el, prose } from "./dom.js";
import { copied, download, pictureOf, tableOf } from "./export.js";
import { drawHeader } from "./header.js";
import { Heatmap } from "./heatmap.js";
import { drawPanel } from "./panel.js";
import { moduleAround, modulesOf } from "./rows.js";
import { Toolbar } from "./toolbar.js";
import { View } from "./view.js";

const LISTED = 60; // runs whose sentences are loaded without being asked for
const EMPTY = [
	"No BatchNorm data yet",
	"Give the Trainer the callback of `lightning_bnmonitor`: `Trainer(callbacks=[BatchNormMonitor()])`.",
	"It writes at the end of the first epoch, or after `every_n_train_batches`. Then reload.",
];
const WITHOUT_LAYERS = ["No BatchNorm layer was monitored", "The model has none of PyTorch’s, or `BatchNormMonitor` was told to leave them out."];

export class Page {
	#entries = []; // of the runs: {name, place among the colours, run, error}
	#channels = new Map();
	#loading = 0;
	#order; // of the rows: where it changes, they are shown from the first on

	constructor(source, state, host) {
		Object.assign(this, { source, state, host, view: null });
		document.title = source.title || "BatchNorm";
		this.toolbar = new Toolbar(state, {
			table: () => this.#download("csv", "text/csv", tableOf(this.view.rows, this.view.panes)),
			picture: () => this.#download("svg", "image/svg+xml", pictureOf(this.view.rows, this.view.panes, this.view.title)),
		});
		this.heatmap = new Heatmap({
			select: (row, step) => state.set({ layer: row.key, ...(step === undefined ? {} : { window: this.#windowOf(step) }) }),
			fold: (...how) => this.#fold(...how),
			unselect: () => state.set({ layer: "", window: "latest" }),
		});
		this.head = el("div");
		this.message = el("main.message", { hidden: true });
		this.changes = el("p.changes");
		this.panel = el("aside.panel");
		this.main = el("main.main", { hidden: true }, el("div.left", this.toolbar.element, this.toolbar.legend, this.changes, this.heatmap.element), this.panel);
		document.body.replaceChildren(this.head, this.message, this.main);
		state.onChange = () => this.#follow();
		new ResizeObserver(() => this.#drawPanel()).observe(this.panel);
	}

	/** Load what is shown, then the sentences of the other runs; what is selected stays so. */
	async load() {
		const turn = ++this.#loading;
		let names;
		try {
			names = await this.source.runs();
		} catch (error) {
			this.#say("The runs cannot be loaded", wordsOf(error));
			return;
		}
		const before = new Map(this.#entries.map((entry) => [entry.name, entry]));
		const places = this.#places(turn);
		this.#entries = names.map((name, place) => ({ place, run: null, error: null, ...before.get(name), name }));
		const first = this.#shown().filter(Boolean);
		await Promise.all(first.map((entry) => this.#loadRun(entry)));
		if (turn !== this.#loading) return;
		this.#channels.clear();
		this.draw();
		this.heatmap.reveal();
		await places;
		for (const entry of this.#entries.filter((each) => !first.includes(each)).slice(0, LISTED)) {
			await this.#loadRun(entry);
			if (turn !== this.#loading) return;
			this.#drawHead();
		}
	}

	draw() {
		this.#drawHead();
		const [entry, other] = this.#shown();
		if (!entry || (entry.run && !entry.run.steps.length)) this.#say(...EMPTY);
		else if (entry.error) this.#say(`The run “${entry.name}” cannot be shown`, entry.error);
		else if (!entry.run) this.#say("Loading …");
		else if (!entry.run.names.length) this.#say(...WITHOUT_LAYERS);
		else this.#show(entry, other);
	}

	#show(entry, other) {
		const { state } = this;
		if (!entry.run.metrics.includes(state.metric)) state.metric = entry.run.metrics[0] ?? "eval_error";
		this.view = new View(entry, other, state, this.view);
		const { run, rows, panes, row, step, names } = this.view;
		[this.message.hidden, this.main.hidden] = [true, false];
		this.toolbar.update(run, this.#entries.map(({ name }) => name).filter((name) => name !== run.name), names, Boolean(this.view.other));
		this.toolbar.explain(run, this.view.causesWithLayers(), panes[0].isDifference);
		this.changes.textContent = this.view.changes();
		this.heatmap.update(rows, panes, { key: row?.key, step });
		const order = [state.sort, state.filter, state.cause].join();
		if (this.#order !== undefined && this.#order !== order) this.heatmap.scroller.scrollTop = 0;
		this.#order = order;
		this.#drawPanel();
	}

	#say(title, ...lines) {
		[this.message.hidden, this.main.hidden] = [false, true];
		this.message.replaceChildren(el("h1", title), ...lines.map((line) => el("p", prose(line))));
	}

	#follow() {
		const missing = this.#shown().filter((entry) => entry && !entry.run && !entry.error);
		this.draw();
		if (missing.length) Promise.all(missing.map((entry) => this.#loadRun(entry))).then(() => this.draw());
	}

	async #loadRun(entry) {
		try {
			[entry.run, entry.error] = [new Run(entry.name, await this.source.history(entry.name)), null];
		} catch (error) {
			[entry.run, entry.error] = [null, wordsOf(error)];
		}
	}

	/** Give runs the colours that TensorBoard gives them, if it tells. */
	async #places(turn) {
		const all = await this.host.runs();
		if (turn !== this.#loading || !all.length) return;
		const place = (name) => [name, name.replace(/ \([^()]*\)$/, "")].map((each) => all.indexOf(each)).find((index) => index >= 0);
		for (const entry of this.#entries) entry.place = place(entry.name) ?? entry.place; // "run (prefix)" is of a run, too
		if (!this.main.hidden) this.draw();
	}

	#drawHead() {
		const { state } = this;
		const [shown, other] = this.#shown();
		const choose = (run) => state.set({ run, versus: other?.name === run ? `run:${shown.name}` : other ? state.versus : "" });
		this.head.replaceChildren(drawHeader(this.#entries, shown, other, { choose, show: (name) => this.#reveal(name) }));
	}

	#drawPanel() {
		if (this.main.hidden) return;
		const { run, layer } = this.view;
		const width = Math.min(this.panel.clientWidth - 40, 900);
		const index = run.indexOf.get(layer);
		if (index === undefined) {
			this.panel.replaceChildren(el("h2", layer), el("p.quiet", `The run “${run.name}” has no such layer.`));
		} else {
			const shown = this.view.shown(index, (of, name) => this.#channelsOf(of, name));
			const actions = {
				view: (value) => this.state.set({ window: value }),
				step: (step) => this.state.set({ window: this.#windowOf(step) }),
				copy: async (text, button) => button.replaceChildren((await copied(text)) ? "Copied" : "Select it"),
			};
			this.panel.replaceChildren(...drawPanel(shown, width, actions));
		}
	}

	/** A layer's channels; undefined until they are loaded, then the panel is drawn again. */
	#channelsOf(run, name) {
		const key = JSON.stringify([run.name, name]);
		if (!this.#channels.has(key)) {
			this.#channels.set(key, undefined);
			const keep = (sets) => {
				this.#channels.set(key, sets);
				this.#drawPanel();
			};
			this.source.channels(run.name, name).then(keep, () => keep(null));
		}
		return this.#channels.get(key);
	}

	/** How the state names the window that ended at a step. */
	#windowOf(step) {
		const { run } = this.view;
		return step === run.steps[run.last] || run.windowAt(step) < 0 ? "latest" : String(step);
	}

	/** Show a layer: unfold what it is in, and drop filters that hide it. */
	#reveal(name) {
		const { state, view } = this;
		const around = modulesOf(name);
		const folds = state.folds.filter((module) => !around.includes(module));
		const unfolded = around.filter((module) => module.split(".").length === state.depth && view.sizes.get(module) > 1);
		const isHidden = !view.rows.some((row) => row.names.includes(name));
		state.set({ layer: name, window: "latest", folds: [...folds, ...unfolded], ...(isHidden ? { filter: "", cause: "" } : {}) });
		this.heatmap.reveal();
	}

	/** Unfold a module, or fold the innermost one around a row. */
	#fold(row, outer) {
		const { state } = this;
		const isFolded = row.isModule && !outer;
		const module = isFolded ? row.key : moduleAround(row, this.view.sizes);
		if (!module) return;
		const folds = state.folds.includes(module) ? state.folds.filter((each) => each !== module) : [...state.folds, module];
		state.set({ folds, layer: isFolded ? row.names[0] : module });
		this.heatmap.reveal();
	}

	#download(ending, type, text) {
		download(`${this.view.title.replace(/[^\p{L}\p{N}._-]+/gu, "_")}.${ending}`, type, text);
	}

	/** The run that is shown, and the one that it is compared with, or null. */
	#shown() {
		const find = (name) => this.#entries.find((entry) => entry.name === name) ?? null;
		return [find(this.state.run) ?? this.#entries[0] ?? null, find(this.state.other("run"))];
	}
}

function wordsOf(error) {
	return error instanceof Unreadable ? error.message : `The data of this run cannot be read: ${error.message}`;
}
