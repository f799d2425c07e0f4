/** The page's entry: TensorBoard calls `render` in the plugin's frame, and so does the file that holds its own data. */

import { el } from "./dom.js";
import { Address, Host } from "./host.js";
import { Page } from "./page.js";
import { findSource, ServerSource } from "./source.js";
import { State } from "./state.js";
import { followMode } from "./theme.js";

/** Show the page in the document's body. */
export async function render() {
	const source = findSource();
	document.documentElement.lang = "en";
	if (source instanceof ServerSource) await styled(new URL("page.css", import.meta.url).href);
	const host = new Host();
	const page = new Page(source, new State(new Address()), host);
	followMode(() => page.draw());
	host.onReload = () => page.load();
	await page.load();
}

/** Load the style sheet before anything is drawn. */
function styled(href) {
	const link = el("link", { rel: "stylesheet", href });
	document.head.append(link);
	return new Promise((resolve) => {
		link.onload = link.onerror = resolve;
	});
}
