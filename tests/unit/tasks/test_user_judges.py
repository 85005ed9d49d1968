"""A fire drill for the judges of task files: right answers in all their spellings earn one, near ones nothing."""

from __future__ import annotations

import importlib.util
import time

import pytest

from sprat.errors import DataError, MachineError
from sprat.tasks.judges import Choice, Exact, Formula, JsonSchema, Judge, Numeric, Regex

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None


def check(judge: Judge, right: list[str], wrong: list[str]) -> None:
    assert len(set(right)) == len(right) >= 20 and len(set(wrong)) == len(wrong) >= 40
    refused = [answer for answer in right if not judge.is_right(answer)]
    taken = [answer for answer in wrong if judge.is_right(answer)]
    assert not refused and not taken, (judge, refused, taken)


def test_exact_takes_its_text_and_blanks_around_it() -> None:
    blanks = ["", " ", "\n", "\t", "\r\n", "  ", " \n", "\u00a0", "\u3000", "\n\n"]
    right = [*(f"{blank}Caf\u00e9 Noir" for blank in blanks), *(f"Cafe\u0301 Noir{blank}" for blank in blanks)]
    right += ["th\u00e9", " th\u00e9"]
    wrong = [
        "", " ", "Caf\u00e9", "Noir", "Cafe Noir", "caf\u00e9 noir", "CAF\u00c9 NOIR", "Caf\u00e9  Noir",
        "Caf\u00e9\nNoir",
    ]  # fmt: skip
    wrong += [
        "Caf\u00e9Noir", "Caf\u00e9 Noir.", "Caf\u00e9 Noir!", '"Caf\u00e9 Noir"', "**Caf\u00e9 Noir**",
        "Caf\u00e9 Noir or th\u00e9",
    ]  # fmt: skip
    wrong += [
        "th\u00e9, Caf\u00e9 Noir", "th\u00e9\nCaf\u00e9 Noir", "Caf\u00e9 Noir Caf\u00e9 Noir", "\\boxed{th\u00e9}",
        "the", "Th\u00e9", "th\u00e9s",
    ]  # fmt: skip
    wrong += [
        "The answer is Caf\u00e9 Noir", "Answer: th\u00e9", "It is th\u00e9", "not th\u00e9", "th\u00e9.",
        "(th\u00e9)", "t h \u00e9", "th\u00e8",
    ]  # fmt: skip
    wrong += [
        "Caf\u00e9 Noi", "af\u00e9 Noir", "Caf\u00e9 Noirs", "riN \u00e9faC", "Noir Caf\u00e9", "Caf\u00e9-Noir",
        "Caf\u00e9_Noir", "none", "null",
    ]  # fmt: skip
    wrong += ["Caf\u00e9\u200b Noir", "<think>th\u00e9", "th\u00e9</think>", "thee", "Caf\u00e9 Noir 1"]
    check(Exact(("Caf\u00e9 Noir", "th\u00e9")), right, wrong)
    relaxed = Exact(("Stra\u00dfe",), ignore_case=True)
    assert relaxed.is_right("STRASSE ") and relaxed.is_right("stra\u00dfe") and not relaxed.is_right("Strase")


