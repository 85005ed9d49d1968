"""Money is exact: integers, dated tables, and sums that come out to the nano-yuan."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprat.errors import ServeError
from sprat.serve.meter import NANO_PER_YUAN, Meter, Prices, load_price_tables, price_request, select_prices

COUNT = st.integers(0, 10**12)


def test_the_default_table_is_r1_at_1_4_and_16_yuan_a_million() -> None:
    prices = select_prices(load_price_tables(), on=date(2026, 1, 1))
    million = 1_000_000
    assert (prices.hit * million, prices.miss * million, prices.output * million) == (
        NANO_PER_YUAN,
        4 * NANO_PER_YUAN,
        16 * NANO_PER_YUAN,
    )


@given(st.lists(st.tuples(COUNT, COUNT, COUNT), max_size=20))
def test_the_total_is_the_sum_of_the_requests_to_the_nano_yuan(requests: list[tuple[int, int, int]]) -> None:
    meter = Meter(select_prices(load_price_tables()))
    costs = [meter.record(hit=hit, miss=miss, output=output) for hit, miss, output in requests]
    assert meter.nano_yuan == sum(c.total for c in costs)
    assert meter.nano_yuan == sum(1000 * h + 4000 * m + 16000 * o for h, m, o in requests)
    assert meter.requests == len(requests)


def test_a_request_is_priced_by_the_table_of_its_day() -> None:
    old = Prices(name="a", since=date(2025, 1, 1), hit=1, miss=2, output=3)
    new = Prices(name="a", since=date(2025, 6, 1), hit=0, miss=1, output=2)
    assert select_prices([new, old], "a", on=date(2025, 5, 31)) is old
    assert select_prices([new, old], "a", on=date(2025, 6, 1)) is new
    with pytest.raises(ServeError, match="known tables: a"):
        select_prices([new, old], "a", on=date(2024, 12, 31))


def test_own_prices_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('[[price]]\nname = "mine"\nsince = 2025-01-01\nhit = 1\nmiss = 2\noutput = 3\n')
    assert select_prices(load_price_tables(path), "mine").output == 3


@pytest.mark.parametrize(
    "text",
    ["", "price = 3", "[[price]]\nname = 'x'", "[[price]]\nname='x'\nsince=2025-01-01\nhit=0.5\nmiss=1\noutput=1", "?"],
)
def test_a_wrong_price_table_is_one_clear_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ServeError, match="prices.toml"):
        load_price_tables(path)
    with pytest.raises(ServeError, match="no such price table"):
        load_price_tables(tmp_path / "none.toml")


def test_negative_counts_are_no_refund() -> None:
    with pytest.raises(ValueError, match="negative"):
        price_request(select_prices(load_price_tables()), hit=0, miss=-1, output=0)
