// Sliders over the iterations of the search, the strengths of the patch, and cautions.

import { curves } from "./curves.js";
import { count, h, number } from "./dom.js";

const REPAIRED = "var(--repaired)", BROKEN = "var(--broken)", TARGET = "var(--target)", DASHED = "6 4";
const INK = "currentColor", DOTTED = "2 3";
const PLAY_MILLISECONDS = 5000;

/** Builds a slider over the iterations of the search: what the best candidate so far repairs and breaks. */
export function searchReplay({ search, name }) {
  if (!search || !(search.curves.best?.length > 1)) return [];
  const { curves: found, n_failed, n_passed, stopped } = search, steps = [...found.best.keys()];
  const of = (value, whole) => count(value) + (whole === null ? "" : ` of ${count(whole)}`);
  const charts = [
    curves("Samples under the best candidate so far", steps, series([
      ["repaired", found.patched, REPAIRED], ["broken", found.broken, BROKEN, DASHED]]), "iteration", true),
    curves("Mean loss under it", steps, series([
      ["on the failed samples", found.loss_failed, REPAIRED],
      ["on the passed ones", found.loss_passed, BROKEN, DASHED]]), "iteration"),
  ];
  const facts = i => [
    ["repaired", of(found.patched?.[i], n_failed)],
    ["broken", of(found.broken?.[i], n_passed)],
    ["best fitness", rounded(found.best[i])],
    ["mean fitness of the swarm", rounded(found.mean?.[i])],
    ["loss on the failed", rounded(found.loss_failed?.[i])],
    ["loss on the passed", rounded(found.loss_passed?.[i])],
    ["diversity", rounded(found.diversity?.[i])],
  ];
  return slider({
    id: "search", title: "The search, iteration by iteration",
    text: `Iteration 0 is the starting swarm. It ended: ${stopped}.`,
    label: "Iteration", steps, start: steps.length - 1, charts, facts, plays: true,
    text_of: i => `iteration ${i}`,
  });
}

/** Builds a slider from the original weights to the patch and beyond: what each strength repairs and breaks. */
export function strengthSlider({ strength, chosen_strength, known }) {
  if (strength.length < 2) return [];
  const steps = strength.map(point => point.strength), calibrated = strength.some(point => point.calibration);
  const known_flips = key => strength.map(point => point.known[key]);
  const calibration = key => strength.map(point => point.calibration?.[key] ?? null);
  const charts = [
    curves("Samples repaired", steps, series([
      ["targets", strength.map(point => point.repaired_in_target), TARGET, DASHED],
      ["known", known_flips("repaired"), REPAIRED],
      ["calibration", calibration("repaired"), INK, DOTTED]]), "strength", true),
    curves("Samples broken", steps, series([
      ["known", known_flips("broken"), BROKEN],
      ["calibration", calibration("broken"), INK, DOTTED]]), "strength", true),
  ];
  const taken = steps.indexOf(chosen_strength);
  const facts = i => [
    ["targets repaired", count(strength[i].repaired_in_target) + (known ? ` of ${count(known.targeted)}` : "")],
    ["known repaired", count(strength[i].known.repaired)],
    ["known broken", count(strength[i].known.broken)],
    ...(calibrated ? [
      ["calibration repaired", count(calibration("repaired")[i])],
      ["calibration broken", count(calibration("broken")[i])],
    ] : []),
    ["", [strength[i].polished ? "polished" : "", i === taken ? "taken" : ""].filter(Boolean).join(", ")],
  ];
  const where = chosen_strength === null ? "" : ` Taken: ${chosen_strength}.`;
  return slider({
    id: "strength", title: "How far to go: the strength of the change",
    text: `0 is the model as it was, 1 the whole change that was found; each was counted.${where}`,
    label: "Strength", steps, start: taken < 0 ? steps.length - 1 : taken, charts, facts, plays: false,
    text_of: i => `strength ${steps[i]}${i === taken ? ", taken" : ""}`,
  });
}

/** Builds a slider over the cautions: what each repairs and breaks of the held-out samples. */
export function cautionSlider({ caution }) {
  if (caution.length < 2) return [];
  const steps = caution.map(point => point.caution), of = key => caution.map(point => point.held_out[key]);
  const chosen = caution.findIndex(point => point.chosen);
  return slider({
    id: "caution", title: "How careful to be: the caution of the training",
    text: "Held-out samples, counted before the repair used them: 0 is the trained network, 1 would be the model as it was.",
    label: "Caution", steps, start: Math.max(0, chosen), plays: false,
    charts: [curves("Held-out samples", steps, series([
      ["repaired", of("repaired"), REPAIRED], ["broken", of("broken"), BROKEN, DASHED]]), "caution", true)],
    facts: i => [
      ["held-out repaired", count(caution[i].held_out.repaired)],
      ["held-out broken", count(caution[i].held_out.broken)],
      ["", i === chosen ? "taken" : ""],
    ],
    text_of: i => `caution ${steps[i]}${i === chosen ? ", taken" : ""}`,
  });
}

const series = lines => lines.filter(([, values]) => values?.some(value => value !== null))
  .map(([name, values, colour, dash]) => ({ name, values, colour, dash }));

const rounded = x => number(x === null || x === undefined ? null : Number(x.toPrecision(4)));

/** Builds a section with a slider, which moves the marks of the charts and updates the facts. */
function slider({ id, title, text, label, steps, start, charts, facts, plays, text_of }) {
  let timer = null;
  const list = h("dl", { class: "facts" }), value = h("output", { for: `${id}-slider` });
  const input = h("input", { id: `${id}-slider`, type: "range", min: 0, max: steps.length - 1, step: 1,
    oninput: () => { stop(); show(Number(input.value)); } });

  function show(i) {
    input.value = i;
    input.setAttribute("aria-valuetext", text_of(i));
    value.textContent = text_of(i);
    list.replaceChildren(...facts(i).filter(([, fact]) => fact !== "").flatMap(([name, fact]) =>
      [h("dt", {}, name), h("dd", {}, fact)]));
    for (const chart of charts) chart.mark(i);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  const play = h("button", { type: "button", onclick: () => {
    if (timer) return stop();
    const pause = Math.max(16, PLAY_MILLISECONDS / steps.length);
    const stride = Math.max(1, Math.round(16 * steps.length / PLAY_MILLISECONDS));
    let i = Number(input.value) >= steps.length - 1 ? 0 : Number(input.value);
    play.textContent = "Pause";
    timer = setInterval(() => {
      if (!play.isConnected) return stop();
      show(Math.min(i, steps.length - 1));
      if (i >= steps.length - 1) stop();
      i += stride;
    }, pause);
    return undefined;
  } }, "Play");
  show(start);
  return [h("section", { class: "replay", "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title),
    h("p", {}, text),
    h("div", { class: "slider" }, plays ? play : null, h("label", { for: `${id}-slider` }, label), input, value),
    h("div", { class: "charts" }, charts.map(chart => chart.element), list))];
}
