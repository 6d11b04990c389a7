// ---- the page ----

function drawHeader() {
  byId("title").textContent = after.title;
  const facts = [
    after.model, `preset ${after.preset}`, `${count(after.rows, "row")} seen`, `${(after.parameters / 1e6).toFixed(1)} M parameters`,
    after.created, ...Object.entries(after.versions).map(([name, version]) => `${name} ${version}`), after.device,
  ];
  byId("facts").textContent = facts.join(" · ");
  if (before) {
    const line = element("p");
    line.append("Compared with ", element("b", before.title, "before"), `: ${before.model}, preset ${before.preset}, ${count(before.rows, "row")} seen, ${before.created}`);
    byId("facts").after(line);
  }
  const unfinished = data.subjects.filter((s) => !s.complete).map((s) => {
    const { alone_on, alone_off } = s.measured;
    return `${s.title} was interrupted: ${s.rows} of ${count(s.rowsWanted, "row")} seen, ${alone_on} of ${count(s.quantizers, "quantizer")} measured alone on and ${alone_off} alone off. Run it again to go on from there.`;
  });
  byId("unfinished").textContent = unfinished.join(" ");
  byId("unfinished").hidden = !unfinished.length;
}

function drawTiles() {
  const each = (value) => [...sides].reverse().map((i) => value(data.subjects[i], i));
  const edgesWith = (test) => (_, i) => String(data.edges.filter((e) => e.sides[i] && test(e.sides[i])).length);
  const tiles = [["SQNR of the outputs, dB", each((s) => db(s.outputs) || "—")]];
  if (metric) tiles.push([`${metric}: floating point`, each((s) => plain(s.scores.off) || "—")], [`${metric}: all quantizers on`, each((s) => plain(s.scores.on) || "—")]);
  tiles.push(
    ["quantizers", each((s) => String(s.quantizers))],
    ["edges left in floating point", [String(data.edges.filter((e) => !isQuantized(e)).length)]],
    ["edges with own SQNR below 20 dB", each(edgesWith((s) => asNumber(s.own) < 20))],
    ["edges that clip more than 0.1 %", each(edgesWith((s) => s.clipped > 0.001))],
    [`edges with outlier channels (${data.outlier}× or more)`, each(edgesWith((s) => s.outlier >= data.outlier))],
  );
  for (const [label, values] of tiles) {
    const tile = element("div", undefined, "tile");
    const figure = element("b");
    values.forEach((value, k) => {
      const last = k === values.length - 1;
      figure.append(element("span", value, last ? "" : "before"), ...(last ? [] : [element("span", " → ", "arrow")]));
      figure.lastChild.style.cssText = last ? "color: inherit; font-size: inherit" : "";
    });
    tile.append(figure, element("span", label));
    byId("tiles").append(tile);
  }
}

function drawLists() {
  const list = (title, label, edges, text) => {
    const block = element("div");
    const head = element("h3", title);
    head.append(element("span", label));
    const rows = edges.slice(0, 5).map((edge) => {
      const row = element("li");
      const figures = [...sides].reverse().map((i) => (edge.sides[i] ? text(edge.sides[i], i) : "") || "—");
      const name = element("span", edge.name);
      name.title = edge.name;
      row.append(name, element("span", figures.join(" → ")));
      row.addEventListener("click", () => select(edge.index, true));
      return row;
    });
    const body = element("ol");
    body.append(...(rows.length ? rows : [element("li", "not measured")]));
    block.append(head, body);
    byId("lists").append(block);
  };
  const arrow = before ? " (before → after)" : "";
  const by = (value, ascending) => {
    const found = data.edges.filter((e) => e.sides[0] && Number.isFinite(value(e.sides[0])));
    return found.sort((a, b) => (ascending ? 1 : -1) * (value(a.sides[0]) - value(b.sides[0])));
  };
  list("Worst edges by their own noise", `SQNR, dB${arrow}`, by((s) => asNumber(s.own), true), (s) => db(s.own));
  list("Most clipped edges", `of values${arrow}`, by((s) => s.clipped || NaN, false), (s) => share(s.clipped));
  list("Most sensitive quantizers, alone on", `${metric ? `${unit} lost` : "SQNR of outputs, dB"}${arrow}`, mostSensitive(aloneOn, !metric), (s, i) => score(aloneOn(s, i)));
  list("Most sensitive quantizers, alone off", `${unit} gained${arrow}`, mostSensitive(aloneOff, false), (s, i) => score(aloneOff(s, i)));
  list("Largest outlier ratios", `channel's greatest |x| over the median${arrow}`, by((s) => finite(s.outlier) ?? NaN, false), (s) => times(s.outlier));
  list("Edges furthest from floating point", `total SQNR, dB${arrow}`, by((s) => asNumber(s.total), true), (s) => db(s.total));
}

function drawCoverage() {
  byId("coverage-about").textContent = [after.summary, ...after.notes].join(". ") + ".";
  const ops = new Map();
  for (const edge of data.edges) {
    const row = ops.get(edge.op) || { weight: 0, activation: 0, input: 0, float: 0, reasons: new Map() };
    ops.set(edge.op, row);
    if (isQuantized(edge)) row[edge.role] += 1;
    else {
      row.float += 1;
      row.reasons.set(edge.reason, (row.reasons.get(edge.reason) || 0) + 1);
    }
  }
  const head = element("tr");
  const headings = ["op", "weights", "activations", "inputs", "left in floating point", "why"];
  headings.forEach((label, i) => head.append(element("th", label, i > 0 && i < 5 ? "number" : "")));
  document.querySelector("#ops thead").append(head);
  for (const [op, row] of [...ops].sort((a, b) => a[0].localeCompare(b[0]))) {
    const line = element("tr");
    const reasons = [...row.reasons].map(([reason, n]) => `${reason} (${n})`).join("; ");
    [op, row.weight || "", row.activation || "", row.input || "", row.float || "", reasons].forEach((text, i) =>
      line.append(element("td", text, i > 0 && i < 5 ? "number" : "")));
    document.querySelector("#ops tbody").append(line);
  }
}

document.body.classList.toggle("compared", Boolean(before));
data.edges.forEach((edge, index) => Object.assign(edge, { index }));
drawHeader();
drawTiles();
drawLists();
fillFilters();
drawTable();
const worst = data.edges.filter((e) => e.sides[0] && Number.isFinite(asNumber(e.sides[0].own)));
select((worst.sort((a, b) => asNumber(a.sides[0].own) - asNumber(b.sides[0].own))[0] || data.edges[0]).index);
drawNoise();
drawSensitivity();
drawOutliers();
drawCoverage();
document.body.dataset.ready = "yes";
