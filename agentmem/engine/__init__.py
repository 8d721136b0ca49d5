"""The engine makes room in a memory, compacts, re-bases and commits. The scheduler feeds several memories at once."""

from agentmem.engine.engine import Engine, in_turn
from agentmem.engine.feeding import Want, feed
from agentmem.engine.scheduler import Scheduler

__all__ = ["Engine", "Scheduler", "Want", "feed", "in_turn"]
