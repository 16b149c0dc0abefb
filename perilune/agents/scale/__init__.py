"""Sub-agents as tasks of a Ray cluster. The run itself, with its journal and its budgets, stays where it was started.

A sub-agent's task gets a copy of its state and drives it with the same code. Whatever happens there goes back as
messages: events are written down here, in order; before a call that has an effect, the task waits until its event is on
the disk. So a task can die at any moment: what it has told is all that there is to know.

desk      the actor that both sides leave messages at
messages  what they say
worker    a task's side; driver: the run's side; link: how it listens
cluster   Ray itself: whether it is there, and a cluster of this machine alone
"""

from perilune.agents.scale.cluster import local_cluster
from perilune.agents.scale.driver import RayAgents
from perilune.agents.scale.messages import RemoteAgents

__all__ = ["RayAgents", "RemoteAgents", "local_cluster"]
