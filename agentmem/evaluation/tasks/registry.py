"""Import the provider ``agentmem/MODEL`` and all tasks, so that inspect_ai's entry point registers them."""

from agentmem.evaluation.tasks.aime import aime
from agentmem.evaluation.tasks.instructions import instructions
from agentmem.evaluation.tasks.many_shot import many_shot
from agentmem.evaluation.tasks.maths import maths
from agentmem.evaluation.tasks.needle import needle
from agentmem.evaluation.tasks.provider import agentmem
from agentmem.evaluation.tasks.qa import qa

__all__ = ["agentmem", "aime", "instructions", "many_shot", "maths", "needle", "qa"]
