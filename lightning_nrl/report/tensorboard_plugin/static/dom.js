// Builds elements of the page. Text from a report becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined && child !== ""));
  return element;
}

/** Creates an HTML element. `on...` attributes are listeners; null, undefined and false ones are left out. */
export const h = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

/** Creates an SVG element, like `h`. */
export const s = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);

/** Formats a count with separators for thousands, or `-` if it is unknown. */
export const count = n => (n === null || n === undefined ? "-" : n.toLocaleString("en"));

/** Formats a number that the server has rounded, or `-` if it is unknown. */
export const number = x => (x === null || x === undefined ? "-" : String(x));

/** Creates an element from HTML of the server, in which all text is escaped. */
export function fromReport(html) {
  const place = h("div");
  place.innerHTML = html;
  return place;
}

/** Sends a request to the plugin and returns its answer. Throws an error with the plugin's message. */
export async function ask(path, values = {}) {
  const answer = await fetch(address(path, values));
  const content = await answer.json().catch(() => ({ problem: `TensorBoard answers: ${answer.statusText}.` }));
  if (!answer.ok) throw new Error(content.problem ?? answer.statusText);
  return content;
}

/** Returns the address of a request to the plugin. */
export function address(path, values = {}) {
  const url = new URL("../" + path, import.meta.url);
  for (const [name, value] of Object.entries(values)) url.searchParams.set(name, value);
  return url;
}
