"use strict";
// What stands beside the rows: totals, a transcript, the critical path, costs.
const Panels = (() => {
  const IMAGE = /^data:image\/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+$/;

  function tiles(box, run, driven) {
    const t = Fold.totals(run);
    const pairs = [
      ["elapsed", Format.seconds(t.wall_s), "seconds that the run was driven"],
      ["steps", Format.number(t.steps), "turns of all agents"],
      ["critical steps", Format.number(t.critical_steps), "turns that had to be taken one after another"],
      ["parallelism", `${t.parallelism.toFixed(1)}×`, "steps for each critical step; what it cost stands beside it"],
      ["tool calls", Format.number(t.tool_calls), ""],
      ["tokens in", Format.short(t.prompt_tokens), `${Format.number(t.prompt_tokens)}, of them ${Format.number(t.cached_tokens)} cached`],
      ["tokens out", Format.short(t.completion_tokens), Format.number(t.completion_tokens)],
      ["cost", Format.money(t.cost_usd), "at the prices that the run knew"],
      ["sub-agents", `${t.subagents}`, `at most ${t.peak_running} at a time, ${t.average_group.toFixed(1)} a group`],
    ];
    box.replaceChildren(...pairs.map(([name, value, hint]) => h("div", { class: "tile", title: hint }, h("dt", {}, name), h("dd", {}, value))));
    const state = run.status || (driven ? "running" : run.seq ? "interrupted" : "loading");
    return { totals: t, state };
  }

  function totalsLine(run) {
    const t = Fold.totals(run);
    return h("p", { class: "totals" }, `In all: ${Format.number(t.steps)} steps, ${Format.number(t.tool_calls)} tool calls, `
      + `${Format.number(t.prompt_tokens)} tokens in, ${Format.number(t.completion_tokens)} out, ${Format.money(t.cost_usd)}, ${Format.seconds(t.wall_s)}.`);
  }

  function table(heads, rows, words = 1) {
    return h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ...heads.map((head, i) => h("th", { scope: "col", class: i < words ? null : "amount" }, head)))),
      h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map((cell, i) => h(i ? "td" : "th", { scope: i ? null : "row", class: i < words ? null : "amount" }, cell)))))));
  }

  function link(id, open, seq) {
    const button = h("button", { type: "button", class: "link" }, id);
    button.addEventListener("click", () => open(id, seq));
    return button;
  }

  function critical(box, run, open) {
    const { total, path } = Fold.criticalPath(run);
    const faster = Fold.speedups(run);
    box.replaceChildren(
      h("p", { class: "quiet" }, "The longest chain of turns, calls and waits. To be faster, the run had to shorten one of these."),
      table(["agent", "turn", "what", "seconds", "share"], path.map((s) => [link(s.agent, open, s.seq), s.turn < 0 ? "" : String(s.turn), s.name,
        s.weight.toFixed(2), total ? `${Math.round(100 * s.weight / total)} %` : ""]), 3),
      h("p", {}, `${Format.seconds(total)} on the critical path of ${Format.seconds(run.elapsed)} that the run took.`),
      h("h3", {}, "With so many sub-agents at a time"),
      table(["places", "steps until the end", "speed-up in steps"], faster.map((f) => [f.slots === Infinity ? "unlimited" : String(f.slots), Format.number(f.steps), `${f.ratio.toFixed(2)}×`])),
      totalsLine(run));
  }

  function costs(box, run, open) {
    const profiles = new Map(), agents = [...run.agents.values()];
    for (const agent of agents) {
      if (!profiles.has(agent.profile)) profiles.set(agent.profile, []);
      profiles.get(agent.profile).push(agent);
    }
    const heads = ["cost", "steps", "calls", "in", "cached", "out"];
    const cells = (group) => {
      const sum = (name) => group.reduce((all, agent) => all + agent[name], 0);
      const cost = group.some((agent) => agent.cost === null) ? null : sum("cost");
      return [Format.money(cost), ...["steps", "toolCalls", "prompt", "cached", "completion"].map((name) => Format.short(sum(name)))];
    };
    const dearest = agents.slice().sort((a, b) => (b.cost || 0) - (a.cost || 0) || b.prompt - a.prompt);
    box.replaceChildren(
      h("p", { class: "quiet" }, "Tokens in, of them cached, and tokens out; the numbers in full are in the API and in perilune swarm cost."),
      table(["profile", ...heads], [...profiles].map(([name, group]) => [`${name} (${group.length})`, ...cells(group)])),
      totalsLine(run),
      h("h3", {}, "By agent, the dearest first"),
      table(["agent", ...heads], dearest.map((agent) => [link(agent.id, open, 0), ...cells([agent])])));
  }

  const VOICES = { system: "system", user: "user", assistant: "model", call: "call", result: "result", note: "" };

  function entry(one, child, open) {
    const title = [VOICES[one.kind], one.title].filter(Boolean).join(" · ");
    const body = [];
    if (one.reasoning) body.push(h("details", {}, h("summary", {}, "thoughts"), h("pre", { class: "quiet" }, one.reasoning)));
    if (one.text) body.push(long(one));
    for (const url of one.images || []) if (IMAGE.test(url)) body.push(h("img", { src: url, alt: "picture that the tool returned" }));
    return h("article", { class: `entry ${one.kind}${one.is_error ? " wrong" : ""}`, "data-seq": one.seq },
      h("h4", {}, h("span", {}, title, one.is_error && one.kind === "result" ? " (error)" : "", child ? " to " : "", child ? link(child, open, 0) : ""),
        h("small", {}, one.facts || "")), ...body);
  }

  function long(one) {
    const text = h("pre", {}, pretty(one));
    if (one.text.length < 1500) return text;
    return h("details", {}, h("summary", {}, `${Format.number(one.text.length)} characters`), text);
  }

  function pretty(one) {
    if (one.kind !== "call") return one.text;
    try { return JSON.stringify(JSON.parse(one.text), null, 1).replace(/^\{\n|\n\}$/g, ""); } catch { return one.text; }
  }

  return { tiles, critical, costs, entry };
})();
