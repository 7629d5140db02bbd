"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const value = (row, i) => row.cells[i].textContent.trim();
  table.querySelectorAll("thead th").forEach((head, i) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = value(a, i), y = value(b, i), p = parseFloat(x), q = parseFloat(y);
        // What was not measured stays last either way.
        if (x === "-" || y === "-") return (x === "-") - (y === "-");
        const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
