// Elements of the page. Whatever a report says goes into text nodes and attributes, never into markup.

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

/** An HTML element: `on...` attributes are listeners; null, undefined and false ones are left out. */
export const h = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

/** An SVG element. */
export const s = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);

/** A count with its thousands set apart; `-` for what is not known. */
export const count = n => (n === null || n === undefined ? "-" : n.toLocaleString("en"));

/** A number as the server has rounded it; `-` for none. */
export const number = x => (x === null || x === undefined ? "-" : String(x));

/** A part of the report's page that the server made, in which all text is escaped. */
export function fromReport(html) {
  const place = h("div");
  place.innerHTML = html;
  return place;
}

/** What the plugin answers to a request; throws what it says is wrong. */
export async function ask(path, values = {}) {
  const answer = await fetch(address(path, values));
  const content = await answer.json().catch(() => ({ problem: `TensorBoard answers: ${answer.statusText}.` }));
  if (!answer.ok) throw new Error(content.problem ?? answer.statusText);
  return content;
}

/** Where the plugin answers. */
export function address(path, values = {}) {
  const url = new URL("../" + path, import.meta.url);
  for (const [name, value] of Object.entries(values)) url.searchParams.set(name, value);
  return url;
}
