// Light or dark, decided before the first paint: what the user chose last, else what the system
// prefers.
"use strict";
try {
  const chosen = localStorage.getItem("llama2/theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser may forbid storage; the system's preference then holds.
}
