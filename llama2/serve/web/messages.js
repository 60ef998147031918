// The conversation as it is seen: questions, answers, and below each what can be done with it. An element belongs to
// its message as long as nothing but the text of an answer changes, so a growing answer costs what has grown.
import { cost } from "./answer.js";
import { copy, fit, h, iconButton } from "./dom.js";
import { errorCard } from "./error_card.js";
import { show as showMarkdown } from "./markdown.js";

const articles = new WeakMap(); // message -> its element
const places = new WeakMap(); // version -> where its text and its cost are shown

/**
 * Shows all messages in `container`. `actions` are what buttons do: edit(message, text), again(message),
 * turn(message, index) to another version, pick(message, version), retry(message, version).
 */
export function showMessages(container, messages, actions) {
  container.replaceChildren(...messages.map((message) => {
    if (!articles.has(message)) articles.set(message, article(message, actions));
    return articles.get(message);
  }));
}

/** Makes one message's element anew, and leaves the focus on the button that had it. */
export function renew(message, actions) {
  const old = articles.get(message);
  const made = article(message, actions);
  articles.set(message, made);
  if (!old?.isConnected) return;
  const action = old.contains(document.activeElement) ? document.activeElement.dataset.action : null;
  old.replaceWith(made);
  if (action) made.querySelector(`[data-action="${action}"]:not(:disabled)`)?.focus();
}

/** Shows what has been added to an answer. */
export function grow(version) {
  const place = places.get(version);
  if (!place) return;
  showMarkdown(place.text, version.content);
  place.text.classList.toggle("waiting", !version.content);
  place.cost.textContent = cost(version, place.brief);
  place.cost.title = cost(version);
}

function article(message, actions) {
  return message.role === "user" ? question(message, actions) : answer(message, actions);
}

// ---- questions ----

function question(message, actions) {
  const button = tool("copy", "Copy the message", () => copy(message.content, button));
  const node = h("article", { class: "turn user", "aria-label": "You" },
    h("div", { class: "bubble" }, message.content),
    h("div", { class: "tools" },
      button, tool("edit", "Edit and send again", () => node.replaceChildren(editor(message, node, actions)))));
  return node;
}

function editor(message, node, actions) {
  const field = h("textarea", { "aria-label": "Edit the message", rows: 1, oninput: () => fit(field) });
  const close = () => {
    renew(message, actions);
    articles.get(message).querySelector('[data-action="edit"]').focus();
  };
  const send = () => {
    if (field.value.trim()) actions.edit(message, field.value.trim());
  };
  field.value = message.content;
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  requestAnimationFrame(() => {
    fit(field);
    field.focus();
  });
  return h("div", { class: "editor" }, field,
    h("p", { class: "faint" }, "What follows this message is replaced."),
    h("div", { class: "buttons" },
      h("button", { type: "button", class: "plain", onclick: close }, "Cancel"),
      h("button", { type: "button", class: "filled", onclick: send }, "Send")));
}

// ---- answers ----

function answer(message, actions) {
  const open = message.shown === null;
  const versions = open ? message.versions.slice(-2) : [message.versions[message.shown]];
  return h("article", { class: open ? "turn answer pair" : "turn answer", "aria-label": "Answer" },
    ...versions.map((version, index) => column(message, version, open ? index : null, actions)));
}

function column(message, version, side, actions) {
  const text = h("div", { class: "text" });
  const price = h("span", { class: "cost" });
  places.set(version, { text, cost: price, brief: side !== null });
  const node = h("section", { class: "column", "aria-busy": version.finish === null ? "true" : null },
    h("p", { class: "model" }, side === null ? null : h("b", {}, "AB"[side]), version.model || "assistant"),
    text,
    version.finish && !version.error && !version.content ? h("p", { class: "faint" }, "The answer is empty.") : null,
    version.error ? errorCard(version.error, () => actions.retry(message, version)) : null,
    h("div", { class: "foot" }, ...(version.finish === null ? [] : tools(message, version, side, actions)), price),
    side === null ? null : pickButton(message, version, side, actions));
  grow(version);
  return node;
}

function pickButton(message, version, side, actions) {
  return h("button", { type: "button", class: "pick", "data-action": `pick-${side}`,
    disabled: version.finish === null || (version.error && !version.content), onclick: () => actions.pick(message, version) },
    "Continue with this answer", h("kbd", {}, String(side + 1)));
}

function tools(message, version, side, actions) {
  const button = tool("copy", "Copy the answer", () => copy(version.content, button));
  const found = version.content ? [button] : [];
  if (side === null) found.push(...versionTools(message, actions));
  if (side !== 1 && !version.error) found.push(tool("again", side === null ? "Answer again" : "Answer both again", () => actions.again(message), "only-last"));
  return found;
}

function versionTools(message, actions) {
  const { versions, shown } = message;
  if (versions.length < 2) return [];
  const turn = (name, label, index) => tool(name, label, () => actions.turn(message, index), "only-last",
    index < 0 || index >= versions.length);
  return [turn("left", "Earlier version", shown - 1),
    h("span", { class: "count only-last" }, `${shown + 1} / ${versions.length}`),
    turn("right", "Later version", shown + 1)];
}

function tool(name, label, onclick, extra = "", disabled = false) {
  return iconButton(name, label, onclick, { class: `quiet round small ${extra}`, "data-action": name, disabled });
}

/** What stands in place of a conversation that has not begun. */
export function welcome(model) {
  return h("div", { class: "welcome" },
    h("h1", {}, "What is on your mind?"),
    h("p", {}, model ? `${model} answers. ` : "", "Conversations stay in this browser."));
}
