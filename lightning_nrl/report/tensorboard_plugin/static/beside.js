// What became in another repair of the samples that one has flipped.

import { ask, count, h } from "./dom.js";

/** A choice among other repairs and a line that says what both share; `chosen(name, ofRow)` is given a column. */
export function besideAnother(repair, others, chosen) {
  const line = h("p", { role: "status" });
  const select = h("select", { onchange: () => choose(select.value) },
    h("option", { value: "" }, "no other"), others.map(name => h("option", { value: name }, name)));

  async function choose(name) {
    line.textContent = "";
    if (!name) return chosen(null);
    try {
      const other = await ask("repair", { name });
      if (select.value !== name) return;  // a reader was faster
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

/** By row what the other repair does to the sample, and in words how many samples both flip. */
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
