// ---- figures as text; null is "not measured" ----

const data = JSON.parse(document.getElementById("data").textContent);
const [after, before] = data.subjects;
const sides = data.subjects.map((_, i) => i);
const names = before ? ["after", "before"] : [""];
const colors = ["#1f6f8b", "#b9772b"];
const isQuantized = (edge) => edge.state !== "none";

const finite = (x) => (typeof x === "number" ? x : null);
const asNumber = (x) => (x === "inf" ? Infinity : x === "-inf" ? -Infinity : typeof x === "number" ? x : NaN);

function db(x) {
  return x === null || x === undefined ? "" : x === "inf" ? "∞" : x === "-inf" ? "−∞" : x.toFixed(1).replace("-", "−");
}
function share(x) {
  if (x === null || x === undefined) return "";
  return x === 0 ? "0 %" : x < 0.00005 ? "<0.01 %" : `${(100 * x).toFixed(x < 0.1 ? 2 : 1)} %`;
}
function times(x) {
  return x === null || x === undefined ? "" : `${x >= 100 ? x.toFixed(0) : x.toFixed(1)}×`;
}
function plain(x) {
  return x === null || x === undefined ? "" : typeof x === "string" ? x : Number(x.toPrecision(4)).toString().replace("-", "−");
}
function count(n, word) {
  return `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
}

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}
const byId = (id) => document.getElementById(id);

// ---- sensitivity, as a reader weighs it ----

const metric = after.metric;
const unit = metric || "dB";

// Alone on: with the outputs' SQNR the score itself (low is bad); with a metric what is lost against floating point.
function aloneOn(side, i) {
  if (!side || side.on === null) return null;
  return metric ? asNumber(data.subjects[i].scores.off) - asNumber(side.on) : asNumber(side.on);
}
// Alone off: what it brings back.
function aloneOff(side, i) {
  return !side || side.off === null ? null : asNumber(side.off) - asNumber(data.subjects[i].scores.on);
}
function score(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  return (metric ? x.toPrecision(3) : x.toFixed(Math.abs(x) < 1 ? 2 : 1)).replace("-", "−");
}
