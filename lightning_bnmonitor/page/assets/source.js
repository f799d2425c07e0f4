/** Where the documents come from: TensorBoard's server, or the page itself. */

import { Unreadable } from "./decode.js";

/** Asks the server, below an address. */
export class ServerSource {
	title = "";

	constructor(base) {
		this.base = base;
	}

	/** Names of the runs, in TensorBoard's order. */
	async runs() {
		return Object.keys((await this.#ask("runs")).runs);
	}

	/** The document of a run. */
	history(run) {
		return this.#ask("history", { run });
	}

	/** The channels of a layer: of its latest and of its worst window. */
	channels(run, layer) {
		return this.#ask("channels", { run, layer });
	}

	async #ask(route, query = {}) {
		const address = new URL(route, this.base);
		address.search = new URLSearchParams(query);
		let answer;
		try {
			answer = await fetch(address);
		} catch {
			throw new Unreadable("TensorBoard does not answer. Is it still running?");
		}
		const document = await answer.json().catch(() => null);
		if (!answer.ok || !document) throw new Unreadable(document?.error ?? `TensorBoard answers ${answer.status} to \`${route}\`.`);
		return document;
	}
}

/** Reads what stands in an element of the page. */
export class InlineSource {
	constructor(element) {
		const data = JSON.parse(element.textContent);
		this.documents = new Map(Object.entries(data.runs));
		this.title = data.title;
	}

	/** Names of the runs, in the order of the file. */
	async runs() {
		return [...this.documents.keys()];
	}

	/** The document of a run. */
	async history(run) {
		return this.documents.get(run).history;
	}

	/** The channels of a layer: of its latest and of its worst window; null if none were kept. */
	async channels(run, layer) {
		return this.documents.get(run).channels?.layers[layer] ?? null;
	}
}

/** The data in the page if there are any, or else the server that the modules came from. */
export function findSource() {
	const element = document.getElementById("bnmonitor-data");
	return element ? new InlineSource(element) : new ServerSource(new URL("./", import.meta.url).href);
}
