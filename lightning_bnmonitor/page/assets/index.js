/** The page's entry, for TensorBoard's frame and for the file that holds its own data. */

import { el } from "./dom.js";
import { Address, Host } from "./host.js";
import { Page } from "./page.js";
import { findSource, ServerSource } from "./source.js";
import { State } from "./state.js";
import { followMode } from "./theme.js";

export async function render() {
	const source = findSource();
	document.documentElement.lang = "en";
	if (source instanceof ServerSource) {
		const style = el("link", { rel: "stylesheet", href: new URL("page.css", import.meta.url).href });
		document.head.append(style);
		await new Promise((resolve) => (style.onload = style.onerror = resolve));
	}
	const host = new Host();
	const page = new Page(source, new State(new Address()), host);
	followMode(() => page.draw());
	host.onReload = () => page.load();
	await page.load();
}
