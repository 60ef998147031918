// The frame around a conversation: the drawer with the list, light and dark, and the scroll
// position.
import { byId } from "./dom.js";

export const narrow = matchMedia("(max-width: 760px)");
export const touchScreen = matchMedia("(hover: none) and (pointer: coarse)");

let atEnd = true;

/** Whether the user reads the end, so that what is added should be followed. */
export function isAtEnd() {
  return atEnd;
}

/** Scrolls to the last word, and stays there while the answer grows. */
export function toEnd() {
  const scroll = byId("scroll");
  scroll.scrollTop = scroll.scrollHeight;
  atEnd = true;
  byId("bottom").hidden = true;
}

/** Notes where the user has scrolled to. */
export function scrolled() {
  const { scrollTop, scrollHeight, clientHeight } = byId("scroll");
  atEnd = scrollHeight - scrollTop - clientHeight < 60;
  byId("bottom").hidden = atEnd;
}

/** Opens or closes the drawer with the list; on a wide screen the list is always there. */
export function toggleList(isOpen) {
  const drawn = narrow.matches && isOpen;
  document.body.classList.toggle("listing", drawn);
  byId("list").inert = narrow.matches && !isOpen;
  byId("main").inert = drawn;
  byId("menu").setAttribute("aria-expanded", String(drawn));
  if (drawn) byId("list-close").focus();
}

export function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Changes between light and dark, and remembers it. */
export function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("llama2/theme", theme);
  } catch {
    // Then it holds for this page only.
  }
  byId("theme").setAttribute("aria-pressed", String(isDark()));
}
