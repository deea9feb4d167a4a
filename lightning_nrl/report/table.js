// Rows of cells, sorted by a click on a head and filtered by words: of report.html, and of TensorBoard's tab.

/** The first number in a text such as "1,024"; NaN where there is none. */
export const numberIn = text => parseFloat(text.replaceAll(",", ""));

/** Numbers by their size, then other text by the alphabet; for the sort of an array. */
export function compareCells(x, y) {
  const p = numberIn(x), q = numberIn(y);
  return isNaN(p) && isNaN(q) ? x.localeCompare(y) : isNaN(p) - isNaN(q) || p - q;
}

/** Whether a text, in lower case, has each word of what a reader asked for. */
export const matchesWords = (text, asked) =>
  asked.toLowerCase().split(" ").every(word => text.includes(word));

/** Makes buttons in a row of heads call `sort(column, ascending)`, and tells screen readers the order. */
export function bindHeads(row, sort) {
  [...row.cells].forEach((head, i) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.ariaSort !== "ascending";
    for (const other of row.cells) if (other.ariaSort) other.ariaSort = "none";
    head.ariaSort = up ? "ascending" : "descending";
    sort(i, up);
  }));
}

/** Makes a whole table sortable; its `data-filter` names the field that filters it, if it has one. */
export function sortable(table) {
  const body = table.tBodies[0], rows = [...body.rows], cell = (row, i) => row.cells[i].textContent;
  bindHeads(table.tHead.rows[0], (i, up) => {
    rows.sort((a, b) => (up ? 1 : -1) * compareCells(cell(a, i), cell(b, i)));
    body.append(...rows);
  });
  const field = document.getElementById(table.dataset.filter);
  if (!field) return;
  const count = document.getElementById(table.dataset.filter + "-count");
  const texts = new Map(rows.map(row => [row, [...row.cells].map(one => one.textContent.toLowerCase()).join(" ")]));
  field.addEventListener("input", () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !matchesWords(texts.get(row), field.value);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  });
}
