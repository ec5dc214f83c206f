// Charts as SVG: lines with bands, and bars. A table of the numbers follows the pointer and the arrow keys; every chart
// has a text for screen readers. Hue, line style and marker differ together, so that no series depends on colour alone.
"use strict";

const SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2", "8 2 2 2"];
const MARGIN = { left: 54, right: 12, top: 10, bottom: 34 };
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Round numbers that divide the range into about `count` parts; at least two.
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const multiples = (step) => {
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  };
  const steps = [10, 5, 2, 1].map((m) => m * power).filter((step) => step >= raw * 0.499);
  return steps.map(multiples).find((found) => found.length >= Math.min(4, count)) ?? multiples(steps.at(-1));
}

function tickText(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(0).replace("e+", "e");
  return String(Number(value.toPrecision(6)));
}

function axisRange(values, { zero = false, max = null } = {}) {
  let low = Math.min(...values, ...(zero ? [0] : []));
  let high = Math.max(...values, ...(zero ? [0] : []));
  if (max !== null) high = Math.max(high, max);
  if (low === high) [low, high] = [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
  const room = (high - low) * 0.04;
  return [zero && low >= 0 ? 0 : low - room, max !== null && high === max ? high : high + room];
}

function frame(width, height, xRange, yRange, options) {
  const plot = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
  const scaleY = options.logY ? Math.log10 : (v) => v;
  const [y0, y1] = yRange.map(scaleY);
  const x = (v) => plot.left + ((v - xRange[0]) / (xRange[1] - xRange[0])) * (plot.right - plot.left);
  const y = (v) => plot.bottom - ((scaleY(v) - y0) / (y1 - y0)) * (plot.bottom - plot.top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "chart", tabindex: 0 });
  root.append(svg("title", {}, options.title));
  const yTicks = options.logY ? decades(yRange) : ticks(yRange[0], yRange[1], 4);
  for (const value of yTicks) {
    root.append(svg("line", { class: "grid", x1: plot.left, x2: plot.right, y1: y(value), y2: y(value) }));
    root.append(svg("text", { class: "tick", x: plot.left - 6, y: y(value) + 4, "text-anchor": "end" }, tickText(value)));
  }
  for (const value of options.xTicks ?? ticks(xRange[0], xRange[1], 6)) {
    const text = (options.xTickText ?? options.xText ?? tickText)(value);
    root.append(svg("text", { class: "tick", x: x(value), y: plot.bottom + 15, "text-anchor": "middle" }, text));
  }
  root.append(svg("line", { class: "axis", x1: plot.left, x2: plot.right, y1: plot.bottom, y2: plot.bottom }));
  const middle = (plot.left + plot.right) / 2;
  root.append(svg("text", { class: "tick", x: middle, y: height - 4, "text-anchor": "middle" }, options.xTitle ?? "step"));
  return { root, plot, x, y };
}

function decades([low, high]) {
  const found = [];
  for (let p = Math.ceil(Math.log10(low) - 1e-9); p <= Math.log10(high) + 1e-9; p++) found.push(10 ** p);
  return found.length > 6 ? found.filter((_, i) => i % 2 === 0) : found;
}

// series: [{name, points: [[x, y, low, high]], style, colour}]; low and high give a band. options: title, zero, max, logY.
function lineChart(series, options) {
  const drawn = series.filter((s) => s.points.length > 0);
  if (!drawn.length) return el("p", { class: "note" }, "not recorded");
  const all = drawn.flatMap((s) => s.points);
  const values = all.flatMap((p) => p.slice(1).filter((v) => Number.isFinite(v) && (!options.logY || v > 0)));
  if (!values.length) return el("p", { class: "note" }, "zero throughout");
  const yRange = options.logY
    ? [10 ** Math.floor(Math.log10(Math.min(...values))), 10 ** (Math.floor(Math.log10(Math.max(...values))) + 1)]
    : axisRange(values, options);
  const xs = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  const xRange = xs.length > 1 ? [xs[0], xs.at(-1)] : [xs[0] - 1, xs[0] + 1];
  const chart = frame(options.width ?? 420, options.height ?? 240, xRange, yRange, options);
  for (const s of drawn) {
    const points = s.points.filter((p) => !options.logY || p[1] > 0);
    if (points.some((p) => p.length > 2)) chart.root.append(band(points, chart, s.colour));
    const path = points.map((p, i) => `${i ? "L" : "M"}${chart.x(p[0]).toFixed(1)} ${chart.y(p[1]).toFixed(1)}`).join("");
    chart.root.append(svg("path", { d: path, class: "line", stroke: s.colour, "stroke-dasharray": DASHES[s.style ?? 0] }));
    if (options.markers || points.length === 1) {
      for (const p of points) chart.root.append(svg("circle", { cx: chart.x(p[0]), cy: chart.y(p[1]), r: 2.6, fill: s.colour }));
    }
  }
  follow(chart, xs, drawn, options);
  return el("div", {}, chart.root, seriesLegend(drawn));
}

