// The chat page: joins what is kept (store.js), what is drawn (answer.js) and what is seen (turns.js, list.js,
// panel.js), and listens to the user.
import { draw, version } from "./answer.js";
import { models } from "./api.js";
import { fromLines, history, shown, toLines } from "./dialogs.js";
import { announce, byId, fit, h, icon, isField, notice } from "./dom.js";
import { errorCard } from "./errors.js";
import { isAtEnd, isDark, narrow, scrolled, toEnd, toggleList, toggleTheme } from "./frame.js";
import { showList } from "./list.js";
import { sampling, showPanel } from "./panel.js";
import { blank, conversations, follow, load, matching, remove, save, saveSettings, settings, titleOf } from "./store.js";
import { grow, renew, showTurns, welcome } from "./turns.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer grows
const runs = new Map(); // conversation id -> the AbortControllers of its running answers
const finger = matchMedia("(hover: none) and (pointer: coarse)");
let current = blank();
let known = null; // names of the server's models, null before they are known
let refused = null; // why they are not

// ---- what is shown ----

function showAll() {
  showConversation();
  showConversations();
  showModels();
  showControls();
  if (!byId("panel").hidden) showSettings();
}

function showConversation() {
  const turns = byId("turns");
  showTurns(turns, current.messages, actions);
  if (refused && !current.messages.length) turns.append(errorCard(refused, connect));
  else if (!current.messages.length) turns.append(welcome(settings.compare ? "" : modelOf(0)));
  byId("main").classList.toggle("fresh", !current.messages.length);
  document.title = current.messages.length ? `${titleOf(current)} · llama2` : "llama2";
}

function showConversations() {
  const words = byId("search").value;
  showList(byId("conversations"), matching(words),
    { current: current.id, running: (id) => runs.has(id), searching: words.trim() !== "" },
    { rename, remove: discard });
}

function showModels() {
  const pickers = settings.compare ? [0, 1] : [0];
  byId("models").replaceChildren(...pickers.map((index) => {
    const names = known?.length ? known : [modelOf(index) || "No model yet"];
    const select = h("select", { "aria-label": settings.compare ? `Model ${"AB"[index]}` : "Model", onchange: () => {
      settings.sides[index].model = select.value;
      keepSettings();
    } }, ...names.map((name) => h("option", { value: name, selected: name === modelOf(index) }, name)));
    return h("label", { class: "model-choice" }, settings.compare ? h("b", {}, "AB"[index]) : null, select,
      icon("chevron"));
  }));
}

function showControls() {
  const running = runs.has(current.id);
  const send = byId("send");
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop (Esc)" : "Send (Enter)";
  send.querySelector("use").setAttribute("href", running ? "#icon-stop" : "#icon-send");
  send.disabled = !running && (!byId("question").value.trim() || undecided());
  byId("compare").setAttribute("aria-pressed", String(settings.compare));
  byId("hint").textContent = undecided() && !running ? "Pick one of the two answers to go on."
    : "A language model may be wrong: check what matters.";
}

function showSettings() {
  showPanel(byId("panel"), current, { changed: keepSettings, close: () => toggleSettings(false),
    save: () => download([current], `${titleOf(current)}.jsonl`),
    system(text) {
      current.system = text;
      if (current.messages.length) keep(current);
    } });
}

function modelOf(index) {
  const { model } = settings.sides[index];
  return !known?.length || known.includes(model) ? model : known[Math.min(index, known.length - 1)];
}

function undecided() {
  return current.messages.at(-1)?.shown === null;
}

// ---- what is kept ----

function keep(conversation, touch = true) {
  if (!save(conversation, touch)) notice("The browser keeps no more conversations. Export some and delete them.");
}

function keepSettings() {
  saveSettings();
  showModels();
  if (!current.messages.length) showConversation();
}

function open(conversation) {
  current = conversation;
  const hash = conversations.has(conversation.id) ? `#${conversation.id}` : "";
  if (location.hash !== hash) window.history.pushState(null, "", hash || location.pathname + location.search);
  toggleList(false);
  showAll();
  toEnd();
  if (!finger.matches) byId("question").focus();
}

function rename(conversation, title) {
  conversation.title = title;
  keep(conversation, false);
  showAll();
}

