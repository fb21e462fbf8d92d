"use strict";
// Filter and sort for tables marked data-tool. The page is whole without this: the controls are made here.
for (const table of document.querySelectorAll("table[data-tool]")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const text = rows.map((row) => row.textContent.toLowerCase());

  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("output");
  label.className = "filter";
  input.type = "search";
  input.placeholder = "words, all of them";
  label.append("Filter ", input, " ", count);
  table.parentElement.before(label);
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => text[i].includes(word));
      shown += !row.hidden;
    });
    count.value = `${shown} of ${rows.length} rows`;
  };
  input.addEventListener("input", filter);
  filter();

  // The number that a cell begins with (<0.001 too); what has none, a dash for instance, goes last either way.
  const value = (row, column) => {
    const shown = row.cells[column].firstChild?.textContent.trim() ?? "";
    const number = parseFloat(shown.replace(/^[<+]/, ""));
    return { shown, number: /^[<+-]?[\d.]/.test(shown) ? number : NaN };
  };
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = rows.map((row) => [value(row, column), row]);
      const numbers = keyed.some(([key]) => !Number.isNaN(key.number));
      keyed.sort(([a], [b]) => {
        const absent = (key) => (numbers ? Number.isNaN(key.number) : key.shown === "–");
        if (absent(a) || absent(b)) return absent(a) - absent(b);
        const order = numbers ? a.number - b.number : a.shown.localeCompare(b.shown, "en", { numeric: true });
        return down ? -order : order;
      });
      body.append(...keyed.map(([, row]) => row));
    });
  });
}
