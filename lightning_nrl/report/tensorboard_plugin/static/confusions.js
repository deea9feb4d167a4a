// Shows how counts of confusions changed. A click on a pair of classes shows its samples.

import { count, h } from "./dom.js";
import { nameOf, pairName } from "./flips.js";

const LARGEST_MATRIX = 14;
const LISTED_PAIRS = 20;

/** Builds a heading and a matrix, or a list if there are many classes. Returns [] if no confusion changed. */
export function changedConfusions(repair, choosePair) {
  const roles = Object.keys(repair.confusion);
  if (!roles.length) return [];
  const place = h("div", { class: "confusions" });
  const draw = role => place.replaceChildren(drawn(repair, role, choosePair));
  const choices = roles.map((role, i) => h("label", {},
    h("input", { type: "radio", name: "confusion-role", value: role, checked: i === roles.length - 1,
      onchange: () => draw(role) }),
    ` ${role} data`));
  draw(roles.at(-1));  // unseen data are the most informative
  return [h("section", { "aria-labelledby": "confusions-title" },
    h("h2", { id: "confusions-title" }, "Confusions that changed"),
    h("p", {}, "How many of a row's class are taken for a column's: ", h("span", { class: "fewer" }, "fewer"), " or ",
      h("span", { class: "further" }, "more"), " than before. Choose a number to see its samples."),
    h("fieldset", { class: "choices" }, h("legend", { class: "hidden" }, "Data"), choices),
    place)];
}

function drawn(repair, role, choosePair) {
  const cells = repair.confusion[role];
  const most = Math.max(...cells.map(([, , before, after]) => Math.abs(after - before)));
  const buttons = [];
  const button = ([label, prediction, before, after]) => {
    const change = after - before, share = 0.15 + 0.5 * Math.abs(change) / most;
    const text = `${pairName(repair, label, prediction)}: ${before} before, ${after} after`;
    const own = h("button", {
      type: "button", class: change < 0 ? "fewer" : "further", style: `--share: ${share}`, "aria-pressed": "false",
      "aria-label": text, title: text,
      onclick: () => {
        const chosen = own.getAttribute("aria-pressed") !== "true";
        for (const other of buttons) other.setAttribute("aria-pressed", "false");
        own.setAttribute("aria-pressed", chosen);
        choosePair(chosen ? { role, label, prediction } : null, () => own.setAttribute("aria-pressed", "false"));
      },
    }, change < 0 ? `−${count(-change)}` : `+${count(change)}`);
    buttons.push(own);
    return own;
  };
  const rows = [...new Set(cells.map(cell => cell[0]))].sort((a, b) => a - b);
  const columns = [...new Set(cells.map(cell => cell[1]))].sort((a, b) => a - b);
  return rows.length <= LARGEST_MATRIX && columns.length <= LARGEST_MATRIX
    ? matrix(repair, cells, rows, columns, button)
    : list(repair, cells, button);
}

function matrix(repair, cells, rows, columns, button) {
  const found = new Map(cells.map(cell => [`${cell[0]} ${cell[1]}`, cell]));
  const body = rows.map(label => h("tr", {},
    h("th", { scope: "row" }, nameOf(repair, label)),
    columns.map(prediction => {
      const cell = found.get(`${label} ${prediction}`);
      return h("td", { class: label === prediction ? "same" : "" }, cell ? button(cell) : "");
    })));
  const head = h("tr", {}, h("td", { class: "corner" }, "true \\ taken for"),
    columns.map(prediction => h("th", { scope: "col" }, nameOf(repair, prediction))));
  return h("div", { class: "wide" },
    h("table", { class: "matrix", "aria-labelledby": "confusions-title" }, h("thead", {}, head), h("tbody", {}, body)));
}

function list(repair, cells, button) {
  const cut = cells.length > LISTED_PAIRS;
  const more = cut ? h("p", {}, `The ${LISTED_PAIRS} largest of ${count(cells.length)}.`) : null;
  const items = cells.slice(0, LISTED_PAIRS).map(cell => h("tr", {},
    h("th", { scope: "row" }, pairName(repair, cell[0], cell[1])),
    h("td", {}, count(cell[2])), h("td", {}, count(cell[3])), h("td", {}, button(cell))));
  const heads = ["", "before", "after", "change"].map(name => h("th", { scope: "col" }, name));
  return h("div", { class: "wide" }, more,
    h("table", { class: "matrix pairs", "aria-labelledby": "confusions-title" },
      h("thead", {}, h("tr", {}, heads)), h("tbody", {}, items)));
}
