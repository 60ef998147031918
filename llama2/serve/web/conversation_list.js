// The list of conversations, grouped by the day of the last word, each to be opened, renamed and deleted.
import { h, iconButton } from "./dom.js";
import { titleOf } from "./store.js";

const DAY = 24 * 60 * 60 * 1000;

/** Shows `found`, latest first. `actions`: rename(conversation, title), remove(conversation). */
export function showList(container, found, { current, running, searching }, actions) {
  const groups = new Map();
  for (const each of found) {
    const name = group(each.updated);
    groups.set(name, [...(groups.get(name) ?? []), entry(each, current, running, actions)]);
  }
  const parts = [...groups].map(([name, entries]) => h("section", {}, h("h2", {}, name), h("ul", {}, ...entries)));
  const nothing = h("p", { class: "faint" }, searching ? "Nothing found." : "No conversations yet.");
  container.replaceChildren(...(parts.length ? parts : [nothing]));
}

function group(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  return time >= midnight - 7 * DAY ? "Last seven days" : "Earlier";
}

function entry(conversation, current, running, actions) {
  const title = titleOf(conversation);
  const isCurrent = conversation.id === current;
  const node = h("li", { class: isCurrent ? "current" : null },
    h("a", { href: `#${conversation.id}`, "aria-current": isCurrent ? "page" : null, title }, title),
    running(conversation.id) ? h("span", { class: "pulse", role: "img", "aria-label": "is being answered" }) : null,
    h("span", { class: "tools" },
      iconButton("edit", `Rename ${title}`, () => rename(node, conversation, actions), { class: "quiet round small" }),
      iconButton("delete", `Delete ${title}`, () => actions.remove(conversation), { class: "quiet round small" })));
  return node;
}

function rename(node, conversation, actions) {
  const field = h("input", { type: "text", "aria-label": "Title", maxlength: 120 });
  let open = true;
  const close = (title) => {
    if (!open) return;
    open = false;
    actions.rename(conversation, title);
  };
  field.value = titleOf(conversation);
  field.addEventListener("blur", () => close(field.value.trim()));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) close(field.value.trim());
    else if (event.key === "Escape") close(conversation.title);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  node.replaceChildren(field);
  field.select();
}
