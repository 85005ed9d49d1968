"""No problem is in two splits, in whatever words: forms by Python's own arithmetic on the question, not by our code."""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from sprat import tasks
from sprat.config import TaskConfig
from sprat.data.pack import document_ids, pack
from sprat.pipeline.data import worked_examples
from sprat.pipeline.recipe import load_recipe
from sprat.tasks import base, canonical
from sprat.tokens import Tokenizer
from sprat.tokens.chat import encode_demonstration

RECIPE = load_recipe("quickstart").data
ALL = (*RECIPE.tasks, *RECIPE.unseen)
Form = tuple[str, frozenset[object]]


def whole(numbers: Iterable[int]) -> frozenset[object]:
    """How often each size counts for the sum: +3 and -3 leave nothing, and 0 never counts."""
    found = Counter[int]()
    for number in numbers:
        found[abs(number)] += (number > 0) - (number < 0)
    return frozenset((size, times) for size, times in found.items() if times)


def signed(expression: str) -> Iterator[int]:
    """The terms of a sum, each with the sign that is left of a 1 in its place when all others are 0."""
    numbers = [int(digits) for digits in re.findall(r"\d+", expression)]
    for place, number in enumerate(numbers):
        here = iter(range(len(numbers)))
        ones = re.sub(r"\d+", lambda _: str(int(next(here) == place)), expression.strip())  # noqa: B023
        yield number * int(eval(ones))


def relation(equation: str) -> Iterator[tuple[str, int]]:
    """How far left and right are apart for 0 and 1, and what is added on each side; x is counted positively."""
    sides = [[int(eval(re.sub("[a-z]", f"({value})", side))) for value in (0, 1)] for side in equation.split("=")]
    (left, moved), (right, shifted) = sides
    slope = (moved - left) - (shifted - right)
    yield "slope", abs(slope)
    for size, times in whole((left, -right) if slope > 0 else (-left, right)):  # type: ignore[misc]
        yield f"{times} times", size


def form(question: str) -> Form:
    """What is asked, read from the question alone."""
    numbers = [int(digits) for digits in re.findall(r"\d+", question)]
    if "GCD" in question:
        return "gcd", frozenset(numbers)
    if "legs" in question:
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        kinds = Counter[tuple[int, int]]()
        for count, animal in re.findall(r"(\d+) ([a-z ]+?)(?=,|\?)", question):
            each = ANIMALS[animal] if animal in ANIMALS else ANIMALS[animal.removesuffix("s")]
            kinds[int(count), each] += 1
        return "legs", frozenset((pair, times) for pair, times in kinds.items() if 0 not in pair)
    if re.search(r"Find the value|Solve for|Determine", question):
        return "equation", frozenset(relation(question.split(":")[-1]))
    return "sum", whole(signed(max(re.findall(r"[-+()\d\s]+", question), key=len)))


@functools.cache
def held_out(title: str, split: tasks.Split) -> list[tasks.Problem]:
    """1000 of ``test`` and 500 of ``dev``, of a task never trained 300; drawing them takes seconds."""
    count = 300 if title in {config.title for config in RECIPE.unseen} else {"test": 1000}.get(split, 500)
    return tasks.held_out_problems(tasks.load(next(config for config in ALL if config.title == title)), count, split)


def forms(config: TaskConfig, split: tasks.Split, count: int) -> Iterator[Form]:
    task = tasks.load(config)
    for index in range(count):
        yield form(task.problem(split, index).question)


def test_no_problem_of_one_split_is_in_another_in_other_words_or_in_another_task() -> None:
    pytest.importorskip("reasoning_gym")
    counts: dict[tasks.Split, int] = {"train": 1000, "dev": 200, "test": 400}
    seen = {split: {each for config in ALL for each in forms(config, split, counts[split])} for split in counts}
    assert all(len(found) > 800 for found in seen.values())
    assert not seen["train"] & seen["dev"] and not seen["train"] & seen["test"] and not seen["dev"] & seen["test"]


