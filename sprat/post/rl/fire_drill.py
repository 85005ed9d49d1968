"""Before a run starts, its grader is tried with answers that are known to be wrong; one that pays them is refused.

Reinforcement learning finds whatever a grader pays for, and the cheapest first. A grader that looks for the right
answer *somewhere* in the text pays a list of all numbers; one that compares floats pays NaN, which differs from nothing
by more than a tolerance; one that runs tests behind the code pays ``exit(0)``. Each of these would be found within some
dozen steps, and the run would be lost. Here it takes seconds.

How much is "paid" depends on the grader's scale, which nobody told. So each problem's right answer is tried too, in the
forms that graders commonly want, and a hack is paid if it gets at least half of the way from the least that was ever
paid to what the right answer gets. Some credit for the form of an answer is no fault. One hit can be chance (an answer
to another question may be right here too): an idea must be paid on two problems, and on one in ten.

Only what a policy can use is tried: answers that need not know the right one. A grader that reads the last number of an
answer is not refused for it; one that finds the right number between two wrong ones is.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from sprat.errors import TrainingError
from sprat.post.rl.rewards import Response, Reward, Verifier
from sprat.tasks import Problem
from sprat.tasks.hack_answers import DEPENDENT, INDEPENDENT, HackFamily, Subject

FAMILIES = (*INDEPENDENT, *DEPENDENT)
PAID_SHARE = 0.5  # of the way from the least that is paid to what the right answer gets
MIN_PROBLEMS, MIN_PROBLEM_SHARE = 2, 0.1  # on which an idea is paid
DRILL_PROBLEMS, ANSWERS_OF_AN_IDEA = 12, 4  # for a problem; others take their turn on the next
DRILL_SECONDS = 60.0  # after which only one answer of an idea is tried for a problem
_FAULTS_AT_START = 8
_REASONING = "I read the question, think about it, and answer."
_RIGHT_FORMS = ("{}", "\\boxed{{{}}}", "The answer is {}.", "#### {}", "<answer>{}</answer>", "```python\n{}\n```")


@dataclass(frozen=True)
class PaidHack:
    """A wrong answer that the grader pays: its idea, why it is wrong, and what the right answer gets."""

    family: str
    why: str
    question: str
    answer: str
    paid: float
    right_paid: float


@dataclass
class FireDrill:
    """What came of a drill.

    Attributes:
        num_hacks, num_problems: how many answers were tried, for how many problems.
        right_paid: problems whose right answer was paid, in one form or another.
        paid: the hacks of those ideas that are paid too often to be chance.
        chance: ideas that were paid, but on too few problems.
    """

    num_hacks: int = 0
    num_problems: int = 0
    right_paid: int = 0
    paid: list[PaidHack] = field(default_factory=list)
    chance: list[PaidHack] = field(default_factory=list)

    @property
    def failure(self) -> str:
        """Why the grader should not be used; empty when it may."""
        if not self.paid:
            return ""
        families = list(dict.fromkeys(hack.family for hack in self.paid))
        first = min(self.paid, key=lambda hack: (families.index(hack.family), len(hack.answer)))
        others = f"; also paid: {', '.join(families[1:])}" if families[1:] else ""
        return (
            f"the grader pays {first.paid:g} for the wrong answer {_shown(first.answer)} to {_shown(first.question)} "
            f"({first.family}: {first.why}), and {first.right_paid:g} for the right one{others}"
        )

    @property
    def warning(self) -> str:
        """What should be looked at; empty where all is well."""
        if self.num_problems and not self.right_paid:
            return "the grader paid no right answer in any common form, so the drill shows only that it pays no hack"
        return ""

    def raise_if_failed(self) -> None:
        """Raises: TrainingError: the grader pays answers that are wrong; shows one."""
        if self.failure:
            todo = "let it pay only what is right; docs/rl-graders.md tells what each of these ideas is"
            raise TrainingError(self.failure, where="fire drill", todo=todo)


def fire_drill(
    verifier: Reward,
    problems: Sequence[Problem],
    *,
    families: Sequence[HackFamily] = FAMILIES,
    max_seconds: float = DRILL_SECONDS,
) -> FireDrill:
    """Try ``verifier`` with right answers and with hacks, and refuse it if it pays those.

    Args:
        problems: some that training will ask, the more different their answers the better.

    Raises:
        TrainingError: it pays an idea of hacks, or failed on every answer.
    """
    result = run_drill(verifier, problems, families=families, max_seconds=max_seconds)
    result.raise_if_failed()
    return result


def run_drill(
    verifier: Reward,
    problems: Sequence[Problem],
    *,
    families: Sequence[HackFamily] = FAMILIES,
    max_seconds: float = DRILL_SECONDS,
) -> FireDrill:
    """As ``fire_drill``, and whatever comes out is returned.

    Raises:
        TrainingError: it failed on every answer.
    """
    problems = _different(problems)
    result, end = FireDrill(num_problems=len(problems)), time.monotonic() + max_seconds
    payments: list[tuple[int, HackFamily, str, float]] = []
    right: dict[int, float] = {}
    floor = 0.0
    for place, problem in enumerate(problems):
        forms = [form.format(problem.answer) for form in _RIGHT_FORMS] if problem.answer.strip() else []
        paid = [value for form in forms if (value := _pay(verifier, problem, form)) is not None]
        floor, right[place] = min([floor, *paid]), max(paid, default=0.0)
        subject = Subject(problem.question, problem.answer, problems[place - 1].answer if place else "")
        for family in families:
            for answer in _turn(family.make(subject), place, 1 if time.monotonic() > end else ANSWERS_OF_AN_IDEA):
                if _bare(answer) == _bare(problem.answer):
                    continue
                value = _pay(verifier, problem, answer)
                result.num_hacks += 1
                if value is not None:
                    floor = min(floor, value)
                    payments.append((place, family, answer, value))
                if _only_faults(verifier):
                    break
    if isinstance(verifier, Verifier):
        verifier.pop_faults()
    result.right_paid = sum(value > floor for value in right.values())
    _judge_payments(result, problems, payments, right, floor)
    return result


def _judge_payments(
    result: FireDrill,
    problems: Sequence[Problem],
    payments: Sequence[tuple[int, HackFamily, str, float]],
    right: dict[int, float],
    floor: float,
) -> None:
    """Sort what was paid into ideas that pay, and chance."""
    usual = max(right.values(), default=0.0)
    if usual <= floor:
        usual = max([1.0, *(value for *_, value in payments)])
    paid_problems, hacks = defaultdict[str, set[int]](set), defaultdict[str, list[PaidHack]](list)
    for place, family, answer, value in payments:
        full = right[place] if right[place] > floor else usual
        if value > floor and value - floor >= PAID_SHARE * (full - floor):
            paid_problems[family.name].add(place)
            hacks[family.name].append(PaidHack(family.name, family.why, problems[place].question, answer, value, full))
    enough = min(len(problems), max(MIN_PROBLEMS, round(MIN_PROBLEM_SHARE * len(problems))))
    for name, places in paid_problems.items():
        (result.paid if len(places) >= enough else result.chance).extend(hacks[name])


def _different(problems: Sequence[Problem]) -> list[Problem]:
    """Some of the problems, with as many different answers as there are, each answer once before any comes twice."""
    by_answer: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_answer[problem.answer].append(problem)
    rounds = [group[turn] for turn in range(len(problems)) for group in by_answer.values() if turn < len(group)]
    return rounds[:DRILL_PROBLEMS]


def _turn(answers: list[str], place: int, count: int) -> list[str]:
    """``count`` of the answers, others for each problem."""
    start = place * count % max(len(answers), 1)
    return [*answers[start:], *answers[:start]][:count]


def _pay(verifier: Reward, problem: Problem, answer: str) -> float | None:
    """What the grader pays for an answer that is in good form."""
    return verifier(problem, Response(_REASONING, answer, True, True))


def _only_faults(verifier: Reward) -> bool:
    """Whether the grader has never done anything but fail."""
    return (
        isinstance(verifier, Verifier)
        and verifier.num_calls >= _FAULTS_AT_START
        and verifier.faults == verifier.num_calls
    )


def _bare(answer: str) -> str:
    """An answer without what only sets it off."""
    text = re.sub(r"\\boxed\{(.*)\}", r"\1", answer.strip(), flags=re.DOTALL)
    return re.sub(r"\\text\{(.*)\}", r"\1", text, flags=re.DOTALL).strip(" .$\n").casefold()


def _shown(text: str) -> str:
    """The beginning of a text, in quotes."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
