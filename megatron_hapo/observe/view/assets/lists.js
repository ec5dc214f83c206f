// The page of a step: its groups with filters, search and order. Only groups near the visible part are elements.
"use strict";

const GROUPS_AT_ONCE = 40;

const ORDERS = {
  group: ["order in the step", null],
  low: ["lowest mean reward", (rows) => mean(rows.map((r) => r.reward))],
  high: ["highest mean reward", (rows) => -mean(rows.map((r) => r.reward))],
  spread: ["widest spread of rewards", (rows) => -spread(rows.map((r) => r.reward))],
  entropy: ["highest mean entropy", (rows) => -mean(rows.map((r) => r.entropy))],
  length: ["longest", (rows) => -mean(rows.map((r) => r.length))],
  mismatch: ["largest mean mismatch", (rows) => -Math.abs(mean(rows.map((r) => r.mismatch)))],
};

function mean(values) {
  const known = values.filter((x) => x !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : 0;
}

function spread(values) {
  const known = values.filter((x) => x !== null);
  return known.length ? Math.max(...known) - Math.min(...known) : 0;
}

// Groups of a summary as objects: [{number, uid, source, prompt, rows: [{sample, reward, ...}]}].
function groupsOf(summary) {
  const { rows, groups } = summary;
  const names = Object.keys(rows);
  return groups.first.map((first, g) => {
    const last = g + 1 < groups.first.length ? groups.first[g + 1] : rows.group.length;
    const responses = [];
    for (let i = first; i < last; i++) {
      const response = { index: i };
      for (const name of names) response[name] = rows[name][i];
      responses.push(response);
    }
    return {
      number: rows.group[first], uid: groups.uid[g], source: rows.data_source[first], prompt: groups.prompt[g],
      rows: responses,
    };
  });
}

function matches(row, group, filters, found) {
  const within = (value, low, high) => (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
  if (filters.source !== "" && group.source !== filters.source) return false;
  if (!within(row.reward ?? NaN, filters.rewardLow, filters.rewardHigh)) return false;
  if (!within(row.length, filters.lengthLow, filters.lengthHigh)) return false;
  if (filters.finish === "truncated" && row.finish_reason !== "length") return false;
  if (filters.finish === "finished" && row.finish_reason !== "stop") return false;
  if (filters.finish === "failed" && row.failure === null) return false;
  return found === null || found.has(row.index) || group.prompt.toLowerCase().includes(filters.text.toLowerCase());
}

// Indices of the responses that contain the text; null without a text. Loads the responses file by file.
async function searched(prefix, summary, text) {
  if (text === "") return null;
  const found = new Set();
  const wanted = text.toLowerCase();
  for (let i = 0; i < summary.num_texts; i++) {
    const chunk = await hapo.load(`${prefix}/text_${i}`);
    chunk.responses.forEach((response, k) => {
      if (response.toLowerCase().includes(wanted)) found.add(chunk.first + k);
    });
  }
  return found;
}

function groupList(prefix, summary) {
  const groups = groupsOf(summary);
  const filters = { source: "", rewardLow: "", rewardHigh: "", lengthLow: "", lengthHigh: "", finish: "", text: "" };
  let order = "group";
  const count = el("p", { class: "count", role: "status" });
  const holder = el("div");
  let run = 0;
  const update = async () => {
    const mine = ++run;
    const found = await searched(prefix, summary, filters.text);
    if (mine !== run) return; // a later change has taken over
    const shown = groups
      .map((group) => ({ group, rows: group.rows.filter((row) => matches(row, group, filters, found)) }))
      .filter((item) => item.rows.length > 0);
    const key = ORDERS[order][1];
    if (key) shown.sort((a, b) => key(a.rows) - key(b.rows));
    const responses = shown.reduce((sum, item) => sum + item.rows.length, 0);
    count.textContent = `${responses} of ${summary.rows.group.length} responses, in ${shown.length} of ${groups.length} groups`;
    fill(holder, prefix, shown);
  };
  const set = (name) => (value) => {
    filters[name] = value;
    update();
  };
  const controls = filterControls(summary, set, (value) => {
    order = value;
    update();
  });
  update();
  return el("section", {}, controls, count, holder);
}

function filterControls(summary, set, setOrder) {
  const number = (name, label) => {
    const input = el("input", { type: "number", step: "any", "data-filter": name, "aria-label": label });
    input.addEventListener("input", () => set(name)(input.value));
    return input;
  };
  const search = el("input", { type: "search", placeholder: "in prompts and responses", "data-filter": "text" });
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => set("text")(search.value), 150);
  });
  const sources = [...new Set(summary.rows.data_source)].sort();
  const finishes = [["", "any"], ["finished", "finished"], ["truncated", "truncated"], ["failed", "could not be scored"]];
  const orders = Object.entries(ORDERS).map(([key, [title]]) => [key, title]);
  return el(
    "form",
    { class: "filters", onsubmit: (event) => event.preventDefault() },
    labelled("Search", search),
    labelled("Data source", select([["", "all"], ...sources.map((s) => [s, s])], "", set("source"), { "data-filter": "source" })),
    labelled("Reward", el("span", { class: "range" }, number("rewardLow", "lowest reward"), " to ", number("rewardHigh", "highest reward"))),
    labelled("Tokens", el("span", { class: "range" }, number("lengthLow", "fewest tokens"), " to ", number("lengthHigh", "most tokens"))),
    labelled("End", select(finishes, "", set("finish"), { "data-filter": "finish" })),
    labelled("Order", select(orders, "group", setOrder)),
  );
}

function fill(holder, prefix, shown) {
  const list = el("div", { class: "groups" });
  holder.replaceChildren(list);
  let next = 0;
  const more = () => {
    for (const item of shown.slice(next, next + GROUPS_AT_ONCE)) list.append(groupCard(prefix, item));
    next += GROUPS_AT_ONCE;
    return next < shown.length;
  };
  more();
  appendWhileVisible(null, list, more);
}

function groupCard(prefix, { group, rows }) {
  const link = `#/${prefix}/group/${group.number}`;
  return el(
    "article",
    { class: "card", "data-group": group.number },
    el("h3", {}, el("a", { href: link }, `Group ${group.number}`), el("small", {}, ` ${group.source}, ${group.uid}`)),
    el("p", { class: "preview", dir: "auto" }, visible(group.prompt)),
    el("div", { class: "chips" }, ...rows.map((row) => chip(link, row))),
  );
}

// A response as one link: reward, length, and marks for a cut or failed response.
function chip(link, row) {
  const marks = [row.finish_reason === "length" ? "truncated" : "", row.failure ?? ""].filter(Boolean);
  const right = row.correctness >= 1;
  const state = row.correctness > 0 && !right ? "partly" : right ? "right" : "wrong";
  return el(
    "a",
    { class: `chip ${state}`, href: `${link}/${row.sample}`, title: visible(row.preview) },
    el("b", {}, `${right ? "✓" : state === "partly" ? "~" : "✗"} ${formatted(row.reward, 3)}`),
    ` ${row.length} tokens${marks.length ? `, ${marks.join(", ")}` : ""}`,
  );
}
