// The pages: all runs, a step, the tokens of a step, one prompt, and two prompts beside each other.
// Their addresses: #/, #/RUN/FILE, #/RUN/FILE/tokens, #/RUN/FILE/group/G[/SAMPLE[/TOKEN]], and .../with/RUN/FILE/G.
"use strict";

let measureShown = "entropy";
let newest = 0;

async function show() {
  const mine = ++newest;
  hideTip();
  document.documentElement.dataset.state = "loading";
  const parts = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeURIComponent);
  let content;
  try {
    const index = await hapo.load("index");
    content = await page(index, parts);
    if (mine !== newest) return;
    document.getElementById("path").replaceChildren(...trail(index, parts));
  } catch (error) {
    if (mine !== newest) return;
    content = [el("p", { class: "fault", role: "alert" }, error.message)];
  }
  document.getElementById("main").replaceChildren(...content);
  const box = document.querySelector("[data-token]");
  if (box) box.showToken(Number(box.dataset.token));
  document.documentElement.dataset.state = "ready";
}

function page(index, [run, file, kind, ...rest]) {
  if (run === undefined) return overview(index);
  const known = index.runs[run]?.files.find((f) => f.name === file);
  if (!known) throw new Error("There is no such page.");
  const prefix = `${run}/${file}`;
  if (kind === undefined) return stepPage(prefix);
  if (kind === "tokens") return tokenPage(prefix);
  const split = rest.indexOf("with");
  if (split >= 0) return comparison(index, [run, file, rest[0]], rest.slice(split + 1));
  return groupPage(index, run, file, rest);
}

function title(file) {
  return `${file.evaluation ? "evaluation, step" : "step"} ${file.step}`;
}

function trail(index, [run, file, kind, ...rest]) {
  const links = [el("a", { href: "#/" }, "Runs")];
  if (run !== undefined && index.runs[run]) {
    const known = index.runs[run].files.find((f) => f.name === file);
    if (known) links.push(el("a", { href: `#/${run}/${file}` }, `${index.runs[run].name}, ${title(known)}`));
  }
  if (kind === "tokens") links.push(el("span", {}, "tokens"));
  if (kind === "group") links.push(el("a", { href: `#/${run}/${file}/group/${rest[0]}` }, `group ${rest[0]}`));
  return links.flatMap((link, i) => (i ? [" › ", link] : [link]));
}

function overview(index) {
  return index.runs.map((run, number) =>
    el(
      "section",
      {},
      el("h1", {}, run.name),
      switches(run.files[0].job),
      stepTable(number, run.files),
    ),
  );
}

function stepTable(number, files) {
  const head = ["recorded", "responses", "groups", "reward, mean", "correct", "tokens, mean"];
  const row = (file) => {
    const values = [file.responses, file.groups, formatted(file.reward, 4), `${formatted(100 * file.correct, 3)} %`, formatted(file.tokens, 4)];
    const link = el("a", { href: `#/${number}/${file.name}` }, title(file));
    return el("tr", {}, el("td", {}, link), ...values.map((value) => el("td", { class: "number" }, `${value}`)));
  };
  return el(
    "table",
    { class: "data" },
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", {}, text)))),
    el("tbody", {}, ...files.map(row)),
  );
}

// The switches of the method, as far as the records name them.
function switches(job) {
  const rows = Object.entries(job).filter(([, value]) => value !== null);
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
  return el(
    "details",
    {},
    el("summary", {}, "Settings of the run"),
    el("table", {}, ...rows.map(([name, value]) => el("tr", {}, el("th", {}, name), el("td", {}, text(value))))),
  );
}

async function stepPage(prefix) {
  const summary = await hapo.load(`${prefix}/summary`);
  const tokens = summary.scales.entropy
    ? el("a", { href: `#/${prefix}/tokens` }, "Forking tokens and distributions")
    : "These responses were only sampled and scored: entropies, h and advantages are those of training.";
  return [el("p", {}, tokens), groupList(prefix, summary)];
}

