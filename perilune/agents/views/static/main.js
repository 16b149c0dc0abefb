"use strict";
// Where the events come from (a stream or the page itself), what is shown of them, and the keys.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const base = data.base, path = encodeURIComponent(data.run_id);
  const events = [];
  let shown = new Fold.Run(), isFollowing = true, isDriven = !data.events, cursor = 0, isDirty = true, tab = "transcript", player = 0;
  let talk = { agent: null, seq: 0, entries: [], isLoading: false, isStale: false, wanted: 0 };

  const rows = new Rows(at("rows"), at("axis"), (id, seq) => open(id, seq));

  function upTo(seq) {
    if (seq < shown.seq) shown = new Fold.Run();
    for (let index = shown.seq; index < events.length && events[index].seq <= seq; index++) shown.add(events[index]);
  }

  function draw() {
    isDirty = false;
    upTo(isFollowing ? events.length : cursor);
    const driven = isDriven || shown.seq < events.length;
    const { state } = Panels.tiles(at("tiles"), shown, driven);
    at("state").textContent = state;
    at("state").className = `pill is-${state}`;
    at("task").textContent = shown.task;
    at("model").textContent = shown.model;
    alerts();
    rows.show(shown, driven);
    if (tab === "critical") Panels.critical(at("critical"), shown, open);
    if (tab === "costs") Panels.costs(at("costs"), shown, open);
    if (tab === "transcript") drawTalk();
    scrubber();
  }

  function alerts() {
    const found = [...shown.approvals.values()].map((request) => h("li", { class: "approval" }, `${request.agent} waits for a person: ${request.name}`));
    for (const one of shown.questions.values()) found.push(h("li", { class: "approval" }, `${one.agent} asks: ${one.text}`));
    if (!shown.status) for (const w of shown.warnings.slice(-2)) found.push(h("li", {}, `${Math.round(100 * w.share)} % of the budget of ${w.quantity} is used (${w.owner})`));
    if (shown.resumed.length) found.push(h("li", {}, `resumed at ${shown.resumed.map((s) => Format.seconds(s)).join(", ")}`));
    if (shown.error) found.push(h("li", { class: "wrong" }, shown.error));
    at("alerts").replaceChildren(...found);
  }

  function scrubber() {
    const range = at("scrub"), last = shown.last;
    range.max = Math.max(1, events.length);
    range.value = isFollowing ? events.length : cursor;
    at("follow").setAttribute("aria-pressed", String(isFollowing));
    at("play").textContent = player ? "❚❚" : "▶";
    at("play").setAttribute("aria-label", player ? "Pause" : "Replay");
    const text = last ? `event ${shown.seq} of ${events.length} · ${last.type.replace(/_/g, " ")}${last.agent ? ` · ${last.agent}` : ""} · ${Format.seconds(shown.elapsed)}` : "no events yet";
    at("where").textContent = text;
    range.setAttribute("aria-valuetext", text);
  }

  let isDrawing = false;
  function soon() {
    isDirty = true;
    if (isDrawing) return;
    isDrawing = true;
    const last = soon.last || 0, wait = Math.max(0, 200 - (performance.now() - last));
    setTimeout(() => requestAnimationFrame(() => { soon.last = performance.now(); isDrawing = false; if (isDirty) draw(); }), wait);
  }

  function go(seq) {
    cursor = Math.max(1, Math.min(events.length, seq));
    isFollowing = false;
    requestAnimationFrame(draw);
  }

  function play() {
    if (player) { clearInterval(player); player = 0; return scrubber(); }
    if (isFollowing || cursor >= events.length) cursor = 1;
    isFollowing = false;
    const stride = Math.max(1, Math.round(events.length / 400));
    player = setInterval(() => {
      cursor = Math.min(events.length, cursor + stride);
      if (cursor >= events.length) { clearInterval(player); player = 0; }
      requestAnimationFrame(draw);
    }, 50);
    return draw();
  }

  function follow() { isFollowing = true; if (player) { clearInterval(player); player = 0; } draw(); }

  function open(id, seq = 0) {
    choose("transcript");
    rows.select(id);
    if (talk.agent !== id) talk = { agent: id, seq: 0, entries: [], isLoading: false, isStale: true, wanted: seq, drawn: null };
    talk.wanted = seq;
    load();
    drawTalk();
  }

  async function load() {
    const mine = talk;
    if (data.transcripts) {
      mine.entries = data.transcripts[mine.agent] || [];
      return;
    }
    if (mine.isLoading) { mine.isStale = true; return; }
    mine.isLoading = true; mine.isStale = false;
    try {
      const id = mine.agent.split("/").map(encodeURIComponent).join("/");
      const answer = await fetch(`${base}api/runs/${path}/agents/${id}?after=${mine.seq}`);
      if (answer.ok) {
        const found = await answer.json();
        mine.entries.push(...found.entries);
        mine.seq = Math.max(mine.seq, found.seq);
      }
    } finally { mine.isLoading = false; }
    if (mine === talk) { soon(); if (mine.isStale) setTimeout(load, 700); }
  }

  function drawTalk() {
    const box = at("transcript"), agent = shown.agents.get(talk.agent);
    const limit = shown.seq, entries = talk.entries.filter((one) => one.seq <= limit);
    const sign = `${talk.agent} ${entries.length}`;
    const [activity, detail] = agent ? shown.activity(agent, isDriven || shown.seq < events.length) : ["not there yet", ""];
    at("who").replaceChildren(h("b", {}, talk.agent || ""), " ", agent ? agent.profile : "", h("span", { class: "quiet" }, ` ${activity}${detail ? `: ${detail}` : ""}`));
    if (talk.drawn !== sign) {
      const nearEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60, grew = talk.drawnAgent === talk.agent && box.childElementCount <= entries.length;
      const hadSome = box.childElementCount > 0;
      if (!grew) box.replaceChildren();
      for (const one of entries.slice(box.childElementCount)) box.append(Panels.entry(one, childOf(one), open));
      if (grew && hadSome && nearEnd && isFollowing && isDriven) box.scrollTop = box.scrollHeight;
      if (!grew) box.scrollTop = 0;
      talk.drawn = sign; talk.drawnAgent = talk.agent;
    }
    if (talk.wanted) {
      const target = box.querySelector(`[data-seq="${Number(talk.wanted)}"]`);
      if (target) {
        box.scrollTop = target.offsetTop - box.offsetTop - 8;
        box.querySelectorAll(".found").forEach((one) => one.classList.remove("found"));
        target.classList.add("found");
        talk.wanted = 0;
      }
    }
  }

  function childOf(one) {
    const call = one.kind === "call" ? shown.calls.get(one.key) : null;
    return call ? call.child : null;
  }

  function choose(name, focus = false) {
    tab = name;
    for (const button of document.querySelectorAll("[role=tab]")) {
      const isIt = button.dataset.tab === name;
      button.setAttribute("aria-selected", String(isIt));
      button.tabIndex = isIt ? 0 : -1;
      at(`panel-${button.dataset.tab}`).hidden = !isIt;
      if (isIt && focus) button.focus();
    }
    soon();
  }

  function received(event) {
    events.push(event);
    if (event.agent === talk.agent || event.type.startsWith("approval")) talk.isStale = true;
    soon();
    if (talk.isStale && !talk.isLoading && talk.agent && !received.timer) received.timer = setTimeout(() => { received.timer = 0; load(); }, 500);
  }

  function listen() {
    const source = new EventSource(`${base}api/runs/${path}/events?view=lean`);
    source.onmessage = (message) => {
      const event = JSON.parse(message.data);
      if (event.seq === events.length + 1) received(event);
    };
    source.addEventListener("driven", (message) => { isDriven = message.data === "true"; soon(); });
    source.addEventListener("end", () => { source.close(); isDriven = false; at("connection").textContent = ""; soon(); });
    source.onerror = () => { at("connection").textContent = "the connection is lost; trying again"; };
    source.onopen = () => { at("connection").textContent = ""; };
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape" && event.target.id === "filter") { event.target.value = ""; rows.filter = ""; rows.layout(); at("rows").focus(); rows.focusRow(); }
      return;
    }
    const actions = { "/": () => at("filter").focus(), "[": () => go(shown.seq - 1), "]": () => go(shown.seq + 1), p: play, f: follow,
      "+": () => rows.zoom(0.5), "=": () => rows.zoom(0.5), "-": () => rows.zoom(2), 0: () => rows.zoom(0), 1: () => choose("transcript"),
      2: () => choose("critical"), 3: () => choose("costs") };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  });
  at("scrub").addEventListener("input", (event) => go(Number(event.target.value)));
  at("play").addEventListener("click", play);
  at("follow").addEventListener("click", follow);
  at("back").addEventListener("click", () => go(shown.seq - 1));
  at("on").addEventListener("click", () => go(shown.seq + 1));
  at("filter").addEventListener("input", (event) => { rows.filter = event.target.value; rows.layout(); });
  at("only").addEventListener("change", (event) => { rows.only = event.target.value; rows.layout(); });
  at("show-path").addEventListener("change", (event) => { rows.showCritical = event.target.checked; rows.draw(); });
  for (const [id, factor] of [["closer", 0.5], ["farther", 2], ["whole", 0]]) at(id).addEventListener("click", () => rows.zoom(factor));
  at("task").addEventListener("click", () => at("task").classList.toggle("open"));
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((button, index) => {
    button.addEventListener("click", () => choose(button.dataset.tab));
    button.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move) choose(tabs[(index + move + tabs.length) % tabs.length].dataset.tab, true);
    });
  });
  window.view = { events, rows, go, get run() { return shown; } };
  open("root");
  if (data.events) { events.push(...data.events); draw(); } else listen();
})();