function discard(conversation) {
  stop(conversation.id);
  remove(conversation.id);
  if (conversation === current) open(blank());
  else showConversations();
  notice(`“${titleOf(conversation)}” is deleted.`, { label: "Undo", run() {
    keep(conversation, false);
    open(conversation);
  } });
}

function download(some, name) {
  const text = toLines(some);
  if (!text) {
    notice("There is no conversation to export.");
    return;
  }
  const address = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  h("a", { href: address, download: name.replace(/[^\p{L}\p{N} ._-]/gu, "_") }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

async function take(file) {
  try {
    const found = fromLines(await file.text());
    for (const each of found) keep({ ...blank(), ...each });
    showConversations();
    notice(`${found.length} conversation${found.length === 1 ? "" : "s"} imported.`);
  } catch (error) {
    notice(`${file.name}: ${error.message}.`, null, 15);
  }
}

// ---- asking and answering ----

const actions = {
  edit(message, text) {
    const at = current.messages.indexOf(message);
    stop(current.id);
    current.messages.splice(at);
    ask(text);
  },
  again(message) {
    stop(current.id);
    begin(message);
  },
  async retry(message, failed) {
    const conversation = current;
    if (!known) await connect();
    const fresh = version(modelOf(failed.side ?? 0));
    delete failed.error;
    delete failed.rate;
    answer(conversation, message, [Object.assign(failed, fresh, { exact: false })]);
  },
  turn(message, index) {
    message.shown = index;
    renewed(message);
  },
  pick(message, picked) {
    message.shown = message.versions.indexOf(picked);
    renewed(message);
    if (!finger.matches) byId("question").focus();
  },
};

function renewed(message) {
  keep(current, false);
  renew(message, actions);
  showControls();
}

function ask(text) {
  current.messages.push({ role: "user", content: text });
  const message = { role: "assistant", versions: [], shown: null };
  current.messages.push(message);
  begin(message);
}

// A further attempt at `message`, or two to compare.
async function begin(message) {
  const conversation = current;
  if (!known) await connect();
  const made = (settings.compare ? [0, 1] : [0]).map((side) => ({ ...version(modelOf(side)), side }));
  message.versions.push(...made);
  message.shown = settings.compare ? null : message.versions.length - 1;
  answer(conversation, message, made);
}

async function answer(conversation, message, versions) {
  const controller = new AbortController();
  runs.set(conversation.id, new Set([...(runs.get(conversation.id) ?? []), controller]));
  keep(conversation);
  renew(message, actions);
  if (conversation === current) open(conversation);
  announce("The answer is being written.");
  await Promise.all(versions.map(async (each) => {
    await draw(each, request(conversation, message, each), controller.signal, () => grown(conversation, each));
    if (message.versions.includes(each)) renew(message, actions);
  }));
  finish(conversation, controller, versions);
}

function request(conversation, message, { model, side }) {
  const at = conversation.messages.indexOf(message);
  const attempts = message.versions.filter((each) => each.side === side).length;
  return { model, ...sampling(side, Math.max(attempts - 1, 0)),
    messages: [...history(conversation, at - 1), { role: "user", content: conversation.messages[at - 1].content }] };
}

function finish(conversation, controller, versions) {
  const left = runs.get(conversation.id);
  left?.delete(controller);
  if (!left?.size) runs.delete(conversation.id);
  if (conversations.has(conversation.id)) keep(conversation);
  showConversations();
  if (conversation !== current) return;
  showControls();
  grownNow();
  announce(versions.map((each) => each.error?.message ?? each.content).join("\n"));
}

function stop(id) {
  for (const controller of runs.get(id) ?? []) controller.abort();
}

const growing = new Set();
let lastSave = 0;

function grown(conversation, version) {
  if (conversation === current) {
    if (!growing.size) requestAnimationFrame(grownNow);
    growing.add(version);
  }
  if (Date.now() - lastSave < SAVE_EVERY || !conversations.has(conversation.id)) return;
  lastSave = Date.now();
  save(conversation);
}

function grownNow() {
  const stay = isAtEnd();
  for (const version of growing) grow(version);
  growing.clear();
  if (stay) toEnd();
}

// ---- the frame around ----

function toggleSettings(isOpen) {
  byId("panel").hidden = !isOpen;
  byId("tune").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) showSettings();
  if (!isOpen) byId("tune").focus();
  else if (!finger.matches) byId("system").focus(); // a field would bring up the keyboard
}

function toggleCompare() {
  settings.compare = !settings.compare;
  keepSettings();
  showAll();
}

function submit() {
  const field = byId("question");
  const text = field.value.trim();
  if (runs.has(current.id) || !text || undecided()) return;
  field.value = "";
  fit(field);
  ask(text);
}

// ---- keys ----

const KEYS = {
  "/": () => byId("question").focus(),
  "?": () => byId("help").showModal(),
  1: () => document.querySelector('[data-action="pick-0"]')?.click(),
  2: () => document.querySelector('[data-action="pick-1"]')?.click(),
};

function pressed(event) {
  if (event.isComposing || byId("help").open) return;
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "k") {
    open(blank());
  } else if (event.key === "Escape") {
    escape();
  } else if (!isField(event.target) && !event.ctrlKey && !event.metaKey && !event.altKey && KEYS[event.key]) {
    KEYS[event.key]();
  } else {
    return;
  }
  event.preventDefault();
}

