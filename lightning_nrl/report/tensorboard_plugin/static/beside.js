// Compares the flipped samples of a repair with another repair.

import { ask, fromReport, h } from "./dom.js";

/** Builds a choice among other repairs and a comparison with it; `chosen(name, ofRow)` gets a table column. */
export function besideAnother(repair, others, chosen) {
  const comparison = h("div", { role: "status" });
  const select = h("select", { onchange: () => choose(select.value) },
    h("option", { value: "" }, "no other"), others.map(name => h("option", { value: name }, name)));

  async function choose(other) {
    comparison.replaceChildren();
    if (!other) return chosen(null);
    try {
      const [{ html, problem }, details] = await Promise.all(
        [ask("beside", { name: repair.name, other }), ask("repair", { name: other })]);
      if (select.value !== other) return;  // the reader has chosen another one
      if (problem) throw new Error(problem);
      comparison.replaceChildren(fromReport(html));
      chosen(`in ${other}`, flipIn(repair, details));
    } catch (error) {
      comparison.textContent = error.message;
      chosen(null);
    }
  }
  return [h("label", {}, "beside ", select), comparison];
}

/** Returns a function of a row: what the other repair does to its sample. */
function flipIn(repair, other) {
  const its = byName(other);
  const sizes = new Map(other.splits.map(({ name, n }) => [name, n]));
  const unflipped = { broken: "kept", repaired: "failing" };
  return row => {
    const { name, n } = repair.splits[row[0]];
    return sizes.get(name) === n ? its.get(`${name} ${row[1]}`) ?? unflipped[row[2]] : "-";
  };
}

const byName = ({ splits, flips }) =>
  new Map(flips.rows.map(row => [`${splits[row[0]].name} ${row[1]}`, row[2]]));
