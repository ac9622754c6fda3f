"use strict";
// The table of scans: a click on a heading sorts by it, and 50 rows at a time are in the page. All are in a template, which a
// browser neither lays out nor loads the pictures of.
const SIZE = 50;
const body = document.querySelector("#scans tbody");
const rows = [...document.getElementById("rows").content.children];
let first = 0;

function show() {
  body.replaceChildren(...rows.slice(first, first + SIZE));
  document.getElementById("pages").hidden = rows.length <= SIZE;
  document.getElementById("page").textContent = `${first + 1} to ${Math.min(first + SIZE, rows.length)} of ${rows.length}`;
  document.getElementById("back").disabled = first === 0;
  document.getElementById("next").disabled = first + SIZE >= rows.length;
}

function turn(step) {
  first += step * SIZE;
  show();
}

function sort(heading) {
  const column = heading.cellIndex, down = heading.ariaSort === "ascending";
  const value = (row) => row.cells[column].dataset.value;
  const known = (row) => value(row) !== "None";
  rows.sort((a, b) => {
    if (!known(a) || !known(b)) return known(b) - known(a);
    const order = column ? value(a) - value(b) : value(a).localeCompare(value(b), undefined, { numeric: true });
    return down ? -order : order;
  });
  for (const each of heading.parentNode.cells) each.removeAttribute("aria-sort");
  heading.ariaSort = down ? "descending" : "ascending";
  first = 0;
  show();
}

for (const heading of document.querySelectorAll("#scans th:not(.text)")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  button.addEventListener("click", () => sort(heading));
  heading.append(button);
}
document.getElementById("sheet").addEventListener("click", ({ target }) => {
  target.ariaPressed = document.getElementById("scans").classList.toggle("sheet");
});
document.getElementById("back").addEventListener("click", () => turn(-1));
document.getElementById("next").addEventListener("click", () => turn(1));
show();
