// The Repair tab: lists the repairs of a log folder and shows one of them.

import { changedConfusions } from "./confusions.js";
import { ask, fromReport, h } from "./dom.js";
import { flippedSamples } from "./flips.js";
import { cautionSlider, searchReplay, strengthSlider } from "./replays.js";
import { repairsTable } from "./repairs.js";
import { verdict } from "./verdict.js";

const RELOAD_MILLISECONDS = 30_000;
const state = { repairs: [], found: 0, shown: null, wanted: null, stamp: 0 };

/** Builds the page. TensorBoard calls this when the tab is opened. */
export async function render() {
  document.documentElement.lang = "en";
  document.title = "Repair";
  for (const name of ["report.css", "tab.css"]) {
    document.head.append(h("link", { rel: "stylesheet", href: new URL(name, import.meta.url) }));
  }
  followTheme();
  document.body.append(
    h("main", { class: "report tab" },
      h("section", { id: "repairs", "aria-label": "Repairs in this log" }),
      h("section", { id: "repair", "aria-label": "The repair", "aria-live": "off" },
        h("p", { role: "status" }, "The reports are being read."))));
  await reload();
  setInterval(() => document.hidden || reload(), RELOAD_MILLISECONDS);
}

/** Reads the list of repairs again. Updates the screen only where something changed. */
async function reload() {
  try {
    const { repairs, found } = await ask("repairs");
    const changed = JSON.stringify(repairs) !== JSON.stringify(state.repairs);
    Object.assign(state, { repairs, found });
    const own = repairs.find(one => one.name === state.shown) ?? repairs.find(one => !one.problem);
    if (changed || !own) listRepairs(own?.name);
    if (own && (own.name !== state.shown || own.modified !== state.stamp)) await show(own.name);
  } catch (error) {
    // TensorBoard has ended or is busy: keep what is on the screen until the next reload.
    if (!state.shown) complain(error);
  }
}

function listRepairs(shown) {
  const place = document.getElementById("repairs");
  if (!state.repairs.length) {
    complain(new Error("No repair lies in this log folder. One leaves its report.json in <log_dir>/repair; " +
      "with dirpath= elsewhere, point TensorBoard at that folder."));
  }
  const several = state.repairs.length > 1 || state.repairs.some(one => one.problem);
  place.replaceChildren(...(several ? repairsTable(state.repairs, state.found, shown, show) : []));
}

/** Shows the repair of this name. */
async function show(name) {
  for (const button of document.querySelectorAll("#repairs [data-repair]")) {
    const own = button.dataset.repair === name;
    button.setAttribute("aria-pressed", own);
    button.closest("tr").classList.toggle("shown", own);
  }
  const place = document.getElementById("repair");
  state.wanted = name;
  try {
    const repair = await ask("repair", { name });
    if (state.wanted !== name) return;  // the reader has chosen another one
    Object.assign(state, { shown: name, stamp: repair.modified });
    const others = state.repairs.filter(one => !one.problem && one.name !== name).map(one => one.name);
    const flips = repair.changes ? flippedSamples(repair, others) : { element: "", choosePair: () => undefined };
    place.replaceChildren(
      ...verdict(repair),
      h("div", { class: "beside" }, flips.element, changedConfusions(repair, flips.choosePair)),
      ...strengthSlider(repair),
      ...cautionSlider(repair),
      ...searchReplay(repair),
      h("details", { class: "more" }, h("summary", {}, "The rest of the report"), fromReport(repair.more)));
  } catch (error) {
    complain(error);
  }
}

function complain(error) {
  document.getElementById("repair").replaceChildren(h("p", { class: "warn", role: "alert" }, error.message));
}

/** Follows TensorBoard's own switch between light and dark. Outside TensorBoard the browser's setting holds. */
function followTheme() {
  try {
    const above = window.parent.document.body;
    const follow = () => {
      document.documentElement.dataset.theme = above.classList.contains("dark-mode") ? "dark" : "light";
    };
    if (window.parent === window) return;
    follow();
    new MutationObserver(follow).observe(above, { attributeFilter: ["class"] });
  } catch {
    // The parent page has another origin, so its theme cannot be read.
  }
}