function escape() {
  if (document.body.classList.contains("listing")) {
    toggleList(false);
    byId("menu").focus();
  } else if (runs.has(current.id)) {
    stop(current.id);
  } else if (!byId("panel").hidden) {
    toggleSettings(false);
  } else {
    document.activeElement?.blur();
  }
}

function writing(event) {
  if (event.isComposing) return;
  const send = event.key === "Enter" && !event.shiftKey && !finger.matches;
  const last = event.key === "ArrowUp" && !event.target.value
    ? [...document.querySelectorAll('.user [data-action="edit"]')].at(-1) : null;
  if (send) submit();
  else if (last) last.click();
  else return;
  event.preventDefault();
}

// ---- beginning ----

function listen() {
  const field = byId("question");
  const clicks = { new: () => open(blank()), menu: () => toggleList(true), "list-close": () => toggleList(false),
    shade: () => toggleList(false), keys: () => byId("help").showModal(), theme: toggleTheme, compare: toggleCompare,
    tune: () => toggleSettings(byId("panel").hidden), bottom: toEnd, import: () => byId("file").click(),
    export: () => download(matching(""), "conversations.jsonl") };
  for (const [id, act] of Object.entries(clicks)) byId(id).addEventListener("click", act);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (runs.has(current.id)) stop(current.id);
    else submit();
  });
  field.addEventListener("keydown", writing);
  field.addEventListener("input", () => {
    fit(field);
    showControls();
  });
  byId("search").addEventListener("input", showConversations);
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) take(target.files[0]);
    target.value = "";
  });
  byId("scroll").addEventListener("scroll", scrolled, { passive: true });
  document.addEventListener("keydown", pressed);
  narrow.addEventListener("change", () => toggleList(false));
  addEventListener("popstate", visit);
  addEventListener("pagehide", () => {
    for (const id of runs.keys()) save(conversations.get(id), false);
  });
  follow((id) => runs.has(id), (id) => {
    if (id === current.id) current = conversations.get(id) ?? blank();
    showAll();
  });
}

// The conversation that the address names.
function visit() {
  const id = location.hash.slice(1);
  if (id === current.id || (id && !conversations.has(id))) return;
  open(conversations.get(id) ?? blank());
}

async function connect() {
  try {
    known = await models();
    refused = null;
    settings.sides.forEach((each, index) => {
      each.model = modelOf(index);
    });
  } catch ({ message, status = 0, wait = 0 }) {
    refused = { message, status, until: wait ? Date.now() + wait * 1000 : 0 };
  }
  showAll();
}

function start() {
  load();
  const apple = /Mac|iPhone|iPad/.test(navigator.platform);
  for (const node of document.querySelectorAll("[data-modifier]")) node.textContent = apple ? "⌘" : "Ctrl";
  for (const node of document.querySelectorAll("[data-key]")) node.textContent = `${apple ? "⌘" : "Ctrl "}${node.dataset.key}`;
  byId("theme").setAttribute("aria-pressed", String(isDark()));
  listen();
  current = conversations.get(location.hash.slice(1)) ?? current;
  open(current);
  connect();
}

start();
