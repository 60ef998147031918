// Conversations saved as a file of the user.
import { h, notice } from "./dom.js";
import { toLines } from "./jsonl.js";

/** Offers conversations as a file of JSON Lines. */
export function download(conversations, name) {
  const text = toLines(conversations);
  if (!text) {
    notice("There is no conversation to export.");
    return;
  }
  const address = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  h("a", { href: address, download: name.replace(/[^\p{L}\p{N} ._-]/gu, "_") }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
