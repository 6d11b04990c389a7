// ---- plots ----

const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
const font = { family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 12, color: "#1b2430" };
const axis = { gridcolor: "#eceff2", zerolinecolor: "#d5dbe1", automargin: true };

function layout(title, x, y, more) {
  return {
    font,
    title: { text: title, font: { size: 13 }, x: 0.01, xref: "container", y: 0.98, yanchor: "top" },
    margin: { l: 62, r: 18, t: 34, b: 44 },
    xaxis: { ...axis, title: { text: x } },
    yaxis: { ...axis, title: { text: y } },
    paper_bgcolor: "#fff",
    plot_bgcolor: "#fff",
    showlegend: false,
    legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom" },
    hoverlabel: { namelength: -1 },
    ...more,
  };
}

function drawDetail(edge) {
  byId("detail-name").textContent = edge.name;
  const words = [edge.op, edge.role, edge.quantizer || `floating point: ${edge.reason}`];
  for (const i of [...sides].reverse()) {
    const s = edge.sides[i];
    if (!s) continue;
    const facts = [`${before ? `${names[i]}: ` : ""}${count(s.values, "value")} in [${plain(s.low)}, ${plain(s.high)}]`];
    if (s.grid) facts.push(`grid [${s.grid.map(plain).join(", ")}]`, `${count(s.clippedLow, "value")} clipped below, ${s.clippedHigh.toLocaleString("en")} above`);
    if (s.masked) facts.push(`${count(s.masked, "masked value")} left out`);
    words.push(facts.join(", "));
  }
  byId("detail-facts").textContent = words.join(" · ");
  drawHistogram(edge);
  drawChannels(edge);
}

function drawHistogram(edge) {
  const traces = [];
  const shapes = [];
  for (const i of [...sides].reverse()) {
    const s = edge.sides[i];
    if (!s || !s.histogram) continue;
    const { width, first, counts } = s.histogram;
    const x = counts.map((_, k) => width * (first + k + 0.5));
    const outside = s.grid ? x.map((v) => v < s.grid[0] || v > s.grid[1]) : x.map(() => false);
    const hover = `%{x:.4g}: %{y} values<extra>${names[i]}</extra>`;
    const bars = (keep, name, color) => ({
      type: "bar", name, x, y: counts.map((c, k) => (keep(k) ? c : 0)), width, hovertemplate: hover,
      marker: { color, opacity: i === 1 ? 0.45 : 0.8, line: { width: 0 } },
    });
    traces.push(bars((k) => !outside[k], names[i] || (s.grid ? "on the grid" : "values"), colors[i]));
    if (outside.some((o, k) => o && counts[k])) traces.push(bars((k) => outside[k], before ? `${names[i]}, clipped` : "clipped", i === 1 ? "#e0a09a" : "#c0392b"));
    for (const end of s.grid || [])
      shapes.push({ type: "line", x0: end, x1: end, y0: 0, y1: 1, yref: "paper", line: { color: colors[i], width: 1.5, dash: i === 1 ? "dot" : "dash" } });
  }
  const title = traces.length ? "What comes in: values by size; dashed: the ends of the grid" : "No values were measured on this edge";
  const more = { barmode: "overlay", bargap: 0, shapes, showlegend: traces.length > 1 };
  const drawn = layout(title, "value", "values in a bin (log)", more);
  drawn.yaxis.type = "log";
  drawn.yaxis.dtick = 1;
  drawn.yaxis.exponentformat = "power";
  Plotly.react("histogram", traces, drawn, config);
}