async function groupPage(index, run, file, [group, sample, token]) {
  const prefix = `${run}/${file}`;
  // Beside the group; otherPlaces tells what goes wrong.
  for (const number of index.runs.keys()) hapo.load(`${number}/prompts`).catch(() => {});
  const [data, summary] = await Promise.all([hapo.load(`${prefix}/group_${group}`), hapo.load(`${prefix}/summary`)]);
  const chosen = sample === undefined ? data.samples : data.samples.filter((s) => String(s.sample) === sample);
  if (!chosen.length) throw new Error("There is no such response.");
  const column = { data, samples: chosen, scales: summary.scales };
  const all = `#/${prefix}/group/${group}`;
  const notes = [
    sample === undefined ? null : el("a", { href: all }, `all ${data.samples.length} samples beside each other`),
    await otherPlaces(index, run, file, group, data),
  ];
  const [controls, body] = coloured([column], token === undefined ? null : Number(token), (s) => `${all}/${s.sample}`);
  return [promptBox(data), el("div", { class: "filters" }, ...controls, ...notes.filter(Boolean)), body];
}

// A control that opens this prompt at another step or in another run, beside this one.
async function otherPlaces(index, run, file, group, data) {
  const places = [];
  for (const [number, other] of index.runs.entries()) {
    const found = (await hapo.load(`${number}/prompts`))[`${data.data_source} ${data.uid}`] ?? [];
    for (const [name, g] of found) {
      if (String(number) === run && name === file && String(g) === group) continue;
      const known = other.files.find((f) => f.name === name);
      places.push([`${number}/${name}/${g}`, `${other.name}, ${title(known)}`]);
    }
  }
  if (!places.length) return null;
  const open = (value) => value && (location.hash = `#/${run}/${file}/group/${group}/with/${value}`);
  return labelled("Compare with", select([["", "the same prompt in …"], ...places], "", open, { "data-control": "compare" }));
}

async function comparison(index, left, right) {
  const sides = await Promise.all(
    [left, right].map(async ([run, file, group]) => {
      const known = index.runs[run]?.files.find((f) => f.name === file);
      if (!known) throw new Error("There is no such page.");
      const prefix = `${run}/${file}`;
      const [data, summary] = await Promise.all([hapo.load(`${prefix}/group_${group}`), hapo.load(`${prefix}/summary`)]);
      const heading = `${index.runs[run].name}, ${title(known)}`;
      return { data, samples: data.samples, scales: summary.scales, heading };
    }),
  );
  const [controls, body] = coloured(sides, null, () => null);
  body.classList.add("two");
  return [promptBox(sides[0].data), el("div", { class: "filters" }, ...controls), body];
}

function promptBox(data) {
  return el(
    "section",
    { class: "prompt" },
    el("p", { class: "note" }, `${data.data_source}, ${data.uid}. Expected answer: `, el("b", { dir: "auto" }, visible(data.ground_truth))),
    el("pre", { class: "prompt-text", dir: "auto" }, visible(data.prompt)),
  );
}

// The control of the colour with its legend, and the responses of one or two columns of samples.
function coloured(columns, token, linkOf) {
  const boxes = [];
  const key = el("div");
  const scale = (name) => scaleOf(name, widest(columns.map((c) => c.scales[name])));
  let shown = scale(measureShown) ? measureShown : "surprisal"; // which evaluations have, too
  const recolour = (name) => {
    measureShown = shown = name;
    for (const box of boxes) box.recolour(name, scale(name));
    key.replaceChildren(legend(name, scale(name)));
  };
  const body = el("div", { class: "columns" });
  for (const column of columns) {
    const holder = el("div", { class: "samples" });
    for (const sample of column.samples) {
      const box = tokenBox(sample, shown, scale(shown), token);
      if (token !== null) box.dataset.token = token;
      boxes.push(box);
      holder.append(el("article", { class: "sample", "data-sample": sample.sample }, sampleHead(sample, linkOf(sample)), box));
    }
    body.append(el("section", {}, column.heading ? el("h2", {}, column.heading) : "", holder));
  }
  key.append(legend(shown, scale(shown)));
  const options = Object.entries(MEASURES).map(([name, measure]) => [name, measure.title]);
  return [[labelled("Colour by", select(options, shown, recolour, { "data-control": "measure" })), key], body];
}

// One scale for both columns: the lowest and the highest of their percentiles.
function widest(ranges) {
  const known = ranges.filter(Boolean);
  return known.length ? [Math.min(...known.map((r) => r[0])), Math.max(...known.map((r) => r[1]))] : null;
}

