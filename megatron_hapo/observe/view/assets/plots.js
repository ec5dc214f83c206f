// Plots of lines with bands and of stacked bars, drawn by Plotly: zoom, pan, series to hide, and download as a picture.
// Hue, line style and marker differ together, so that no series depends on colour alone.
"use strict";

const SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"];
const DASHES = ["solid", "7px,3px", "2px,3px", "9px,3px,2px,3px", "12px,4px", "4px,2px", "1px,2px", "8px,2px,2px,2px"];
const MARKERS = ["circle", "square", "diamond", "cross", "x", "triangle-up", "star", "hexagon"];
const CONFIG = {
  displaylogo: false, responsive: true, displayModeBar: "hover",
  modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]], // the others need a network, or select
};

const drawn = new Set();

// Plotly reads tags and entities in texts; names are shown as they are.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

function colourOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// What depends on light or dark, as paths into the layout.
function themed() {
  const found = { "font.color": colourOf("--soft"), "hoverlabel.bgcolor": colourOf("--page") };
  found["hoverlabel.font.color"] = colourOf("--text");
  Object.assign(found, { "modebar.color": colourOf("--soft"), "modebar.activecolor": colourOf("--strong") });
  for (const axis of ["xaxis", "yaxis"]) found[`${axis}.gridcolor`] = found[`${axis}.zerolinecolor`] = colourOf("--line");
  return found;
}

function follow() {
  for (const plot of drawn) {
    if (plot.isConnected) Plotly.relayout(plot, themed());
    else drawn.delete(plot);
  }
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", follow);
new MutationObserver(follow).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });

// An element that draws itself once it is on the page and has a width.
function plot(traces, layout, options) {
  const box = el("div", { class: "plot", role: "img", "aria-label": options.title, style: { height: "270px" } });
  const whole = {
    margin: { l: 58, r: 12, t: 28, b: 40 }, hovermode: "x unified", hoverdistance: -1, showlegend: traces.some((t) => t.showlegend),
    legend: { orientation: "h", x: 0, y: -0.2, yanchor: "top" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { size: 11 }, hoverlabel: { font: {} },
    modebar: { bgcolor: "rgba(0,0,0,0)" },
    ...layout,
  };
  new ResizeObserver(async (_, observer) => {
    if (!box.clientWidth) return;
    observer.disconnect();
    await hapo.plotly();
    await Plotly.newPlot(box, traces, whole, CONFIG);
    await Plotly.relayout(box, themed());
    drawn.add(box);
    box.on("plotly_click", (event) => options.onpoint?.(event.points[0].x));
    box.dataset.state = "drawn";
  }).observe(box);
  return box;
}

// One line of the table under the pointer.
function hover(name, texts) {
  return { name: plain(name), customdata: texts, hovertemplate: "%{customdata}" };
}

// series: [{name, points: [[x, y, low, high]], style, colour}]; low and high give a band.
// options: title, xTitle, zero, max, logY, markers, onpoint.
function lineChart(series, options) {
  const some = series.filter((s) => s.points.length > 0);
  if (!some.length) return el("p", { class: "note" }, "not recorded");
  const visible = (y) => Number.isFinite(y) && (!options.logY || y > 0);
  if (!some.some((s) => s.points.some((p) => visible(p[1])))) return el("p", { class: "note" }, "zero throughout");
  const traces = some.flatMap((s) => {
    const points = s.points.filter((p) => visible(p[1]));
    const x = points.map((p) => p[0]);
    const bounds = (p) => (p.length > 2 ? ` (${formatted(p[2], 4)} to ${formatted(p[3], 4)})` : "");
    const line = {
      x, y: points.map((p) => p[1]), type: "scatter", mode: options.markers || x.length === 1 ? "lines+markers" : "lines",
      line: { color: s.colour, width: 2, dash: DASHES[s.style ?? 0] }, marker: { symbol: MARKERS[s.style ?? 0], size: 6 },
      showlegend: some.length > 1, legendgroup: s.name,
      ...hover(s.name, points.map((p) => formatted(p[1], 5) + bounds(p))),
    };
    return [...band(points.filter((p) => p.length > 2), s), line];
  });
  const y = { automargin: true, exponentformat: "power", ...(options.zero && !options.logY ? { rangemode: "tozero" } : {}) };
  if (options.logY) y.type = "log";
  if (options.max && options.zero) y.range = [0, options.max * 1.03];
  return plot(traces, { xaxis: axis(options), yaxis: y }, options);
}

function band(points, series) {
  const edge = (column, fill) => ({
    x: points.map((p) => p[0]), y: points.map((p) => p[column]), type: "scatter", mode: "lines", line: { width: 0 },
    fill, fillcolor: `${series.colour}2e`, hoverinfo: "skip", showlegend: false, legendgroup: series.name,
  });
  return points.length ? [edge(2, "none"), edge(3, "tonexty")] : [];
}

function axis({ xTitle = "step", xTicks, xTickText }) {
  const ticks = xTicks && { tickvals: xTicks, ticktext: xTicks.map(xTickText ?? String) };
  return { title: { text: xTitle, standoff: 4 }, automargin: true, ...ticks };
}

// Bars over x, one or more series of values that are stacked: series: [{name, values, colour}].
// options: title, xTitle, xText (x in the text under the pointer, where it is not itself), xTicks, xTickText.
function barChart(x, series, options) {
  if (!x.length || series.every((s) => s.values.every((value) => value === null))) {
    return el("p", { class: "note" }, "not recorded");
  }
  if (series.every((s) => s.values.every((value) => !value))) return el("p", { class: "note" }, "zero throughout");
  const traces = series.map((s) => ({
    x, y: s.values, type: "bar", marker: { color: s.colour }, showlegend: series.length > 1,
    ...hover(s.name, s.values.map((value, i) => `${options.xText ? `${options.xText(x[i])}: ` : ""}${formatted(value, 4)}`)),
  }));
  const hovermode = options.xText ? "x" : "x unified";
  return plot(traces, { barmode: "stack", bargap: 0.14, hovermode, xaxis: axis(options), yaxis: { automargin: true } }, options);
}

function panel(title, ...children) {
  return el("figure", { class: "panel" }, el("figcaption", {}, title), ...children);
}