RIGHT_NUMBERS = [
    "1234.5", "1,234.5", " 1234.5\n", "+1234.5", "1234.50", "01234.5", "$1,234.5", "1234.5.",
    "The answer is 1,234.5.", "2469/2", "\\frac{2469}{2}", "\\dfrac{2469}{2}", "\\boxed{1234.5}",
    "7 + 8, so \\boxed{1{,}234.5}", "123450%", "123450 percent", "1.2345e3", "1.2345E+3", "12345e-1", "**1234.5**",
    "`1234.5`", "$1234.5$", "\\(1234.5\\)", "= 1234.5", "x = 1234.5", "#### 1234.5", "(1234.5)", "\u20ac1234.5",
    "1234.5 apples", "1234.5, that is 2469/2", "\\boxed{1234.5} = \\boxed{2469/2}", "\\text{1234.5}", "1234.5!",
    "123450\\%", "\\boxed{\\$1{,}234.5}",
]  # fmt: skip
WRONG_NUMBERS = [
    "", " ", "none", "1234", "1235", "1234.4", "1234.51", "-1234.5", "\u22121234.5", "- 1234.5", "--1234.5", "1234,5",
    "12,34.5", "1,2345", "1 234.5", "1234.5.0", "1234.5 or 1235", "1235 or 1234.5", "1234.5\n1235", "1235\n1234.5",
    "5 + 7 = 1234.5", "1234.5 million", "1234.5 dozen", "1234.5k", "1234.5km", "1234.5x", "x1234.5", "1234.5^2",
    "1234.5 * 2", "10^1234.5", "> 1234.5", ">= 1234.5", ">=1234.5", "~1234.5", "~ 1234.5", "!= 1234.5",
    "\u2260 1234.5", "\u2248 1234.5", "< 1234.5", "\\sqrt{1234.5}", "1234.5\\pi", "1234.5 \\pi", "1234.5 \u03c0",
    "1234.5 \\times 1", "\\boxed{1235}, not 1234.5", "\\boxed{1234.5} \\boxed{1235}", "\\boxed{1234.5",
    "1234.5 \\boxed{}", "1234.5%", "1234.5...", "1234.5e0001", "1.2345e999999999", "1e9999", "2469/0", "2469/2/1",
    "1 2469/2", "1\\frac{2469}{2}", "2469 / 2", "1234.5-0", "1234.5\u00b2", "\u00bd", "\u0661\u0662\u0663\u0664.5",
    "\uff11\uff12\uff13\uff14.5", "twelve hundred", "0x4D2", "1_234.5", "1234.5;1235", "[1234.5, 1235]",
    "{1234.5, 1}", "NaN", "inf", "1234.5i", "3 + 1234.5i", "1234.5?", "12:34.5", "1.234,5", "5.4321", "234.5",
    "1234.5/1235", "1234.5 - 1",
]  # fmt: skip


def test_numeric_takes_one_value_in_any_spelling() -> None:
    check(Numeric(("1234.5",)), RIGHT_NUMBERS, WRONG_NUMBERS)


def test_the_last_number_counts_where_the_file_says_so() -> None:
    judge = Numeric(("12",), extract="last")
    right = ["5+7=12", "5 + 7 = 12", "7 or 12", "First 5, then 7, so 12.", "12", "13? No: 12", "\\boxed{12} of 13"]
    assert all(map(judge.is_right, right))
    wrong = [
        "12 or 7", "5+12", "12 = 5 + 7", "12 of \\boxed{13}", "\\boxed{12} \\boxed{13}", "12\n- 12", "12, 12km", "",
    ]  # fmt: skip
    assert not any(map(judge.is_right, wrong))


def test_tolerance_is_a_share_of_the_right_answer() -> None:
    assert Numeric(("-200",), rel_tol=0.01).is_right("-202") and Numeric(("-200",), rel_tol=0.01).is_right("-198")
    assert not Numeric(("-200",), rel_tol=0.01).is_right("-202.01") and not Numeric(("0",), rel_tol=0.5).is_right(
        "1e-9"
    )
    assert Numeric(("0.3",)).is_right("3/10") and Numeric(("1e-12",), rel_tol=0.1).is_right("1.1e-12")


def test_a_choice_is_named_by_letter_text_or_both() -> None:
    judge = Choice(("Rome", "Paris, France", "None of these", "Berlin"), 1)
    forms = [
        "B", "b", " B\n", "(B)", "(b)", "[B]", "B.", "B)", "B:", "**B**", "\\boxed{B}", "\\boxed{\\text{B}}",
        "\\boxed{(B)}",
    ]  # fmt: skip
    forms += [
        "Paris, France", "Paris,  France", "Paris, France.", "B. Paris, France", "(B) Paris, France",
        "B) Paris, France.",
    ]  # fmt: skip
    forms += [
        "B: Paris, France",
        "Answer: B",
        "The answer is B.",
        "The correct answer is (B).",
        "Final answer: Paris, France",
    ]
    forms += ["So it is \\boxed{B}", "Option B", "**Answer:** B", "answer B", "\\boxed{B} and again \\boxed{B}"]
    wrong = [
        "", " ", "A", "C", "D", "E", "Z", "BB", "B B", "A B", "A, B", "A or B", "B or A", "AB", "(A) (B)", "B, not A",
        "not B",
    ]  # fmt: skip
    wrong += [
        "A. Paris, France", "B. Rome", "(A) Paris, France", "B Paris, France", "Paris", "France", "paris, france",
        "Rome",
    ]  # fmt: skip
    wrong += [
        "Berlin", "None of these", "Paris, France or Rome", "Paris, France\nRome", "\\boxed{A}",
        "\\boxed{A} \\boxed{B}",
    ]  # fmt: skip
    wrong += [
        "\\boxed{B", "1", "2", "choice 2", "\u0392", "The answer is A or B", "The answer is not B", "Answer: A", "B?",
        "B!",
    ]  # fmt: skip
    wrong += ["I think B", "B because", "B.A", "B. ", "(B", "B. Paris", "A\nB", "B\nA", "-B", "B+"]
    wrong.remove("B. ")  # blanks at the end say nothing
    check(judge, forms, wrong)
    assert Choice(("Mg", "mg"), 1).is_right("mg") and not Choice(("Mg", "mg"), 1).is_right("Mg")
    assert Choice(("Rome", "Paris"), 1, ignore_case=True).is_right("PARIS")


