// Compares the flipped samples of a repair with another repair.

import { ask, count, h } from "./dom.js";

/** Builds a choice among other repairs and a line that compares them; `chosen(name, ofRow)` gets a table column. */
export function besideAnother(repair, others, chosen) {
  const line = h("p", { role: "status" });
  const select = h("select", { onchange: () => choose(select.value) },
    h("option", { value: "" }, "no other"), others.map(name => h("option", { value: name }, name)));

  async function choose(name) {
    line.textContent = "";
    if (!name) return chosen(null);
    try {
      const other = await ask("repair", { name });
      if (select.value !== name) return;  // the reader has chosen another one
      const { ofRow, text } = joined(repair, other);
      line.textContent = text;
      chosen(`in ${name}`, ofRow);
    } catch (error) {
      line.textContent = error.message;
      chosen(null);
    }
  }
  return [h("label", {}, "beside ", select), line];
}

/** Returns what the other repair does to the sample of a row, and a text on how many samples both flip. */
function joined(repair, other) {
  const own = byName(repair), its = byName(other);
  const sizes = new Map(other.splits.map(({ name, n }) => [name, n]));
  const same = !repair.origin || !other.origin || repair.origin === other.origin;
  const shared = repair.splits.filter(({ name, n }) => sizes.get(name) === n).map(({ name }) => name);
  if (!same || !shared.length) {
    return { ofRow: () => "-", text: "They do not start from the same model and data, so samples cannot be compared." };
  }
  const unflipped = { broken: "kept", repaired: "failing" };
  const ofRow = row => {
    const split = repair.splits[row[0]].name;
    return shared.includes(split) ? its.get(`${split} ${row[1]}`) ?? unflipped[row[2]] : "-";
  };
  const parts = Object.keys(unflipped).map(flip => {
    const [here, there] = [own, its].map(
      flips => new Set([...flips].filter(([, value]) => value === flip).map(([key]) => key)));
    const both = [...here].filter(key => there.has(key)).length, [ours, theirs] = [here.size - both, there.size - both];
    return `${flip}: ${count(both)} in both, ${count(ours)} here alone, ${count(theirs)} there alone`;
  });
  return { ofRow, text: `Samples ${parts.join("; ")}.` };
}

const byName = ({ splits, flips }) =>
  new Map(flips.rows.map(row => [`${splits[row[0]].name} ${row[1]}`, row[2]]));
