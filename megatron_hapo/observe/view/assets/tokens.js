// A response as coloured tokens, and the numbers of the token under the pointer or the cursor.
"use strict";

const TOKENS_AT_ONCE = 1500;

// Typed arrays of one sample, decoded once.
function decoded(sample) {
  if (sample.arrays) return sample.arrays;
  const arrays = { ids: hapo.integers(sample.ids), ends: hapo.integers(sample.ends) };
  for (const [name, text] of Object.entries(sample.values)) arrays[name] = hapo.floats(text);
  sample.arrays = arrays;
  return arrays;
}

function measureAt(arrays, name, i) {
  const value = (key) => (arrays[key] ? arrays[key][i] : NaN);
  switch (name) {
    case "entropy":
      return value("entropies");
    case "temperature":
      return value("temperatures");
    case "h":
      return value("h");
    case "advantage":
      return value("token_advantages");
    case "log_ratio":
      return Math.log(value("importance_ratios"));
    case "surprisal":
      return -value("rollout_log_probs");
    default:
      return value("rollout_log_probs") - value("rollout_temperature_log_probs");
  }
}

function clippedAt(arrays, i) {
  const ratio = arrays.importance_ratios?.[i];
  const advantage = arrays.token_advantages?.[i];
  if (ratio < 1 - arrays.clip_low?.[i] && advantage < 0) return "low";
  if (ratio > 1 + arrays.clip_high?.[i] && advantage > 0) return "high";
  return null;
}

function pieceOf(sample, i) {
  const { ends } = decoded(sample);
  return sample.response.slice(i > 0 ? ends[i - 1] : 0, ends[i]);
}

// Control characters by their numbers, since few fonts have symbols for them; marks that reorder text would let one token
// disguise its neighbours.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function visible(text) {
  return text.replace(UNSEEN, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// A token alone, in quotes, as it appears in tables and in the numbers.
function quoted(text) {
  return text === "" ? "part of a character" : `“${visible(text).replaceAll("\n", "↵").replaceAll("\t", "⇥")}”`;
}

// The element of a response. `colour(i)` gives a token's colour; tokens are appended as they come into view.
function tokenBox(sample, measure, scale, selected) {
  const arrays = decoded(sample);
  const text = el("div", { class: "tokens", dir: "auto" });
  const box = el("div", { class: "token-box", tabindex: 0, "aria-label": "Tokens; arrow keys move between them" }, text);
  let next = 0;
  const colourOf = (i) => (scale ? scale.colour(measureAt(arrays, measure, i)) : "transparent");
  const append = (until) => {
    const fragment = document.createDocumentFragment();
    for (; next < Math.min(until, arrays.ids.length); next++) fragment.append(tokenSpan(sample, arrays, next, colourOf));
    text.append(fragment);
    return next < arrays.ids.length;
  };
  append(Math.max(TOKENS_AT_ONCE, selected === null ? 0 : selected + 200));
  appendWhileVisible(box, text, () => append(next + TOKENS_AT_ONCE));
  watchTokens(box, text, sample, append);
  box.showToken = (i) => {
    append(i + 200);
    box.current = i;
    moveCursor(box, text, sample, i);
  };
  box.recolour = (newMeasure, newScale) => {
    measure = newMeasure;
    scale = newScale;
    for (const span of text.children) span.style.backgroundColor = colourOf(Number(span.dataset.i));
  };
  return box;
}

function tokenSpan(sample, arrays, i, colourOf) {
  const piece = sample.response.slice(i > 0 ? arrays.ends[i - 1] : 0, arrays.ends[i]);
  const span = document.createElement("span");
  span.dataset.i = i;
  span.style.backgroundColor = colourOf(i);
  if (piece === "") {
    span.className = "part";
    span.textContent = "·";
  } else {
    span.textContent = visible(piece);
    if (piece.includes("\n")) span.className = "newline";
  }
  if (clippedAt(arrays, i)) span.classList.add("clipped");
  return span;
}

function watchTokens(box, text, sample, append) {
  box.current = -1; // the token of the cursor
  box.addEventListener("mouseover", (event) => {
    const i = event.target.dataset?.i;
    if (i === undefined) return;
    showTip(numbersOf(sample, Number(i)), event.clientX, event.clientY);
  });
  box.addEventListener("mouseout", hideTip);
  box.addEventListener("blur", hideTip);
  box.addEventListener("click", (event) => {
    if (event.target.dataset?.i !== undefined) box.current = Number(event.target.dataset.i);
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    box.current = Math.max(0, Math.min(decoded(sample).ids.length - 1, box.current + step));
    append(box.current + 200);
    moveCursor(box, text, sample, box.current);
  });
}

function moveCursor(box, text, sample, i) {
  text.querySelector(".cursor")?.classList.remove("cursor");
  const span = text.children[i];
  if (!span) return;
  span.classList.add("cursor");
  box.scrollTop += span.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
  const place = span.getBoundingClientRect();
  showTip(numbersOf(sample, i), place.left, place.bottom);
}

// Rows of the table of one token: [name, value].
function numbersOf(sample, i) {
  const arrays = decoded(sample);
  const value = (name) => formatted(arrays[name]?.[i] ?? NaN);
  const low = arrays.clip_low?.[i];
  const high = arrays.clip_high?.[i];
  const range = low === undefined ? "-" : `${formatted(1 - low, 5)} to ${formatted(1 + high, 5)}`;
  const side = clippedAt(arrays, i);
  return [
    ["token", quoted(pieceOf(sample, i))],
    ["id, position", `${arrays.ids[i]}, ${i + 1} of ${arrays.ids.length}`],
    ["entropy, nats", value("entropies"), "entropies"],
    ["temperature T_t", value("temperatures"), "temperatures"],
    ["h", value("h"), "h"],
    ["advantage of the response", formatted(sample.advantage ?? NaN)],
    ["advantage of the token", value("token_advantages"), "token_advantages"],
    ["importance ratio", value("importance_ratios"), "importance_ratios"],
    ["clip range", side ? `${range}, clipped (${side})` : range],
    ["log-prob, engine at T_t", value("rollout_log_probs"), "rollout_log_probs"],
    ["log-prob, trainer at T_t", value("rollout_temperature_log_probs"), "rollout_temperature_log_probs"],
    ["mismatch, engine - trainer", formatted(measureAt(arrays, "mismatch", i))],
    ["log-prob, trainer at T", value("old_log_probs"), "old_log_probs"],
    ["version of the weights", value("policy_versions"), "policy_versions"],
  ];
}