@pytest.mark.parametrize(
    ("choices", "index", "word"),
    [
        (("one",), 0, "1 choices"),
        (("a1", "a1 "), 0, "same"),
        (("B", "A"), 0, "is called"),
        (("x1", "y1"), 2, "place 2"),
        (tuple(map(str, range(27))), 0, "27 choices"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused(choices: tuple[str, ...], index: int, word: str) -> None:
    with pytest.raises(DataError, match=word):
        Choice(choices, index)


def test_a_pattern_matches_all_of_an_answer() -> None:
    judge = Regex(r"(?:[1-9]|1[0-2]):[0-5][0-9] ?(?:am|pm)", ignore_case=True)
    right = [f"{hour}:0{hour % 10} am" for hour in range(1, 10)] + [f"{hour}:59pm" for hour in range(1, 13)]
    right += ["12:00 PM", " 7:30 Am\n"]
    wrong = [f"{hour}:15 am" for hour in (0, *range(13, 25))] + [f"3:{minute} am" for minute in range(60, 80)]
    wrong += [
        "", " ", "3 am", "3:5 am", "03:05 am", "3:05", "am", "3:05  am", "3:05\nam", "at 3:05 am", "3:05 am!",
        "3:05 am pm",
    ]  # fmt: skip
    wrong += ["3:05 am or 3:06 am", "3:05 am\n3:06 am", "(3:05 am)", "3.05 am", "3:05 a.m."]
    check(judge, right, wrong)


def test_json_holds_to_its_schema_and_stands_alone() -> None:
    judge = JsonSchema(
        '{"type": "object", "required": ["name", "age"], "additionalProperties": false, "properties": '
        '{"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}}}'
    )
    right = [f'{{"name": "Ada", "age": {age}}}' for age in range(0, 121, 10)]
    right += [
        '{"age":1,"name":"B"}',
        ' {"name":"Ada","age":36}\n',
        '{\n"name":"Ada",\n"age":36\n}',
        '{"name":"Ada","age":36.0}',
    ]
    right += [
        '{"name":"\\u0041da","age":1}',
        '{"name":"A\\"da","age":1}',
        '{"name":"Ada Lovelace","age":0}',
        '{"name":"A","age":2}',
    ]
    ages = [
        "-1", "121", "1.5", '"36"', "null", "true", "[36]", "{}", "NaN", "Infinity", "-Infinity", "1e3", "036", "+1",
        "0x1",
    ]  # fmt: skip
    wrong = [f'{{"name": "Ada", "age": {age}}}' for age in ages]
    wrong += [
        f'{{"name": {name}, "age": 1}}'
        for name in ("1", "null", '""', '"ada"', '["Ada"]', "Ada", "'Ada'", "true", '" Ada"')
    ]
    wrong += ["", " ", "{}", "[]", "null", "Ada", '{"name":"Ada"}', '{"age":1}', '{"name":"Ada","age":1,"x":1}']
    wrong += ['{"name":"Ada","age":1', '{"name":"Ada","age":1,}', '{"name":"Ada","age":1}}', "{'name':'Ada','age':1}"]
    wrong += [
        '{"name":"Ada","age":1} {"name":"Ada","age":1}',
        'Here: {"name":"Ada","age":1}',
        '{"name":"Ada","age":1} done',
    ]
    wrong += [
        '```json\n{"name":"Ada","age":1}\n```',
        '[{"name":"Ada","age":1}]',
        '{"name":"Ada","age":1,"age":1}',
        "[" * 5000,
    ]
    check(judge, right, wrong)


def test_a_schema_may_refer_to_its_own_parts() -> None:
    judge = JsonSchema('{"type": "array", "items": {"$ref": "#/$defs/even"}, "$defs": {"even": {"multipleOf": 2}}}')
    assert judge.is_right("[2, 4]") and not judge.is_right("[2, 3]")


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
def test_a_formula_in_another_spelling_is_the_same() -> None:
    judge = Formula(("\\frac{x+1}{2}",))
    right = [
        "\\frac{x+1}{2}", "$\\frac{x+1}{2}$", "\\frac{1+x}{2}", "\\boxed{\\frac{x+1}{2}}", "(x+1)/2", "0.5x+0.5",
        "x/2+1/2",
    ]  # fmt: skip
    right += [
        "\\dfrac{x+1}{2}",
        "\\(\\frac{x+1}{2}\\)",
        "\\[\\frac{x+1}{2}\\]",
        "$$\\frac{x+1}{2}$$",
        " \\frac{x+1}{2}\n",
    ]
    right += [
        "\\frac{x}{2}+\\frac{1}{2}", "\\frac{1}{2}(x+1)", "\\frac12 (1+x)", "\\frac{2x+2}{4}", "2^{-1}(x+1)",
        "(1+x)/2",
    ]  # fmt: skip
    right += ["So: \\boxed{(x+1)/2}", "1-\\frac{1-x}{2}"]
    wrong = [
        "", " ", "x", "1", "x+1", "2", "\\frac{x+1}{3}", "\\frac{x-1}{2}", "\\frac{y+1}{2}", "\\frac{x+1}{2}+1",
        "x+1/2", "x/2+1",
    ]  # fmt: skip
    wrong += [
        "-\\frac{x+1}{2}", "\\frac{2}{x+1}", "\\frac{x+1}{2}, 1", "\\frac{x+1}{2} or 1", "1 or \\frac{x+1}{2}",
        "\\boxed{1}",
    ]  # fmt: skip
    wrong += [
        "\\boxed{\\frac{x+1}{2}} \\boxed{1}",
        "\\boxed{\\frac{x+1}{2}",
        "$\\frac{x+1}{2}$ $1$",
        "(\\frac{x+1}{2}, 1)",
        "none",
    ]
    wrong += [
        "\\{\\frac{x+1}{2}, 1\\}", "[0, \\frac{x+1}{2}]", "\\frac{x+1}{2} < 1", "\\sqrt{x+1}", "x^2",
        "\\frac{x^2+1}{2}", "\\pi",
    ]  # fmt: skip
    wrong += [
        "__import__('os').getcwd()", "x+1 / 2 / 2", "2(x+1)", "0.5x", "0.5", "0.5x+0.4", "\\sin x", "\\frac{x+1}{}",
        "\\infty", "y",
    ]  # fmt: skip
    check(judge, right, wrong)
    assert not Formula(("7",)).is_right("7 or 8")


@pytest.mark.skipif(HAS_MATH_VERIFY, reason="math-verify is installed")
def test_a_judge_without_its_package_says_what_to_install() -> None:
    with pytest.raises(MachineError, match=r"(?s)math-verify.*tasks\.jsonl, line 3.*sprat\[judges\]"):
        Formula(("7",), "tasks.jsonl, line 3")


def test_a_hostile_pattern_costs_seconds_and_the_next_answer_is_judged() -> None:
    judge, start = Regex("(a+)+b"), time.process_time()
    assert not judge.is_right("a" * 64)
    assert judge.is_right("aab") and time.process_time() - start < 1  # it was not this process that searched


@pytest.mark.parametrize("pattern", ["(", "[", "*a", "(?P<a>", "a{3,1}", "\\", "(?<=a+)b"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="no regular expression"):
        Regex(pattern)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ('{"type": "text"}', "no JSON schema"),
        ('{"minimum": "1"}', "no JSON schema"),
        ('{"$ref": "https://example.com/schema.json"}', "never fetched"),
        ('{"properties": {"a": {"$ref": "other.json"}}}', "never fetched"),
        ('{"items": {"$ref": "#/$defs/none"}}', "not in it"),
    ],
)
def test_what_is_no_schema_or_lies_elsewhere_is_refused(schema: str, word: str) -> None:
    with pytest.raises(DataError, match=word):
        JsonSchema(schema)


@pytest.mark.parametrize(
    "answer", ["\\boxed{" * 5000 + "}" * 5000, "answer" + " " * 50_000 + "B?", "1," * 20_000, "9" * 50_000]
)
def test_a_degenerate_answer_is_judged_in_linear_time(answer: str) -> None:
    judges: list[Judge] = [Numeric(("7",)), Choice(("Rome", "Paris"), 1), Exact(("7",))]
    start = time.process_time()
    assert not any(judge.is_right(answer) for judge in judges) and time.process_time() - start < 2
