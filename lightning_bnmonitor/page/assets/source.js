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

/** Answers the same from an element of the page. */
export class InlineSource {
	constructor(element) {
		const { runs, title } = JSON.parse(element.textContent);
		Object.assign(this, { documents: runs, title });
	}

	async runs() {
		return Object.keys(this.documents);
	}

	async history(run) {
		return this.documents[run].history;
	}

	/** Null if none were kept. */
	async channels(run, layer) {
		return this.documents[run].channels?.layers[layer] ?? null;
	}
}

/** The data in the page if there are any, or else the server that the modules came from. */
export function findSource() {
	const element = document.getElementById("bnmonitor-data");
	return element ? new InlineSource(element) : new ServerSource(new URL("./", import.meta.url).href);
}
