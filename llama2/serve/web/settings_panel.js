// The settings: the system prompt of this conversation, and how answers are sampled, once for each
// side of a comparison. An empty field is not sent, so the server's own default holds.
import { h, icon, iconButton } from "./dom.js";
import { settings, side } from "./store.js";

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    max: 2,
    step: 0.05,
    slider: true,
    help: "0 always takes the likeliest token",
  },
  {
    name: "top_p",
    label: "Top-p",
    max: 1,
    step: 0.01,
    slider: true,
    help: "the likeliest tokens up to this share",
  },
  { name: "top_k", label: "Top-k", step: 1, help: "only this many tokens; 0 means all" },
  { name: "min_p", label: "Min-p", max: 1, step: 0.01, help: "relative to the likeliest token" },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 0.05,
    max: 2,
    step: 0.05,
    help: "above 1 repeats less",
  },
  { name: "max_tokens", label: "Longest answer", min: 1, step: 1, help: "in tokens" },
  { name: "seed", label: "Seed", step: 1, help: "the same seed gives the same answer" },
];
let chosenSide = 0;

/** Fills the panel. `actions`: changed() after any change, system(text), close(), save(). */
export function showPanel(panel, conversation, actions) {
  const showAgain = () => showPanel(panel, conversation, actions);
  const values = settings.sides[settings.compare ? chosenSide : 0];
  const reset = () => {
    Object.assign(values, side(), { model: values.model });
    actions.changed();
    showAgain();
  };
  const plain = { type: "button", class: "plain" };
  panel.replaceChildren(h("div", { class: "fields" },
    h("div", { class: "title" },
      h("h2", {}, "Settings"),
      iconButton("close", "Close the settings", actions.close)),
    systemField(conversation, actions),
    settings.compare ? sideButtons(showAgain) : null,
    ...FIELDS.map((field) => fieldRow(field, values, actions)),
    h("button", { ...plain, onclick: reset }, "Back to the defaults"),
    h("button", { ...plain, onclick: actions.save }, icon("export"), "Export this conversation")));
}

/**
 * Returns the sampling settings of a side as the API wants them; `attempt` makes a seed differ when
 * asked again.
 */
export function sampling(index, attempt) {
  const values = settings.sides[index];
  const names = FIELDS.map(({ name }) => name).filter((name) => values[name] !== null);
  const body = Object.fromEntries(names.map((name) => [name, values[name]]));
  if ("seed" in body) body.seed += attempt;
  return body;
}

function systemField(conversation, actions) {
  const field = h("textarea", {
    id: "system",
    rows: 4,
    placeholder: "None",
    oninput: () => actions.system(field.value),
  });
  field.value = conversation.system;
  return h("div", { class: "field" },
    h("label", { for: "system" }, "System prompt"),
    field,
    h("p", { class: "faint" }, "For this conversation, from the next answer on."));
}

function sideButtons(showAgain) {
  const button = (index) => {
    const choose = () => {
      chosenSide = index;
      showAgain();
    };
    const label = `${"AB"[index]} · ${settings.sides[index].model || "model"}`;
    const isChosen = String(chosenSide === index);
    return h("button", { type: "button", "aria-pressed": isChosen, onclick: choose },
      h("span", {}, label));
  };
  return h("div", { class: "segments", role: "group", "aria-label": "Side" }, button(0), button(1));
}

function fieldRow({ name, label, help, slider, min = 0, max = null, step }, values, actions) {
  const id = `field-${name}`;
  const isWhole = step === 1;
  const number = h("input", {
    id,
    type: "number",
    min,
    max,
    step: isWhole ? 1 : "any",
    placeholder: "default",
    inputmode: isWhole ? "numeric" : "decimal",
    "aria-describedby": `${id}-help`,
    oninput: () => set(number),
  });
  const range = slider
    ? h("input", { type: "range", min, max, step, "aria-label": label, oninput: () => set(range) })
    : null;
  const set = (field) => {
    if (!field.checkValidity()) return;
    values[name] = field.value === "" ? null : Number(field.value);
    if (field === range) number.value = field.value;
    else if (range) range.value = field.value || "1";
    actions.changed();
  };
  number.value = values[name] ?? "";
  if (range) range.value = values[name] ?? 1;
  return h("div", { class: "field row" },
    h("label", { for: id }, label),
    number,
    range,
    h("p", { class: "faint", id: `${id}-help` }, help));
}
