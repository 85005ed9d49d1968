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

What is paid is shown to the grader once more: one that then says otherwise pays by chance, which is worse, and said.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sprat.errors import TrainingError
from sprat.post.rl.rewards import FAULTS, BatchReward, Response, Reward, Verdict, all_failed
from sprat.tasks import Problem
from sprat.tasks.hack_answers import DEPENDENT, INDEPENDENT, HackFamily, Subject

FAMILIES = (*INDEPENDENT, *DEPENDENT)
PAID_SHARE = 0.5  # of the way from the least that is paid to what the right answer gets
MIN_PROBLEMS, MIN_PROBLEM_SHARE = 2, 0.1  # on which an idea is paid
DRILL_PROBLEMS, ANSWERS_OF_AN_IDEA = 12, 4  # for a problem; others take their turn on the next
DRILL_SECONDS = 60.0  # after which only one answer of an idea is tried for a problem
STOP_AFTER = 3  # times as long, after which no further problem is begun
_FAULTS_AT_START = 8
_BATCH = 16  # answers that the grader is shown at once
_ASKED_AGAIN = 16  # of what it paid
_KEPT_CHARS = 500  # of an answer that a run keeps
THINK_TAGS = ("<think>", "</think>")
_REASONING = "I read the question, think about it, and answer."
_RIGHT_FORMS = ("{}", "\\boxed{{{}}}", "The answer is {}.", "#### {}", "<answer>{}</answer>", "```python\n{}\n```")

