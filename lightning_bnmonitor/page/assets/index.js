/** The page: loads runs, holds what is selected, and draws it. */

import { orBelow, Run, Unreadable } from "./decode.js";
import { element, prose } from "./dom.js";
import { download, pictureOf, tableOf } from "./export.js";
import { drawHeader } from "./header.js";
import { Heatmap } from "./heatmap.js";
import { Address, Host } from "./host.js";
import { whole } from "./numbers.js";
import { drawModule, drawPanel } from "./panel.js";
import { panesOf, partnersOf } from "./panes.js";
import { countModules, filtered, foldedRows, moduleAround, modulesOf, sorted } from "./rows.js";
import { findSource, InlineSource } from "./source.js";
import { State } from "./state.js";
import { followMode } from "./theme.js";
import { Toolbar } from "./toolbar.js";

const LISTED = 60; // runs whose sentences are loaded without being asked for

/** Show the page in the document's body. */
export async function render() {
  const source = findSource();
  if (!(source instanceof InlineSource)) await styled(new URL("page.css", import.meta.url).href);
  document.title = source.title || "BatchNorm";
  document.documentElement.lang = "en";
  const page = new Page(source, new State(new Address()), new Host());
  followMode(() => page.draw());
  page.host.onReload(() => page.load());
  await page.load();
}

/** Load the style sheet before anything is drawn. */
function styled(href) {
  const link = element("link", { rel: "stylesheet", href });
  document.head.append(link);
  return new Promise((resolve) => {
    link.onload = link.onerror = resolve;
  });
}

class Page {
  entries = [];
  #panes = { key: null };
  #channels = new Map();
  #loading = 0;

  constructor(source, state, host) {
    Object.assign(this, { source, state, host });
    this.toolbar = new Toolbar(state, {
      table: () => download(this.#file("csv"), "text/csv", tableOf(this.rows, this.panes)),
      picture: () => download(this.#file("svg"), "image/svg+xml", pictureOf(this.rows, this.panes, this.#title())),
    });
    this.heatmap = new Heatmap({
      select: (row, place, column) => this.#select(row, place, column),
      fold: (row, outer) => this.#fold(row, outer),
      unselect: () => state.set({ layer: "", window: "latest" }),
    });
    this.head = element("div");
    this.message = element("main.message", { hidden: true });
    this.panel = element("aside.panel");
    this.left = element("div.left", {}, this.toolbar.element, this.toolbar.legend, this.heatmap.element);
    this.main = element("main.main", {}, this.left, this.panel);
    document.body.replaceChildren(this.head, this.message, this.main);
    state.subscribe((_, changes) => this.#changed(changes));
    let width = 0;
    new ResizeObserver(() => {
      if (width !== this.panel.clientWidth) this.#drawPanel();
      width = this.panel.clientWidth;
    }).observe(this.panel);
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.target.matches("input, select")) return;
      event.preventDefault();
      this.toolbar.filter.focus();
    });
  }

  /** Load what is shown, then the sentences of the other runs; what is selected stays so. */
  async load() {
    const turn = ++this.#loading;
    let names;
    try {
      names = await this.source.runs();
    } catch (error) {
      this.#say("The runs cannot be loaded", [wordsOf(error)]);
      return;
    }
    if (turn !== this.#loading) return;
    this.#channels.clear();
    this.entries = names.map((name, place) => ({ name, place, run: null, error: null, ...this.entries.find((entry) => entry.name === name) }));
    this.#place(names, turn);
    if (!names.includes(this.state.run)) this.state.run = names[0] ?? "";
    if (!names.includes(this.state.otherRun) && this.state.otherRun !== null) this.state.versus = "";
    const first = [this.state.run, this.state.otherRun].filter(Boolean);
    for (const name of first) await this.#loadRun(name);
    if (turn !== this.#loading) return;
    this.draw();
    this.heatmap.reveal(this.#rowKey());
    for (const name of names.filter((each) => !first.includes(each)).slice(0, LISTED)) {
      await this.#loadRun(name);
      if (turn !== this.#loading) return;
      this.#drawHead();
      this.#drawToolbar();
    }
  }

  /** Draw everything. */
  draw() {
    this.#panes.key = null;
    const entry = this.#entry(this.state.run);
    if (!this.entries.length) {
      this.#say("No BatchNorm data yet", [
        "Give the Trainer the callback: `Trainer(callbacks=[BatchNormMonitor()])`, from `lightning_bnmonitor`.",
        "It writes here at the end of the first epoch (or of `every_n_train_batches`). Then reload: the arrow at the top right.",
      ]);
    } else if (entry.error) this.#say(`The run “${entry.name}” cannot be shown`, [entry.error]);
    else if (!entry.run) this.#say("…", []);
    else if (!entry.run.names.length) {
      this.#say("No BatchNorm layer was monitored", ["The model of this run has no BatchNorm layer of PyTorch’s, or `layers=` of `BatchNormMonitor` excludes them all."]);
    } else if (!entry.run.steps.length) {
      this.#say("No window has ended yet", ["The first ends with the first epoch, or after `every_n_train_batches`. Then reload."]);
    } else this.#show();
  }

  #show() {
    this.message.hidden = true;
    this.main.hidden = false;
    this.#drawHead();
    this.#layOut();
    this.#drawToolbar();
    this.#drawHeatmap();
    this.#drawPanel();
  }

  #say(title, lines) {
    this.#drawHead();
    this.main.hidden = true;
    this.message.hidden = false;
    this.message.replaceChildren(element("h1", {}, title), ...lines.map((line) => element("p", {}, prose(line))));
  }

