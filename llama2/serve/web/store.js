// What the browser keeps: every conversation under a key of its own, and the settings. Nothing
// leaves the browser but what is sent to the model. Where storage is forbidden or full the page
// works on and says that it forgets.
//
// A conversation is {id, title, system, created, updated, messages}. A user's message is {role,
// content}; an answer is {role, versions, shown}: every attempt is kept, `shown` is the one that
// counts, null until the user picks one.
import { shown } from "./jsonl.js";

const CONVERSATION = "llama2/conversation/";
const SETTINGS = "llama2/settings";
const TITLE = 60;
const SAMPLING = {
  temperature: 0.6,
  top_p: 0.9,
  top_k: null,
  min_p: null,
  repetition_penalty: null,
  max_tokens: null,
  seed: null,
};

/** All conversations by id, newest last. */
export const conversations = new Map();
export const settings = { compare: false, sides: [side(), side()] };

export function side() {
  return { model: "", ...SAMPLING };
}

/** Reads what is kept. A record that some other version wrote is left where it is and not shown. */
export function load() {
  for (const key of keys()) {
    if (key.startsWith(CONVERSATION)) remember(key, read(key));
  }
  const kept = read(SETTINGS);
  if (Array.isArray(kept?.sides) && kept.sides.length === 2) {
    settings.compare = kept.compare === true;
    settings.sides = kept.sides.map((each) => ({ ...side(), ...each }));
  }
}

/** A conversation that is not kept before something is said in it. */
export function blank() {
  const now = Date.now();
  return { id: identifier(), title: "", system: "", created: now, updated: now, messages: [] };
}

/** Keeps a conversation; false if the browser would not. */
export function save(conversation, touch = true) {
  if (touch) conversation.updated = Date.now();
  conversations.set(conversation.id, conversation);
  return write(CONVERSATION + conversation.id, conversation);
}

export function saveSettings() {
  return write(SETTINGS, settings);
}

export function remove(id) {
  conversations.delete(id);
  try {
    localStorage.removeItem(CONVERSATION + id);
  } catch {
    // Nothing was kept, so nothing is to be removed.
  }
}

/**
 * Takes over what another tab has changed; `busy(id)` holds back conversations that are being
 * answered here.
 */
export function follow(busy, changed) {
  addEventListener("storage", ({ key }) => {
    if (!key?.startsWith(CONVERSATION) || busy(key.slice(CONVERSATION.length))) return;
    conversations.delete(key.slice(CONVERSATION.length));
    remember(key, read(key));
    changed(key.slice(CONVERSATION.length));
  });
}

/** What a conversation is called in the list. */
export function titleOf(conversation) {
  const first = conversation.messages[0]?.content.trim().split("\n")[0] ?? "";
  const short = first.length > TITLE ? `${first.slice(0, TITLE - 1)}…` : first;
  return conversation.title || short || "New chat";
}

/** Conversations with all of `words` in the title or the text, the latest first. */
export function matching(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  return [...conversations.values()]
    .filter((each) => {
      const text = wanted.length ? fullText(each) : "";
      return wanted.every((word) => text.includes(word));
    })
    .sort((one, other) => other.updated - one.updated);
}

function fullText(conversation) {
  const said = conversation.messages.map((each) => each.content ?? shown(each)?.content ?? "");
  return [titleOf(conversation), conversation.system, ...said].join("\n").toLowerCase();
}

function remember(key, conversation) {
  if (typeof conversation?.id !== "string" || !Array.isArray(conversation.messages)) return;
  for (const message of conversation.messages) {
    // the page was left meanwhile
    for (const version of message.versions ?? []) version.finish ??= "cancelled";
  }
  conversations.set(conversation.id, conversation);
}

function identifier() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function keys() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
