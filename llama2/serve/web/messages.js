// The conversation as it is seen: questions, answers, and below each what can be done with it. An
// element belongs to its message as long as nothing but the text of an answer changes, so a growing
// answer costs only what has grown.
import { cost } from "./answer.js";
import { copy, fit, h, iconButton } from "./dom.js";
import { errorCard } from "./error_card.js";
import { show as showMarkdown } from "./markdown.js";

const articles = new WeakMap(); // message -> its element
const growing = new WeakMap(); // version -> the elements of its text and its cost

/**
 * Shows all messages in `container`. `actions` are what buttons do: edit(message, text),
 * again(message), turn(message, index) to another version, pick(message, version),
 * retry(message, version).
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
  const node = article(message, actions);
  articles.set(message, node);
  if (!old?.isConnected) return;
  const focus = document.activeElement;
  const action = old.contains(focus) ? focus.dataset.action : null;
  old.replaceWith(node);
  if (action) node.querySelector(`[data-action="${action}"]:not(:disabled)`)?.focus();
}

/** Shows the text that has been added to an answer. */
export function grow(version) {
  const elements = growing.get(version);
  if (!elements) return;
  showMarkdown(elements.text, version.content);
  elements.text.classList.toggle("waiting", !version.content);
  elements.cost.textContent = cost(version, elements.brief);
  elements.cost.title = cost(version);
}

function article(message, actions) {
  return message.role === "user" ? question(message, actions) : answer(message, actions);
}

// ---- questions ----

function question(message, actions) {
  const edit = () => node.replaceChildren(editor(message, actions));
  const copyButton = tool("copy", "Copy the message", () => copy(message.content, copyButton));
  const node = h("article", { class: "turn user", "aria-label": "You" },
    h("div", { class: "bubble" }, message.content),
    h("div", { class: "tools" }, copyButton, tool("edit", "Edit and send again", edit)));
  return node;
}

function editor(message, actions) {
  const field = h("textarea", {
    "aria-label": "Edit the message",
    rows: 1,
    oninput: () => fit(field),
  });
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
  return h("div", { class: "editor" },
    field,
    h("p", { class: "faint" }, "What follows this message is replaced."),
    h("div", { class: "buttons" },
      h("button", { type: "button", class: "plain", onclick: close }, "Cancel"),
      h("button", { type: "button", class: "filled", onclick: send }, "Send")));
}

// ---- answers ----

function answer(message, actions) {
  const isOpen = message.shown === null;
  const versions = isOpen ? message.versions.slice(-2) : [message.versions[message.shown]];
  const kind = isOpen ? "turn answer pair" : "turn answer";
  return h("article", { class: kind, "aria-label": "Answer" },
    ...versions.map((version, index) => column(message, version, isOpen ? index : null, actions)));
}

// One version of an answer; `side` is 0 or 1 where two are compared, else null.
function column(message, version, side, actions) {
  const isRunning = version.finish === null;
  const isEmpty = version.finish && !version.error && !version.content;
  const text = h("div", { class: "text" });
  const price = h("span", { class: "cost" });
  growing.set(version, { text, cost: price, brief: side !== null });
  const retry = () => actions.retry(message, version);
  const node = h("section", { class: "column", "aria-busy": isRunning ? "true" : null },
    h("p", { class: "model" },
      side === null ? null : h("b", {}, "AB"[side]),
      version.model || "assistant"),
    text,
    isEmpty ? h("p", { class: "faint" }, "The answer is empty.") : null,
    version.error ? errorCard(version.error, retry) : null,
    h("div", { class: "foot" },
      ...(isRunning ? [] : tools(message, version, side, actions)),
      price),
    side === null ? null : pickButton(message, version, side, actions));
  grow(version);
  return node;
}

function pickButton(message, version, side, actions) {
  const attributes = {
    type: "button",
    class: "pick",
    "data-action": `pick-${side}`,
    disabled: version.finish === null || (version.error && !version.content),
    onclick: () => actions.pick(message, version),
  };
  return h("button", attributes, "Continue with this answer", h("kbd", {}, String(side + 1)));
}

function tools(message, version, side, actions) {
  const buttons = [];
  if (version.content) {
    const button = tool("copy", "Copy the answer", () => copy(version.content, button));
    buttons.push(button);
  }
  if (side === null) buttons.push(...versionTools(message, actions));
  if (side !== 1 && !version.error) {
    const label = side === null ? "Answer again" : "Answer both again";
    buttons.push(tool("again", label, () => actions.again(message), "only-last"));
  }
  return buttons;
}

function versionTools(message, actions) {
  const { versions, shown } = message;
  if (versions.length < 2) return [];
  const turn = (name, label, index) => {
    const isMissing = index < 0 || index >= versions.length;
    return tool(name, label, () => actions.turn(message, index), "only-last", isMissing);
  };
  return [
    turn("left", "Earlier version", shown - 1),
    h("span", { class: "count only-last" }, `${shown + 1} / ${versions.length}`),
    turn("right", "Later version", shown + 1),
  ];
}

function tool(name, label, onclick, extra = "", disabled = false) {
  const attributes = { class: `quiet round small ${extra}`, "data-action": name, disabled };
  return iconButton(name, label, onclick, attributes);
}

/** Returns what stands in place of a conversation that has not begun. */
export function welcome(model) {
  return h("div", { class: "welcome" },
    h("h1", {}, "What is on your mind?"),
    h("p", {}, model ? `${model} answers. ` : "", "Conversations stay in this browser."));
}
