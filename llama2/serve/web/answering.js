// Questions and their answers: asked, drawn, asked again, and shown as they grow.
import { draw, version } from "./answer.js";
import { connect, keep, open } from "./conversations.js";
import { announce, byId } from "./dom.js";
import { history } from "./jsonl.js";
import { isAtEnd, toEnd, touchScreen } from "./layout.js";
import { grow, renew } from "./messages.js";
import { sampling } from "./settings_panel.js";
import { modelOf, runs, state, stop } from "./state.js";
import { conversations, save, settings } from "./store.js";
import { showControls, showConversations } from "./views.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer grows

/** The actions of the buttons below messages. */
export const actions = {
  edit(message, text) {
    const at = state.conversation.messages.indexOf(message);
    stop(state.conversation.id);
    state.conversation.messages.splice(at);
    ask(text);
  },
  again(message) {
    stop(state.conversation.id);
    begin(message);
  },
  async retry(message, failed) {
    const { conversation } = state;
    if (!state.models) await connect();
    const fresh = version(modelOf(failed.side ?? 0));
    delete failed.error;
    delete failed.rate;
    answer(conversation, message, [Object.assign(failed, fresh, { exact: false })]);
  },
  turn(message, index) {
    message.shown = index;
    showChosen(message);
  },
  pick(message, picked) {
    message.shown = message.versions.indexOf(picked);
    showChosen(message);
    if (!touchScreen.matches) byId("question").focus();
  },
};

function showChosen(message) {
  keep(state.conversation, false);
  renew(message, actions);
  showControls();
}

export function ask(text) {
  state.conversation.messages.push({ role: "user", content: text });
  const message = { role: "assistant", versions: [], shown: null };
  state.conversation.messages.push(message);
  begin(message);
}

// A further attempt at `message`, or two to compare.
async function begin(message) {
  const { conversation } = state;
  if (!state.models) await connect();
  const sides = settings.compare ? [0, 1] : [0];
  const versions = sides.map((side) => ({ ...version(modelOf(side)), side }));
  message.versions.push(...versions);
  message.shown = settings.compare ? null : message.versions.length - 1;
  answer(conversation, message, versions);
}

async function answer(conversation, message, versions) {
  const controller = new AbortController();
  runs.set(conversation.id, new Set([...(runs.get(conversation.id) ?? []), controller]));
  keep(conversation);
  renew(message, actions);
  if (conversation === state.conversation) open(conversation);
  announce("The answer is being written.");
  await Promise.all(versions.map(async (each) => {
    const body = request(conversation, message, each);
    await draw(each, body, controller.signal, () => showGrowth(conversation, each));
    if (message.versions.includes(each)) renew(message, actions);
  }));
  finish(conversation, controller, versions);
}

function request(conversation, message, { model, side }) {
  const at = conversation.messages.indexOf(message);
  const attempts = message.versions.filter((each) => each.side === side).length;
  const question = { role: "user", content: conversation.messages[at - 1].content };
  return {
    model,
    ...sampling(side, Math.max(attempts - 1, 0)),
    messages: [...history(conversation, at - 1), question],
  };
}

function finish(conversation, controller, versions) {
  const controllers = runs.get(conversation.id);
  controllers?.delete(controller);
  if (!controllers?.size) runs.delete(conversation.id);
  if (conversations.has(conversation.id)) keep(conversation);
  showConversations();
  if (conversation !== state.conversation) return;
  showControls();
  drawGrowth();
  announce(versions.map((each) => each.error?.message ?? each.content).join("\n"));
}

// ---- growing answers ----

const growing = new Set(); // versions with text that is not drawn yet
let savedAt = 0;

function showGrowth(conversation, version) {
  if (conversation === state.conversation) {
    if (!growing.size) requestAnimationFrame(drawGrowth);
    growing.add(version);
  }
  if (Date.now() - savedAt < SAVE_EVERY || !conversations.has(conversation.id)) return;
  savedAt = Date.now();
  save(conversation);
}

function drawGrowth() {
  const stay = isAtEnd();
  for (const version of growing) grow(version);
  growing.clear();
  if (stay) toEnd();
}
