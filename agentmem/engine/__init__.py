"""The engine of a memory, which runs forwards and compacts, and the scheduler, which feeds several memories at once."""

from agentmem.engine.engine import Engine, in_turn
from agentmem.engine.feeding import Want, feed
from agentmem.engine.scheduler import Scheduler

__all__ = ["Engine", "Scheduler", "Want", "feed", "in_turn"]
