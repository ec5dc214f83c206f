// What tokens can be coloured by, how numbers are written, and the colours: blue and orange, which remain distinct with
// every kind of colour blindness; their strength, not only their hue, carries the value.
"use strict";

const BLUE = [0, 114, 178];
const ORANGE = [213, 94, 0];
const STRONGEST = 0.62;

const MEASURES = {
  entropy: { title: "entropy", unit: "nats", diverging: false },
  temperature: { title: "temperature T_t", unit: "", diverging: true, middle: 1 },
  h: { title: "h", unit: "", diverging: true, middle: 0 },
  advantage: { title: "advantage of the token", unit: "", diverging: true, middle: 0 },
  log_ratio: { title: "log importance ratio", unit: "nats", diverging: true, middle: 0 },
  surprisal: { title: "surprisal, -log-prob of the engine at T_t", unit: "nats", diverging: false },
  mismatch: { title: "mismatch, log-prob engine - trainer", unit: "nats", diverging: true, middle: 0 },
};

function formatted(value, digits = 6) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const rounded = Number(value.toPrecision(digits));
  return rounded !== 0 && Math.abs(rounded) < 1e-4 ? rounded.toExponential() : String(rounded);
}

// The scale of a measure over a file's 1st to 99th percentile; null if nothing was recorded.
function scaleOf(name, percentiles) {
  if (!percentiles) return null;
  const [low, high] = percentiles;
  const measure = MEASURES[name];
  if (!measure.diverging) {
    const end = high > 0 ? high : 1;
    return { low: 0, high: end, colour: (x) => shade(ORANGE, x / end) };
  }
  const middle = measure.middle;
  const reach = Math.max(Math.abs(low - middle), Math.abs(high - middle)) || 1;
  const colour = (x) => shade(x < middle ? BLUE : ORANGE, Math.abs(x - middle) / reach);
  return { low: middle - reach, high: middle + reach, middle, colour };
}

function shade([red, green, blue], strength) {
  if (Number.isNaN(strength)) return "transparent";
  return `rgba(${red},${green},${blue},${(Math.min(1, Math.max(0, strength)) * STRONGEST).toFixed(3)})`;
}

function legend(name, scale) {
  const measure = MEASURES[name];
  if (!scale) return el("div", { class: "legend" }, `${measure.title}: not recorded for these responses`);
  const stops = [...Array(9).keys()].map((i) => scale.colour(scale.low + ((scale.high - scale.low) * i) / 8));
  const ends = [scale.low, ...(measure.diverging ? [scale.middle] : []), scale.high];
  return el(
    "div",
    { class: "legend" },
    el("span", { class: "legend-title" }, measure.unit ? `${measure.title}, ${measure.unit}` : measure.title),
    el(
      "span",
      { class: "legend-scale" },
      el("span", { class: "legend-bar", style: { background: `linear-gradient(to right, ${stops.join(",")})` } }),
      el("span", { class: "legend-ends" }, ...ends.map((x) => el("span", {}, formatted(x, 3)))),
    ),
    el("span", { class: "legend-clip" }, el("span", { class: "clipped" }, "underlined"), ": clipped at the last update"),
  );
}
