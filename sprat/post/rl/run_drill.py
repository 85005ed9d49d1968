"""The fire drill before a run on the user's questions: their verifier is tried with hacks of their own problems.

It costs no answer of the model, so it comes before the gate. A verifier that pays is refused by a sentence that shows
what it paid; ``fire_drill = "accept"`` takes the risk, and the run keeps what was paid, so that its report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.post.rl.fire_drill import run_drill
from sprat.post.rl.problem_mix import ProblemMix
from sprat.post.rl.rewards import BatchReward, TaskJudge
from sprat.post.rl.run_gate import distinct_problems
from sprat.tasks import Task
from sprat.tokens import Tokenizer

PROBLEMS = 64  # of which those are tried whose answers differ


def drill_verifier(
    mix: ProblemMix,
    tasks: Sequence[Task],
    reward: BatchReward | None,
    tokenizer: Tokenizer,
    config: RLRunConfig,
    name: str,
    on_news: Callable[[str], None],
) -> dict[str, Any]:
    """What came of it, for the run's facts; nothing where it is off.

    Args:
        tasks: whose judges pay where there is no ``reward``.
        name: of the reward, for errors.

    Raises:
        TrainingError: it pays answers that are wrong, and nobody accepts that; or it failed on every answer.
    """
    if config.fire_drill == "off":
        return {}
    problems = [problem for _, problem in distinct_problems(mix, PROBLEMS)]
    thinks = tokenizer.chat_format.thinking_prompt is not None
    tags = tokenizer.chat_format.think_tags if thinks else None
    drill = run_drill(reward or TaskJudge(tasks), problems, think_tags=tags)
    if config.fire_drill == "refuse":
        drill.raise_if_failed(f"fire drill of reward {name}")
    found = f"{drill.num_hacks} known hacks of {drill.num_problems} problems"
    news = [f"{drill.failure}; accepted by fire_drill=accept" if drill.failure else "none was paid"]
    on_news("; ".join([f"the fire drill: {found}", *news, *([drill.warning] if drill.warning else [])]))
    return {"fire_drill": {**drill.to_dict(), "accepted": bool(drill.failure)}}
