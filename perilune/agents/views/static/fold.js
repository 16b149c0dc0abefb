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
      if (agent.parent !== null && (agent.started === null || agent.waits)) return ["queued", ""];
      if (agent.open) {
        if (!agent.open.retries.length) return ["thinking", ""];
        const fault = agent.open.retries[agent.open.retries.length - 1].fault;
        return fault === "rate_limit" || fault === "overload" ? ["rate limited", ""] : ["retrying", fault];
      }
      for (const request of this.approvals.values()) if (request.agent === agent.id) return ["approval", request.name];
      for (const one of this.questions.values()) if (one.agent === agent.id) return ["question", one.text];
      const open = lastCalls(agent).filter((call) => call.ended === null);
      const tools = open.filter((call) => call.name !== "assign_task" && call.name !== "swarm_map");
      if (tools.length) return ["tool", tools[0].name + howFar(tools[0]) + (tools.length > 1 ? ` +${tools.length - 1}` : "")];
      const working = agent.given.filter((stint) => stint.end === null).length || open.length;
      return working ? ["sub-agents", String(working)] : ["idle", ""];
    }

    // Of each turn that set sub-agents to work, what they do, and those of them that are new.
    groups(agent) {
      return agent.turns.map((turn) => ({ turn, stints: turn.ended === null ? [] : agent.given.filter((stint) => stint.turn === turn.n) }))
        .filter((group) => group.stints.length)
        .map((group) => ({ ...group, children: group.stints.filter((stint) => stint.isFirst).map((stint) => this.agents.get(stint.agent)) }));
    }
  }

  function howFar(call) {
    if (!call.progress) return "";
    const { done, total } = call.progress;
    return total === null ? ` ${Math.floor(done)}` : ` ${Math.floor(100 * done / total)} %`;
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

  // A stint: what a sub-agent does for its parent, see stints.py. `readAt` is the first turn of the parent that has the result.
  function give(run, agent, p, at) {
    const parent = run.agents.get(agent.parent);
    if (!parent) return;
    const background = Boolean(p.background), turn = parent.steps - 1;
    agent.stint = { agent: agent.id, call: p.call, turn, begin: agent.steps, end: null, background, readAt: background ? null : turn + 1,
      spawned: at, started: null, ended: null, isFirst: agent.stint === null };
    parent.given.push(agent.stint);
    parent.version++;
    const call = run.calls.get(p.call || "");
    if (call) Object.assign(call, { child: agent.id, awaited: !background });
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
        given: [], stint: null, waits: false, asked: [], steps: 0, toolCalls: 0, prompt: 0, cached: 0, completion: 0, cost: 0, retries: 0, version: 1, seq: event.seq });
      give(run, run.agents.get(event.agent), p, at);
    },
    agent_resumed(run, p, agent, at) {
      if (!agent) return;
      Object.assign(agent, { ended: null, status: null, error: null, waits: true });
      give(run, agent, p, at);
    },
    agent_started(run, p, agent, at) {
      if (!agent) return;
      agent.waits = false;
      if (agent.started === null) agent.started = at;
      if (agent.stint && agent.stint.started === null) agent.stint.started = at;
    },
    result_delivered(run, p, agent) {
      const child = run.agents.get(p.child);
      if (agent && child && child.stint) child.stint.readAt = agent.steps;
    },
    agent_finished(run, p, agent, at, event) {
      if (!agent) return;
      close(agent, at, p.status, event);
      for (const one of agent.asked) if (one.to === null) { one.to = at; run.approvals.delete(one.id); run.questions.delete(one.id); }
      Object.assign(agent, { ended: at, status: p.status, error: p.error });
      if (agent.stint) Object.assign(agent.stint, { ended: at, end: agent.steps });
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
    tool_progress(run, p) { const call = run.calls.get(p.call); if (call) call.progress = p; },
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
        child: null, awaited: false, progress: null, seq: event.seq };
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
    return run.root ? longest(run, run.root, 0, Infinity, weight) : { total: 0, path: [] };
  }

  const longer = (one, other) => !one || other.total > one.total ? other : one;

  function longest(run, agent, begin, end, weight) {
    const [ofTurn, ofCall] = WEIGHTS[weight], results = new Map();
    let best = { total: 0, path: [] };
    for (const turn of agent.turns) {
      if (turn.ended === null || turn.n < begin || turn.n >= end) continue;
      if (results.has(turn.n)) best = longer(best, results.get(turn.n));
      results.delete(turn.n);
      const segment = { agent: agent.id, turn: turn.n, call: null, name: "turn", weight: ofTurn(turn), from: turn.started, to: turn.ended, seq: turn.seq };
      best = { total: best.total + segment.weight, path: [...best.path, segment] };
      const branches = turn.calls.filter((call) => !call.awaited).map((call) => [turn.n + 1, direct(agent, turn, call, ofCall)]);
      for (const stint of agent.given) if (stint.turn === turn.n) branches.push([stint.readAt, branch(run, stint, weight)]);
      const chosen = new Map();
      for (const [place, way] of branches) chosen.set(place, longer(chosen.get(place), way));
      for (const [place, way] of chosen) {
        results.set(place, longer(results.get(place), { total: best.total + way.total, path: [...best.path, ...way.path] }));
      }
    }
    for (const found of results.values()) {
      if (found.total > best.total || (found.total === best.total && found.path.length > best.path.length)) best = found;
    }
    return best;
  }

  function direct(agent, turn, call, ofCall) {
    const value = ofCall(call);
    return { total: value, path: [{ agent: agent.id, turn: turn.n, call: call.key, name: call.name, weight: value,
      from: call.started, to: call.ended === null ? call.started : call.ended, seq: call.seq }] };
  }

  const endOf = (stint) => stint.end === null ? Infinity : stint.end;

  function branch(run, stint, weight) {
    const child = run.agents.get(stint.agent), begun = stint.started === null ? stint.spawned : stint.started;
    const waited = weight === "seconds" ? begun - stint.spawned : 0;
    const { total, path } = longest(run, child, stint.begin, endOf(stint), weight);
    const queue = waited > 0 ? [{ agent: child.id, turn: -1, call: stint.call, name: "queue", weight: waited, from: stint.spawned, to: begun, seq: child.seq }] : [];
    return { total: waited + total, path: [...queue, ...path] };
  }

  function criticalSteps(run, agent, begin, end, serve) {
    const results = new Map();
    let length = 0;
    for (let turn = begin; turn < Math.min(end, agent.steps); turn++) {
      length = 1 + Math.max(length, results.get(turn) || 0);
      results.delete(turn);
      for (const stint of agent.given) {
        if (stint.turn !== turn) continue;
        const steps = criticalSteps(run, run.agents.get(stint.agent), stint.begin, endOf(stint));
        const there = serve ? serve(length, steps) : length + steps;
        results.set(stint.readAt, Math.max(there, results.get(stint.readAt) || 0));
      }
    }
    return Math.max(length, ...results.values());
  }

  // Places of sub-agents; who comes is served when one is free.
  function places(slots) {
    const free = [];
    return (at, length) => {
      if (free.length >= slots) {
        let least = 0;
        for (let i = 1; i < free.length; i++) if (free[i] < free[least]) least = i;
        at = Math.max(at, free.splice(least, 1)[0]);
      }
      free.push(at + length);
      return at + length;
    };
  }

  function totals(run) {
    const agents = [...run.agents.values()], groups = agents.flatMap((agent) => run.groups(agent)), costs = agents.map((a) => a.cost);
    const sum = (name) => agents.reduce((all, agent) => all + agent[name], 0);
    const steps = sum("steps"), critical = run.root ? criticalSteps(run, run.root, 0, Infinity) : 0;
    return { steps, critical_steps: critical, tool_calls: sum("toolCalls"), prompt_tokens: sum("prompt"),
      cached_tokens: sum("cached"), completion_tokens: sum("completion"), cost_usd: costs.includes(null) ? null : sum("cost"),
      wall_s: run.elapsed, subagents: Math.max(0, agents.length - 1), parallelism: critical ? steps / critical : 0,
      average_group: groups.length ? groups.reduce((all, g) => all + g.stints.length, 0) / groups.length : 0, peak_running: peak(run, agents) };
  }

  function peak(run, agents) {
    const marks = [];
    for (const stint of agents.flatMap((agent) => agent.given)) {
      if (stint.started !== null) marks.push([stint.started, 1], [stint.ended === null ? run.elapsed : stint.ended, -1]);
    }
    marks.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    let running = 0, most = 0;
    for (const [, change] of marks) { running += change; most = Math.max(most, running); }
    return most;
  }

  function speedups(run) {
    const all = totals(run).steps;
    return [1, 8, 32, 100, Infinity].map((slots) => {
      const steps = run.root ? criticalSteps(run, run.root, 0, Infinity, places(slots)) : 0;
      return { slots, steps, ratio: steps ? all / steps : 0 };
    });
  }

  return { Run, criticalPath, totals, speedups };
})();
