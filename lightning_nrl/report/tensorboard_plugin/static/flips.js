// The table of flipped samples, with sorting, filters, pages and pictures.

import { besideAnother } from "./beside.js";
import { address, count, h, number } from "./dom.js";
import { bindHeads, compareCells, matchesWords } from "./table.js";

const PAGE_SIZES = [25, 50, 100], WORDS = "words";
const [SPLIT, POSITION, FLIP, LABEL, BEFORE, AFTER, MARGIN_BEFORE, MARGIN_AFTER, IN_TARGET, SLICE, KIND,
  NAME] = Array(12).keys();

/** Returns the name of a class. */
export const nameOf = (repair, label) => (label < 0 ? "-" : repair.classes[label] ?? String(label));

/** Returns the name of a confusion. */
export const pairName = (repair, label, prediction) =>
  `${nameOf(repair, label)} taken for ${nameOf(repair, prediction)}`;

/**
 * Builds the section of a repair's flipped samples. `others` are names of repairs to compare with.
 *
 * Returns its `element`, and `choosePair({role, label, prediction} or null, dropped)`, which shows only the samples of
 * a class that were or are taken for another one. `dropped` is called when the reader removes this filter.
 */
export function flippedSamples(repair, others) {
  const { rows, slices } = repair.flips, { splits } = repair;
  const own = [
    ["split", row => splits[row[SPLIT]].name, WORDS],
    ["position", row => String(row[POSITION])],
    ["flip", row => row[FLIP], WORDS],
    ...(rows.some(row => row[NAME]) ? [["name", row => row[NAME], WORDS]] : []),
    ["true", row => nameOf(repair, row[LABEL]), WORDS],
    ["before", row => nameOf(repair, row[BEFORE]), WORDS],
    ["after", row => nameOf(repair, row[AFTER]), WORDS],
    ["margin before", row => number(row[MARGIN_BEFORE])],
    ["margin after", row => number(row[MARGIN_AFTER])],
    ["in target", row => (row[IN_TARGET] ? "yes" : "no")],
    ...(slices.length ? [["slice", row => slices[row[SLICE]] ?? "", WORDS]] : []),
  ];
  const all = rows.map(row => ({ row })), pictured = rows.some(row => row[KIND]);
  const asked = { words: "", flip: "", split: "", slice: "", target: "", pair: null, dropped: null };
  let columns, shown = all, page = 0, size = PAGE_SIZES[0], order = null;

  const body = h("tbody");
  const head = h("thead");
  const table = h("table", { class: "flips", "aria-labelledby": "flips-title" }, head, body);
  const status = h("span", { role: "status", class: "count" });
  const chip = h("button", { type: "button", class: "chip", hidden: true, onclick: () => choosePair(null) });
  const view = sampleView(repair);

  /** Sets the columns of the table: its own and, if named, one of another repair. */
  function lay(name, ofRow) {
    columns = name ? [...own, [name, ofRow, WORDS]] : own;
    order = null;
    for (const one of all) {
      one.cells = columns.map(([, cell]) => cell(one.row));
      one.text = `${one.cells.join(" ")} ${splits[one.row[SPLIT]].role}`.toLowerCase();
    }
    const heads = h("tr", {}, pictured ? h("th", { scope: "col", class: "input" }, "input") : null,
      columns.map(([title, , kind]) =>
        h("th", { scope: "col", "aria-sort": "none", class: kind }, h("button", { type: "button" }, title))));
    head.replaceChildren(heads);
    bindHeads(heads, (i, up) => { order = { column: i - pictured, up }; filter(); });
    filter();
  }

  function draw() {
    const start = page * size, seen = shown.slice(start, start + size);
    table.setAttribute("aria-rowcount", shown.length + 1);
    body.replaceChildren(...seen.map(({ row, cells }, i) =>
      h("tr", { class: row[FLIP], "aria-rowindex": start + i + 2 },
        pictured ? h("td", { class: "input" }, view.thumbnail(row)) : null,
        cells.map((text, j) => h("td", { class: `${j === 2 ? "flip " : ""}${columns[j][2] ?? ""}` }, text)))));
    const range = shown.length > size ? `, ${count(start + 1)} to ${count(start + seen.length)} on this page` : "";
    status.textContent = `${count(shown.length)} of ${count(all.length)}${range}`;
    for (const [button, possible] of [[first, page > 0], [previous, page > 0], [next, start + size < shown.length],
      [last, start + size < shown.length]]) button.disabled = !possible;
  }

  function filter() {
    const { words, flip, split, slice, target, pair } = asked;
    shown = all.filter(({ row, text }) =>
      (!flip || row[FLIP] === flip)
      && (!split || row[SPLIT] === Number(split))
      && (!slice || row[SLICE] === Number(slice))
      && (!target || row[IN_TARGET] === (target === "yes"))
      && (!pair || (splits[row[SPLIT]].role === pair.role && row[LABEL] === pair.label
        && (row[BEFORE] === pair.prediction || row[AFTER] === pair.prediction)))
      && matchesWords(text, words));
    if (order) shown.sort((a, b) => (order.up ? 1 : -1) * compareCells(a.cells[order.column], b.cells[order.column]));
    page = 0;
    draw();
  }

  function choosePair(pair, dropped = null) {
    if (!pair) asked.dropped?.();
    Object.assign(asked, { pair, dropped });
    chip.hidden = !pair;
    if (pair) {
      chip.textContent = `${pair.role}: ${pairName(repair, pair.label, pair.prediction)} ✕`;
      chip.setAttribute("aria-label", `Take the filter off: ${chip.textContent.slice(0, -2)}`);
    }
    filter();
  }

  const turn = (name, to) => h("button", { type: "button", onclick: () => { page = to(); draw(); } }, name);
  const first = turn("First", () => 0), previous = turn("Previous", () => page - 1);
  const next = turn("Next", () => page + 1);
  const last = turn("Last", () => Math.ceil(shown.length / size) - 1);
  const choice = (name, key, options) => h("label", {}, `${name} `,
    h("select", { onchange: event => { asked[key] = event.target.value; filter(); } },
      h("option", { value: "" }, "all"), options.map(([value, text]) => h("option", { value }, text))));
  const sizes = h("label", {}, "a page ",
    h("select", { onchange: event => { size = Number(event.target.value); page = 0; draw(); } },
      PAGE_SIZES.map(n => h("option", { value: n }, String(n)))));
  const [beside, line] = others.length ? besideAnother(repair, others, lay) : [null, null];
  const filters = h("div", { class: "filters", role: "search", "aria-label": "Filter of flipped samples" },
    h("label", {}, "Filter ", h("input", { type: "search", placeholder: "such as: broken test",
      oninput: event => { asked.words = event.target.value; filter(); } })),
    choice("flip", "flip", [["broken", "broken"], ["repaired", "repaired"]]),
    splits.length > 1 ? choice("split", "split", splits.map(({ name, role }, i) => [i, `${name} (${role})`])) : null,
    slices.length ? choice("slice", "slice", slices.map((name, i) => [i, name])) : null,
    choice("in target", "target", [["yes", "yes"], ["no", "no"]]),
    beside, chip, status);
  lay(null);
  const title = `${repair.accepted ? "Samples that flipped" : "Samples that would flip"}, broken ones first`;
  const element = h("section", { "aria-labelledby": "flips-title" },
    h("h2", { id: "flips-title" }, title),
    (all.length
      ? [filters, line, h("div", { class: "wide" }, table),
        h("nav", { class: "pages", "aria-label": "Pages of flipped samples" }, first, previous, next, last, sizes)]
      : [h("p", {}, "None.")]),
    view.dialog);
  return { element, choosePair };
}