  #changed(changes) {
    const run = this.#entry(this.state.run);
    const other = this.#entry(this.state.otherRun);
    const missing = [run, other].filter((entry) => entry && !entry.run && !entry.error);
    if (!run) return;
    if (missing.length) Promise.all(missing.map((entry) => this.#loadRun(entry.name))).then(() => this.draw());
    else if ("layer" in changes || "window" in changes) this.draw();
    else this.draw();
  }

  async #loadRun(name) {
    const entry = this.#entry(name);
    try {
      entry.run = new Run(name, await this.source.history(name));
      entry.error = null;
    } catch (error) {
      [entry.run, entry.error] = [null, wordsOf(error)];
    }
  }

  /** Give runs the colours that TensorBoard gives them. */
  async #place(names, turn) {
    const all = await this.host.runs();
    if (turn !== this.#loading || !names.every((name) => all.includes(name))) return;
    for (const entry of this.entries) entry.place = all.indexOf(entry.name);
    if (this.#entry(this.state.run)?.run) this.draw();
  }

  /** Panes and rows of what is selected. */
  #layOut() {
    const { state } = this;
    const entry = this.#entry(state.run);
    this.run = entry.run;
    if (!this.run.metrics.includes(state.metric)) state.metric = this.run.metrics[0] ?? "eval_error";
    const other = this.#entry(state.otherRun);
    this.other = other?.run?.names.length ? other.run : null;
    this.otherWindow = state.otherStep === null ? -1 : this.run.windowAt(state.otherStep);
    this.layer = state.layer || this.run.names[this.#worst()];
    this.window = this.#window();
    this.names = [...this.run.names, ...(this.other?.names ?? []).filter((name) => !this.run.indexOf.has(name))];
    this.sizes = countModules(this.names);
    this.panes = panesOf(this.run, this.other, this.otherWindow, this.window, state, [entry.place, other?.place ?? 0]);
    const known = filtered(this.names, state, (name) => this.#causesOf(name));
    this.rows = sorted(foldedRows(known, this.sizes, state), state.sort, this.panes.at(-1));
  }

  #causesOf(name) {
    const layer = this.run.indexOf.get(name);
    if (layer === undefined) return [];
    const causes = new Set(this.run.steps.map((_, window) => this.run.cause(window, layer)));
    causes.delete(-1);
    return [...causes].map((cause) => this.run.causes[cause].name);
  }

  /** The layer to look at first: the worst of those that need attention, or else the one with the largest error. */
  #worst() {
    const { run } = this;
    const errors = run.names.map((_, layer) => orBelow(run.error(run.last, layer)));
    return run.sick(run.last)[0] ?? errors.indexOf(Math.max(...errors));
  }

