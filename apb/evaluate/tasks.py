"""The table of tasks that are generated."""

from __future__ import annotations

from collections.abc import Mapping

from apb.evaluate import counting, needles, questions, tracing
from apb.evaluate.draft import Task
from apb.evaluate.match import match_all, match_part

# Answers may be as long as in RULER, and begin as the prompts say, as there.
TASKS: Mapping[str, Task] = {
    **{name: Task(draft, match_all, 128) for name, draft in needles.DRAFTS.items()},
    **{name: Task(draft, match_all, 30) for name, draft in tracing.DRAFTS.items()},
    "cwe": Task(counting.common_words, match_all, 120),
    "fwe": Task(counting.frequent_words, match_all, 50),
    **{name: Task(draft, match_part, 32) for name, draft in questions.DRAFTS.items()},
}
RULER = tuple(name for name in TASKS if name != "kv_retrieval")
"""The thirteen of Hsieh et al. 2024."""
PROSE = "prose"
"""Real text to go on with: no question, but likelihoods and KL to exact attention."""
GROUPS: Mapping[str, tuple[str, ...]] = {"ruler": RULER, "all": (*TASKS, PROSE)}