/** Builds thumbnails of samples, and the dialog that shows a sample in full size. */
function sampleView(repair) {
  const place = h("div"), caption = h("p");
  const dialog = h("dialog", { "aria-label": "The input of a sample" }, place, caption,
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  const source = row => address("sample", {
    name: repair.name, split: repair.splits[row[SPLIT]].name, position: row[POSITION], kind: row[KIND],
  });
  const captionOf = row => `${repair.splits[row[SPLIT]].name} ${row[POSITION]}${row[NAME] && ` (${row[NAME]})`}, `
    + `${row[FLIP]}: `
    + `true ${nameOf(repair, row[LABEL])}, ${nameOf(repair, row[BEFORE])} before, ${nameOf(repair, row[AFTER])} after, `
    + `margin ${number(row[MARGIN_BEFORE])} before, ${number(row[MARGIN_AFTER])} after`;

  async function open(row) {
    caption.textContent = captionOf(row);
    if (row[KIND] === "picture") place.replaceChildren(h("img", { src: source(row), alt: captionOf(row) }));
    else place.replaceChildren(h("pre", {}, await (await fetch(source(row))).text()));
    dialog.showModal();
  }

  function thumbnail(row) {
    if (!row[KIND]) return "";
    const inside = row[KIND] === "picture" ? h("img", { src: source(row), alt: "", loading: "lazy" }) : "text";
    return h("button", { type: "button", class: "thumbnail", "aria-label": `Show ${captionOf(row)}`,
      onclick: () => open(row) }, inside);
  }
  return { dialog, thumbnail };
}