def test_no_packed_row_has_a_question_that_is_held_out() -> None:
    pytest.importorskip("reasoning_gym")
    examples = list(worked_examples(RECIPE.replace(demonstrations=4000), seed=0))
    tokenizer = Tokenizer.train((" ".join(example) for example in examples[:500]), 600)
    sequences = [encode_demonstration(tokenizer, *example) for example in examples]
    rows = pack(sequences, RECIPE.seq_len)
    text = " ".join(tokenizer.decode(row) for row in rows.tokens.tolist())
    trained = {form(question) for question in re.findall(r"<\|user\|>(.*?)<\|assistant\|>", text, re.S)}
    documents = document_ids([len(ids) for ids, _ in sequences], RECIPE.seq_len)
    shown = {number: row for row, numbers in enumerate(documents.tolist()) for number in numbers if number >= 0}
    assert sorted(shown) == list(range(len(examples)))  # each example lies in a row, which says its question
    for number in range(0, len(examples), 100):
        row = shown[number]
        assert examples[number][0] in tokenizer.decode(rows.tokens[row][documents[row] == number].tolist())
    assert len(trained) > 2500 and {kind for kind, _ in trained} == {"sum", "equation", "gcd", "legs"}
    for config in ALL:
        for split in tasks.HELD_OUT_SPLITS:
            held = {form(problem.question) for problem in held_out(config.title, split)[:300]}
            assert len(held) == 300 and not held & trained, (config.title, split)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.title)
def test_two_held_out_problems_are_never_the_same_in_other_words(config: TaskConfig) -> None:
    for split in tasks.HELD_OUT_SPLITS:
        problems = held_out(config.title, split)[:300]
        assert len(problems) == 300 == len({form(problem.question) for problem in problems})


@pytest.mark.slow
@pytest.mark.parametrize("config", RECIPE.tasks, ids=lambda config: config.title)
def test_a_task_has_a_thousand_test_problems(config: TaskConfig) -> None:
    assert len(held_out(config.title, "test")) == 1000 and len(held_out(config.title, "dev")) == 500


def test_the_splits_have_their_shares() -> None:
    """Two in ten, one in ten: within four standard deviations of ten thousand forms."""
    found = [tasks.split_of(f"sum {number}") for number in range(10_000)]
    assert abs(found.count("test") - 2000) < 160 and abs(found.count("dev") - 1000) < 120


