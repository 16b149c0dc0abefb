"use strict";
// A run as its events add up to it: the same rules as timeline.py and critical.py, so that any moment of a run can be
// shown without asking a server. tests/agents/views compare the numbers of both.
const Fold = (() => {
  const ENDS = { completed: "done", cancelled: "cancelled", error: "failed", timeout: "failed",
    context_overflow: "failed", stuck: "failed" };

  class Run {
    constructor() {
      Object.assign(this, { agents: new Map(), calls: new Map(), approvals: new Map(), questions: new Map(), warnings: [], seq: 0, at: 0,
        elapsed: 0, offset: 0, wall: 0, task: "", model: "", status: null, error: null, resumed: [], last: null });
    }

    add(event) {
      const p = event.payload;
      if (event.type === "run_started" || event.type === "run_resumed") this.offset = this.elapsed - event.at;
      this.elapsed = event.at + this.offset;
      this.seq = event.seq; this.wall = event.wall; this.last = event;
      const agent = this.agents.get(event.agent), handler = HANDLERS[event.type];
      if (handler) handler(this, p, agent, this.elapsed, event);
      if (agent) agent.version++;
    }

    get root() { return this.agents.get("root"); }

    activity(agent, driven = true) {
      if (agent.status) return [ENDS[agent.status] || "limit", agent.status === "completed" ? "" : agent.error || agent.status];
      if (!driven) return ["interrupted", ""];
      if (agent.parent !== null && agent.started === null) return ["queued", ""];
      if (agent.open) {
        if (!agent.open.retries.length) return ["thinking", ""];
        const fault = agent.open.retries[agent.open.retries.length - 1].fault;
        return fault === "rate_limit" || fault === "overload" ? ["rate limited", ""] : ["retrying", fault];
      }
      for (const request of this.approvals.values()) if (request.agent === agent.id) return ["approval", request.name];
      for (const one of this.questions.values()) if (one.agent === agent.id) return ["question", one.text];
      const open = lastCalls(agent).filter((call) => call.ended === null);
      const tools = open.filter((call) => call.name !== "assign_task");
      if (tools.length) return ["tool", tools[0].name + (tools.length > 1 ? ` +${tools.length - 1}` : "")];
      return open.length ? ["sub-agents", String(open.length)] : ["idle", ""];
    }

    groups(agent) {
      return agent.turns.map((turn) => ({ turn, children: turn.calls.filter((c) => c.child).map((c) => this.agents.get(c.child)) }))
        .filter((group) => group.children.length);
    }
  }

  const lastCalls = (agent) => agent.turns.length ? agent.turns[agent.turns.length - 1].calls : [];

  function close(agent, at, how, event) {
    if (agent.open) Object.assign(agent.open, { broken: at, how, seq: event.seq });
    agent.open = null;
  }

  function answeredBy(run, waiting, id, at) {
    const known = waiting.get(id), asker = known && run.agents.get(known.agent);
    waiting.delete(id);
    if (asker) { asker.asked.find((one) => one.id === id).to = at; asker.version++; }
  }

  const HANDLERS = {
    run_started(run, p) { run.task = p.task; run.model = p.model; },
    run_resumed(run, p, agent, at) { run.resumed.push(at); },
    run_finished(run, p) { run.status = p.status; run.error = p.error; },
    budget_warning(run, p, agent, at) { run.warnings.push({ at, ...p }); },
    approval_requested(run, p, agent, at) {
      run.approvals.set(p.id, { ...p, at });
      const asker = run.agents.get(p.agent);
      if (asker) { asker.asked.push({ id: p.id, name: p.name, from: at, to: null }); asker.version++; }
    },
    approval_resolved(run, p, agent, at) { answeredBy(run, run.approvals, p.id, at); },
    question_asked(run, p, agent, at) {
      const id = p.id.split(":").slice(0, -2).join(":"), asker = run.agents.get(id);
      run.questions.set(p.id, { ...p, agent: id });
      if (asker) { asker.asked.push({ id: p.id, name: "a question", from: at, to: null }); asker.version++; }
    },
    question_answered(run, p, agent, at) { answeredBy(run, run.questions, p.id, at); },
    agent_spawned(run, p, known, at, event) {
      run.agents.set(event.agent, { id: event.agent, parent: p.parent, profile: p.profile, depth: p.depth, task: p.task || "",
        spawned: at, started: p.parent === null ? at : null, ended: null, status: null, error: null, turns: [], open: null,
        asked: [], steps: 0, toolCalls: 0, prompt: 0, cached: 0, completion: 0, cost: 0, retries: 0, version: 1, seq: event.seq });
      const call = run.calls.get(p.call || "");
      if (call) call.child = event.agent;
      const parent = run.agents.get(p.parent);
      if (parent) parent.version++;
    },
    agent_started(run, p, agent, at) { if (agent && agent.started === null) agent.started = at; },
    agent_finished(run, p, agent, at, event) {
      if (!agent) return;
      close(agent, at, p.status, event);
      for (const one of agent.asked) if (one.to === null) { one.to = at; run.approvals.delete(one.id); run.questions.delete(one.id); }
      Object.assign(agent, { ended: at, status: p.status, error: p.error });
    },
    turn_started(run, p, agent, at) {
      if (!agent) return;
      agent.open = { n: p.turn, started: at, ended: null, broken: null, how: "", queued: 0, total: 0, retries: [], prompt: 0,
        cached: 0, completion: 0, cost: 0, calls: [], seq: 0 };
      agent.turns.push(agent.open);
    },
    turn_retry(run, p, agent, at) {
      if (agent) pay(agent, p);
      if (agent && agent.open) { agent.open.retries.push({ at, ...p }); agent.retries++; }
    },
    turn_failed(run, p, agent, at, event) { if (agent) { pay(agent, p); close(agent, at, p.fault, event); } },
    turn_lost(run, p, agent, at, event) { if (agent) { pay(agent, p); close(agent, at, "lost", event); } },
    turn_finished: answered,
    turn_summarised: answered,
    tool_started(run, p, agent, at) { const call = run.calls.get(p.call); if (call) call.started = at; },
    tool_finished(run, p, agent, at, event) {
      const call = run.calls.get(p.call);
      if (call) Object.assign(call, { ended: at, error: p.is_error, seq: event.seq });
      answeredBy(run, run.questions, p.call, at); // one that nobody answered in time
    },
  };

  // What an attempt took counts, whether it was answered or not.
  function pay(agent, p) {
    if (!p.usage) return;
    agent.prompt += p.usage.prompt_tokens; agent.cached += p.usage.cached_tokens; agent.completion += p.usage.completion_tokens;
    agent.cost = p.cost_usd === null || agent.cost === null ? null : agent.cost + p.cost_usd;
  }

  function answered(run, p, agent, at, event) {
    if (!agent || !agent.turns.length) return;
    const turn = agent.turns[agent.turns.length - 1], usage = p.usage;
    Object.assign(turn, { ended: at, queued: p.queued_s, total: p.total_s, prompt: usage.prompt_tokens,
      cached: usage.cached_tokens, completion: usage.completion_tokens, cost: p.cost_usd, seq: event.seq });
    agent.open = null;
    agent.steps++;
    pay(agent, p);
    if (event.type === "turn_summarised") return;
    (p.message.tool_calls || []).forEach((asked, index) => {
      const call = { key: `${agent.id}:${turn.n}:${index}`, name: asked.function.name, started: at, ended: null, error: false,
        child: null, seq: event.seq };
      turn.calls.push(call);
      run.calls.set(call.key, call);
    });
    agent.toolCalls += turn.calls.length;
  }

  const WEIGHTS = {
    seconds: [(turn) => (turn.ended === null ? turn.started : turn.ended) - turn.started,
      (call) => (call.ended === null ? call.started : call.ended) - call.started],
    steps: [() => 1, () => 0],
    tokens: [(turn) => turn.completion, () => 0],
  };

  function criticalPath(run, weight = "seconds") {
    return run.root ? longest(run, run.root, weight) : { total: 0, path: [] };
  }

  function longest(run, agent, weight) {
    const [ofTurn, ofCall] = WEIGHTS[weight];
    let total = 0;
    const path = [];
    for (const turn of agent.turns) {
      if (turn.ended === null) continue;
      path.push({ agent: agent.id, turn: turn.n, call: null, name: "turn", weight: ofTurn(turn), from: turn.started, to: turn.ended, seq: turn.seq });
      total += ofTurn(turn);
      let best = null;
      for (const call of turn.calls) {
        const found = branch(run, agent, turn, call, weight, ofCall);
        if (!best || found.total > best.total) best = found;
      }
      if (best) { total += best.total; path.push(...best.path); }
    }
    return { total, path };
  }

  function branch(run, agent, turn, call, weight, ofCall) {
    if (call.child === null) {
      const value = ofCall(call);
      return { total: value, path: [{ agent: agent.id, turn: turn.n, call: call.key, name: call.name, weight: value,
        from: call.started, to: call.ended === null ? call.started : call.ended, seq: call.seq }] };
    }
    const child = run.agents.get(call.child);
    const begun = child.started === null ? child.spawned : child.started;
    const waited = weight === "seconds" ? begun - child.spawned : 0;
    const { total, path } = longest(run, child, weight);
    const queue = waited > 0 ? [{ agent: child.id, turn: -1, call: call.key, name: "queue", weight: waited, from: child.spawned, to: begun, seq: child.seq }] : [];
    return { total: waited + total, path: [...queue, ...path] };
  }

  function deepSteps(run, agent, slots) {
    return agent.turns.filter((turn) => turn.ended !== null).reduce((sum, turn) => {
      const group = turn.calls.filter((call) => call.child).map((call) => run.agents.get(call.child));
      const lengths = slots === Infinity ? group.map((child) => deepSteps(run, child, slots)) : group.map((child) => child.steps);
      return sum + 1 + scheduled(lengths, slots);
    }, 0);
  }

  function scheduled(lengths, slots) {
    if (slots >= lengths.length) return Math.max(0, ...lengths);
    const free = new Array(slots).fill(0);
    for (const length of lengths) {
      let least = 0;
      for (let i = 1; i < slots; i++) if (free[i] < free[least]) least = i;
      free[least] += length;
    }
    return Math.max(...free);
  }

  function totals(run) {
    const agents = [...run.agents.values()], groups = agents.flatMap((agent) => run.groups(agent)), costs = agents.map((a) => a.cost);
    const sum = (name) => agents.reduce((all, agent) => all + agent[name], 0);
    const steps = sum("steps"), critical = run.root ? deepSteps(run, run.root, Infinity) : 0;
    return { steps, critical_steps: critical, tool_calls: sum("toolCalls"), prompt_tokens: sum("prompt"),
      cached_tokens: sum("cached"), completion_tokens: sum("completion"), cost_usd: costs.includes(null) ? null : sum("cost"),
      wall_s: run.elapsed, subagents: Math.max(0, agents.length - 1), parallelism: critical ? steps / critical : 0,
      average_group: groups.length ? groups.reduce((all, g) => all + g.children.length, 0) / groups.length : 0, peak_running: peak(run, agents) };
  }

  function peak(run, agents) {
    const marks = [];
    for (const agent of agents) {
      if (agent.parent === null || agent.started === null) continue;
      marks.push([agent.started, 1], [agent.ended === null ? run.elapsed : agent.ended, -1]);
    }
    marks.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    let running = 0, most = 0;
    for (const [, change] of marks) { running += change; most = Math.max(most, running); }
    return most;
  }

  function speedups(run) {
    const all = totals(run).steps;
    return [1, 8, 32, 100, Infinity].map((slots) => {
      const steps = run.root ? deepSteps(run, run.root, slots) : 0;
      return { slots, steps, ratio: steps ? all / steps : 0 };
    });
  }

  return { Run, criticalPath, totals, speedups };
})();
