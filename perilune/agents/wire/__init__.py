"""A swarm for another program: JSON-RPC 2.0 in lines, over the standard streams or any others.

rpc      what a line asks, what is wrong with it, how answers look
session  the methods, and the run that they are about
stdio    lines from one file descriptor and to another; nothing else reaches stdout
"""

from perilune.agents.wire.session import PROTOCOL_VERSION, Session, Sink
from perilune.agents.wire.stdio import serve_stdio

__all__ = ["PROTOCOL_VERSION", "Session", "Sink", "serve_stdio"]