function band(points, chart, colour) {
  const banded = points.filter((p) => p.length > 2);
  const upper = banded.map((p) => `${chart.x(p[0]).toFixed(1)} ${chart.y(p[3]).toFixed(1)}`);
  const lower = banded.map((p) => `${chart.x(p[0]).toFixed(1)} ${chart.y(p[2]).toFixed(1)}`).reverse();
  return svg("path", { d: `M${[...upper, ...lower].join("L")}Z`, fill: colour, opacity: 0.18 });
}

function seriesLegend(series) {
  if (series.length < 2) return "";
  const item = (s) =>
    el(
      "span",
      { class: "key" },
      svg(
        "svg",
        { width: 26, height: 8, "aria-hidden": "true" },
        s.fill
          ? svg("rect", { width: 14, height: 8, x: 6, fill: s.colour })
          : svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: s.colour, "stroke-width": 2.5, "stroke-dasharray": DASHES[s.style ?? 0] }),
      ),
      s.name,
    );
  return el("div", { class: "keys" }, ...series.map(item));
}

// A vertical line and a table of the values at the x nearest to the pointer, or chosen with the arrow keys.
function follow(chart, xs, series, options) {
  const { root, plot } = chart;
  const mark = svg("line", { class: "mark", y1: plot.top, y2: plot.bottom, visibility: "hidden" });
  root.append(mark);
  let at = -1;
  const show = (i, clientX, clientY) => {
    at = i;
    const x = xs[i];
    for (const end of ["x1", "x2"]) mark.setAttribute(end, chart.x(x));
    mark.setAttribute("visibility", "visible");
    const rows = series.map((s) => {
      const point = s.points.find((p) => p[0] === x);
      const bounds = point?.length > 2 ? ` (${formatted(point[2], 4)} to ${formatted(point[3], 4)})` : "";
      return [s.name, point ? formatted(point[1], 5) + bounds : "-"];
    });
    showTip([[options.xTitle ?? "step", options.xText ? options.xText(x) : formatted(x)], ...rows], clientX, clientY);
  };
  const hide = () => {
    mark.setAttribute("visibility", "hidden");
    hideTip();
  };
  root.addEventListener("mousemove", (event) => {
    const bounds = root.getBoundingClientRect();
    const position = ((event.clientX - bounds.left) / bounds.width) * root.viewBox.baseVal.width;
    let best = 0;
    xs.forEach((x, i) => {
      if (Math.abs(chart.x(x) - position) < Math.abs(chart.x(xs[best]) - position)) best = i;
    });
    show(best, event.clientX, event.clientY);
  });
  root.addEventListener("mouseleave", hide);
  root.addEventListener("blur", hide);
  root.addEventListener("click", () => at >= 0 && options.onpoint?.(xs[at]));
  root.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && at >= 0) options.onpoint?.(xs[at]);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const bounds = root.getBoundingClientRect();
    show(Math.max(0, Math.min(xs.length - 1, at + step)), bounds.left + bounds.width / 2, bounds.top + bounds.height / 2);
  });
}

// Bars of equal width: labels for each, and one or more series of values that are stacked.
// options: title, xTitle, xText of the index, xTicks, rows(i) of the table under the pointer.
function barChart(series, options) {
  const count = series[0]?.values.length ?? 0;
  if (!count) return el("p", { class: "note" }, "not recorded");
  if (series.every((s) => s.values.every((value) => value === null))) return el("p", { class: "note" }, "not recorded");
  const totals = [...Array(count).keys()].map((i) => series.reduce((sum, s) => sum + (s.values[i] ?? 0), 0));
  const top = Math.max(...totals);
  if (!top) return el("p", { class: "note" }, "zero throughout");
  const chart = frame(options.width ?? 420, options.height ?? 240, [-0.5, count - 0.5], [0, top * 1.05], options);
  const width = Math.max(1, (chart.x(1) - chart.x(0)) * 0.86);
  const base = Array(count).fill(0);
  for (const s of series) {
    s.values.forEach((value, i) => {
      if (!value) return;
      const [y0, y1] = [chart.y(base[i]), chart.y(base[i] + value)];
      base[i] += value;
      chart.root.append(svg("rect", { x: chart.x(i) - width / 2, y: y1, width, height: y0 - y1, fill: s.colour }));
    });
  }
  const points = series.map((s) => ({ name: s.name, points: s.values.map((value, i) => [i, value ?? NaN]) }));
  follow(chart, [...Array(count).keys()], points, options);
  return el("div", {}, chart.root, seriesLegend(series.map((s) => ({ ...s, fill: true }))));
}

function panel(title, ...children) {
  return el("figure", { class: "panel" }, el("figcaption", {}, title), ...children);
}