function drawChannels(edge) {
  const traces = [...sides].reverse().filter((i) => edge.sides[i] && edge.sides[i].channels.length).map((i) => ({
    type: "bar", name: names[i], y: edge.sides[i].channels, hovertemplate: `channel %{x}: %{y:.4g}<extra>${names[i]}</extra>`,
    marker: { color: colors[i], opacity: i === 1 ? 0.5 : 0.85, line: { width: 0 } },
  }));
  const outliers = edge.sides[0] ? edge.sides[0].outliers : [];
  const few = outliers.slice(0, 6).join(", ") + (outliers.length > 6 ? ", …" : "");
  const found = outliers.length ? `outlier channels: ${few}` : "no outlier channel";
  const title = traces.length ? `Greatest |x| of each channel; ${found}` : edge.role === "weight" ? "Channels are those of activations" : "This edge has no axis of channels";
  Plotly.react("channels", traces, layout(title, "channel", "greatest |x|", { barmode: "overlay", bargap: 0, showlegend: traces.length > 1 }), config);
}

function drawNoise() {
  const edges = data.edges.filter((e) => e.role !== "weight");
  const line = (i, key, name, style) => ({
    type: "scatter", mode: style.mode, name: before ? `${name}, ${names[i]}` : name,
    x: edges.map((_, k) => k), y: edges.map((e) => (e.sides[i] ? finite(e.sides[i][key]) : null)),
    customdata: edges.map((e) => e.index), text: edges.map((e) => e.name), connectgaps: true,
    hovertemplate: "%{text}<br>%{y:.1f} dB<extra>%{fullData.name}</extra>", marker: { size: 5, color: style.color }, line: { width: 1.5, color: style.color },
  });
  const traces = [...sides].reverse().flatMap((i) => [
    line(i, "total", "total", { mode: "lines+markers", color: colors[i] }),
    line(i, "own", "own", { mode: "markers", color: ["#8fb8c6", "#e0c39c"][i] }),
  ]);
  const drawn = layout("", "edge, in the order of the graph", "SQNR, dB", { showlegend: true, margin: { l: 62, r: 18, t: 30, b: 44 } });
  Plotly.newPlot("noise-plot", traces, drawn, config).then((plot) => plot.on("plotly_click", (e) => select(e.points[0].customdata, true)));
}

const TOP = 20;

function drawSensitivity() {
  const rows = after.sensitivityRows;
  const what = metric ? `the score ${metric} (greater is better)` : "the SQNR of the outputs against the floating-point model";
  const base = metric ? ` Floating point ${plain(after.scores.off)}, all quantizers on ${plain(after.scores.on)}.` : ` All quantizers on: ${db(after.scores.on)} dB.`;
  byId("sensitivity-about").textContent = rows
    ? `Measured by ${what}, on ${count(rows, "row")}. Alone on: only this quantizer quantizes. Alone off: all others do.` + (after.scores.on === undefined ? "" : base)
    : "Not measured.";
  ranked("alone-on", aloneOn, !metric, metric ? `Alone on: ${metric} lost` : "Alone on: SQNR of the outputs; low is sensitive", metric ? unit : "SQNR, dB");
  ranked("alone-off", aloneOff, false, "Alone off: what it brings back", `${unit} gained`);
}

// The most sensitive quantizers by one of the two scores, as bars.
function ranked(id, value, ascending, title, label) {
  const found = mostSensitive(value, ascending).slice(0, TOP).reverse();
  if (!found.length) return byId(id).replaceChildren(element("p", `${title}: not measured`, "about"));
  const traces = sides.map((i) => ({ // bars of a group go upwards
    type: "bar", orientation: "h", name: names[i], y: found.map((e) => e.name), x: found.map((e) => value(e.sides[i], i)),
    customdata: found.map((e) => e.index), hovertemplate: "%{y}: %{x:.3g}<extra></extra>", marker: { color: colors[i] },
  }));
  const drawn = layout(title, label, "", { bargap: 0.25, showlegend: Boolean(before), height: 70 + 19 * found.length, margin: { l: 10, r: 14, t: 34, b: 40 } });
  drawn.yaxis.tickfont = { size: 10.5 };
  drawn.yaxis.ticksuffix = " ";
  drawn.legend.traceorder = "reversed";
  byId(id).style.height = `${drawn.height}px`;
  return Plotly.newPlot(id, traces, drawn, config).then((plot) => plot.on("plotly_click", (e) => select(e.points[0].customdata, true)));
}

