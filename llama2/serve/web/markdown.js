// Markdown as models write it, made into elements: headings, lists, quotes, tables, code, emphasis
// and links. It is not all of CommonMark. HTML in the text stays text; a link is one only if it
// leads to http or https; nothing is loaded.
//
// It is our own because no Python package installs a library for browsers, and the page loads
// nothing from elsewhere.
import { copy, h, iconButton } from "./dom.js";
import { colour } from "./highlight.js";

// quotes in lists in quotes: deeper ones stay text, so that no text can exhaust the stack
const DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const TABLE = /^\|?[ \t]*:?-+:?(?:[ \t]*\|[ \t]*:?-+:?)*[ \t]*\|?$/;
const sources = new WeakMap();

/**
 * Shows `text` in `container`. Blocks that are there already stay, so a growing answer is cheap to
 * show again.
 */
export function show(container, text) {
  const found = blocks(text.replace(/\r\n?/g, "\n").split("\n"));
  found.forEach((block, index) => {
    const source = `${block.kind}\n${block.lines.join("\n")}`;
    const present = container.children[index];
    if (present && sources.get(present) === source) return;
    const node = element(block, 0);
    sources.set(node, source);
    if (present) present.replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > found.length) container.lastElementChild.remove();
}

/** The address if it may be followed, else null. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

// ---- blocks ----

function blocks(lines) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const kind = kindOf(lines, at);
    const end = ENDS[kind](lines, at);
    found.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return found;
}

function kindOf(lines, at) {
  const line = lines[at];
  if (fence(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  return isTable(lines, at) ? "table" : "paragraph";
}

function fence(line) {
  const [start, mark] = FENCE.exec(line) ?? [];
  const rest = mark ? line.slice(start.length).trim() : "";
  if (!mark || (mark[0] === "`" && rest.includes("`"))) return null;
  return { mark, language: rest.split(/\s/)[0] };
}

function isTable(lines, at) {
  const next = lines[at + 1] ?? "";
  return lines[at].includes("|") && next.includes("-") && TABLE.test(next.trim())
    && cells(next).length === cells(lines[at]).length;
}

const ENDS = {
  heading: (lines, at) => at + 1,
  rule: (lines, at) => at + 1,
  quote: (lines, at) => first(lines, at + 1, (line) => !QUOTE.test(line)),
  table: (lines, at) => first(lines, at + 2, (line) => !line.trim() || !line.includes("|")),
  paragraph(lines, at) {
    return first(lines, at + 1, (line, index) => !line.trim() || interrupts(lines, index));
  },
  fence(lines, at) {
    const { mark } = fence(lines[at]);
    const close = first(lines, at + 1, (line) => closes(line, mark));
    return Math.min(close + 1, lines.length);
  },
  list(lines, at) {
    const ordered = isOrdered(lines[at]);
    const indent = ITEM.exec(lines[at])[1].length;
    return first(lines, at + 1, (line, index) => {
      if (!line.trim()) return false;
      const own = indentOf(line);
      if (own > indent + 1) return false;
      if (ITEM.test(line) && !RULE.test(line)) return isOrdered(line) !== ordered;
      return !lines[index - 1].trim() || kindOf(lines, index) !== "paragraph";
    });
  },
};

function first(lines, from, matches) {
  let at = from;
  while (at < lines.length && !matches(lines[at], at)) at += 1;
  return at;
}

function interrupts(lines, at) {
  const kind = kindOf(lines, at);
  // "in\n1984. A year" is no list
  if (kind === "list") return /^ *(?:[-*+]|1[.)]) +\S/.test(lines[at]);
  return kind !== "paragraph";
}

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

function isOrdered(line) {
  return /^ *\d/.test(line);
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function element({ kind, lines }, depth) {
  return MAKERS[kind](lines, depth);
}

function inside(lines, depth) {
  if (depth >= DEPTH) return [lines.join("\n")];
  return blocks(lines).map((block) => element(block, depth + 1));
}

const MAKERS = {
  paragraph: (lines) => h("p", {}, ...inline(lines.map((line) => line.trim()).join("\n"))),
  rule: () => h("hr"),
  quote(lines, depth) {
    const quoted = lines.map((line) => line.replace(QUOTE, ""));
    return h("blockquote", {}, ...inside(quoted, depth));
  },
  heading(lines) {
    const [, marks, text] = HEADING.exec(lines[0]);
    const level = Math.min(6, marks.length + 2); // the page has its own first and second
    return h(`h${level}`, { class: `level-${marks.length}` }, ...inline(withoutClosingMarks(text)));
  },
  fence(lines) {
    const { mark, language } = fence(lines[0]);
    const closed = lines.length > 1 && closes(lines.at(-1), mark);
    const text = lines.slice(1, closed ? -1 : undefined).join("\n");
    const button = iconButton("copy", "Copy the code", () => copy(text, button));
    return h("figure", { class: "code" },
      h("figcaption", {}, h("span", {}, language.slice(0, 30) || "text"), button),
      h("pre", { tabindex: "0", "aria-label": "Code" }, h("code", {}, ...colour(text, language))));
  },
  list(lines, depth) {
    const ordered = isOrdered(lines[0]);
    const number = ordered ? Number.parseInt(lines[0], 10) : 1;
    return h(ordered ? "ol" : "ul", { start: ordered && number !== 1 ? number : null },
      ...items(lines).map((item) => listItem(item, depth)));
  },
  table(lines) {
    const columns = cells(lines[1]).map(alignment);
    const row = (line, tag) => {
      const texts = cells(line);
      return h("tr", {}, ...columns.map((align, index) => {
        return h(tag, { class: align }, ...inline(texts[index] ?? ""));
      }));
    };
    const body = lines.slice(2).map((line) => row(line, "td"));
    return h("div", { class: "table", tabindex: "0" },
      h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, ...body)));
  },
};

// The class of a column, from the cell below its head: ":--", ":-:" or "--:".
function alignment(cell) {
  if (!cell.endsWith(":")) return null;
  return cell.startsWith(":") ? "centre" : "right";
}

function withoutClosingMarks(text) {
  const words = text.trim().split(" ");
  if (words.length > 1 && /^#+$/.test(words.at(-1))) words.pop();
  return words.join(" ").trim();
}

function items(lines) {
  const indent = ITEM.exec(lines[0])[1].length;
  const found = [];
  let width = 0;
  for (const line of lines) {
    const match = indentOf(line) <= indent + 1 ? ITEM.exec(line) : null;
    if (match) {
      width = match[0].length;
      found.push([line.slice(width)]);
    } else {
      found.at(-1).push(line.slice(Math.min(width, indentOf(line))));
    }
  }
  return found;
}

function listItem(lines, depth) {
  const [task, mark] = /^\[([ xX])\] /.exec(lines[0]) ?? [];
  const content = inside(task ? [lines[0].slice(task.length), ...lines.slice(1)] : lines, depth);
  if (content[0] instanceof HTMLParagraphElement) content.splice(0, 1, ...content[0].childNodes);
  if (!task) return h("li", {}, ...content);
  const isDone = mark !== " ";
  const label = isDone ? "done" : "open";
  return h("li", { class: "task" },
    h("input", { type: "checkbox", disabled: true, checked: isDone, "aria-label": label }),
    ...content);
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "");
  const parts = text.split(/(?<!\\)\|/).map((part) => part.trim().replaceAll("\\|", "|"));
  if (parts.length > 1 && parts.at(-1) === "") parts.pop();
  return parts;
}

// ---- within a line ----

const SPECIAL = /[\\`*_~[!<h\n]/g;
const BARE = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const LABEL = 1000; // the longest label and address that are searched for

/** Nodes and strings for text with emphasis, code and links. */
function inline(text, depth = 0) {
  const nodes = [];
  // marks that have no partner further on: looked for once, not once for each
  const missing = new Set();
  let plain = "";
  for (let at = 0; at < text.length;) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    if (next === text.length) break;
    const span = depth < DEPTH ? spanAt(text, next, depth, missing) : null;
    if (span) {
      nodes.push(plain, span.node);
      plain = "";
      at = span.end;
    } else {
      plain += text[next];
      at = next + 1;
    }
  }
  return [...nodes, plain].filter((node) => node !== "");
}

