"""What is asked of a model, and how its answers are judged."""

from cogsym.sweeps.tasks.choice import Choice
from cogsym.sweeps.tasks.kinds import register_task_kind
from cogsym.sweeps.tasks.text import RunningText
from cogsym.sweeps.tasks.translation import Translation

register_task_kind("choice", Choice)
register_task_kind("text", RunningText)
register_task_kind("translation", Translation)
