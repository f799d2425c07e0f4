/** Rows of the heatmap: layers, or modules that they are folded into; filtered and sorted. */

import { larger, orBelow } from "./decode.js";

const collator = new Intl.Collator("en", { numeric: true });

// A row is a layer or a folded module: {key, label, names of its layers, isModule}.

/** Modules that a layer is in, from the outermost. */
export function modulesOf(name) {
	const parts = name.split(".");
	return parts.slice(1).map((_, depth) => parts.slice(0, depth + 1).join("."));
}

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

/** Layers that pass the filters: a part of the name, a pattern, or one of `causesOf(name)`. */
export function filtered(names, { filter, cause }, causesOf) {
	const wanted = filter.trim().toLowerCase();
	const pattern = wanted.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".");
	const whole = /[*?]/.test(wanted) && new RegExp(`^${pattern}$`, "su");
	return names.filter((each) => {
		const [name, causes] = [each.toLowerCase(), causesOf(each)];
		const matches = whole ? whole.test(name) : name.includes(wanted) || causes.includes(wanted);
		return matches && (!cause || causes.includes(cause));
	});
}

/** Rows in the order of the layers, with folded modules where their first layer stands. */
export function foldedRows(names, sizes, state) {
	const rows = new Map();
	for (const name of names) {
		const module = modulesOf(name).find((each) => sizes.get(each) > 1 && state.isFolded(each));
		const id = `${module !== undefined} ${module ?? name}`;
		if (!rows.has(id)) {
			const label = module === undefined ? name : `${module}.*`;
			rows.set(id, { key: module ?? name, label, names: [], isModule: module !== undefined });
		}
		rows.get(id).names.push(name);
	}
	return [...rows.values()];
}

/** Rows sorted: as in the model, by name, or the worst of a pane's last window first. */
export function sorted(rows, sort, pane) {
	if (sort === "name") return [...rows].sort((a, b) => collator.compare(a.label, b.label));
	if (sort !== "worst") return rows;
	const rank = (row) => {
		const series = pane.series(row);
		if (!series) return [-1, 0, 0];
		const size = (value) => orBelow(pane.isDifference ? Math.abs(value) : value);
		return [series.attention[pane.lastColumn], size(series.values[pane.lastColumn]), size(series.values.reduce(larger))];
	};
	const ranked = rows.map((row) => ({ row, by: rank(row) }));
	return ranked.sort(({ by: a }, { by: b }) => b[0] - a[0] || b[1] - a[1] || b[2] - a[2] || 0).map(({ row }) => row);
}
