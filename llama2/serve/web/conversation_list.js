// The list of conversations, grouped by the day of the last word, each to be opened, renamed and
// deleted.
import { h, iconButton } from "./dom.js";
import { titleOf } from "./store.js";

const DAY = 24 * 60 * 60 * 1000;

/**
 * Shows conversations, the latest first. `current` is the id of the open one, running(id) tells
 * which are being answered. `actions`: rename(conversation, title), remove(conversation).
 */
export function showList(container, conversations, { current, running, searching }, actions) {
  const groups = new Map();
  for (const conversation of conversations) {
    const name = group(conversation.updated);
    const node = entry(conversation, current, running, actions);
    groups.set(name, [...(groups.get(name) ?? []), node]);
  }
  const sections = [...groups].map(([name, entries]) => {
    return h("section", {}, h("h2", {}, name), h("ul", {}, ...entries));
  });
  if (!sections.length) {
    const text = searching ? "Nothing found." : "No conversations yet.";
    sections.push(h("p", { class: "faint" }, text));
  }
  container.replaceChildren(...sections);
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
  const small = { class: "quiet round small" };
  const edit = () => rename(node, conversation, actions);
  const remove = () => actions.remove(conversation);
  const address = `#${conversation.id}`;
  const pulse = h("span", { class: "pulse", role: "img", "aria-label": "is being answered" });
  const node = h("li", { class: isCurrent ? "current" : null },
    h("a", { href: address, "aria-current": isCurrent ? "page" : null, title }, title),
    running(conversation.id) ? pulse : null,
    h("span", { class: "tools" },
      iconButton("edit", `Rename ${title}`, edit, small),
      iconButton("delete", `Delete ${title}`, remove, small)));
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
