// The chat page: joins its parts, and begins.
import { actions } from "./answering.js";
import { connect, discard, importFile, keep, open, openAddress, rename } from "./conversations.js";
import { byId, fit } from "./dom.js";
import { download } from "./files.js";
import { isDark, narrow, scrolled, toEnd, toggleList, toggleTheme } from "./layout.js";
import { listenToKeys, submit } from "./keys.js";
import { isRunning, runs, state, stop } from "./state.js";
import { blank, conversations, follow, load, matching, save } from "./store.js";
import * as views from "./views.js";

const CLICKS = {
  new: () => open(blank()),
  menu: () => toggleList(true),
  "list-close": () => toggleList(false),
  shade: () => toggleList(false),
  keys: () => byId("help").showModal(),
  theme: toggleTheme,
  compare: views.toggleCompare,
  tune: () => views.toggleSettings(byId("panel").hidden),
  bottom: toEnd,
  import: () => byId("file").click(),
  export: () => download(matching(""), "conversations.jsonl"),
};

function listen() {
  for (const [id, act] of Object.entries(CLICKS)) byId(id).addEventListener("click", act);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (isRunning()) stop(state.conversation.id);
    else submit();
  });
  byId("question").addEventListener("input", ({ target }) => {
    fit(target);
    views.showControls();
  });
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) importFile(target.files[0]);
    target.value = "";
  });
  byId("search").addEventListener("input", views.showConversations);
  byId("scroll").addEventListener("scroll", scrolled, { passive: true });
  narrow.addEventListener("change", () => toggleList(false));
  listenToKeys();
  addEventListener("popstate", openAddress);
  addEventListener("pagehide", () => {
    for (const id of runs.keys()) save(conversations.get(id), false);
  });
  follow((id) => runs.has(id), (id) => {
    if (id === state.conversation.id) state.conversation = conversations.get(id) ?? blank();
    views.showAll();
  });
}

function nameKeys() {
  const modifier = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";
  for (const node of document.querySelectorAll("[data-modifier]")) node.textContent = modifier;
  for (const node of document.querySelectorAll("[data-key]")) {
    node.textContent = `${modifier}${modifier === "⌘" ? "" : " "}${node.dataset.key}`;
  }
}

views.setActions({ message: actions, list: { rename, remove: discard }, connect, keep });
load();
nameKeys();
byId("theme").setAttribute("aria-pressed", String(isDark()));
listen();
open(conversations.get(location.hash.slice(1)) ?? state.conversation);
connect();
