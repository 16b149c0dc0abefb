"use strict";
// The tree of agents beside their Gantt bars. Only the rows in sight are in the document, and only those that changed
// are drawn again, so that hundreds of agents stay smooth. Texts reach the page as text nodes, never as markup.
const SVG = "http://www.w3.org/2000/svg";

// Characters that turn the direction of writing around would show a text as another than it is.
const plain = (text) => text.replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value; else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined).map((child) => typeof child === "string" ? plain(child) : child));
  return node;
}

const Format = {
  number: (value) => Math.round(value).toLocaleString("en-US"),
  short(value) {
    if (value < 10000) return Format.number(value);
    return value < 1e6 ? `${(value / 1e3).toFixed(value < 1e5 ? 1 : 0)}k` : `${(value / 1e6).toFixed(2)}M`;
  },
  money: (value) => value === null ? "unknown" : value < 1 ? `$${value.toFixed(4)}` : `$${value.toFixed(2)}`,
  seconds(value) {
    if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
    const minutes = Math.floor(value / 60), rest = Math.floor(value % 60);
    return minutes < 60 ? `${minutes} min ${rest} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  },
};

class Rows {
  constructor(box, axis, onSelect) {
    Object.assign(this, { box, axis, onSelect, run: new Fold.Run(), driven: true, critical: new Map(), rows: [], drawn: new Map(),
      selected: "root", focus: 0, collapsed: new Set(), from: 0, to: null, filter: "", only: "all", showCritical: true });
    this.inner = h("div", { class: "inner" });
    box.append(this.inner);
    box.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()), { passive: true });
    box.addEventListener("keydown", (event) => this.key(event));
    box.addEventListener("click", (event) => this.click(event));
    new ResizeObserver(() => this.draw()).observe(box);
  }

  show(run, driven) {
    this.run = run; this.driven = driven;
    const { path } = Fold.criticalPath(run);
    this.critical = new Map();
    for (const segment of path) {
      if (!this.critical.has(segment.agent)) this.critical.set(segment.agent, []);
      this.critical.get(segment.agent).push(segment);
    }
    this.layout();
  }

  layout() {
    const words = this.filter.toLowerCase(), rows = [];
    const fits = (agent) => {
      if (words && !`${agent.id} ${agent.profile} ${agent.task}`.toLowerCase().includes(words)) return false;
      const activity = this.run.activity(agent, this.driven)[0];
      if (this.only === "running") return !agent.status;
      if (this.only === "failed") return ["failed", "cancelled", "limit"].includes(activity);
      return this.only === "critical" ? this.critical.has(agent.id) : true;
    };
    const walk = (agent, level) => {
      if (fits(agent)) rows.push({ key: agent.id, agent, level });
      for (const group of this.run.groups(agent)) {
        const key = `${agent.id}#${group.turn.n}`, children = group.children.filter(fits);
        if (!children.length) continue;
        rows.push({ key, group, level: level + 1, parent: agent, shown: children.length });
        if (!this.collapsed.has(key)) group.children.forEach((child) => walk(child, level + 2));
      }
    };
    if (this.run.root) walk(this.run.root, 1);
    this.rows = rows;
    this.focus = Math.min(this.focus, Math.max(0, rows.length - 1));
    this.draw();
  }

  get whole() { const seconds = Math.max(this.run.elapsed, 1); return this.run.status ? 1.01 * seconds : nice(seconds, ENDS_OF_AXES); }

  get end() { return this.to === null ? this.whole : this.to; }

  draw() {
    const height = 28, top = this.box.scrollTop, seen = this.box.clientHeight || 600;
    this.inner.style.height = `${this.rows.length * height}px`;
    const first = Math.max(0, Math.floor(top / height) - 6), last = Math.min(this.rows.length, Math.ceil((top + seen) / height) + 6);
    const wanted = new Map();
    for (let index = first; index < last; index++) wanted.set(this.rows[index].key, index);
    for (const [key, one] of this.drawn) if (!wanted.has(key)) { one.node.remove(); this.drawn.delete(key); }
    const hadFocus = this.box.contains(document.activeElement) && document.activeElement !== this.box;
    for (const [key, index] of wanted) this.drawRow(key, index, height);
    if (hadFocus && !this.box.contains(document.activeElement)) this.focusRow(false);
    this.drawAxis();
  }

  drawRow(key, index, height) {
    const row = this.rows[index], sign = this.signature(row, index), known = this.drawn.get(key);
    if (known && known.sign === sign) return;
    const node = row.agent ? this.agentRow(row, index) : this.groupRow(row, index);
    node.style.top = `${index * height}px`;
    if (known) {
      const focused = document.activeElement === known.node;
      known.node.replaceWith(node);
      if (focused) node.focus({ preventScroll: true });
    } else this.inner.append(node);
    this.drawn.set(key, { node, sign });
  }

  signature(row, index) {
    const shared = `${index} ${this.from} ${this.end} ${this.focus === index} ${this.showCritical} ${this.driven} ${this.rows.length}`;
    if (!row.agent) return `${shared} ${this.run.seq} ${this.collapsed.has(row.key)}`;
    const agent = row.agent, path = this.critical.get(agent.id);
    const tick = agent.status ? "" : this.run.elapsed;
    return `${shared} ${agent.version} ${agent.spawned} ${tick} ${path ? path.length : 0} ${this.selected === agent.id}`;
  }

  shell(row, index, label, kind) {
    return h("div", { class: `row ${kind}`, role: "treeitem", id: `row-${index}`, "aria-level": row.level, "aria-setsize": this.rows.length,
      "aria-posinset": index + 1, "data-key": row.key, "aria-label": label, tabindex: index === this.focus ? 0 : -1,
      "aria-selected": row.agent ? String(this.selected === row.agent.id) : null,
      "aria-expanded": row.group ? String(!this.collapsed.has(row.key)) : null });
  }

  agentRow(row, index) {
    const agent = row.agent, [activity, detail] = this.run.activity(agent, this.driven), isCritical = this.critical.has(agent.id);
    const tokens = agent.prompt + agent.completion;
    const label = `${agent.id}, ${agent.profile}, ${activity} ${detail}, ${agent.steps} steps, ${tokens} tokens${isCritical ? ", on the critical path" : ""}`;
    const node = this.shell(row, index, label, isCritical && this.showCritical ? "agent critical" : "agent");
    node.append(
      h("span", { class: `name level-${Math.min(row.level, 5)}`, title: agent.task },
        h("b", {}, agent.id), " ", h("span", { class: "quiet" }, agent.parent === null ? agent.profile : agent.task || agent.profile)),
      h("span", { class: `activity is-${activity.replace(" ", "-")}`, title: detail }, h("i", { class: "dot", "aria-hidden": "true" }),
        detail && !agent.status ? `${activity}: ${detail}` : activity),
      h("span", { class: "amount" }, String(agent.steps)),
      h("span", { class: "amount" }, Format.short(tokens)),
      h("span", { class: "amount" }, Format.money(agent.cost)),
      this.lane((draw) => this.bars(agent, draw)));
    return node;
  }

  groupRow(row, index) {
    const { turn, children } = row.group, counts = new Map();
    for (const child of children) {
      const activity = this.run.activity(child, this.driven)[0];
      counts.set(activity, (counts.get(activity) || 0) + 1);
    }
    const words = [...counts].map(([name, count]) => `${count} ${name}`).join(", ");
    const begun = Math.min(...children.map((c) => c.spawned)), ended = Math.max(...children.map((c) => c.ended === null ? this.run.elapsed : c.ended));
    const node = this.shell(row, index, `group of ${children.length} started by turn ${turn.n}: ${words}`, "group");
    const open = !this.collapsed.has(row.key);
    node.append(
      h("span", { class: `name level-${Math.min(row.level, 5)}` }, h("span", { class: "fold", "aria-hidden": "true" }, open ? "▾" : "▸"),
        `turn ${turn.n}: ${children.length} sub-agents`),
      h("span", { class: "words quiet", title: words }, words),
      this.lane((draw) => {
        draw("span", begun, ended, `${children.length} sub-agents, ${Format.seconds(ended - begun)}`, 0, 12, 3);
        if (!open) this.density(children, draw);
      }));
    return node;
  }

  // How many of a folded group run, as steps over time.
  density(children, draw) {
    const parts = 80, begin = this.from, width = (this.end - begin) / parts;
    for (let part = 0; part < parts; part++) {
      const at = begin + (part + 0.5) * width;
      const running = children.filter((c) => c.started !== null && c.started <= at && (c.ended === null ? this.run.elapsed : c.ended) > at).length;
      const tall = 20 * running / children.length;
      if (running) draw("llm", at - width / 2, at + width / 2, `${running} run`, 0, 24 - tall, tall);
    }
  }

  lane(fill) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("class", "lane"); svg.setAttribute("aria-hidden", "true");
    const span = this.end - this.from;
    fill((kind, from, to, hint, seq = 0, y = 6, tall = 13) => {
      if (to < this.from || from > this.end) return;
      const left = Math.max(0, (from - this.from) / span), right = Math.min(1, (to - this.from) / span);
      const rect = document.createElementNS(SVG, "rect");
      rect.setAttribute("class", `bar ${kind}`);
      rect.setAttribute("x", `${(100 * left).toFixed(3)}%`);
      rect.setAttribute("width", `${Math.max(0.12, 100 * (right - left)).toFixed(3)}%`);
      rect.setAttribute("y", y); rect.setAttribute("height", tall);
      if (seq) rect.dataset.seq = seq;
      if (hint) { const title = document.createElementNS(SVG, "title"); title.textContent = hint; rect.append(title); }
      svg.append(rect);
    });
    return svg;
  }

  bars(agent, draw) {
    const now = this.run.elapsed;
    if (agent.started === null) draw("queue", agent.spawned, agent.ended === null ? now : agent.ended, "waits for a place");
    else if (agent.started > agent.spawned) draw("queue", agent.spawned, agent.started, `waited ${Format.seconds(agent.started - agent.spawned)} for a place`);
    for (const turn of agent.turns) this.turnBars(agent, turn, now, draw);
    for (const one of agent.asked) draw("approval", one.from, one.to === null ? now : one.to, `${one.name} waits for a person`);
    if (!this.showCritical) return;
    for (const segment of this.critical.get(agent.id) || []) draw("path", segment.from, segment.to, "", segment.seq, 21, 4);
  }

  turnBars(agent, turn, now, draw) {
    const hint = `turn ${turn.n}: `;
    if (turn.broken !== null) draw("broken", turn.started, turn.broken, `${hint}no answer (${turn.how})`, turn.seq);
    else if (turn.ended === null) {
      const kind = turn.retries.length ? "retry" : "llm";
      draw(`${kind} open`, turn.started, now, `${hint}under way, ${turn.retries.length} retries`);
    } else {
      const asked = Math.max(turn.started, turn.ended - turn.total), queued = Math.min(asked, turn.started + turn.queued);
      if (queued - turn.started > 0.001) draw("queue", turn.started, queued, `${hint}queued ${Format.seconds(turn.queued)}`, turn.seq);
      if (turn.retries.length) draw("retry", turn.retries[0].at, asked, `${hint}${turn.retries.length} retries (${turn.retries[0].fault})`, turn.seq);
      draw("llm", asked, turn.ended, `${hint}${Format.seconds(turn.total)}, ${turn.prompt} tokens in, ${turn.completion} out`, turn.seq);
    }
    const end = (call) => call.ended !== null ? call.ended : agent.ended !== null ? agent.ended : now;
    const waits = turn.calls.filter((call) => call.awaited);
    if (waits.length) draw("wait", Math.min(...waits.map((c) => c.started)), Math.max(...waits.map(end)), `${waits.length} sub-agents`, 0, 11, 3);
    for (const call of turn.calls) {
      if (call.child || (call.ended === null && agent.asked.some((one) => one.id === call.key && one.to === null))) continue;
      draw(`${call.error ? "tool wrong" : "tool"}${call.ended === null ? " open" : ""}`, call.started, end(call),
        `${call.name}: ${Format.seconds(end(call) - call.started)}${call.error ? ", error" : ""}`, call.seq);
    }
  }

  drawAxis() {
    const span = this.end - this.from, sign = `${this.from} ${this.end} ${this.run.elapsed} ${this.box.scrollHeight > this.box.clientHeight} ${innerWidth}`;
    if (this.axisSign === sign) return;
    this.axisSign = sign;
    // The axis stands outside the box that scrolls; its bar of scrolling is as wide as the difference.
    this.axis.closest(".head").style.paddingRight = `${this.box.offsetWidth - this.box.clientWidth}px`;
    const least = span / Math.max(2, Math.floor(this.axis.clientWidth / 70)), marks = [];
    const step = STEPS_OF_AXES.find((one) => one >= least) || nice(least, [1, 2, 5, 10]), isLong = this.end >= 120 && step >= 1;
    for (let at = Math.ceil(this.from / step) * step; at <= this.end + 1e-9; at += step) {
      const mark = h("span", { class: "tick" }, isLong ? `${Math.floor(at / 60)}:${String(Math.round(at % 60)).padStart(2, "0")}` : `${+at.toFixed(3)} s`);
      mark.style.left = `${100 * (at - this.from) / span}%`;
      if ((this.end - at) / span * this.axis.clientWidth < 45) mark.classList.add("last");
      marks.push(mark);
    }
    const cursor = h("span", { class: "cursor" });
    cursor.style.left = `${Math.min(100, Math.max(0, 100 * (this.run.elapsed - this.from) / span))}%`;
    this.axis.replaceChildren(...marks, cursor);
  }

  zoom(factor) {
    if (factor === 0) { this.from = 0; this.to = null; return this.draw(); }
    const span = (this.end - this.from) * factor, middle = (this.from + this.end) / 2;
    return this.window(middle - span / 2, span);
  }

  pan(share) { const span = this.end - this.from; this.window(this.from + share * span, span); }

  window(from, span) {
    const whole = this.whole;
    if (span >= whole) { this.from = 0; this.to = null; } else {
      this.from = Math.max(0, Math.min(from, whole - span));
      this.to = this.from + Math.max(span, 0.05);
    }
    this.draw();
  }

  click(event) {
    const node = event.target.closest(".row");
    if (!node) return;
    this.focus = this.rows.findIndex((row) => row.key === node.dataset.key);
    this.activate(Number(event.target.dataset ? event.target.dataset.seq : 0) || 0);
  }

  activate(seq = 0) {
    const row = this.rows[this.focus];
    if (!row) return;
    if (row.group) {
      if (!this.collapsed.delete(row.key)) this.collapsed.add(row.key);
      this.layout();
    } else {
      this.selected = row.agent.id;
      this.draw();
      this.onSelect(row.agent.id, seq);
    }
    this.focusRow();
  }

  select(id) {
    this.selected = id;
    const index = this.rows.findIndex((row) => row.agent && row.agent.id === id);
    if (index >= 0) { this.focus = index; this.reveal(); }
    this.draw();
  }

  key(event) {
    const row = this.rows[this.focus], page = Math.max(1, Math.floor(this.box.clientHeight / 28) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.ctrlKey || event.metaKey || event.altKey || !row) return;
    if (event.shiftKey && event.key.startsWith("Arrow")) {
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") { event.preventDefault(); this.pan(event.key === "ArrowLeft" ? -0.2 : 0.2); }
    } else if (event.key in moves) {
      event.preventDefault();
      this.focus = Math.max(0, Math.min(this.rows.length - 1, this.focus + moves[event.key]));
      this.focusRow();
    } else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); this.activate(); }
    else if (row.group && ((event.key === "ArrowLeft") !== this.collapsed.has(row.key)) && event.key.startsWith("Arrow")) { event.preventDefault(); this.activate(); }
  }

  reveal() {
    const top = this.focus * 28, box = this.box;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + 28 > box.scrollTop + box.clientHeight) box.scrollTop = top + 28 - box.clientHeight;
  }

  focusRow(reveal = true) {
    if (reveal) this.reveal();
    this.draw();
    const row = this.rows[this.focus], known = row && this.drawn.get(row.key);
    if (known) known.node.focus({ preventScroll: true });
  }
}

// Of a run under way the axis grows in steps, so that bars stay where they are between them.
const STEPS_OF_AXES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200];
const ENDS_OF_AXES = [1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9, 10];

function nice(value, steps) {
  const power = 10 ** Math.floor(Math.log10(value)), share = value / power;
  return power * (steps.find((step) => share <= step + 1e-9) || 10);
}