Payment = tuple[int, HackFamily, str, float]  # place of the problem, idea, answer, what was paid


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
        num_alike: how many wrong answers were paid, where all were paid the same and right ones too; else 0.
        faults, last_fault: how often the grader failed, and how the last time.
        unsure: how the grader differed from itself where it was asked again about what it paid; empty where it did not.
    """

    num_hacks: int = 0
    num_problems: int = 0
    right_paid: int = 0
    paid: list[PaidHack] = field(default_factory=list)
    chance: list[PaidHack] = field(default_factory=list)
    num_alike: int = 0
    unsure: str = ""
    faults: int = 0
    last_fault: str = ""

    @property
    def failure(self) -> str:
        """Why the grader should not be used; empty when it may."""
        if not self.paid:
            return ""
        if self.unsure:
            return f"the verifier judged {self.unsure}: it pays by chance"
        families = list(dict.fromkeys(hack.family for hack in self.paid))
        first = min(self.paid, key=lambda hack: (families.index(hack.family), len(hack.answer)))
        what = "the grader"
        others = f"; also paid: {', '.join(families[1:])}" if families[1:] else ""
        if self.num_alike:
            what = (
                f"the verifier paid each of {self.num_alike} answers {first.paid:g}, so there is nothing to learn: it"
            )
        return (
            f"{what} pays {first.paid:g} for the wrong answer {_shown(first.answer)} to {_shown(first.question)} "
            f"({first.family}: {first.why}), and {first.right_paid:g} for the right one{others}"
        )

    @property
    def warning(self) -> str:
        """What should be looked at; empty where all is well."""
        found = []
        if self.num_problems and not self.right_paid:
            found = ["the grader paid no right answer in any common form, so the drill shows only that it pays no hack"]
        if self.faults:
            found.append(f"it failed on {self.faults} answers, the last time it {self.last_fault}")
        return "; ".join(found)

    def raise_if_failed(self, where: str = "fire drill") -> None:
        """Raises: TrainingError: the grader pays answers that are wrong; shows one."""
        if self.failure:
            todo = "let it pay only what is right (docs/rl-graders.md has the ideas); fire_drill=accept takes the risk"
            raise TrainingError(self.failure, where=where, todo=todo)

    def to_dict(self) -> dict[str, Any]:
        """What a run keeps of it, plain JSON values: of each idea that was paid one answer."""
        first = {hack.family: hack for hack in sorted(self.paid, key=lambda hack: -len(hack.answer))}
        shown = [vars(hack) | {"answer": hack.answer[:_KEPT_CHARS]} for _, hack in sorted(first.items())]
        counts = {"hacks": self.num_hacks, "problems": self.num_problems, "right_paid": self.right_paid}
        return {**counts, "paid": shown, "failure": self.failure, "warning": self.warning}


def fire_drill(
    verifier: Reward | BatchReward,
    problems: Sequence[Problem],
    *,
    families: Sequence[HackFamily] = FAMILIES,
    max_seconds: float = DRILL_SECONDS,
    think_tags: tuple[str, str] | None = THINK_TAGS,
) -> FireDrill:
    """Try ``verifier`` with right answers and with hacks, and refuse it if it pays those.

    Args:
        problems: some that training will ask, the more different their answers the better.
        think_tags: what an answer's thinking stands between; None: of a model that does not think.

    Raises:
        TrainingError: it pays an idea of hacks, or failed on every answer.
    """
    result = run_drill(verifier, problems, families=families, max_seconds=max_seconds, think_tags=think_tags)
    result.raise_if_failed()
    return result


def run_drill(
    verifier: Reward | BatchReward,
    problems: Sequence[Problem],
    *,
    families: Sequence[HackFamily] = FAMILIES,
    max_seconds: float = DRILL_SECONDS,
    think_tags: tuple[str, str] | None = THINK_TAGS,
) -> FireDrill:
    """As ``fire_drill``, and whatever comes out is returned.

    Raises:
        TrainingError: it failed on every answer.
    """
    began, grader, problems = time.monotonic(), _Grader(verifier, think_tags), _different(problems)
    payments, right, floor = list[Payment](), dict[int, float](), 0.0
    result, right_values = FireDrill(), set[float]()
    for place, problem in enumerate(problems):
        if time.monotonic() - began > STOP_AFTER * max_seconds and place >= MIN_PROBLEMS:
            break
        forms = [form.format(problem.answer) for form in _RIGHT_FORMS] if problem.answer.strip() else []
        paid = [value for value in grader.pay(problem, forms) if value is not None]
        floor, right[place], right_values = min([floor, *paid]), max(paid, default=0.0), right_values | set(paid)
        subject = Subject(problem.question, problem.answer, problems[place - 1].answer if place else "")
        waiting: list[tuple[HackFamily, str]] = []
        for number, family in enumerate(families, 1):
            count = 1 if time.monotonic() - began > max_seconds else ANSWERS_OF_AN_IDEA
            answers = _turn(family.make(subject), place, count)
            waiting += [(family, each) for each in answers if _bare(each) != _bare(problem.answer)]
            if len(waiting) >= _BATCH or number == len(families):
                values = grader.pay(problem, [each for _, each in waiting])
                known = [
                    (place, *each, value) for each, value in zip(waiting, values, strict=True) if value is not None
                ]
                payments += known
                floor, result.num_hacks = min([floor, *(each[3] for each in known)]), result.num_hacks + len(waiting)
                waiting = []
        result.num_problems += 1
    if grader.faults == grader.calls and grader.calls:
        raise all_failed(grader.name, grader.calls, grader.last_fault)
    result.faults, result.last_fault = grader.faults, grader.last_fault
    result.right_paid = sum(value > floor for value in right.values())
    if len({value for *_, value in payments} | right_values) == 1 and right_values:
        result.num_alike = len(payments)
    _judge_payments(result, problems, payments, right, floor)
    if result.paid and not result.num_alike:
        shown = {(hack.question, hack.answer) for hack in result.paid}
        hits = [each for each in payments if (problems[each[0]].question, each[2]) in shown]
        result.unsure = _ask_again(grader, hits, problems)
    return result


class _Grader:
    """Whoever is tried: pays answers that are in good form, and what of that went wrong is counted.

    Attributes:
        calls, faults: how many answers it was shown, and on how many it failed.
        last_fault: how it did the last time.
    """

    def __init__(self, verifier: Reward | BatchReward, think_tags: tuple[str, str] | None) -> None:
        self.name, self._tags = str(getattr(verifier, "name", "reward")), think_tags
        self.calls, self.faults, self.last_fault = 0, 0, ""
        self._pay: Callable[[list[tuple[Problem, Response]]], list[Verdict]]
        pay = getattr(verifier, "pay", None)
        self._pay = pay or (lambda pairs: [Verdict(verifier(*pair)) for pair in pairs])  # type: ignore[operator]

    def pay(self, problem: Problem, answers: Sequence[str]) -> list[float | None]:
        """What it pays for ``answers``; None where it abstains or fails.

        Raises:
            TrainingError: it fails on everything.
        """
        opened, closed = self._tags or ("", "")
        reasoning = _REASONING if self._tags else ""
        pairs = [
            (problem, Response(reasoning, answer, True, True, f"{opened}{reasoning}{closed}{answer}"))
            for answer in answers
        ]
        verdicts = list[Verdict]()
        while len(verdicts) < len(pairs):  # few at first, for it may be broken and slow to say so
            count = _BATCH if self.faults < self.calls else _FAULTS_AT_START
            new = self._pay(pairs[len(verdicts) :][:count])
            verdicts += new
            faults = [verdict for verdict in new if verdict.outcome in FAULTS]
            self.calls, self.faults = self.calls + len(new), self.faults + len(faults)
            self.last_fault = faults[-1].detail if faults else self.last_fault
            if self.faults == self.calls and self.calls >= _FAULTS_AT_START:
                raise all_failed(self.name, self.calls, self.last_fault)
        return [verdict.reward for verdict in verdicts]


def _ask_again(grader: _Grader, payments: Sequence[Payment], problems: Sequence[Problem]) -> str:
    """How the grader differs from what it said of the same answers before; empty where it does not."""
    chosen = payments[:_ASKED_AGAIN]
    again = [grader.pay(problems[place], [answer])[0] for place, _, answer, _ in chosen]
    pairs = [(each[3], value) for each, value in zip(chosen, again, strict=True) if value is not None]
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    if 2 * len(differing) < len(pairs) * MIN_PROBLEM_SHARE or not differing:
        return ""
    shown = f"{differing[0][0]:g} and then {differing[0][1]:g}"
    return f"{len(differing)} of {len(pairs)} answers otherwise when it was asked again ({shown})"


def _judge_payments(
    result: FireDrill,
    problems: Sequence[Problem],
    payments: Sequence[Payment],
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


def _bare(answer: str) -> str:
    """An answer without what only sets it off."""
    text = re.sub(r"\\boxed\{(.*)\}", r"\1", answer.strip(), flags=re.DOTALL)
    return re.sub(r"\\text\{(.*)\}", r"\1", text, flags=re.DOTALL).strip(" .$\n").casefold()


def _shown(text: str) -> str:
    """The beginning of a text, in quotes."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
