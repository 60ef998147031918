// The keyboard: shortcuts of the page, and the keys of the message field.
import { ask } from "./answering.js";
import { open } from "./conversations.js";
import { byId, fit, isField } from "./dom.js";
import { toggleList, touchScreen } from "./layout.js";
import { isRunning, isUndecided, state, stop } from "./state.js";
import { blank } from "./store.js";
import { toggleSettings } from "./views.js";

const SHORTCUTS = {
  "/": () => byId("question").focus(),
  "?": () => byId("help").showModal(),
  1: () => document.querySelector('[data-action="pick-0"]')?.click(),
  2: () => document.querySelector('[data-action="pick-1"]')?.click(),
};

/** Listens to the keys of the page and of the message field. */
export function listenToKeys() {
  document.addEventListener("keydown", press);
  byId("question").addEventListener("keydown", write);
}

/** Sends the message that is written. */
export function submit() {
  const field = byId("question");
  const text = field.value.trim();
  if (isRunning() || !text || isUndecided()) return;
  field.value = "";
  fit(field);
  ask(text);
}

function press(event) {
  if (event.isComposing || byId("help").open) return;
  const withModifier = event.ctrlKey || event.metaKey;
  const isPlain = !withModifier && !event.altKey && !isField(event.target);
  if (withModifier && !event.shiftKey && event.key.toLowerCase() === "k") open(blank());
  else if (event.key === "Escape") leave();
  else if (isPlain && SHORTCUTS[event.key]) SHORTCUTS[event.key]();
  else return;
  event.preventDefault();
}

// What Escape ends, one thing at a time.
function leave() {
  if (document.body.classList.contains("listing")) {
    toggleList(false);
    byId("menu").focus();
  } else if (isRunning()) {
    stop(state.conversation.id);
  } else if (!byId("panel").hidden) {
    toggleSettings(false);
  } else {
    document.activeElement?.blur();
  }
}

function write(event) {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey && !touchScreen.matches) submit();
  else if (event.key === "ArrowUp" && !event.target.value && lastEdit()) lastEdit().click();
  else return;
  event.preventDefault();
}

function lastEdit() {
  return [...document.querySelectorAll('.user [data-action="edit"]')].at(-1);
}
