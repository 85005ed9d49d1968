"""Watches what is paid during reinforcement learning, and says when it begins to look like a hack.

A reward that rises is what everybody hopes for, and what a hack looks like. The difference is in the answers: those
that are paid stop being answers. Each sign of that (``hack_signals``) is cheap and weak; an honest run shows some of
each too, but at a share that is there from the start. So what is watched is the change: for each sign, the share of
answers that show it at the start is what is normal here, and from then on a one-sided CUSUM (Page 1954) adds up
evidence answer by answer: the log-likelihood ratio of a share that is larger by ``MIN_RISE``, or fourfold. It forgets
what turns out to be nothing, and alarms at ``threshold``: at two such answers close together where there were none, and
at a real rise where some were normal. Nothing that training asks is changed, and no model is called.

Beside the signs of single answers it watches

- ``disagrees``: paid, but not plainly the expected answer, or wrong by the second judge where there is one;
- both at once, a sign and a disagreement: where there was none at the start, one such answer is enough;
- ``same answer``: one text that is paid for problems that expect different things;
- ``length``: an answer several times as long as any at the start;
- ``abstained``: answers that the grader could not judge (made to keep it busy, perhaps).

An alarm is a sentence with an example; what is done about it is the run's business (``trip_wires``).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sprat.post.rl.hack_signals import SIGNALS, Observation, is_explained, squeeze
from sprat.post.rl.rewards import Response
from sprat.tasks import Problem

BASELINE_STEPS, BASELINE_ANSWERS = 4, 100  # both must be seen of a sign before it can alarm
MIN_RISE = 0.02  # of the share of answers with a sign that is to be found
MIN_SHARE = 0.002  # that counts as normal even where none was seen
KNOWN_HACK, MIN_SHARE_OF_KNOWN = "wrong, paid and like a known hack", 0.0005
THRESHOLD = 3.2
USUAL_FACTOR = 2.0  # more evidence where some answers showed the sign from the start
START_SHARE = 0.25  # of paid answers with a sign, at the start, that is an alarm by itself
SAME_ANSWER_PROBLEMS = 3  # other problems for which a text was paid
SAME_ANSWER_CHARS = 24  # of such a text, where nobody knows what is expected
LENGTH_FACTOR, LENGTH_CHARS = 3, 60  # beyond the longest answer at the start
UNREADABLE_SHARE = (
    0.5  # of paid answers that disagree at the start: expected answers are then no answers to compare with
)
_MAX_TEXTS = 20_000
_AT_START = frozenset(SIGNALS) - {"copied from the question", "several candidates", "no value"}


@dataclass(frozen=True)
class HackAlarm:
    """A sign that became more common.

    Attributes:
        share, normal: of the answers of this step that show it, and of those at the start.
        example: an answer that shows it.
    """

    step: int
    signal: str
    share: float
    normal: float
    example: Observation

    def __str__(self) -> str:
        what = f"step {self.step}: {self.share:.1%} of the answers show {self.signal!r}, {self.normal:.1%} at the start"
        return f"{what}; for example {self.example.content[:80]!r} to {self.example.question[:60]!r}"


class HackMonitor:
    """Sees every answer of a run, step by step; ``alarms`` holds what was said so far, each sign once.

    Args:
        threshold: more makes fewer false alarms and later ones.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.threshold = threshold
        self.alarms: list[HackAlarm] = []
        self._steps = 0
        self._low, self._high = math.inf, -math.inf
        self._longest = 0
        self._seen: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # at the start: with the sign, and all
        self._evidence: dict[str, float] = defaultdict(float)
        self._paid_for: dict[str, list[str]] = {}  # texts, and what was expected where they were paid, as digests
        self._expected: dict[str, None] = {}
        self._usual: dict[str, None] = {}  # texts of the start, as digests

    def _is_settled(self, signal: str) -> bool:
        """Whether enough was seen to know what is normal."""
        return self._steps >= BASELINE_STEPS and self._seen[signal][1] >= BASELINE_ANSWERS

    def observe(self, step: int, observations: Sequence[Observation]) -> list[HackAlarm]:
        """Look at the answers of a step; the new alarms."""
        rewards = [seen.reward for seen in observations if seen.reward is not None]
        self._low, self._high = min([self._low, *rewards]), max([self._high, *rewards])
        self._expected |= dict.fromkeys(squeeze(seen.expected) for seen in observations if seen.expected)
        settled, found = self._steps >= BASELINE_STEPS, defaultdict[str, list[Observation | None]](list)
        for seen in observations:
            for signal, shows in self._signs(seen, settled).items():
                found[signal].append(seen if shows else None)
        new = [alarm for signal, marks in found.items() if (alarm := self._weigh(step, signal, marks))]
        self._steps += 1
        if not settled:
            self._longest = max([self._longest, *(len(seen.content) for seen in observations)])
            self._usual |= dict.fromkeys(_digest(squeeze(seen.content)) for seen in observations)
        self.alarms += new
        return new

    def metrics(self) -> dict[str, float]:
        """The evidence for each sign of which there was some, as a share of what makes an alarm."""
        shares = {signal: value / self._threshold(signal) for signal, value in sorted(self._evidence.items())}
        return {f"hack/{signal}": share for signal, share in shares.items()}

    def _threshold(self, signal: str) -> float:
        """The evidence that makes an alarm."""
        return self.threshold * (USUAL_FACTOR if self._seen[signal][0] else 1)

    def _is_paid(self, reward: float | None) -> bool:
        if reward is None or self._high <= self._low:
            return False
        return reward >= (self._low + self._high) / 2

    def _signs(self, seen: Observation, settled: bool) -> dict[str, bool]:
        """Which signs the answer shows, of those that apply to it."""
        signs = {"abstained": seen.reward is None}
        if not self._is_paid(seen.reward):
            return signs
        text, explained = squeeze(seen.content), is_explained(seen, self._expected)
        if explained is not None:
            signs["disagrees"] = not explained
        signs["same answer"] = self._is_same_answer(text, seen) and explained is not True
        shown = {name: explained is not True and shows(seen) for name, shows in SIGNALS.items()}
        if settled:
            bound = max(LENGTH_FACTOR * self._longest, self._longest + LENGTH_CHARS)
            shown["length"] = explained is not True and len(seen.content) > bound
        if explained is not None:
            signs[KNOWN_HACK] = not explained and any(shown.values())
        return signs | shown

    def _is_same_answer(self, text: str, seen: Observation) -> bool:
        """Whether the text was paid for several problems that expect something else; remembers that it was for this."""
        if not seen.expected and (len(text) < SAME_ANSWER_CHARS or _digest(text) in self._usual):
            return False  # short answers are right for many questions
        key = _digest(squeeze(seen.expected) or f"?{seen.question}")
        keys = self._paid_for.setdefault(_digest(text), [])
        if key not in keys and len(keys) <= SAME_ANSWER_PROBLEMS:
            keys.append(key)
        if len(self._paid_for) > _MAX_TEXTS:
            self._paid_for.pop(next(iter(self._paid_for)))
        return len([other for other in keys if other != key]) >= SAME_ANSWER_PROBLEMS

    def _weigh(self, step: int, signal: str, marks: Sequence[Observation | None]) -> HackAlarm | None:
        """Add up the evidence of one sign; an alarm where it is enough for the first time."""
        shown = [seen for seen in marks if seen is not None]
        at_start, settled = self._seen[signal], self._is_settled(signal)
        if not settled and signal != "length":  # which knows what is normal by its bound
            at_start[0], at_start[1] = at_start[0] + len(shown), at_start[1] + len(marks)
        share = at_start[0] / max(at_start[1], 1)
        if any(alarm.signal == signal for alarm in self.alarms):
            return None
        if not settled and signal != "length":
            is_enough = at_start[1] >= BASELINE_ANSWERS and signal in _AT_START and share >= START_SHARE
            return HackAlarm(step, signal, share, share, shown[-1]) if is_enough and shown else None
        if signal == "disagrees" and share > UNREADABLE_SHARE:
            return None
        least = MIN_SHARE_OF_KNOWN if signal == KNOWN_HACK else MIN_SHARE
        normal = min(max(least, _upper_bound(*at_start)), 0.9) if at_start[0] else least
        raised = min(normal + max(MIN_RISE, 3 * normal), 0.95)
        rise, fall = math.log(raised / normal), math.log((1 - raised) / (1 - normal))
        for seen in marks:
            self._evidence[signal] = max(0.0, self._evidence[signal] + (fall if seen is None else rise))
            if seen is not None and self._evidence[signal] >= self._threshold(signal):
                return HackAlarm(step, signal, len(shown) / len(marks), share, seen)
        return None

    def state(self) -> dict[str, Any]:
        """All that it knows, as JSON can hold it, for a checkpoint."""
        return {
            "steps": self._steps,
            "rewards": [self._low, self._high] if self._low <= self._high else None,
            "longest": self._longest,
            "seen": dict(self._seen),
            "evidence": dict(self._evidence),
            "paid_for": [[text, list(keys)] for text, keys in self._paid_for.items()],  # the first goes first
            "expected": list(self._expected),
            "usual": list(self._usual),
            "told": [[a.step, a.signal, a.share, a.normal, vars(a.example)] for a in self.alarms],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._steps, self._longest = state["steps"], state["longest"]
        self._low, self._high = state["rewards"] or (math.inf, -math.inf)
        self._seen.update({signal: list(counts) for signal, counts in state["seen"].items()})
        self._evidence.update(state["evidence"])
        self._paid_for = {text: list(keys) for text, keys in state["paid_for"]}
        self._expected = dict.fromkeys(state["expected"])
        self._usual = dict.fromkeys(state["usual"])
        told = state["told"]
        self.alarms = [
            HackAlarm(step, name, share, usual, Observation(**seen)) for step, name, share, usual, seen in told
        ]


def observation(problem: Problem, response: Response, reward: float | None, second: bool | None = None) -> Observation:
    """A sampled answer to ``problem`` as the monitor sees it."""
    return Observation(problem.question, problem.answer, response.reasoning, response.content, reward, second)


def _digest(text: str) -> str:
    """What a text is known by: a checkpoint need not hold it."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _upper_bound(count: int, total: int, z: float = 1.64) -> float:
    """The upper end of Wilson's interval for a share: what is seen at the start is a sample too."""
    spread = z * math.sqrt(count * (total - count) / total + z * z / 4)
    return (count + z * z / 2 + spread) / (total + z * z)
