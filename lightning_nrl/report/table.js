// Sorts and filters tables, in report.html and in TensorBoard's tab.

/** Returns the number at the start of a text such as "1,024", or NaN. */
export const numberIn = text => parseFloat(text.replaceAll(",", ""));

/** Compares cells for `sort`: numbers first, by size, then other text by the alphabet. */
export function compareCells(x, y) {
  const p = numberIn(x), q = numberIn(y);
  return isNaN(p) && isNaN(q) ? x.localeCompare(y) : isNaN(p) - isNaN(q) || p - q;
}

/** True if a text in lower case contains each word of the search text. */
export const matchesWords = (text, asked) =>
  asked.toLowerCase().split(" ").every(word => text.includes(word));

/** Makes the buttons in a row of heads call `sort(column, ascending)`, and sets `aria-sort` for screen readers. */
export function bindHeads(row, sort) {
  [...row.cells].forEach((head, i) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.ariaSort !== "ascending";
    for (const other of row.cells) if (other.ariaSort) other.ariaSort = "none";
    head.ariaSort = up ? "ascending" : "descending";
    sort(i, up);
  }));
}

/** Makes a table sortable. If it has `data-filter`, the input of this id filters its rows. */
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
