// Conversations as files: JSON Lines of the records that `llama2 sft` trains on and `/save` in the
// terminal writes. One line is {"messages": [{"role", "content"}, ...]}; roles alternate, and the
// last turn is an answer.

/**
 * The messages of a conversation as the API and files want them; questions without an answer are
 * left out.
 */
export function history(conversation, end = conversation.messages.length) {
  const messages = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  for (let at = 0; at + 1 < end; at += 2) {
    const answer = shown(conversation.messages[at + 1]);
    if (!answer?.content) continue;
    messages.push({ role: "user", content: conversation.messages[at].content },
      { role: "assistant", content: answer.content });
  }
  return messages;
}

/** The version of an answer that counts, or undefined while the user has not picked one. */
export function shown(message) {
  return message.versions[message.shown];
}

/**
 * Conversations as JSON Lines; those without any answer have nothing to be learnt from and are left
 * out.
 */
export function toLines(conversations) {
  return conversations
    .map((each) => ({ messages: history(each), metadata: { title: each.title } }))
    .filter(({ messages }) => messages.some(({ role }) => role === "assistant"))
    .map((record) => `${JSON.stringify(record)}\n`)
    .join("");
}

/**
 * What `toLines` wrote as `[{title, system, messages}]`. An Error names the first line that is no
 * conversation.
 */
export function fromLines(text) {
  return text.split("\n").flatMap((line, index) => {
    return line.trim() ? [fromLine(line, index + 1)] : [];
  });
}

function fromLine(line, number) {
  const record = parsed(line, number);
  const system = record.messages[0]?.role === "system" ? record.messages[0].content : "";
  const turns = record.messages.slice(record.messages[0]?.role === "system" ? 1 : 0);
  turns.forEach(({ role, content }, index) => {
    const expected = index % 2 ? "assistant" : "user";
    const turn = `line ${number}: turn ${index + 1}`;
    if (role !== expected) throw new Error(`${turn} is '${role}', expected '${expected}'`);
    if (typeof content !== "string") throw new Error(`${turn} has no text`);
  });
  if (!turns.length || turns.length % 2) {
    throw new Error(`line ${number}: the last turn must be an answer`);
  }
  if (typeof system !== "string") throw new Error(`line ${number}: the system prompt is no text`);
  const title = typeof record.metadata?.title === "string" ? record.metadata.title : "";
  return { title, system, messages: turns.map(message) };
}

function parsed(line, number) {
  let record;
  try {
    record = JSON.parse(line);
  } catch {
    throw new Error(`line ${number}: not JSON`);
  }
  const messages = record?.messages;
  const isObject = (each) => each !== null && typeof each === "object";
  if (!Array.isArray(messages) || !messages.every(isObject)) {
    throw new Error(`line ${number}: not a conversation, it has no "messages"`);
  }
  return record;
}

function message({ role, content }) {
  if (role === "user") return { role, content };
  return { role, versions: [{ content, model: "", finish: "stop" }], shown: 0 };
}