  /** Index of the window that is looked at. */
  #window() {
    const { window } = this.state;
    const layer = this.run.indexOf.get(this.layer);
    const worst = window === "worst" && layer !== undefined ? this.run.said("worst", layer) : null;
    const found = worst ? worst.window : this.run.windowAt(Number(window));
    return window === "latest" || found < 0 ? this.run.last : found;
  }

  #drawHead() {
    const actions = {
      choose: (run) => this.state.set({ run, versus: this.state.versus === `run:${run}` ? `run:${this.state.run}` : this.state.otherStep === null ? this.state.versus : "" }),
      select: (name) => this.#show1(name),
    };
    this.head.replaceChildren(drawHeader(this.entries, this.state, actions));
  }

  #drawToolbar() {
    if (!this.run) return;
    const others = this.entries.filter((entry) => entry.name !== this.state.run).map((entry) => entry.name);
    this.toolbar.update(this.run, others, this.names, this.run.steps[this.window]);
    const layers = new Map();
    for (const name of this.run.names) for (const cause of this.#causesOf(name)) layers.set(cause, (layers.get(cause) ?? 0) + 1);
    const causes = this.run.causes.filter(({ name }) => layers.has(name)).map((cause) => ({ cause, layers: layers.get(cause.name) }));
    this.toolbar.explain(this.run, causes, this.panes.length === 1 && this.panes[0].isDifference);
  }

  #drawHeatmap() {
    this.heatmap.update(this.rows, this.panes, { key: this.#rowKey(), step: this.run.steps[this.window] });
  }

  /** Key of the row that the selected layer is in. */
  #rowKey() {
    const name = this.layer;
    return this.rows?.find((row) => row.names.includes(name) || row.key === name)?.key ?? name;
  }

  #drawPanel() {
    if (this.main.hidden || !this.run) return;
    const width = Math.min(this.panel.clientWidth - 40, 900);
    const row = this.rows.find((each) => each.key === this.#rowKey());
    if (row?.isModule) {
      const pane = this.panes.find((each) => each.run);
      const column = pane ? pane.windows.indexOf(this.window) : -1;
      if (pane) this.panel.replaceChildren(...drawModule(row, pane, column < 0 ? pane.lastColumn : column, { select: (name) => this.#show1(name) }));
      return;
    }
    const layer = this.run.indexOf.get(this.layer);
    if (layer === undefined) {
      this.panel.replaceChildren(element("p.hint", {}, "Click a cell, or use the arrow keys: what is the matter with the layer, why, and what to do about it."));
      return;
    }
    const shown = this.#shown(layer);
    const actions = {
      view: (window) => this.state.set({ window }),
      step: (step) => this.state.set({ window: this.#windowName(step) }),
      copy: async (text, button) => {
        button.textContent = (await copied(text)) ? "Copied" : "Not copied";
        setTimeout(() => (button.textContent = "Copy"), 1500);
      },
    };
    this.panel.replaceChildren(...drawPanel(shown, width, actions).filter(Boolean));
  }

  /** All that the panel shows of a layer. */
  #shown(layer) {
    const { run, state } = this;
    const [latest, worst] = [run.said("latest", layer), run.said("worst", layer)];
    const views = [
      { value: "latest", label: `latest: step ${whole(run.steps[run.last])}`, window: run.last, said: latest },
      worst && { value: "worst", label: `worst: step ${whole(worst.step)}`, window: worst.window, said: worst },
    ].filter(Boolean);
    let view = views.find(({ value }) => value === state.window);
    if (!view) {
      const said = worst?.window === this.window ? worst : null;
      view = { value: state.window, label: `step ${whole(run.steps[this.window])}`, window: this.window, said };
      if (this.window === run.last) view = views[0];
      else views.push(view);
    }
    view.worst = worst;
    const others = [];
    if (this.other) {
      const theirs = this.other.indexOf.get(this.layer) ?? -1;
      const partners = partnersOf(run.steps, this.other.steps);
      others.push({ title: this.other.name, run: this.other, layer: theirs, window: partners[Math.max(view.window, 0)], partners, channels: this.#channelsOf(this.other, this.layer) });
    } else if (this.otherWindow >= 0) {
      others.push({ title: `step ${run.steps[this.otherWindow]}`, run, layer, window: this.otherWindow, isEarlier: true });
    }
    const title = this.other ? run.name : `step ${run.steps[view.window] ?? ""}`;
    return { run, layer, views, view, others, title, channels: this.#channelsOf(run, this.layer) };
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

  #select(row, place, column) {
    const changes = { layer: row.isModule ? row.key : row.names[0] };
    if (place && place.pane.windows !== undefined && (place.pane.run ?? this.run) === this.run) changes.window = this.#windowName(place.pane.steps[column]);
    else if (place) changes.window = this.#windowName(place.pane.steps[column]);
    this.state.set(changes);
    this.heatmap.scroller.focus({ preventScroll: true });
  }

  #windowName(step) {
    return step === this.run.steps[this.run.last] || this.run.windowAt(step) < 0 ? "latest" : String(step);
  }

  /** Show a layer: unfold what it is in, and drop filters that hide it. */
  #show1(name) {
    const folds = this.state.folds.filter((module) => !modulesOf(name).includes(module));
    const hidden = !this.rows.some((row) => row.names.includes(name));
    this.state.set({ layer: name, window: "latest", folds, depth: modulesOf(name).some((module) => this.state.isFolded(module)) ? 0 : this.state.depth, ...(hidden ? { filter: "", cause: "" } : {}) });
    this.heatmap.reveal(name);
  }

  #fold(row, outer) {
    if (row.isModule && !outer) {
      this.state.toggle(row.key);
      return;
    }
    const module = moduleAround(row, this.sizes);
    if (!module) return;
    this.state.toggle(module);
    this.state.set({ layer: module });
    this.heatmap.reveal(module);
  }

  #title() {
    const { run, other, otherWindow, state } = this;
    const against = other ? ` against ${other.name}` : otherWindow >= 0 ? `, step ${run.steps[otherWindow]} and step ${run.steps[this.window]}` : "";
    return `${state.metric}: ${run.name}${against}`;
  }

  #file(ending) {
    return `${this.#title().replace(/[^\p{L}\p{N}._-]+/gu, "_")}.${ending}`;
  }

  #entry(name) {
    return this.entries.find((entry) => entry.name === name) ?? null;
  }
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without permission, or in a file: by the selection, as ever.
    const area = element("textarea", {}, text);
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

function wordsOf(error) {
  return error instanceof Unreadable ? error.message : `The data of this run cannot be read: ${error.message}`;
}
