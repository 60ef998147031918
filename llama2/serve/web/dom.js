// The few ways in which this page makes and changes elements. Text always goes in as text: nothing
// here, or anywhere else on the page, parses HTML, so neither a model nor an imported file can add
// markup or script.

/** An element with attributes (`onclick: f` listens) and children: nodes, strings, or nothing. */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

export function byId(id) {
  return document.getElementById(id);
}

/** One of the pictures that index.html defines. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button that is only a picture; `label` is its name for those who do not see it. */
export function iconButton(name, label, onclick, extra = {}) {
  const attributes = { type: "button", class: "quiet round", "aria-label": label, title: label };
  return h("button", { ...attributes, onclick, ...extra }, icon(name));
}

/** Says something to a screen reader. */
export function announce(text) {
  byId("status").textContent = text;
}

/**
 * A message at the foot of the page that goes away by itself, with at most one thing to do about
 * it.
 */
export function notice(text, action = null, seconds = 6) {
  const node = h("div", { class: "notice", role: "status" }, h("span", {}, text));
  const close = () => node.remove();
  const act = () => {
    close();
    action.run();
  };
  if (action) {
    node.append(h("button", { type: "button", class: "plain", onclick: act }, action.label));
  }
  node.append(iconButton("close", "Close this message", close));
  byId("notices").replaceChildren(node);
  setTimeout(close, seconds * 1000);
}

/** Puts text on the clipboard and shows on the button that it is there. */
export async function copy(text, button) {
  if (!await toClipboard(text)) {
    notice("The browser did not allow copying.");
    return;
  }
  const picture = button.querySelector("use");
  picture.setAttribute("href", "#icon-check");
  announce("Copied");
  setTimeout(() => picture.setAttribute("href", "#icon-copy"), 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // the clipboard is kept from pages that came over plain HTTP
  }
}

function copyBySelection(text) {
  const before = document.activeElement;
  const field = h("textarea", { class: "unseen", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  return done;
}

/** Gives a text field the height of its content. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

export function isField(node) {
  const fields = "input, textarea, select, [contenteditable]";
  return node instanceof Element && node.closest(fields) !== null;
}
