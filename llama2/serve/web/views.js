// The parts of the page, drawn from the state: messages, list, model choice, controls and settings.
import { showList } from "./conversation_list.js";
import { byId, h, icon } from "./dom.js";
import { errorCard } from "./error_card.js";
import { download } from "./files.js";
import { touchScreen } from "./layout.js";
import { showMessages, welcome } from "./messages.js";
import { showPanel } from "./settings_panel.js";
import { isRunning, isUndecided, modelOf, runs, state } from "./state.js";
import { matching, saveSettings, settings, titleOf } from "./store.js";

let actions = {};

/**
 * Sets what buttons do: `message` are the actions of messages.js, `list` those of
 * conversation_list.js; connect() asks for the models again, keep(conversation) stores one.
 */
export function setActions(given) {
  actions = given;
}

export function showAll() {
  showConversation();
  showConversations();
  showModels();
  showControls();
  if (!byId("panel").hidden) showSettings();
}

export function showConversation() {
  const { conversation, refusal } = state;
  const isFresh = !conversation.messages.length;
  const turns = byId("turns");
  showMessages(turns, conversation.messages, actions.message);
  if (isFresh && refusal) turns.append(errorCard(refusal, actions.connect));
  else if (isFresh) turns.append(welcome(settings.compare ? "" : modelOf(0)));
  byId("main").classList.toggle("fresh", isFresh);
  document.title = isFresh ? "llama2" : `${titleOf(conversation)} · llama2`;
}

export function showConversations() {
  const words = byId("search").value;
  const marks = {
    current: state.conversation.id,
    running: (id) => runs.has(id),
    searching: words.trim() !== "",
  };
  showList(byId("conversations"), matching(words), marks, actions.list);
}

export function showModels() {
  const sides = settings.compare ? [0, 1] : [0];
  byId("models").replaceChildren(...sides.map(modelChoice));
}

function modelChoice(side) {
  const names = state.models?.length ? state.models : [modelOf(side) || "No model yet"];
  const letter = settings.compare ? "AB"[side] : "";
  const choose = () => {
    settings.sides[side].model = select.value;
    changeSettings();
  };
  const options = names.map((name) => {
    return h("option", { value: name, selected: name === modelOf(side) }, name);
  });
  const label = settings.compare ? `Model ${letter}` : "Model";
  const select = h("select", { "aria-label": label, onchange: choose }, ...options);
  return h("label", { class: "model-choice" }, letter ? h("b", {}, letter) : null, select,
    icon("chevron"));
}

export function showControls() {
  const running = isRunning();
  const send = byId("send");
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop (Esc)" : "Send (Enter)";
  send.querySelector("use").setAttribute("href", running ? "#icon-stop" : "#icon-send");
  send.disabled = !running && (!byId("question").value.trim() || isUndecided());
  byId("compare").setAttribute("aria-pressed", String(settings.compare));
  byId("hint").textContent = isUndecided() && !running
    ? "Pick one of the two answers to go on."
    : "A language model may be wrong: check what matters.";
}

export function showSettings() {
  const { conversation } = state;
  showPanel(byId("panel"), conversation, {
    changed: changeSettings,
    close: () => toggleSettings(false),
    save: () => download([conversation], `${titleOf(conversation)}.jsonl`),
    system(text) {
      conversation.system = text;
      if (conversation.messages.length) actions.keep(conversation);
    },
  });
}

export function toggleSettings(isOpen) {
  byId("panel").hidden = !isOpen;
  byId("tune").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) showSettings();
  if (!isOpen) byId("tune").focus();
  else if (!touchScreen.matches) byId("system").focus(); // a field would bring up the keyboard
}

export function toggleCompare() {
  settings.compare = !settings.compare;
  changeSettings();
  showAll();
}

function changeSettings() {
  saveSettings();
  showModels();
  if (!state.conversation.messages.length) showConversation();
}
