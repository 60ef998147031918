// The state of the page besides what is stored: the open conversation, the server's models, and the
// answers that are being drawn.
import { blank, settings } from "./store.js";

export const state = {
  conversation: blank(),
  models: null, // names, null before they are known
  refusal: null, // the error that kept them away
};

/** The AbortControllers of running answers by conversation id. */
export const runs = new Map();

/** The model that answers on a side (0 or 1): the chosen one, if the server has it. */
export function modelOf(side) {
  const { model } = settings.sides[side];
  const names = state.models;
  return !names?.length || names.includes(model) ? model : names[Math.min(side, names.length - 1)];
}

/** Whether the user has still to pick one of two answers. */
export function isUndecided() {
  return state.conversation.messages.at(-1)?.shown === null;
}

/** Whether an answer of the open conversation is being drawn. */
export function isRunning() {
  return runs.has(state.conversation.id);
}

/** Ends the running answers of a conversation. */
export function stop(id) {
  for (const controller of runs.get(id) ?? []) controller.abort();
}
