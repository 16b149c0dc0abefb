// One request to the server: its answer piece by piece.
"use strict";

const Stream = (() => {
  async function failure(response) {
    let text = `The server answered ${response.status}.`;
    try {
      text = (await response.json()).error.message || text;
    } catch {
      // Whatever answered was no server of this kind; the status has to do.
    }
    const error = new Error(text);
    error.status = response.status;
    return error;
  }

  // Call take(event) with each event; resolves when the stream is complete.
  async function read(response, take) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("The answer broke off: the connection was lost.");
      held += value;
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice(6);
        if (data === "[DONE]") return;
        const found = JSON.parse(data);
        if (found.error) throw new Error(found.error.message);
        take(found);
      }
    }
  }

  async function chat(body, { key, signal, take }) {
    const headers = { "content-type": "application/json" };
    if (key) headers.authorization = `Bearer ${key}`;
    const response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
    if (!response.ok) throw await failure(response);
    await read(response, take);
  }

  return { chat };
})();
