// Errors, shown where they happened, with what can be done about them: wait, give a key, try again.
import { hasKey, setKey } from "./api.js";
import { h } from "./dom.js";

/**
 * Returns an element for an error as api.js reports it, {message, status, until}; `retry` is called
 * when the user wants to try again.
 */
export function errorCard({ message, status, until }, retry) {
  if (status === 401) return keyCard(retry);
  return h("div", { class: "error", role: "alert" },
    h("p", {}, sentence(message)),
    retryButton(until, retry));
}

function keyCard(retry) {
  const isWrong = hasKey();
  const text = isWrong
    ? "The server does not accept this API key."
    : "This server asks for an API key.";
  return h("div", { class: isWrong ? "error" : "error asking", role: "alert" },
    h("p", {}, text),
    keyForm(retry));
}

function keyForm(retry) {
  const field = h("input", {
    type: "password",
    "aria-label": "API key",
    placeholder: "API key",
    autocomplete: "off",
    required: true,
  });
  const send = (event) => {
    event.preventDefault();
    setKey(field.value.trim());
    retry();
  };
  return h("form", { class: "key", onsubmit: send },
    field,
    h("button", { class: "filled" }, "Use this key"),
    h("p", { class: "faint" }, "It is kept until this tab is closed."));
}

function retryButton(until, retry) {
  const button = h("button", { type: "button", class: "filled", onclick: retry }, "Try again");
  const tick = () => {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    button.disabled = seconds > 0;
    button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
    if (seconds > 0) setTimeout(tick, 250);
  };
  if (until) tick();
  return button;
}

function sentence(text) {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}
