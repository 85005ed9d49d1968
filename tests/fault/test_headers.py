"""Two thousand broken headers: none crashes, hangs or shows a traceback; bench/fuzz_headers.py tries more."""

from __future__ import annotations

from bench.fuzz_headers import mutated, run, seeds


def test_every_broken_header_ends_in_one_sentence() -> None:
    found = run(2_000, seed=7)
    assert not found["faults"], found["faults"][:5]
    assert found["refused"] > 1_000 and found["sound"] > 100 and found["refused"] + found["sound"] == 2_000


def test_an_input_is_known_by_its_number() -> None:
    files = seeds()
    assert mutated(files, 3, 17) == mutated(files, 3, 17) != mutated(files, 3, 18)
