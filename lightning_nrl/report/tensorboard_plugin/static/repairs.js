// The table of all repairs in a log folder.

import { count, h } from "./dom.js";
import { sortable } from "./table.js";

const HEADS = ["repair", "verdict", "target", "targets repaired", "known broken", "unseen repaired", "unseen broken",
  "of others break", "unseen accuracy", "weights changed", "seconds"];

/** Builds a table with a row per repair. A click on a name calls `show(name)`. */
export function repairsTable(repairs, found, shown, show) {
  const rows = repairs.map(one => h("tr", { class: one.name === shown ? "shown" : "" },
    h("th", { scope: "row" },
      h("button", { type: "button", "data-repair": one.name, "aria-pressed": String(one.name === shown),
        disabled: Boolean(one.problem), onclick: () => show(one.name) }, one.name)),
    ...(one.problem ? [h("td", { class: "warn words", colspan: HEADS.length - 1 }, one.problem)] : cells(one))));
  const heads = HEADS.map((name, i) =>
    h("th", { scope: "col", "aria-sort": "none", class: i === 1 || i === 2 ? "words" : "" },
      h("button", { type: "button" }, name)));
  const table = h("table", { "aria-labelledby": "repairs-title" },
    h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
  if (!repairs.some(one => one.problem)) sortable(table);
  const more = found > repairs.length ? `, the latest ${count(repairs.length)} of ${count(found)}` : "";
  return [h("h2", { id: "repairs-title" }, `Repairs in this log${more}`), h("div", { class: "wide" }, table)];
}

function cells({ status, evidence, tone, target, known, unseen, at_most, weights_changed, seconds }) {
  const of = (part, whole) => `${count(part)} of ${count(whole)}`;
  return [
    h("td", { class: `words ${tone}` }, status + (evidence ? `, ${evidence}` : "")),
    h("td", { class: "words" }, target),
    h("td", {}, known ? of(known.repaired_in_target, known.targeted) : "-"),
    h("td", { class: known?.broken ? "warn" : "" }, count(known?.broken)),
    h("td", {}, unseen ? of(unseen.repaired, unseen.wrong) : "-"),
    h("td", {}, count(unseen?.broken)),
    h("td", {}, at_most ? `≤ ${at_most}` : "-"),
    h("td", {}, unseen ? `${unseen.accuracy_after}, was ${unseen.accuracy_before}` : "-"),
    h("td", {}, count(weights_changed)),
    h("td", {}, seconds.toFixed(1)),
  ];
}
