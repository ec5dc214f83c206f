// Data files, loaded as scripts (a page opened from disk may not fetch), and small helpers to build elements.
// Text that a model wrote reaches the page through textContent only, so it is never parsed as HTML.
"use strict";

const hapo = { waiting: new Map(), cache: new Map() };

hapo.receive = (name, data) => {
  hapo.waiting.get(name)?.(data);
  hapo.waiting.delete(name);
};

// Groups are large: only the last few stay in memory.
const KEPT_FILES = 24;

hapo.load = (name) => {
  if (hapo.cache.has(name)) return hapo.cache.get(name);
  const promise = new Promise((resolve, reject) => {
    hapo.waiting.set(name, resolve);
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => script.remove();
    script.onerror = () => {
      script.remove();
      hapo.cache.delete(name);
      reject(new Error(`data/${name}.js cannot be read`));
    };
    document.head.append(script);
  });
  hapo.cache.set(name, promise);
  const large = [...hapo.cache.keys()].filter((key) => /\/(group|text)_/.test(key));
  for (const key of large.slice(0, -KEPT_FILES)) hapo.cache.delete(key);
  return promise;
};

// The plotting library is large: it is read when the first plot is drawn.
hapo.plotly = () => {
  hapo.library ??= new Promise((resolve, reject) => {
    if (window.Plotly) return resolve();
    const script = el("script", { src: "plotly.min.js", onload: resolve });
    script.onerror = () => reject(new Error("plotly.min.js cannot be read"));
    document.head.append(script);
  });
  return hapo.library;
};

hapo.bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
hapo.floats = (text) => new Float32Array(hapo.bytes(text));
hapo.integers = (text) => new Int32Array(hapo.bytes(text));

// An element: el("p", { class: "note", onclick: f }, "text", child, ...).
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function labelled(text, control) {
  return el("label", {}, el("span", {}, text), control);
}

function select(options, value, onchange, properties = {}) {
  const control = el("select", { ...properties, onchange: () => onchange(control.value) });
  for (const [key, text] of options) control.append(el("option", { value: key, selected: key === value }, text));
  return control;
}

// Appends items to a list while its end is near the visible part of `root` (the window if null).
function appendWhileVisible(root, list, more) {
  const end = el("div", { class: "end" });
  list.after(end);
  const observer = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      if (more()) {
        observer.unobserve(end); // observing again reports the end once more if it is still visible
        observer.observe(end);
      } else {
        observer.disconnect();
      }
    },
    { root, rootMargin: "800px" },
  );
  observer.observe(end);
}

// The table beside the pointer: rows of [name, value, key].
function showTip(rows, x, y) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(
    el("table", {}, ...rows.map(([name, value, key]) => el("tr", {}, el("th", {}, name), el("td", { "data-key": key }, value)))),
  );
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 20 + height > innerHeight ? Math.max(4, y - height - 14) : y + 20}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}
