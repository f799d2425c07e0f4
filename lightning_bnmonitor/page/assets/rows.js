/** Rows of the heatmap: layers, or modules that they are folded into; filtered and sorted. */

import { larger, orBelow } from "./decode.js";

const collator = new Intl.Collator("en", { numeric: true });

// A row is a layer or a folded module: {key, label, names of its layers, isModule}.

/** Modules that a layer is in, from the outermost. */
export function modulesOf(name) {
	const parts = name.split(".");
	return parts.slice(1).map((_, depth) => parts.slice(0, depth + 1).join("."));
}

/** How many layers each module has. */
export function countModules(names) {
	const sizes = new Map();
	for (const name of names) for (const module of modulesOf(name)) sizes.set(module, (sizes.get(module) ?? 0) + 1);
	return sizes;
}

/** The innermost module with several layers around a row, "" if there is none. */
export function moduleAround(row, sizes) {
	const around = modulesOf(row.isModule ? row.key : row.names[0]).filter((module) => sizes.get(module) > row.names.length);
	return around.at(-1) ?? "";
}

/** Whether a name, or one of the causes, is what a filter asks for: a part of it, or a pattern with * and ?. */
export function matches(filter, name, causes) {
	const wanted = filter.trim().toLowerCase();
	if (!wanted || causes.includes(wanted)) return true;
	if (!/[*?]/.test(wanted)) return name.toLowerCase().includes(wanted);
	const pattern = wanted.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".");
	return new RegExp(`^${pattern}$`, "su").test(name.toLowerCase());
}

/** Layers that pass the filters; `causesOf` gives the names of a layer's causes in all windows. */
export function filtered(names, state, causesOf) {
	if (!state.filter && !state.cause) return names;
	return names.filter((name) => {
		const causes = causesOf(name);
		return matches(state.filter, name, causes) && (!state.cause || causes.includes(state.cause));
	});
}

/** Rows in the order of the layers, with folded modules where their first layer stands. */
export function foldedRows(names, sizes, state) {
	const rows = new Map();
	for (const name of names) {
		const module = modulesOf(name).find((each) => sizes.get(each) > 1 && state.isFolded(each));
		const key = module ?? name;
		const id = module === undefined ? `layer ${name}` : `module ${module}`;
		if (!rows.has(id)) {
			rows.set(id, { key, label: module === undefined ? name : `${module}.*`, names: [], isModule: module !== undefined });
		}
		rows.get(id).names.push(name);
	}
	return [...rows.values()];
}

/** Rows sorted: as in the model, by name, or the worst of a pane's last window first. */
export function sorted(rows, sort, pane) {
	if (sort === "name") return [...rows].sort((a, b) => collator.compare(a.label, b.label));
	if (sort !== "worst" || !pane) return rows;
	const ranks = new Map(
		rows.map((row) => {
			const series = pane.series(row);
			const column = pane.lastColumn;
			const size = (value) => orBelow(pane.isDifference ? Math.abs(value) : value);
			const largest = series ? series.values.reduce(larger, NaN) : NaN;
			return [row, series ? [series.attention[column], size(series.values[column]), size(largest)] : [0, -Infinity, -Infinity]];
		}),
	);
	return [...rows].sort((a, b) => {
		const [first, second] = [ranks.get(a), ranks.get(b)];
		const differing = first.findIndex((rank, index) => rank !== second[index]);
		return differing < 0 ? 0 : second[differing] - first[differing];
	});
}
