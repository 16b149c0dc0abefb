"""A search engine of a few lines over a wide table's pages, and runs of a policy on it."""

import asyncio
import json
import re
import sqlite3
from dataclasses import dataclass, field

from perilune.agents.messages import ChatRequest, Message, ToolCall

SEARCH_TOOLS = ("search", "open_page")
SWARM_TOOLS = ("create_subagent", "assign_task")
MAX_OPEN_CHARS = 1500


class Library:
    """SQLite FTS5 with bm25, titles counting four times; hits are JSON, or text in a layout."""

    def __init__(self, documents, layout=None):
        self.layout = layout
        self.texts = {document.id: document.text for document in documents}
        self._base = sqlite3.connect(":memory:", check_same_thread=False)
        self._base.execute("create virtual table pages using fts5(id unindexed, title, text)")
        self._base.executemany("insert into pages values (?, ?, ?)", documents)

    def find(self, query, k):
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query))
        return self._base.execute(
            "select id, title, snippet(pages, 2, '', '', ' ... ', 12) from pages where pages match ? "
            "order by bm25(pages, 0, 4, 1) limit ?",
            (words, k),
        ).fetchall()

    def search(self, queries, k):
        if self.layout is None:
            found = [(query, self.find(query, k)) for query in queries]
            names = ("doc", "title", "snippet")
            return json.dumps(
                [
                    {"query": query, "hits": [dict(zip(names, hit, strict=True)) for hit in hits]}
                    for query, hits in found
                ]
            )
        parts = []
        for query in queries:
            parts.append(f"Results for: {query}")
            parts += [
                self.layout.format(number=number, id=id, title=title, snippet=snippet)
                for number, (id, title, snippet) in enumerate(self.find(query, k), start=1)
            ]
        return "\n".join(parts)

    def open_page(self, doc, offset=0):
        return self.texts[doc][offset : offset + MAX_OPEN_CHARS]


@dataclass
class Agent:
    """What is counted of one agent and of those that it started."""

    answer: str = ""
    turns: int = 0
    tool_calls: int = 0
    critical_turns: int = 0
    seconds: float = 0.0
    groups: list = field(default_factory=list)


@dataclass
class World:
    """Runs agents; `latency` gives the seconds of a call to the model, `meddle` may replace a sub-agent's result."""

    policy: object
    library: Library
    latency: object = None
    meddle: object = None
    max_turns: int = 400

    async def run(self, prompt, tools, system="You collect information."):
        agent = Agent()
        messages = [Message(role="system", content=system), Message(role="user", content=prompt)]
        profiles = {}
        schemas = [{"type": "function", "function": {"name": name}} for name in tools]
        while True:
            assert agent.turns < self.max_turns, "the policy does not come to an end"
            reply = self.policy(ChatRequest(model="m", messages=messages, tools=schemas))
            messages.append(Message.from_dict(reply.to_dict()))
            agent.turns += 1
            agent.critical_turns += 1
            agent.seconds += self.latency() if self.latency is not None else 0.0
            if not reply.tool_calls:
                agent.answer = reply.content
                return agent
            assert len({call.id for call in reply.tool_calls}) == len(reply.tool_calls)
            agent.tool_calls += len(reply.tool_calls)
            for call in reply.tool_calls:
                if call.name == "create_subagent":
                    arguments = json.loads(call.arguments)
                    profiles[arguments["name"]] = arguments["system_prompt"]
            done = await asyncio.gather(*(self._call(agent, call, profiles) for call in reply.tool_calls))
            children = [child for _, child in done if child is not None]
            if children:
                agent.groups.append(children)
                agent.critical_turns += max(child.critical_turns for child in children)
                agent.seconds += max(child.seconds for child in children)
            for call, (text, _) in zip(reply.tool_calls, done, strict=True):
                messages.append(Message(role="tool", content=text, tool_call_id=call.id))

    async def _call(self, agent, call: ToolCall, profiles):
        arguments = json.loads(call.arguments)
        if call.name == "assign_task":
            child = await self.run(arguments["prompt"], SEARCH_TOOLS, profiles[arguments["agent"]])
            result = {"agent_id": "root/1", "agent": arguments["agent"], "status": "completed", "steps": child.turns}
            result |= {"tool_calls": child.tool_calls, "result": child.answer[:8000]}
            if self.meddle is not None:
                result = self.meddle(result)
            return json.dumps(result), child
        if call.name == "create_subagent":
            return "registered", None
        try:
            return getattr(self.library, call.name)(**arguments), None
        except KeyError as error:
            return f"there is no page {error}", None


def solve(policy, library, task, swarm, **world):
    tools = (*SEARCH_TOOLS, *SWARM_TOOLS) if swarm else SEARCH_TOOLS
    return asyncio.run(World(policy, library, **world).run(task.question, tools))
