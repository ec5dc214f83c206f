// The page of the report: training dynamics of every line, seconds of the stages, and links to recorded responses.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

const CURVES = [
  ["Accuracy, evaluation", "eval/accuracy", { max: 1, zero: true, markers: true }],
  ["Accuracy, training", "reward/accuracy", { max: 1, zero: true }],
  ["Reward, training, mean", "reward/mean", {}],
  ["Entropy, nats, mean", "entropy/mean", { zero: true }],
  ["Sampling temperature, mean within min to max", "temperature/mean", {}],
  ["Response length, tokens, mean", "response_length/mean", {}],
  ["Truncated responses, %", "response_length/truncated", { zero: true, factor: 100 }],
  ["Clipped at the lower bound, % of tokens", "loss/clip_fraction_low", { zero: true, factor: 100 }],
  ["Clipped at the upper bound, % of tokens", "loss/clip_fraction_high", { zero: true, factor: 100 }],
  ["Mismatch, |log-prob engine - trainer|, nats", "rollout/logprob_abs_diff", { logY: true }],
  ["Gradient norm", "grad_norm", { zero: true }],
  ["Seconds per step", "time/step", { zero: true }],
];

function pointsOf(line, metric, factor = 1) {
  if (metric !== "temperature/mean") return (line.metrics[metric] ?? []).map(([x, ...ys]) => [x, ...ys.map((y) => y * factor)]);
  const at = (name, column) => new Map((line.metrics[name] ?? []).map((p) => [p[0], p[column] ?? p[1]]));
  const [low, high] = [at("temperature/min", 2), at("temperature/max", 3)];
  return (line.metrics[metric] ?? []).map(([x, y]) => (low.has(x) && high.has(x) ? [x, y, low.get(x), high.get(x)] : [x, y]));
}

function curve([title, metric, options]) {
  const series = data.lines.map((line, i) => ({
    name: line.name, points: pointsOf(line, metric, options.factor), colour: SERIES[i % SERIES.length], style: i % DASHES.length,
  }));
  const chart = lineChart(series, { ...options, title, onpoint: data.views.length ? offerResponses : undefined });
  return panel(title, chart);
}

// The mean seconds of each stage; "other" is the remainder of the step.
function stageTable() {
  const mean = (line, name) => {
    const values = (line.metrics[`time/${name}`] ?? []).map((p) => p[1]);
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN;
  };
  const rows = data.lines.map((line) => {
    const stages = data.stages.map((stage) => mean(line, stage));
    const step = mean(line, "step");
    const known = stages.filter((x) => !Number.isNaN(x)).reduce((a, b) => a + b, 0);
    const cells = [...stages, Math.max(0, step - known), step].map((x) => el("td", { class: "number" }, formatted(x, 3)));
    return el("tr", {}, el("th", {}, line.name), ...cells);
  });
  const head = ["run", ...data.stages.map((stage) => stage.replaceAll("_", " ")), "other", "step"];
  return el(
    "table",
    { class: "data" },
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", {}, text)))),
    el("tbody", {}, ...rows),
  );
}

// Stacked seconds over the steps of a single run, as at most 60 bars.
function stageBars(line) {
  const steps = (line.metrics["time/step"] ?? []).map((p) => p[0]);
  if (!steps.length) return el("p", { class: "note" }, "not recorded");
  const size = Math.ceil(steps.length / 60);
  const starts = steps.filter((_, i) => i % size === 0);
  const binned = (name) => {
    const values = new Map((line.metrics[`time/${name}`] ?? []).map((p) => [p[0], p[1]]));
    return starts.map((_, k) => {
      const some = steps.slice(k * size, (k + 1) * size).map((step) => values.get(step) ?? 0);
      return some.reduce((a, b) => a + b, 0) / some.length;
    });
  };
  const series = data.stages.map((stage, i) => ({ name: stage.replaceAll("_", " "), values: binned(stage), colour: SERIES[i] }));
  const total = binned("step");
  const rest = total.map((seconds, k) => Math.max(0, seconds - series.reduce((sum, s) => sum + s.values[k], 0)));
  series.push({ name: "other", values: rest, colour: SERIES[7] });
  return barChart(starts, series, { title: "Seconds per step" });
}

// Links to the recorded responses of the step nearest to a point.
function offerResponses(step) {
  const links = data.views.map((view) => {
    const distance = (file) => Math.abs(Number(file.split("_")[1]) - step);
    const file = view.files.reduce((best, f) => (distance(f) < distance(best) ? f : best));
    return el("a", { href: `${view.address}#/0/${file}`, target: "_blank" }, `${view.name}, step ${Number(file.split("_")[1])}`);
  });
  const box = document.getElementById("links");
  box.replaceChildren("Responses: ", ...links.flatMap((link, i) => (i ? [" · ", link] : [link])));
  box.hidden = false;
}

function bandNote() {
  const joined = data.lines.some((line) => line.name.endsWith(" seeds"));
  const notes = [
    joined ? "Lines of several seeds are means; the band reaches from the lowest to the highest seed." : "",
    data.views.length ? "A click on a point offers the responses of the nearest recorded step." : "",
    data.without_pages.length
      ? `Responses are recorded; a click on a point leads to them after: megatron-hapo view ${data.without_pages[0]}`
      : "",
    data.live ? "The runs are watched: this page loads itself again." : "",
  ].filter(Boolean);
  return el("p", { class: "note" }, notes.join(" "));
}

function drawReport() {
  const heading = data.lines.length === 1 ? data.lines[0].name : `${data.lines.length} experiments`;
  // The seconds of a single run are stacked bars of its stages.
  const panels = data.lines.length > 1 ? CURVES.map(curve) : CURVES.slice(0, -1).map(curve);
  if (data.lines.length === 1) panels.push(panel("Seconds per step", stageBars(data.lines[0])));
  document.getElementById("main").replaceChildren(
    el("h1", {}, heading),
    bandNote(),
    el("p", { id: "links", class: "bar links", hidden: true, role: "status" }),
    el("div", { class: "panels" }, ...panels),
    el("h2", {}, "Seconds of each stage, mean over the steps"),
    stageTable(),
  );
  document.documentElement.dataset.state = "ready";
}

drawReport();
if (data.live) {
  // Not while somebody reads the numbers of a point.
  setInterval(() => document.querySelector(".plot:hover") ?? location.reload(), 10000);
}
