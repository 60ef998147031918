// One answer as it is drawn: text, and what it cost. The result is written into a `version` of the
// conversation: {model, content, finish, tokens, exact, rate, delay, error}. `finish` is null while
// it runs, then "stop", "length", "cancelled" or "error".
import { ApiError, chat } from "./api.js";

export function version(model) {
  return { model, content: "", finish: null, tokens: 0 };
}

/**
 * Asks for an answer and writes it into `version`; `changed` is called after every part. Never
 * throws.
 */
export async function draw(version, body, signal, changed) {
  const begun = performance.now();
  let start = 0;
  let finish = null;
  try {
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    for await (const chunk of chat(streamed, signal)) {
      const [choice] = chunk.choices ?? [];
      if (choice?.delta?.content) {
        start ||= performance.now();
        version.content += choice.delta.content;
        version.tokens += 1; // a part is about a token, until the server has counted them
      }
      finish = choice?.finish_reason ?? finish;
      if (chunk.usage) {
        Object.assign(version, { tokens: chunk.usage.completion_tokens, exact: true });
      }
      measure(version, begun, start);
      changed();
    }
    version.finish = finish ?? "stop";
  } catch (error) {
    fail(version, error, signal);
  }
  changed();
}

function fail(version, error, signal) {
  version.finish = signal.aborted ? "cancelled" : "error";
  if (signal.aborted) return;
  // another error is a defect of this page or of the server's stream
  if (!(error instanceof ApiError)) console.error(error);
  const { status = 0, wait = 0 } = error;
  version.error = { message: error.message, status, until: wait ? Date.now() + wait * 1000 : 0 };
}

function measure(version, begun, start) {
  if (!start) return;
  version.delay = (start - begun) / 1000;
  const seconds = (performance.now() - start) / 1000;
  if (version.tokens > 1 && seconds > 0.05) version.rate = (version.tokens - 1) / seconds;
}

/** What an answer cost, in words; `brief` leaves out what is read once a day. */
export function cost({ tokens, exact, rate, delay, finish }, brief = false) {
  if (!tokens) return "";
  const parts = [`${exact ? "" : "≈ "}${tokens} token${tokens === 1 ? "" : "s"}`];
  if (rate) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  if (delay && finish && !brief) parts.push(`first after ${delay.toFixed(2)} s`);
  if (finish === "length") parts.push("cut at the length limit");
  if (finish === "cancelled") parts.push("stopped");
  return parts.join(" · ");
}
