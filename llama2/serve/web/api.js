// The server's OpenAI API, as far as a chat needs it: the list of models and answers as a stream of
// events.

const KEY = "llama2/key";

/**
 * What the server or the network refused. `status` is 0 for the network; `wait` is in seconds, 0 if
 * unknown.
 */
export class ApiError extends Error {
  constructor(message, status = 0, wait = 0) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

/** Keeps the API key until the tab is closed. */
export function setKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    throw new ApiError("the browser does not keep the key", 401);
  }
}

/** Whether a key is sent. */
export function hasKey() {
  return "Authorization" in authorization();
}

/** The names of the models the server has. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  return data.map(({ id }) => id);
}

/** The chunks of one chat completion, as parsed objects. ApiError if it fails or breaks off. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "the server failed", 500);
    yield chunk;
  }
  throw new ApiError("the answer broke off: the connection has ended");
}

async function request(path, { headers = {}, ...options } = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization() } });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("the server cannot be reached");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

function authorization() {
  let key = null;
  try {
    key = sessionStorage.getItem(KEY);
  } catch {
    // Without storage there is no key.
  }
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  const { message = `the server answered ${response.status}`, param } = body?.error ?? {};
  // without the field, which a user does not know
  const text = message.startsWith(`${param}: `) ? message.slice(param.length + 2) : message;
  const seconds = Number.isFinite(wait) ? Math.min(Math.max(wait, 0), 3600) : 0;
  return new ApiError(text, response.status, seconds);
}

// The data of server-sent events: lines "data: ...", an empty line ends an event, everything else
// is of no interest.
async function* events(body) {
  let data = [];
  for await (const line of linesOf(body)) {
    if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    } else if (line.startsWith("data:")) {
      data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => Promise.reject(broken(error)));
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) yield line.endsWith("\r") ? line.slice(0, -1) : line;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function broken(error) {
  if (error.name === "AbortError") return error;
  return new ApiError("the answer broke off: the connection was lost");
}
