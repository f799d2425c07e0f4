/** The heatmap: rows of layers, columns of windows; only what is visible is drawn. */

import { columnAt, columnEdge, drawCells, placePanes } from "./cells.js";
import { element, shortened } from "./dom.js";
import { whole } from "./numbers.js";
import { createOverview } from "./overview.js";
import { css } from "./theme.js";
import { describeCell } from "./tooltip.js";

const WIDEST = 88; // pixels of a column
const NAME_SHARE = 0.36; // of the width at most
const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/**
 * The heatmap of what `update` is given.
 * @param {object} actions `select(row, place, column)`, `fold(row, outer)`, `unselect()`.
 */
export class Heatmap {
  #rows = [];
  #panes = [];
  #places = [];
  #selected = null;
  #drawn = [0, -1]; // rows that have a label
  #pending = 0;

  constructor(actions) {
    this.actions = actions;
    this.heads = element("div.heads");
    this.labels = element("div.labels");
    this.canvas = element("canvas");
    this.mark = element("div.mark");
    this.cross = [element("div.cross.across"), element("div.cross.along")];
    this.plot = element("div.plot", {}, this.canvas, this.mark, ...this.cross);
    this.window = element("div.window", {}, this.labels, this.plot);
    this.spacer = element("div.spacer", {}, this.window);
    this.scroller = element(
      "div.scroller",
      { tabindex: 0, role: "application", "aria-label": "Heatmap of layers and windows: arrow keys select, Enter folds a module" },
      this.spacer,
    );
    this.axis = element("div.axis");
    this.spoken = element("div.spoken", { "aria-live": "polite" });
    this.tooltip = element("div.tooltip", { role: "tooltip", hidden: true });
    this.overview = createOverview(this.scroller);
    this.empty = element("p.empty", { hidden: true }, "No layer matches the filter.");
    this.body = element("div.body", {}, this.scroller, this.overview.element);
    this.element = element("div.heatmap", {}, this.heads, this.body, this.axis);
    this.element.append(this.empty, this.spoken, this.tooltip);
    this.scroller.addEventListener("scroll", () => this.#later());
    this.scroller.addEventListener("keydown", (event) => this.#press(event));
    this.plot.addEventListener("pointermove", (event) => this.#hover(event));
    this.plot.addEventListener("pointerleave", () => this.#leave());
    this.plot.addEventListener("click", (event) => this.#click(event));
    new ResizeObserver(() => this.#layOut()).observe(this.element);
  }

  /** Show rows and panes; `selected` is the row's key, and the step. */
  update(rows, panes, selected) {
    [this.#rows, this.#panes, this.#selected] = [rows, panes, selected];
    this.empty.hidden = rows.length > 0;
    this.#layOut();
  }

  /** Bring a row into sight. */
  reveal(key) {
    const index = this.#rows.findIndex((row) => row.key === key);
    if (index < 0) return;
    const [top, height] = [index * this.rowHeight, this.scroller.clientHeight];
    const { scrollTop } = this.scroller;
    if (top < scrollTop || top + this.rowHeight > scrollTop + height) {
      this.scroller.scrollTop = Math.max(0, top - Math.floor(height / 2));
    }
  }

  #layOut() {
    const { clientWidth: width } = this.scroller;
    const height = this.element.clientHeight - this.axis.offsetHeight - (this.#panes.some((pane) => pane.title) ? 20 : 0);
    if (!width) return;
    this.rowHeight = [32, 28, 22].find((each) => this.#rows.length * each <= height) ?? 18;
    this.body.style.height = `${this.#rows.length * this.rowHeight}px`;
    const pen = this.canvas.getContext("2d");
    pen.font = `12px ${css("--font")}`;
    const longest = this.#rows.reduce((most, row) => Math.max(most, pen.measureText(row.label).width), 60);
    const names = Math.ceil(Math.min(longest + 30, width * NAME_SHARE));
    this.characters = Math.floor((names - 30) / (longest / Math.max(...this.#rows.map((row) => row.label.length), 1)));
    this.element.style.setProperty("--names", `${names}px`);
    this.spacer.style.height = `${this.#rows.length * this.rowHeight}px`;
    this.plotWidth = width - names;
    this.#places = placePanes(this.#panes, this.plotWidth - 1, WIDEST);
    this.#drawHeads();
    this.#drawAxis();
    this.#drawn = [0, -1];
    this.#draw();
    this.overview.update(this.#rows, this.#panes.at(-1));
  }

  #later() {
    this.#leave();
    this.#pending ||= requestAnimationFrame(() => {
      this.#pending = 0;
      this.#draw();
    });
  }

  #draw() {
    const height = Math.min(this.scroller.clientHeight, this.#rows.length * this.rowHeight);
    const top = Math.max(0, Math.min(this.scroller.scrollTop, this.#rows.length * this.rowHeight - height));
    const first = Math.floor(top / this.rowHeight);
    const visible = this.#rows.slice(first, Math.ceil((top + height) / this.rowHeight));
    const scale = window.devicePixelRatio || 1;
    this.window.style.height = `${height}px`;
    this.canvas.width = Math.round(this.plotWidth * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.width = `${this.plotWidth}px`;
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    drawCells(context, this.#places, visible, first * this.rowHeight - top, this.rowHeight);
    this.labels.style.transform = `translateY(${-top}px)`;
    this.#drawLabels(first, visible);
    this.#drawMark(top);
    this.overview.follow();
  }

  #drawLabels(first, visible) {
    if (this.#drawn[0] === first && this.#drawn[1] === first + visible.length) return;
    this.#drawn = [first, first + visible.length];
    this.labels.replaceChildren(
      ...visible.map((row, index) => {
        const fold = element(
          "button.fold",
          {
            type: "button",
            tabindex: -1,
            title: row.isModule ? `Unfold ${row.label} (Enter)` : "Fold the module of this layer (Enter)",
            onclick: (event) => {
              event.stopPropagation();
              this.actions.fold(row, event.shiftKey);
            },
          },
          row.isModule ? "▸" : "▾",
        );
        const name = element("span.name", {}, shortened(row.label, this.characters));
        const size = row.isModule && element("span.size", {}, whole(row.names.length));
        return element(
          row.isModule ? "div.label.module" : "div.label",
          {
            title: row.label,
            "data-key": row.key,
            "aria-selected": String(row.key === this.#selected?.key),
            style: { top: `${(first + index) * this.rowHeight}px`, height: `${this.rowHeight}px`, "line-height": `${this.rowHeight - 1}px` },
            onclick: () => this.actions.select(row, null, -1),
          },
          fold,
          name,
          size,
        );
      }),
    );
  }

  /** The frame of the selected cell. */
  #drawMark(top) {
    const index = this.#rows.findIndex((row) => row.key === this.#selected?.key);
    const place = this.#places.find((each) => each.pane.steps.includes(this.#selected?.step)) ?? this.#places[0];
    this.mark.hidden = index < 0 || !place;
    if (this.mark.hidden) return;
    const column = place.pane.steps.indexOf(this.#selected.step);
    const left = columnEdge(place, Math.max(column, 0));
    const right = column < 0 ? columnEdge(place, place.pane.steps.length) : columnEdge(place, column + 1);
    setBox(this.mark, left - 1, index * this.rowHeight - top - 1, Math.max(right - left, 3) + 1, this.rowHeight + 1);
  }

  #drawHeads() {
    const titled = this.#places.filter(({ pane }) => pane.title);
    this.heads.hidden = !titled.length;
    this.heads.replaceChildren(
      ...titled.map((place, index) => {
        const next = titled[index + 1];
        const room = (next ? next.left : this.plotWidth) - place.left - 6;
        const dot = place.pane.color && element("span.dot", { style: { background: place.pane.color } });
        const style = { left: `calc(var(--names) + ${place.left}px)`, "max-width": `${room}px` };
        return element("div.head", { style, title: place.pane.title }, dot, place.pane.title);
      }),
    );
  }

  #drawAxis() {
    const labels = [];
    for (const place of this.#places) {
      const { steps } = place.pane;
      const room = 9 + 7 * Math.max(...steps.map((step) => whole(step).length), 1);
      const every = Math.max(Math.ceil(room / place.column), 1);
      for (let column = steps.length - 1; column >= 0; column -= every) {
        const center = place.left + (column + 0.5) * place.column;
        if (center < room / 4 && steps.length > 1 && this.#places.length > 1) continue;
        const style = { left: `calc(var(--names) + ${Math.min(center, this.plotWidth - room / 2)}px)` };
        labels.push(element("span.tick", { style }, whole(steps[column])));
      }
    }
    this.axis.replaceChildren(element("span.caption", {}, "training step"), ...labels);
  }

  #at(event) {
    const box = this.plot.getBoundingClientRect();
    const top = this.scroller.scrollTop;
    const index = Math.floor((event.clientY - box.top + top) / this.rowHeight);
    const found = columnAt(this.#places, event.clientX - box.left);
    return found && index >= 0 && index < this.#rows.length ? { ...found, index, row: this.#rows[index], top } : null;
  }

  #hover(event) {
    const at = this.#at(event);
    if (!at) return this.#leave();
    const left = columnEdge(at.place, at.column);
    const width = Math.max(columnEdge(at.place, at.column + 1) - left, 1);
    setBox(this.cross[0], 0, at.index * this.rowHeight - at.top, this.plotWidth, this.rowHeight - 1);
    setBox(this.cross[1], left, 0, width, this.window.clientHeight);
    for (const line of this.cross) line.hidden = false;
    const shown = `${at.index} ${at.place.left} ${at.column}`;
    if (this.tooltip.dataset.shown !== shown) {
      this.tooltip.dataset.shown = shown;
      this.tooltip.replaceChildren(...describeCell(at.row, at.place.pane, at.column));
    }
    this.tooltip.hidden = false;
    const { offsetWidth, offsetHeight } = this.tooltip;
    const x = event.clientX + 16 + offsetWidth > window.innerWidth ? event.clientX - 12 - offsetWidth : event.clientX + 16;
    const y = Math.min(event.clientY + 16, window.innerHeight - offsetHeight - 6);
    this.tooltip.style.transform = `translate(${Math.max(x, 4)}px, ${Math.max(y, 4)}px)`;
    return undefined;
  }

  #leave() {
    this.tooltip.hidden = true;
    for (const line of this.cross) line.hidden = true;
  }

  #click(event) {
    const at = this.#at(event);
    if (at) this.actions.select(at.row, at.place, at.column);
  }

  #press(event) {
    const index = this.#rows.findIndex((row) => row.key === this.#selected?.key);
    const page = Math.max(Math.floor(this.scroller.clientHeight / this.rowHeight) - 1, 1);
    const far = { PageUp: [-page, 0], PageDown: [page, 0], Home: [0, -Infinity], End: [0, Infinity] };
    const move = KEYS[event.key] ?? far[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey || !this.#rows.length) return;
    if (event.key === "Escape") this.actions.unselect();
    else if (event.key === "Enter" || event.key === " ") {
      if (index >= 0) this.actions.fold(this.#rows[index], event.shiftKey);
    } else if (move) this.#move(index, move);
    else return;
    event.preventDefault();
  }

  #move(index, [down, right]) {
    const next = index < 0 ? 0 : Math.min(Math.max(index + down, 0), this.#rows.length - 1);
    const row = this.#rows[next];
    if (!right) this.actions.select(row, null, -1);
    else {
      const place = this.#places.find((each) => each.pane.steps.includes(this.#selected?.step)) ?? this.#places[0];
      const { steps } = place.pane;
      const column = Math.min(Math.max(steps.indexOf(this.#selected?.step) + right, 0), steps.length - 1);
      this.actions.select(row, place, column);
    }
    this.reveal(row.key);
    const shown = this.#selected && this.#places[0].pane.series(row);
    const column = this.#places[0].pane.steps.indexOf(this.#selected?.step);
    this.spoken.textContent = shown ? `${row.label}, step ${this.#selected.step}: ${shown.values[column]}` : row.label;
  }
}

function setBox(box, left, top, width, height) {
  box.style.transform = `translate(${left}px, ${top}px)`;
  box.style.width = `${width}px`;
  box.style.height = `${height}px`;
}
