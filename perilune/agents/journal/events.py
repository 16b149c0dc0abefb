"""One event of a run. Its payload has these keys; those with a question mark, where there is something to say.

| type | payload |
|---|---|
| run_started | task, model, models?, config, tools, rules, recipe, version, payload?: "hashed" without what was said |
| run_resumed | owner, model, models?, config, tools, rules, recipe, version |
| run_stopped | error?: what stopped it, if it was not on purpose |
| cancel_requested | reason |
| agent_spawned | parent, profile, call, depth, messages, background?, model?, item?: its place in a call for many,
| | fork?: how many messages of the parent's history stand before its own
| agent_resumed | call, text, background?: one that had ended has another task |
| result_delivered | child, text: the agent's next turn reads what one in the background came to |
| agent_started | queued_s: it has a place among those that run |
| turn_started | turn, hash, max_tokens |
| turn_retry | turn, attempt, fault, status, error, wait_s, usage, cost_usd |
| turn_finished | turn, message, finish_reason, usage, model, cost_usd, queued_s, first_token_s, total_s,
| | admitted_calls?, dropped_calls?
| turn_summarised | the same, of a call that wrote down the state before a history was dropped |
| turn_failed | turn, fault, error, usage?, cost_usd? |
| turn_lost | turn |
| tool_started | call, name, arguments, effect |
| tool_progress | call, done, total: how far it is; total null where the tool does not know, at most once a second |
| tool_finished | call, name, text, is_error, elapsed_s, note?, images? |
| profile_created | name, system_prompt, by |
| tool_changed | tool: as models are offered it from here on, its server describes it anew |
| last_words | status, text: the limit that was met; the agent is asked once more, without tools |
| asked_for_more | text: its answer was too short |
| context_compacted | policy, summary |
| budget_warning | owner, quantity, share |
| approval_requested | id, agent, name, arguments, rule |
| approval_resolved | id, allowed, scope, by |
| question_asked, question_answered | id, text |
| steered | text |
| agent_finished | status, result, error, active_s?: seconds that count for its limit of time |
| run_finished | status, answer, error |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened; a run is what its events add up to."""

    seq: int
    """Number in the run, counted from 1."""
    type: str
    agent: str
    """Whose it is; "" for the run's own."""
    cause: int
    """Number of the event that made this one possible; 0 for the first."""
    wall: float
    """Unix time in seconds, for people; durations are differences of `at`."""
    at: float
    """Seconds on a clock that only goes forward; begins anew when a run is resumed."""
    payload: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "seq": self.seq,
            "type": self.type,
            "agent": self.agent,
            "cause": self.cause,
            "wall": self.wall,
            "at": self.at,
            "payload": dict(self.payload),
        }
