"""Runs memories: makes room under the cap, compacts, re-bases, commits; feeds several sequences in one forward."""

from agentmem.engine.engine import Engine, in_turn
from agentmem.engine.feeding import Want, feed
from agentmem.engine.scheduler import Scheduler

__all__ = ["Engine", "Scheduler", "Want", "feed", "in_turn"]