function mostSensitive(value, ascending) {
  const found = data.edges.filter((e) => Number.isFinite(value(e.sides[0], 0) ?? NaN));
  const sign = ascending ? 1 : -1;
  return found.sort((a, b) => sign * (value(a.sides[0], 0) - value(b.sides[0], 0)));
}

// ---- outlier channels: edges of one op and width are one picture ----

function families() {
  const found = new Map();
  for (const edge of data.edges) {
    const side = edge.sides[0];
    if (!side || side.outlier === null) continue;
    const key = `${edge.op}, ${side.channels.length} channels`;
    found.set(key, [...(found.get(key) || []), edge]);
  }
  const greatest = (edges) => Math.max(...edges.map((e) => e.sides[0].outlier));
  return [...found].sort((a, b) => greatest(b[1]) - greatest(a[1]));
}

function drawOutliers() {
  byId("ratio").textContent = data.outlier;
  const all = families();
  byId("family").replaceChildren(...all.map(([key, edges]) => element("option", `${key} (${count(edges.length, "edge")})`)));
  const draw = () => {
    if (all.length) drawHeat(all[byId("family").selectedIndex][1]);
    else byId("repeated").textContent = "No edge has an axis of 8 or more channels.";
  };
  byId("family").addEventListener("input", draw);
  draw();
}

function drawHeat(edges) {
  byId("heat").className = before ? "two pair" : "two one";
  byId("heat").replaceChildren();
  const ratios = (i) => edges.map((e) => {
    const channels = e.sides[i] ? e.sides[i].channels : [];
    const median = [...channels].sort((a, b) => a - b)[Math.floor(channels.length / 2)];
    return channels.map((x) => (median ? x / median : null));
  });
  const top = Math.max(data.outlier, ...sides.flatMap((i) => ratios(i).flat()));
  const ticks = [1, 2, 3, 6, 10, 20, 50, 100, 200, 500, 1000].filter((t) => t <= top);
  for (const i of [...sides].reverse()) {
    const plot = element("div", undefined, "plot");
    byId("heat").append(plot);
    const values = ratios(i);
    const trace = {
      type: "heatmap", z: values.map((row) => row.map((r) => (r ? Math.log10(r) : 0))), customdata: values, y: edges.map((e) => e.name), zmin: 0, zmax: Math.log10(top),
      colorscale: [[0, "#f4f6f8"], [Math.log10(data.outlier) / Math.log10(top) * 0.999, "#7fb0c2"], [1, "#7a1022"]],
      showscale: i === 0,
      hovertemplate: "%{y}<br>channel %{x}: %{customdata:.1f}×<extra></extra>",
      colorbar: { title: { text: "ratio" }, tickvals: ticks.map(Math.log10), ticktext: ticks.map(String), thickness: 12 },
    };
    const drawn = layout(names[i], "channel", "", { height: 110 + 17 * edges.length, margin: { l: 10, r: 10, t: names[i] ? 34 : 12, b: 44 } });
    drawn.yaxis = { ...drawn.yaxis, autorange: "reversed", tickfont: { size: 10.5 }, showticklabels: i === sides.length - 1 };
    Plotly.newPlot(plot, [trace], drawn, config).then((p) => p.on("plotly_click", (e) => select(edges[e.points[0].pointIndex[0]].index, true)));
  }
  const seen = new Map();
  for (const edge of edges) for (const channel of edge.sides[0].outliers) seen.set(channel, (seen.get(channel) || 0) + 1);
  const often = [...seen].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 8);
  const listed = often.map(([channel, n]) => `${channel} (in ${n} of ${edges.length})`).join(", ");
  byId("repeated").textContent = often.length ? `Outlier channels${before ? ", after" : ""}: ${listed}.` : "No outlier channel on these edges.";
}
