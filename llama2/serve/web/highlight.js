// Colours for code: comments, strings, numbers and the words that most languages share. A block in
// a language that is not known here stays plain, which is better than wrongly coloured. Our own for
// the reason that markdown.js gives.
import { h } from "./dom.js";

const LONGEST = 20000;
const STRING = String.raw`"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'`;
const NUMBER = String.raw`\b(?:0x[\da-fA-F]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const WORD = String.raw`[A-Za-z_$][\w$]*`;
const HASH = String.raw`#[^\n]*`;
const SLASHES = String.raw`//[^\n]*|/\*[^]*?(?:\*/|$)`;

const words = (text) => new Set(text.split(" "));
const C_WORDS = "auto break case catch class const continue default delete do double else enum "
  + "export extends extern false final float fn for func function if impl implements import in int "
  + "interface let long match mod mut namespace new null nullptr package private protected pub "
  + "public return self static string struct super switch template this throw trait true try type "
  + "typedef typename undefined union unsigned use using val var virtual void while async await "
  + "bool boolean char defer go chan map range from of instanceof typeof yield";
const PYTHON_WORDS = "and as assert async await break class continue def del elif else except "
  + "False finally for from global if import in is lambda None nonlocal not or pass raise return "
  + "self True try while with yield match case";
const SHELL_WORDS = "if then else elif fi for while do done case esac function in return export "
  + "local echo cd set";
const SQL_WORDS = "select from where join left right inner outer on group by order having limit "
  + "insert into values update set delete create table index view primary key foreign references "
  + "not null and or as distinct union all case when then else end with is in like between exists "
  + "drop alter";

const TRIPLE = String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)`;
const FAMILIES = [
  { names: "python py python3", words: words(PYTHON_WORDS), rest: `${HASH}|${TRIPLE}` },
  {
    names: "javascript js typescript ts jsx tsx java c cpp c++ h csharp cs go rust rs swift "
      + "kotlin kt scala php dart zig",
    words: words(C_WORDS),
    rest: `${SLASHES}|${"`(?:\\\\.|[^`\\\\])*`"}`,
  },
  {
    names: "bash sh shell zsh console dockerfile makefile ruby rb r perl",
    words: words(SHELL_WORDS),
    rest: HASH,
  },
  { names: "yaml yml toml ini", words: words("true false null yes no"), rest: HASH },
  { names: "json jsonc jsonl", words: words("true false null"), rest: SLASHES },
  {
    names: "sql",
    words: words(SQL_WORDS),
    rest: String.raw`--[^\n]*|/\*[^]*?(?:\*/|$)`,
    anyCase: true,
  },
];
const BY_NAME = new Map(FAMILIES.flatMap((family) => family.names.split(" ").map((name) => [name, {
  ...family,
  pattern: new RegExp(`(${family.rest})|(${STRING})|(${NUMBER})|(${WORD})`, "g"),
}])));

/** Nodes and strings that together hold exactly `text`. */
export function colour(text, language) {
  const family = BY_NAME.get(language.toLowerCase());
  if (!family || text.length > LONGEST) return [text];
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(family.pattern)) {
    const kind = kindOf(match, family);
    if (!kind) continue;
    parts.push(text.slice(end, match.index), h("span", { class: kind }, match[0]));
    end = match.index + match[0].length;
  }
  return [...parts, text.slice(end)];
}

function kindOf([whole, rest, string, number, word], family) {
  if (rest) return /^["'`]/.test(whole) ? "string" : "comment";
  if (string) return "string";
  if (number) return "number";
  return family.words.has(family.anyCase ? word.toLowerCase() : word) ? "keyword" : null;
}
