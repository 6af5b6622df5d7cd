// Clicking a method in a legend hides or shows its curves in all figures; clicking a column heading sorts the table.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    const method = button.dataset.method;
    for (const twin of document.querySelectorAll(`.legend button[data-method="${method}"]`)) {
      twin.setAttribute("aria-pressed", shown);
    }
    for (const curve of document.querySelectorAll(`[id*="curve."][id$=".${method}"]`)) {
      curve.classList.toggle("off", !shown);
    }
  });
}

for (const heading of document.querySelectorAll("th")) {
  heading.querySelector("button").addEventListener("click", () => {
    const first = heading.dataset.first;
    const sorted = heading.getAttribute("aria-sort");
    const descending = (sorted === null ? first : sorted === "ascending" ? "descending" : "ascending") === "descending";
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = heading.closest("table").tBodies[0];
    const key = (row) => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent.trim();
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      return x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y);
    };
    const missing = (row) => key(row) === "nan" || key(row) === "–"; // sorted last in both directions
    const rows = [...body.rows].sort((a, b) => missing(a) - missing(b) || (descending ? -order(a, b) : order(a, b)));
    body.append(...rows);
  });
}
