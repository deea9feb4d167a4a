// Draws curves over steps as SVG, with a mark that can be moved along them.

import { h, s } from "./dom.js";

const WIDTH = 460, HEIGHT = 230, LEFT = 52, RIGHT = 12, TOP = 12, BOTTOM = 40;

/**
 * Draws a chart and its legend.
 *
 * @param title title, also for screen readers.
 * @param xs the steps, ascending.
 * @param series list of `{name, values, colour, dash}`; a missing value is null.
 * @param xName label of the axis of steps.
 * @param whole true if the values are counts.
 * @returns `{element, mark(i)}`: `mark` moves the mark to the i-th step.
 */
export function curves(title, xs, series, xName, whole = false) {
  const values = series.flatMap(one => one.values).filter(value => value !== null);
  const [low, high] = [Math.min(0, ...values), Math.max(whole ? 1 : 1e-9, ...values)];
  const span = xs.at(-1) - xs[0] || 1;
  const x = value => LEFT + (value - xs[0]) / span * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const step = (values, i) => (values[i] === null ? "" : `${joined(values, i) ? "L" : "M"}${x(xs[i])} ${y(values[i])}`);
  const lines = series.map(({ values, colour, dash }) => s("path", {
    d: values.map((_, i) => step(values, i)).join(""),
    fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash,
  }));
  const rule = s("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "mark" });
  const dots = series.map(({ colour }) => s("circle", { r: 4, fill: colour }));
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title },
    ticks(low, high, whole).map(value => s("g", { class: "tick" },
      s("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      s("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, String(value)))),
    ticks(xs[0], xs.at(-1)).map(value =>
      s("text", { x: x(value), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, String(value))),
    s("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, xName),
    lines, rule, dots);
  const legend = h("ul", { class: "legend" }, series.map(({ name, colour, dash }) => h("li", {},
    s("svg", { viewBox: "0 0 24 8", width: 24, height: 8, "aria-hidden": "true" },
      s("line", { x1: 0, x2: 24, y1: 4, y2: 4, stroke: colour, "stroke-width": 2, "stroke-dasharray": dash })),
    ` ${name}`)));

  function mark(i) {
    rule.setAttribute("x1", x(xs[i]));
    rule.setAttribute("x2", x(xs[i]));
    series.forEach(({ values }, j) => {
      const value = values[i];
      dots[j].setAttribute("visibility", value === null ? "hidden" : "visible");
      if (value !== null) {
        dots[j].setAttribute("cx", x(xs[i]));
        dots[j].setAttribute("cy", y(value));
      }
    });
  }
  mark(0);
  return { element: h("figure", { class: "curves" }, h("figcaption", {}, title), svg, legend), mark };
}

const joined = (values, i) => i > 0 && values[i - 1] !== null;

/** Returns four to eight round numbers from low to high. */
function ticks(low, high, whole = false) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(one => one * power).find(one => one >= rough && (one >= 1 || !whole)) ?? 1;
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
    found.push(Number((i * step).toFixed(digits)));
  }
  return found;
}
