r"""Questions with their formulas, to make hacks for; and math-verify's own test cases, read from its source."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.grading.hack_formulas import FAMILIES
from sprat.tasks.hack_answers import Subject

MATH_VERIFY = "math-verify==0.9.0"
SUBJECTS = (
    ("What is $13 \\times 17$?", "221"),
    ("What is 3 + 4 + 5?", "12"),
    ("Compute $2^{10}$.", "1024"),
    ("How many cm are 0.05 m?", "5"),
    ("Find $\\frac{1}{3}+\\frac{1}{6}$.", "\\frac{1}{2}"),
    ("Give $\\pi$ to 5 places.", "3.14159"),
    ("What share of 50 is 9, in percent?", "18\\%"),
    ("How long is the side?", "5\\text{ cm}"),
    ("Simplify $\\sqrt{8}$.", "2\\sqrt{2}"),
    ("What is the area of a circle of radius 3?", "9\\pi"),
    ("Factor $x^2-1$.", "(x-1)(x+1)"),
    ("Expand $(x+1)^2$.", "x^2+2x+1"),
    ("Solve $x+y=3$, $x-y=-1$.", "(1,2)"),
    ("Solve $x^2-3x+2=0$.", "\\{1,2\\}"),
    ("For which $x$ is $x(x-1)<0$?", "(0,1)"),
    ("Give the line through $(0,1)$ and $(1,3)$.", "y=2x+1"),
    ("For which $x$ is $2x>2$?", "x>1"),
    ("What is $10^{-7}$ as a decimal?", "0.0000001"),
    ("How many zeros has it?", "0"),
    ("What is $7-10$?", "-3"),
    ("What is $\\frac{1}{2003! \\cdot 2004}$?", "\\frac{1}{2004!}"),
    ("Write 5 in base 2.", "101_2"),
    ("Give the solutions of $x^2=2$", "\\pm\\sqrt{2}"),
    ("What is $e^{i\\pi}$?", "-1"),
)
# Wrong answers that math-verify 0.9.0 takes for the expected one, or might, with why they are wrong.
NEAR = (
    ("0.0000001", "0.0", "zero is not small"),
    ("0.0000001", "0.0000002", "twice as much"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}", "four million times less"),
    ("101_2", "101_3", "another base: ten, not five"),
    ("5\\text{ cm}", "5\\text{ km}", "another unit"),
    ("5\\text{ cm}", "5\\text{ m}", "another unit"),
    ("18\\%", "18\\text{ million}", "another size"),
    ("(1,2)", "(2,1)", "another point"),
    ("(1,2)", "[1,2]", "an interval"),
    ("(0,1)", "[0,1]", "with its ends"),
    ("(0,1)", "(0,1]", "with an end"),
    ("(0,1)", "(0,1.5)", "longer"),
    ("\\{1,2\\}", "\\{1,2,3\\}", "one too many"),
    ("\\{1,2\\}", "1", "one too few"),
    ("x>1", "x \\ge 1", "with the border"),
    ("x>1", "x < 1", "the other side"),
    ("x>1", "x > 0", "more"),
    ("y=2x+1", "y=2x", "another line"),
    ("y=2x+1", "y=y", "all lines"),
    ("\\pm\\sqrt{2}", "\\sqrt{2}", "one of two"),
    ("2\\sqrt{2}", "2\\sqrt{3}", "another root"),
    ("2\\sqrt{2}", "2.8", "rounded"),
    ("9\\pi", "28", "rounded"),
    ("(x-1)(x+1)", "(x-1)(x+2)", "another product"),
    ("x^2+2x+1", "x^2+2x+1+10^{-30}", "not the same"),
    ("1-\\frac{1}{n}", "1+\\frac{1}{n}", "another sign"),
    ("9", "9\\%", "a hundredth"),
    ("120", "5!", "not worked out"),
    ("1", "\\sin^2 x + \\cos^2 x", "not worked out"),
    ("1", "9=1", "nine is not one"),
)


@dataclass(frozen=True)
class Hack:
    """One wrong answer to one question, and why it is wrong."""

    question: str
    expected: str
    family: str
    answer: str
    why: str


def hacks() -> list[Hack]:
    """Every hack of every family for every subject, and the near ones; no two alike."""
    found: dict[tuple[str, str], Hack] = {}
    for place, (question, expected) in enumerate(SUBJECTS):
        for family in FAMILIES:
            for answer in family.make(Subject(question, expected, SUBJECTS[place - 1][1])):
                hack = Hack(question, expected, family.name, answer, family.why)
                found.setdefault((expected, answer), hack)
    for expected, answer, why in NEAR:
        found.setdefault((expected, answer), Hack("", expected, "near by name", answer, why))
    return list(found.values())


def published_cases(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The pairs of texts that math-verify's own tests compare, with what they expect, from its source on PyPI.

    Returns:
        cases (``name``, ``gold``, ``answer``, ``source`` for ``JudgePool.verdict``, ``expected``), and the names of
        tests that compare no texts, but look into the package.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--no-build-isolation", "-d", str(folder), MATH_VERIFY], check=True, timeout=300)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (source,) = folder.glob("*/tests")
    collector = Path(__file__).with_name("collect_math_verify.py")
    command = [sys.executable, str(collector), str(source.parent)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    collected = json.loads(done.stdout.splitlines()[-1])
    return collected["cases"], collected["others"]