function sampleHead(sample, link) {
  const parts = Object.entries(sample.parts).map(([name, value]) => `${name} ${formatted(value, 4)}`);
  const ends = { stop: "finished", length: "truncated", abort: "aborted" };
  const name = `Sample ${sample.sample}`;
  const right = { 1: "correct", 0: "wrong" }[sample.correctness] ?? `correctness ${formatted(sample.correctness, 4)}`;
  return el(
    "header",
    {},
    el("h3", {}, link ? el("a", { href: link }, name) : name),
    el(
      "p",
      { class: "note" },
      `reward ${formatted(sample.reward, 4)}${parts.length ? ` (${parts.join(", ")})` : ""}, `,
      `${right}, ${sample.advantage === null ? "" : `advantage ${formatted(sample.advantage, 4)}, `}`,
      `${decoded(sample).ids.length} tokens, `,
      `${ends[sample.finish_reason] ?? sample.finish_reason}${sample.failure ? `, could not be scored: ${sample.failure}` : ""}`,
    ),
  );
}

async function tokenPage(prefix) {
  const data = await hapo.load(`${prefix}/tokens`);
  return [
    el("h1", {}, `${data.num_tokens} tokens`),
    el("div", { class: "panels" }, ...distributions(data)),
    el("h2", {}, "Forking tokens"),
    el("p", { class: "note" }, "Tokens with the highest mean entropy at the places where they were sampled, and what follows them."),
    forkingTable(prefix, data.forking),
  ];
}

function distributions(data) {
  const histogram = (name, bins, text, xTitle, logarithmic = false) => {
    if (!bins) return panel(name, el("p", { class: "note" }, "not recorded"));
    const [first, last] = [bins.edges[0], bins.edges.at(-1)];
    const width = (last - first) / bins.shares.length;
    const x = bins.shares.map((_, i) => first + (i + 0.5) * width);
    const series = [{ name: "% of tokens", values: bins.shares.map((s) => 100 * s), colour: SERIES[0] }];
    const decades = [...Array(Math.floor(last) - Math.ceil(first) + 1).keys()].map((i) => Math.ceil(first) + i);
    const ticks = logarithmic ? { xTicks: decades, xTickText: text } : {};
    return panel(name, barChart(x, series, { title: name, xTitle, xText: text, ...ticks }));
  };
  const parts = data.quantiles;
  const tenths = parts.map((_, i) => i + 1);
  const options = { xTitle: "tenth of the tokens by entropy, lowest to highest", xTicks: tenths };
  const percent = (name) => parts.map((p) => (p[name] === null ? null : 100 * p[name]));
  const line = (name) => parts.map((p, i) => [i + 1, p[name]]).filter((p) => p[1] !== null);
  return [
    histogram("Entropy, % of tokens", data.entropy, (x) => formatted(10 ** x, 2), "nats, logarithmic", true),
    histogram("h, % of tokens", data.h, (x) => formatted(x, 2), "h"),
    panel(
      "Clipped tokens, %",
      barChart(
        tenths,
        [
          { name: "at the lower bound", values: percent("low"), colour: SERIES[0] },
          { name: "at the upper bound", values: percent("high"), colour: SERIES[1] },
        ],
        { ...options, title: "Clipped tokens by entropy" },
      ),
    ),
    panel(
      "Sum of |advantage|, %",
      barChart(
        tenths,
        [
          { name: "positive advantages", values: percent("up"), colour: SERIES[0] },
          { name: "negative advantages", values: percent("down"), colour: SERIES[1] },
        ],
        { ...options, title: "Sum of absolute advantages by entropy" },
      ),
    ),
    panel(
      "Temperature, mean",
      lineChart([{ name: "T_t", points: line("temperature"), colour: SERIES[0] }], { ...options, markers: true, title: "Mean temperature by entropy" }),
    ),
  ];
}

function forkingTable(prefix, tokens) {
  const follower = (f) => el("span", { class: "follower" }, el("code", {}, quoted(f.text)), ` ${f.count}`);
  const example = ([group, sample, position], i) => el("a", { href: `#/${prefix}/group/${group}/${sample}/${position}` }, `${i + 1}`);
  const head = ["token", "id", "count", "mean entropy, nats", "mean T_t", "mean h", "followed by (times)", "examples"];
  return el(
    "table",
    { class: "data" },
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", {}, text)))),
    el(
      "tbody",
      {},
      ...tokens.map((token) =>
        el(
          "tr",
          {},
          el("td", {}, el("code", {}, quoted(token.text))),
          ...[token.id, token.count, formatted(token.entropy, 4), formatted(token.temperature, 4), formatted(token.h, 4)].map((x) =>
            el("td", { class: "number" }, `${x}`),
          ),
          el("td", {}, ...token.followers.map(follower)),
          el("td", {}, ...token.examples.flatMap((e, i) => [example(e, i), " "])),
        ),
      ),
    ),
  );
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
addEventListener("hashchange", show);
show();
