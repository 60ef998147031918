// The user's conversations: opened, kept, renamed, deleted and imported.
import { models } from "./api.js";
import { byId, notice } from "./dom.js";
import { fromLines } from "./jsonl.js";
import { toEnd, toggleList, touchScreen } from "./layout.js";
import { modelOf, state, stop } from "./state.js";
import { blank, conversations, remove, save, settings, titleOf } from "./store.js";
import { showAll, showConversations } from "./views.js";

/** Stores a conversation; `touch` makes it the latest. */
export function keep(conversation, touch = true) {
  if (save(conversation, touch)) return;
  notice("The browser keeps no more conversations. Export some and delete them.");
}

export function open(conversation) {
  state.conversation = conversation;
  const hash = conversations.has(conversation.id) ? `#${conversation.id}` : "";
  if (location.hash !== hash) {
    window.history.pushState(null, "", hash || location.pathname + location.search);
  }
  toggleList(false);
  showAll();
  toEnd();
  if (!touchScreen.matches) byId("question").focus();
}

/** Opens the conversation that the address names. */
export function openAddress() {
  const id = location.hash.slice(1);
  if (id === state.conversation.id || (id && !conversations.has(id))) return;
  open(conversations.get(id) ?? blank());
}

export function rename(conversation, title) {
  conversation.title = title;
  keep(conversation, false);
  showAll();
}

/** Deletes a conversation, and offers it back. */
export function discard(conversation) {
  stop(conversation.id);
  remove(conversation.id);
  if (conversation === state.conversation) open(blank());
  else showConversations();
  const restore = () => {
    keep(conversation, false);
    open(conversation);
  };
  notice(`“${titleOf(conversation)}” is deleted.`, { label: "Undo", run: restore });
}

export async function importFile(file) {
  try {
    const imported = fromLines(await file.text());
    for (const each of imported) keep({ ...blank(), ...each });
    showConversations();
    notice(`${imported.length} conversation${imported.length === 1 ? "" : "s"} imported.`);
  } catch (error) {
    notice(`${file.name}: ${error.message}.`, null, 15);
  }
}

/** Asks the server for its models. */
export async function connect() {
  try {
    state.models = await models();
    state.refusal = null;
    settings.sides.forEach((each, side) => {
      each.model = modelOf(side);
    });
  } catch ({ message, status = 0, wait = 0 }) {
    state.refusal = { message, status, until: wait ? Date.now() + wait * 1000 : 0 };
  }
  showAll();
}
