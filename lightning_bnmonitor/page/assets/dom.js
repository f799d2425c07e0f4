/** Elements with text, never markup: whatever a layer is called, it is shown as it is. */

/** An HTML element: "tag.class", properties ("on…": listeners, "style": CSS) or none, children. */
export const el = (tag, ...rest) => filled(document.createElement(tag.split(".")[0]), tag, rest);

export const svg = (tag, ...rest) => filled(document.createElementNS("http://www.w3.org/2000/svg", tag.split(".")[0]), tag, rest);

/** A row of a table: names of cells' classes, or "", and what is in them. */
export const tr = (...cells) => el("tr", cells.map(([kind, ...content]) => el(`td${kind && `.${kind}`}`, ...content)));

/** A table of rows, below a head if there is one. */
export const table = (kind, rows, ...head) => el(`table.${kind}`, head.length ? el("thead", head) : null, el("tbody", rows));

/** A group of buttons of which one is pressed: [value, label, title]. */
export function segmented(label, options, chosen, choose) {
	const buttons = options.map(([value, text, title]) =>
		el("button", { title, "aria-pressed": String(value === chosen), "data-value": value, onclick: () => choose(value) }, text),
	);
	return el("div.segmented", { role: "group", "aria-label": label }, buttons);
}

/** A text in which code stands between backticks. */
export const prose = (text) => text.split("`").map((part, i) => (i % 2 ? el("code", part) : part));

/** What stands between backticks in a text. */
export const codeOf = (text) => text.split("`").filter((_, i) => i % 2);

export const shortened = (name, length) => (name.length <= length ? name : `…${name.slice(1 - length)}`);

export const dot = (color) => el("span.dot", { style: { background: color } });

function filled(node, tag, rest) {
	const [first] = rest;
	const hasProperties = first && Object.getPrototypeOf(first) === Object.prototype;
	node.classList.add(...tag.split(".").slice(1));
	for (const [name, value] of Object.entries(hasProperties ? first : {})) {
		if ((value ?? false) === false) continue;
		if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
		else if (name === "style") for (const [key, css] of Object.entries(value)) node.style.setProperty(key, css);
		else node.setAttribute(name, value === true ? "" : value);
	}
	const children = rest.slice(hasProperties ? 1 : 0).flat(Infinity);
	node.append(...children.filter((child) => (child ?? false) !== false));
	return node;
}
