// The verdict, with its counts and the limit for future data.

import { count, fromReport, h } from "./dom.js";

/** Builds the elements from the verdict to the table of splits. */
export function verdict(repair) {
  return [
    h("h1", { class: repair.tone }, repair.verdict),
    h("dl", { class: "answers" }, repair.answers.flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])),
    h("ul", { class: "tiles" }, tiles(repair)),
    h("p", { class: "reason" }, repair.reason),
    h("dl", { class: "asked" }, Object.entries({
      "repair": repair.name,
      "target": repair.target,
      "gate": repair.gate,
      "layer": repair.layers,
      "compared with": repair.against,
      ...(repair.made ? { "made": repair.made } : {}),
    }).map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text)))),
    h("details", { class: "more" }, h("summary", {}, "Split by split"), fromReport(repair.outcome)),
  ];
}

function tiles({ known, unseen, accepted, changes, tone, at_most, calibrated }) {
  if (!changes) {
    // No new weights were counted, so only the unchanged model can be shown.
    return Object.entries({ known, unseen }).filter(([, data]) => data).map(([name, data]) =>
      tile(`${name} samples right`, count(data.right), `of ${count(data.n)}`, ""));
  }
  const would = accepted ? "" : "would be ";
  const found = [];
  if (known) {
    found.push(tile(`known samples ${would}broken`, count(known.broken), `of ${count(known.right)} that were right`,
      known.broken ? "warn" : "good"));
    const [part, whole] = known.targeted ? [known.repaired_in_target, known.targeted] : [known.repaired, known.wrong];
    const what = known.targeted ? "targets" : "known failures";
    found.push(tile(`${what} ${would}repaired`, count(part), `of ${count(whole)}`, part ? "good" : "warn"));
  }
  if (unseen) {
    const judged = accepted ? tone : "";
    found.push(tile("unseen failures repaired", count(unseen.repaired), `of ${count(unseen.wrong)}`, judged));
    found.push(tile("unseen samples broken", count(unseen.broken), `of ${count(unseen.right)} that were right`, judged));
    if (at_most) found.push(tile("others like these broken", `≤ ${at_most}`, "with 95 % confidence", ""));
    found.push(tile("unseen accuracy", unseen.accuracy_after, `was ${unseen.accuracy_before}`, ""));
  } else if (accepted) {
    const text = calibrated ? "calibration data stand in, see above" : "nothing is known; give unseen= next time";
    found.push(tile("unseen data", "none", text, calibrated ? "" : "warn"));
  }
  return found;
}

const tile = (name, value, text, tone) =>
  h("li", {}, h("span", { class: "name" }, name), " ", h("strong", { class: tone }, value), " ", h("span", {}, text));
