// The page: conversations, what is asked and answered, and the settings.
"use strict";

const Chat = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const input = byId("input");
  const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
  let chat = fresh();
  let running = null; // {controller, chat} of the answer that is being written

  function fresh() {
    const id = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    return { id, title: "", messages: [] };
  }

  function settings() {
    const found = Store.settings();
    const values = { system: typeof found.system === "string" ? found.system : "" };
    for (const name of NUMBERS) if (typeof found[name] === "number") values[name] = found[name];
    return values;
  }

  function requestBody() {
    const { system, ...numbers } = settings();
    const said = chat.messages.filter((one) => !one.error).map(({ role, content }) => ({ role, content }));
    const messages = system ? [{ role: "system", content: system }, ...said] : said;
    return { model: data.model, messages, stream: true, stream_options: { include_usage: true }, ...numbers };
  }

  async function send() {
    const text = input.value.trim();
    if (!text || running) return;
    input.value = "";
    grow();
    chat.messages.push({ role: "user", content: text });
    chat.title = chat.title || text.slice(0, 80);
    drawLast(false);
    await answer();
  }

  async function answer() {
    const entry = { role: "assistant", content: "", reasoning: "" };
    const body = requestBody();
    const owner = chat;
    chat.messages.push(entry);
    const box = drawLast(true);
    running = { controller: new AbortController(), chat: owner };
    refresh();
    const begun = performance.now();
    let first = 0;
    let usage = null;
    let isDue = false;
    const draw = () => {
      isDue = false;
      box.show();
      View.follow();
    };
    const take = (event) => {
      usage = event.usage || usage;
      for (const { delta, finish_reason } of event.choices) {
        if (delta.content || delta.reasoning_content) first = first || performance.now();
        entry.content += delta.content || "";
        entry.reasoning += delta.reasoning_content || "";
        if (finish_reason === "length") entry.note = "Ended at the longest answer allowed.";
      }
      if (!isDue) {
        isDue = true;
        requestAnimationFrame(draw);
      }
    };
    try {
      await Stream.chat(body, { key: Store.key(), signal: running.controller.signal, take });
      entry.note = [entry.note, speed(usage, begun, first)].filter(Boolean).join(" ");
    } catch (error) {
      if (error.name === "AbortError") entry.note = "Stopped.";
      else entry.error = error.message;
      if (error.status === 401) openSettings();
    }
    running = null;
    box.finish();
    View.follow();
    save(owner);
    refresh();
  }

  function speed(usage, begun, first) {
    if (!usage || !first) return "";
    const seconds = (performance.now() - first) / 1000;
    const rate = usage.completion_tokens > 1 && seconds > 0 ? ` · ${((usage.completion_tokens - 1) / seconds).toFixed(0)} per second` : "";
    return `${usage.completion_tokens} tokens${rate} · first after ${((first - begun) / 1000).toFixed(2)} s`;
  }

  // An answer that was stopped or failed before a word of it came is not part of what was said.
  function save(one) {
    const kept = one.messages.filter((message) => message.role === "user" || message.content || message.error);
    if (!Store.saveChat({ ...one, messages: kept })) console.warn("no room to keep this conversation");
    drawList();
  }

  function drawLast(isWriting) {
    byId("empty").hidden = true;
    const made = View.message(chat.messages.at(-1), { retry, edit, isWriting });
    View.follow(true);
    return made;
  }

  function drawAll() {
    View.clear();
    byId("empty").hidden = chat.messages.length > 0;
    for (const entry of chat.messages) View.message(entry, { retry, edit, isWriting: false });
    View.follow(true);
    drawList();
    refresh();
  }

  function cutAt(entry) {
    const place = chat.messages.indexOf(entry);
    if (running || place < 0) return false;
    chat.messages = chat.messages.slice(0, place);
    return true;
  }

  function retry(entry) {
    if (!cutAt(entry)) return;
    drawAll();
    answer();
  }

  function edit(entry) {
    if (!cutAt(entry)) return;
    input.value = entry.content;
    drawAll();
    grow();
    input.focus();
  }

  function show(one) {
    stop();
    chat = one;
    drawAll();
    closeDrawer();
    input.focus();
  }

  function stop() {
    if (running) running.controller.abort();
  }

  function drawList() {
    const list = byId("chats");
    list.replaceChildren(...Store.chats().map((one) => {
      const row = View.make("li", one.id === chat.id ? "current" : "");
      const open = View.button(one.title || "Untitled", "open", () => show(one));
      const remove = View.button("×", "remove", () => {
        Store.removeChat(one.id);
        if (one.id === chat.id) show(fresh());
        else drawList();
      });
      remove.setAttribute("aria-label", `Delete ${one.title || "conversation"}`);
      row.append(open, remove);
      return row;
    }));
  }

  function refresh() {
    byId("send").hidden = Boolean(running);
    byId("stop").hidden = !running;
    byId("send").disabled = !input.value.trim();
  }

  function grow() {
    input.style.height = "auto";
    const border = input.offsetHeight - input.clientHeight;
    input.style.height = `${Math.min(input.scrollHeight + border, 240)}px`;
    input.style.overflowY = input.scrollHeight + border > 240 ? "auto" : "hidden";
    refresh();
  }

  function openSettings() {
    const values = settings();
    byId("system").value = values.system;
    for (const name of NUMBERS) byId(name).value = values[name] ?? "";
    byId("key").value = Store.key();
    byId("settings").showModal();
  }

  function saveSettings() {
    const values = { system: byId("system").value };
    for (const name of NUMBERS) {
      const field = byId(name);
      if (field.value !== "" && field.checkValidity()) values[name] = field.valueAsNumber;
    }
    Store.saveSettings(values);
    Store.saveKey(byId("key").value.trim());
  }

  const closeDrawer = () => document.body.classList.remove("drawer");

  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("settings").open) return;
    if (document.body.classList.contains("drawer")) closeDrawer();
    else stop();
  });
  byId("stop").addEventListener("click", stop);
  byId("new").addEventListener("click", () => show(fresh()));
  byId("open-settings").addEventListener("click", openSettings);
  byId("settings-form").addEventListener("submit", saveSettings);
  byId("cancel").addEventListener("click", () => byId("settings").close());
  byId("reset").addEventListener("click", () => byId("settings-form").reset());
  byId("menu").addEventListener("click", () => document.body.classList.toggle("drawer"));
  byId("shade").addEventListener("click", closeDrawer);
  drawAll();
  grow();
  input.focus();

  return { get current() { return chat; }, get isWriting() { return Boolean(running); } };
})();
