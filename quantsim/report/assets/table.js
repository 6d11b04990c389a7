// ---- the table of edges: what a column shows, what it sorts by, what is filtered ----

const groups = [
  { label: "clipped", value: (s) => finite(s.clipped), text: (s) => share(s.clipped), bad: (s) => s.clipped > 0.01 },
  { label: "own SQNR", unit: "dB", value: (s) => asNumber(s.own), text: (s) => db(s.own), bad: (s) => asNumber(s.own) < 20 },
  { label: "total SQNR", unit: "dB", value: (s) => asNumber(s.total), text: (s) => db(s.total), bad: (s) => asNumber(s.total) < 10 },
  { label: "alone on", unit: metric ? `${unit} lost` : "dB", value: aloneOn, text: (s, i) => score(aloneOn(s, i)) },
  { label: "alone off", unit: before ? unit : `${unit} gained`, value: aloneOff, text: (s, i) => score(aloneOff(s, i)) },
  { label: "outlier", unit: "ratio", value: (s) => finite(s.outlier), text: (s) => times(s.outlier), bad: (s) => s.outlier >= data.outlier },
];
const columns = [
  { label: "edge", value: (e) => e.index, text: (e) => e.name },
  ...(before ? [] : [{ label: "quantizer", words: true, value: (e) => e.quantizer, text: (e) => e.quantizer || "floating point" }]),
  { label: "range, or why there is none", words: true, value: (e) => e.range || e.reason, text: (e) => e.range || e.reason },
];
for (const group of groups)
  for (const i of [...sides].reverse())
    columns.push({
      label: group.label,
      unit: [names[i], group.unit].filter(Boolean).join(", "),
      number: true,
      value: (e) => (e.sides[i] ? group.value(e.sides[i], i) : null),
      text: (e) => (e.sides[i] ? group.text(e.sides[i], i) : ""),
      bad: (e) => e.sides[i] && group.bad && group.bad(e.sides[i], i),
    });
const ordering = { column: 0, descending: false };
let selected = null;

function drawHead() {
  const row = element("tr");
  columns.forEach((column, i) => {
    const cell = element("th", column.label, column.number ? "number" : "");
    if (column.unit) cell.append(element("small", column.unit));
    if (ordering.column === i) cell.setAttribute("aria-sort", ordering.descending ? "descending" : "ascending");
    cell.addEventListener("click", () => {
      ordering.descending = ordering.column === i ? !ordering.descending : false;
      ordering.column = i;
      drawTable();
    });
    row.append(cell);
  });
  document.querySelector("#table thead").replaceChildren(row);
}

// Every word of the filter must be part of the name.
function passes(edge) {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [role, op, kind] = ["role", "op", "kind"].map((id) => byId(id).value);
  const side = edge.sides[0] || {};
  const kinds = {
    quantized: isQuantized(edge),
    float: !isQuantized(edge),
    clips: side.clipped > 0,
    outliers: side.outlier >= data.outlier,
  };
  const name = edge.name.toLowerCase();
  return words.every((w) => name.includes(w)) && (!role || edge.role === role) && (!op || edge.op === op) && (!kind || kinds[kind]);
}

function compare(a, b) {
  const value = columns[ordering.column].value;
  const [x, y] = [value(a), value(b)];
  const [noX, noY] = [x, y].map((v) => v === null || v === undefined || v === "" || Number.isNaN(v));
  if (noX || noY) return noX - noY || a.index - b.index; // what was not measured comes last, either way
  const order = typeof x === "string" ? x.localeCompare(y) : x === y ? 0 : x < y ? -1 : 1;
  return (ordering.descending ? -order : order) || a.index - b.index;
}

function drawTable() {
  drawHead();
  const shown = data.edges.filter(passes).sort(compare);
  const body = document.querySelector("#table tbody");
  body.replaceChildren(...shown.map(tableRow));
  byId("shown").textContent = `${shown.length} of ${count(data.edges.length, "edge")}`;
}

function tableRow(edge) {
  const row = element("tr", undefined, isQuantized(edge) ? "" : "float");
  row.dataset.index = edge.index;
  row.classList.toggle("selected", edge.index === selected);
  for (const column of columns) {
    const text = column.text(edge);
    const cell = element("td", text, [column.number ? "number" : "", column.words ? "words" : ""].join(" ").trim());
    if (column.bad && column.bad(edge)) cell.classList.add("bad");
    if (!column.number) cell.title = text;
    row.append(cell);
  }
  row.addEventListener("click", () => select(edge.index));
  return row;
}

function fillFilters() {
  const options = { role: "every role", op: "every op" };
  for (const [id, all] of Object.entries(options)) {
    const first = element("option", all);
    first.value = "";
    const values = [...new Set(data.edges.map((e) => e[id]))].sort();
    byId(id).replaceChildren(first, ...values.map((v) => element("option", v)));
  }
  for (const id of ["search", "role", "op", "kind"]) byId(id).addEventListener("input", drawTable);
}

// Show an edge's values below the table; from elsewhere on the page, go there too.
function select(index, scroll) {
  selected = index;
  for (const row of document.querySelectorAll("#table tbody tr")) row.classList.toggle("selected", Number(row.dataset.index) === index);
  drawDetail(data.edges[index]);
  if (!scroll) return;
  const row = document.querySelector("#table tbody tr.selected");
  if (row) byId("scroll").scrollTop = row.offsetTop - 120;
  byId("edges").scrollIntoView();
}
