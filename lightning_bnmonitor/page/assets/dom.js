/** Elements with text, never markup: whatever a layer is called, it is shown as it is. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element.
 * @param {string} tag With classes: "div.panel.quiet".
 * @param {object} properties Attributes; "on…" are listeners, "style" an object of CSS properties.
 * @param {...any} children Elements and texts; null and false are left out.
 */
export function element(tag, properties = {}, ...children) {
  return filled(document.createElement(tag.split(".")[0]), tag, properties, children);
}

/** An SVG element; see `element`. */
export function drawn(tag, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, tag.split(".")[0]), tag, properties, children);
}

/** A group of buttons of which one is pressed: [value, label, title]. */
export function segmented(label, options, chosen, choose) {
  const buttons = options.map(([value, text, title]) =>
    element(
      "button",
      { type: "button", title, "aria-pressed": String(value === chosen), "data-value": value, onclick: () => choose(value) },
      text,
    ),
  );
  return element("div.segmented", { role: "group", "aria-label": label }, ...buttons);
}

/** A text in which code stands between backticks. */
export function prose(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

/** What stands between backticks in a text. */
export const codeOf = (text) => text.split("`").filter((_, index) => index % 2);

/** The end of a name that does not fit. */
export function shortened(name, length) {
  return name.length <= length ? name : `…${name.slice(1 - length)}`;
}

function filled(node, tag, properties, children) {
  const classes = tag.split(".").slice(1);
  if (classes.length) node.classList.add(...classes);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, css] of Object.entries(value)) node.style.setProperty(key, css);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