function spanAt(text, at, depth, missing) {
  const letter = text[at];
  if (letter === "\n") return { node: h("br"), end: at + 1 };
  if (letter === "\\") return escaped(text, at);
  if (letter === "`") return codeSpan(text, at, missing);
  if (letter === "[") return link(text, at, at, depth);
  if (letter === "!") return text[at + 1] === "[" ? link(text, at, at + 1, depth) : null;
  if (letter === "<") return pointed(text, at);
  if (letter === "h") return bare(text, at);
  return emphasis(text, at, depth, missing);
}

function escaped(text, at) {
  const next = text[at + 1] ?? "";
  return /[!-/:-@[-`{-~]/.test(next) ? { node: next, end: at + 2 } : null;
}

function codeSpan(text, at, missing) {
  const mark = /`+/y;
  mark.lastIndex = at;
  const [run] = mark.exec(text);
  const from = at + run.length;
  if (missing.has(run)) return { node: run, end: from };
  for (let close = text.indexOf(run, from); close >= 0;) {
    const end = first(text, close, (letter) => letter !== "`");
    if (end - close === run.length) {
      const body = text.slice(from, close).replaceAll("\n", " ");
      const padded = body.length > 2 && body.startsWith(" ") && body.endsWith(" ") && body.trim();
      return { node: h("code", {}, padded ? body.slice(1, -1) : body), end };
    }
    close = text.indexOf(run, end);
  }
  missing.add(run);
  return { node: run, end: from };
}

function link(text, start, open, depth) {
  const close = partner(text, open, "[", "]");
  if (close < 0 || text[close + 1] !== "(") return null;
  const end = partner(text, close + 1, "(", ")");
  if (end < 0) return null;
  const [address] = text.slice(close + 2, end).trim().split(/\s/);
  const href = safeAddress(address.replace(/^<|>$/g, ""));
  if (!href) return null;
  const label = text.slice(open + 1, close);
  return { node: anchor(href, label ? inline(label, depth + 1) : [href]), end: end + 1 };
}

function partner(text, at, opening, closing) {
  let open = 0;
  for (let index = at; index < Math.min(text.length, at + LABEL); index += 1) {
    if (text[index] === "\\") index += 1;
    else if (text[index] === opening) open += 1;
    else if (text[index] === closing && (open -= 1) === 0) return index;
  }
  return -1;
}

function pointed(text, at) {
  const end = text.slice(at, at + LABEL).indexOf(">");
  const href = end > 0 ? safeAddress(text.slice(at + 1, at + end)) : null;
  return href ? { node: anchor(href, [text.slice(at + 1, at + end)]), end: at + end + 1 } : null;
}

function bare(text, at) {
  if (/\w/.test(text[at - 1] ?? "")) return null;
  BARE.lastIndex = at;
  let address = BARE.exec(text)?.[0] ?? "";
  while (/[.,;:!?*_~\]]$/.test(address) || (address.endsWith(")") && !address.includes("("))) {
    address = address.slice(0, -1);
  }
  const href = safeAddress(address);
  return href ? { node: anchor(href, [address]), end: at + address.length } : null;
}

function anchor(href, children) {
  const flat = children.map((child) => {
    return child instanceof HTMLAnchorElement ? child.textContent : child;
  });
  const rel = "noopener noreferrer nofollow";
  return h("a", { href, title: href, target: "_blank", rel }, ...flat);
}

const TAGS = {
  "***": ["strong", "em"],
  "**": ["strong"],
  __: ["strong"],
  "*": ["em"],
  _: ["em"],
  "~~": ["del"],
};

function emphasis(text, at, depth, missing) {
  const end = first(text, at, (letter) => letter !== text[at]);
  const mark = text.slice(at, end);
  const whole = { node: mark, end };
  const tags = TAGS[mark];
  if (!tags || missing.has(mark) || /\s/.test(text[end] ?? " ")) return whole;
  if (mark.startsWith("_") && /\w/.test(text[at - 1] ?? "")) return whole;
  const close = closing(text, end, mark);
  if (close < 0) {
    missing.add(mark);
    return whole;
  }
  const content = inline(text.slice(end, close), depth + 1);
  const [node] = tags.reduceRight((inner, tag) => [h(tag, {}, ...inner)], content);
  return { node, end: close + mark.length };
}

function closing(text, from, mark) {
  for (let at = from; at < text.length; at += 1) {
    if (text[at] === "\\") {
      at += 1;
    } else if (text[at] === "`") {
      at = first(text, at, (letter) => letter !== "`") - 1;
    } else if (text[at] === mark[0]) {
      const end = first(text, at, (letter) => letter !== mark[0]);
      const inWord = mark[0] === "_" && /\w/.test(text[end] ?? "");
      const mayClose = fits(end - at, mark.length) && !/\s/.test(text[at - 1]) && !inWord;
      if (mayClose) return end - mark.length;
      at = end - 1;
    }
  }
  return -1;
}

// A run of three may end one mark inside another: **bold *and italic***.
function fits(run, length) {
  return run === length || (run === 3 && length < 3);
}
