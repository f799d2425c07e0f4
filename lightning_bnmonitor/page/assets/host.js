/** TensorBoard around the page; all of it may be missing. */

const HASH_KEY = "p.batchnorm.show"; // as TensorBoard names what its plugins keep in the address
const PATIENCE = 800; // milliseconds

/** The window of TensorBoard, if the page is a frame of it and may look at it. */
export function outerWindow() {
	try {
		return window.parent !== window && window.parent.document.querySelector("tb-webapp") ? window.parent : null;
	} catch {
		return null;
	}
}

/** What TensorBoard tells its plugins by messages: JSON over a port, each answered. */
export class Host {
	#port = null;
	#answer = () => {};
	onReload = () => {};

	constructor() {
		if (window.parent === window) return;
		const channel = new MessageChannel();
		this.#port = channel.port1;
		this.#port.onmessage = (event) => this.#receive(JSON.parse(event.data));
		window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
	}

	/** Names of all runs in the order of their colours; empty if TensorBoard does not tell. */
	runs() {
		if (!this.#port) return [];
		this.#send({ type: "experimental.GetRuns", id: 0, isReply: false });
		return new Promise((resolve) => {
			this.#answer = (names) => resolve(names ?? []);
			setTimeout(resolve, PATIENCE, []);
		});
	}

	#receive({ type, id, payload, isReply }) {
		if (isReply) return this.#answer(payload);
		if (type === "experimental.DataReloaded") this.onReload();
		this.#send({ type, id, isReply: true });
	}

	#send(message) {
		this.#port.postMessage(JSON.stringify({ payload: null, error: null, ...message }));
	}
}

/** What the page keeps in the address: that of TensorBoard, or else its own. */
export class Address {
	constructor() {
		this.outer = outerWindow();
		this.window = this.outer ?? window;
	}

	read() {
		const hash = this.window.location.hash.slice(1);
		if (!this.outer) return hash;
		const kept = hash.split("&").find((item) => item.startsWith(`${HASH_KEY}=`));
		return kept ? decodeURIComponent(kept.slice(HASH_KEY.length + 1)) : "";
	}

	/** Keep a text, without a new entry in the history. */
	write(text) {
		const { location, history } = this.window;
		let hash = text;
		if (this.outer) {
			const others = location.hash.slice(1).split("&").filter((item) => item && !item.startsWith(`${HASH_KEY}=`));
			hash = [...others, ...(text ? [`${HASH_KEY}=${encodeURIComponent(text)}`] : [])].join("&");
		}
		try {
			history.replaceState(history.state, "", `${location.href.split("#")[0]}${hash ? `#${hash}` : ""}`);
		} catch {
			// A frame in a notebook has no address to keep it in.
		}
	}

	onChange(callback) {
		this.window.addEventListener("hashchange", callback);
	}
}