def test_another_salt_is_another_split(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [tasks.split_of(f"sum {number}") for number in range(1000)]
    monkeypatch.setattr(base, "SPLIT_SALT", "another")
    after = [tasks.split_of(f"sum {number}") for number in range(1000)]
    held = [new for old, new in zip(before, after, strict=True) if old == "test"]
    assert 0.6 < held.count("train") / len(held) < 0.8


SAME = [
    ("4 - 1 - 7", "4 - ( 1 + 7 )"),
    ("-( 3 - 5 ) + 2", "2 + 5 - 3"),
    ("2 - -3", "3 + 2"),
    ("1 + 3", "1 + 3 + 0"),
    ("1 + 3", "0 + 3 - 0 - -1"),
    ("1 + 3", "5 + 1 - 5 + 3"),
    ("-( -( 3 - 1 ) )", "3 - 1"),
    ("5 - 5", "0 - 0"),
    ("2 * ( 3 + 4 ) - 1", "-1 + ( 4 + 3 ) * 2"),
    ("2 * ( 3 - 4 )", "-2 * ( 4 - 3 )"),
    ("-2 * 3", "2 * -3"),
    ("-2 * -3", "3 * 2"),
    ("4 * -( 3 * 2 )", "-2 * 3 * 4"),
    ("1 * ( 3 + 4 ) * 1", "4 + 3"),
    ("-1 * ( 3 + 4 )", "-3 - 4"),
    ("5 + 0 * ( 3 + 4 )", "5"),
    ("2 * 3 - 3 * 2 + 1", "1"),
    ("( 3 + 5 ) / 2", "( 5 + 3 ) / 2 / 1"),
    ("0 / 7 + 2", "2"),
]
OTHER = [
    ("4 - 1", "1 - 4"),
    ("2 * 3", "2 + 3"),
    ("12", "1 + 2"),
    ("6 / 3", "3 / 6"),
    ("1 + 3", "4"),
    ("3 + 3", "2 * 3"),
    ("3 + 3 - 3", "3 + 3"),
    ("2 * ( 3 + 4 )", "2 * 3 + 2 * 4"),
    ("1 + 1", "1"),
    ("( 1 + 1 ) * ( 1 + 1 )", "1 + 1"),
    ("2 * ( 3 - 4 )", "2 * ( 4 - 3 )"),
    ("2 * 3 * 4", "2 * 34"),
    ("-7 / 2", "-( 7 / 2 )"),
]


@pytest.mark.parametrize("one, other", SAME)
def test_expressions_that_are_the_same_have_one_form(one: str, other: str) -> None:
    assert canonical.expression(one) == canonical.expression(other)


@pytest.mark.parametrize("one, other", OTHER)
def test_expressions_that_are_not_have_two(one: str, other: str) -> None:
    assert canonical.expression(one) != canonical.expression(other)


def test_expressions_of_one_form_have_one_value() -> None:
    """Whatever is drawn: no rule of the form changes what is calculated."""
    rng, values = random.Random(0), dict[str, int]()

    def drawn(depth: int) -> str:
        if not depth or rng.random() < 0.2:
            return str(rng.randint(-2, 2))
        return f"{rng.choice(['', '', '-'])}( {drawn(depth - 1)} {rng.choice('+-*')} {drawn(depth - 1)} )"

    for _ in range(20_000):
        expression = drawn(3)
        assert values.setdefault(canonical.expression(expression), eval(expression)) == eval(expression), expression
    assert 1000 < len(values) < 15_000


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("5 - 8*e = -51", "8*z - 5 = 51", True),
        ("z + 5 = 13", "13 = 5 + x", True),
        ("z + 5 = 13", "13 - x = 5", True),
        ("z + 5 = 13", "x - 13 = -5", True),
        ("3*x - 6 = 0", "3*y = 6", True),
        ("3*x + 0 = 6", "0 + 3*y = 6 - 0", True),
        ("z + 5 = 13", "z - 5 = 13", False),
        ("z + 5 = 13", "2*z + 5 = 13", False),
        ("2*z + 4 = 8", "z + 2 = 4", False),
        ("z + 5 = 13", "z = 8", False),
    ],
)
def test_an_equation_is_what_it_says_of_x(one: str, other: str, same: bool) -> None:
    assert (canonical.equation(one) == canonical.equation(other)) == same
    assert (form(f"Solve for x: {one}") == form(f"Solve for x: {other}")) == same


@pytest.mark.parametrize(
    "one, other, same",
    [
        ([38, 6], [6, 38, 6], True),
        ([6, 6], [6, 6, 6], True),
        ([6, 0], [-6], True),
        ([1, 8], [9, 1], True),
        ([38, 6], [38, 12], False),
        ([6, 12], [6], False),
        ([12], [1, 2], False),
    ],
)
def test_a_divisor_is_that_of_a_set(one: list[int], other: list[int], same: bool) -> None:
    assert (canonical.divisor(one) == canonical.divisor(other)) == same


Animals = list[tuple[int, int]]


@pytest.mark.parametrize(
    "one, other, same",
    [
        ([(3, 4), (2, 8)], [(2, 8), (3, 4)], True),
        ([(3, 4)], [(5, 0), (3, 4), (0, 6)], True),
        ([(5, 0)], [(1, 0), (2, 0)], True),
        ([(3, 4), (2, 4)], [(5, 4)], False),
        ([(2, 4)], [(4, 2)], False),
        ([(3, 4), (3, 4)], [(3, 4)], False),
    ],
)
def test_legs_are_counted_of_animals_that_have_them(one: Animals, other: Animals, same: bool) -> None:
    assert (canonical.legs(one) == canonical.legs(other)) == same


def test_the_words_of_a_question_decide_where_nobody_wrote_a_form() -> None:
    one, other = (tasks.Problem("t", 0, question, "a") for question in ("Who  is\nit?", "who is it?"))
    assert one.canonical == other.canonical == "who is it?"
