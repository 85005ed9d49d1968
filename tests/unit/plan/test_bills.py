"""Bills are exact, at the price that holds at the moment; the expectations were computed by hand."""

from __future__ import annotations

import tomllib
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from sprat.errors import ConfigError
from sprat.plan.bills import Usage, bill_api, bill_training
from sprat.plan.prices import PriceBook, gpu_price, load_prices
from sprat.serve.meter import load_price_tables, select_prices

BOOK = """
[[gpu]]
chip = "H800"
since = 2024-12-26
usd = "2"
source = "a test"

[[gpu]]
chip = "H800"
since = 2025-06-01
usd = "1.75"
source = "a test"

[[gpu]]
chip = "H800"
kind = "spot"
since = 2025-01-01
usd = "0.9"
source = "a test"

[[api]]
name = "chat"
since = 2025-01-20
timezone = "Asia/Shanghai"
source = "a test"
holidays = [2025-05-01, 2025-05-02]
workdays = [2025-04-27]  # a Sunday
prices.usd = { cache_hit = "0.14", cache_miss = "0.55", output = "2.19" }
prices.cny = { cache_hit = "1", cache_miss = "4", output = "16" }

[[api.window]]
name = "holiday"
days = ["holiday"]
factor = "0.5"

[[api.window]]
name = "weekend"
from = "08:00"
days = ["weekend"]
prices.usd = { cache_hit = "0.1", cache_miss = "0.4", output = "2" }
prices.cny = { cache_hit = "0.8", cache_miss = "3", output = "14" }

[[api.window]]
name = "night"
from = "22:00"
to = "06:30"
factor = "0.25"

[[api]]
name = "chat"
since = 2025-06-01
timezone = "Asia/Shanghai"
source = "a test"
prices.usd = { cache_hit = "0.07", cache_miss = "0.27", output = "1.1" }
prices.cny = { cache_hit = "0.5", cache_miss = "2", output = "8" }

[[api]]
name = "flat"
since = 2025-01-01
source = "a test"
prices.usd = { cache_hit = "0.25", cache_miss = "0.25", output = "1.25" }
"""
M = 10**6
ONE = (M, M, M)
# Tokens (hit, miss, output), moment, currency, what it costs.
BILLS = [
    (ONE, "2025-04-23T12:00+08:00", "usd", "2.88"),
    (ONE, "2025-04-23T12:00+08:00", "cny", "21"),
    ((0, 0, 0), "2025-04-23T12:00+08:00", "usd", "0"),
    ((1, 0, 0), "2025-04-23T12:00+08:00", "usd", "0.00000014"),
    ((0, 1, 0), "2025-04-23T12:00+08:00", "usd", "0.00000055"),
    ((0, 0, 1), "2025-04-23T12:00+08:00", "usd", "0.00000219"),
    ((750_000, 250_000, 100_000), "2025-04-23T12:00+08:00", "usd", "0.4615"),
    ((342_000 * M, 266_000 * M, 168_000 * M), "2025-04-23T12:00+08:00", "usd", "562100"),
    (ONE, "2025-04-23T21:59:59+08:00", "usd", "2.88"),
    (ONE, "2025-04-23T22:00+08:00", "usd", "0.72"),
    (ONE, "2025-04-24T06:29:59+08:00", "usd", "0.72"),
    (ONE, "2025-04-24T06:30+08:00", "usd", "2.88"),
    ((333, 333, 333), "2025-04-23T23:00+08:00", "cny", "0.00174825"),
    (ONE, "2025-04-26T06:00+08:00", "usd", "0.72"),  # Saturday: the night that began on Friday
    (ONE, "2025-04-26T07:00+08:00", "usd", "2.88"),  # between the windows
    (ONE, "2025-04-26T10:00+08:00", "usd", "2.5"),
    (ONE, "2025-04-26T23:00+08:00", "usd", "2.5"),  # the first window that holds
    ((1_234_567, 7_654_321, 999), "2025-04-26T10:00+08:00", "cny", "23.9646026"),
    (ONE, "2025-04-27T10:00+08:00", "usd", "2.88"),  # a Sunday that is worked
    (ONE, "2025-05-11T23:59+08:00", "usd", "2.5"),
    (ONE, "2025-05-12T00:00+08:00", "usd", "0.72"),
    (ONE, "2025-05-01T12:00+08:00", "usd", "1.44"),
    (ONE, "2025-05-01T12:00+08:00", "cny", "10.5"),
    (ONE, "2025-05-01T23:00+08:00", "usd", "1.44"),
    (ONE, "2025-04-30T23:59:59+08:00", "usd", "0.72"),
    (ONE, "2025-04-30T16:00+00:00", "usd", "1.44"),  # midnight in Shanghai
    (ONE, "2025-05-03T00:30+08:00", "usd", "0.72"),
    (ONE, "2025-05-31T23:59+08:00", "usd", "2.5"),  # a Saturday, the last minute of the old prices
    (ONE, "2025-06-01T00:00+08:00", "usd", "1.44"),
    (ONE, "2025-05-31T16:00+00:00", "usd", "1.44"),
    (ONE, "2025-05-31T11:59-04:00", "usd", "2.5"),
    (ONE, "2025-06-07T10:00+08:00", "cny", "10.5"),  # the new prices have no windows
    ((10**18, 0, 0), "2025-04-23T12:00+08:00", "usd", "140000000000"),
]


@pytest.fixture(scope="module")
def book() -> PriceBook:
    return PriceBook.model_validate(tomllib.loads(BOOK))


@pytest.mark.parametrize("tokens, moment, currency, total", BILLS)
def test_a_bill_is_exact(book: PriceBook, tokens: tuple[int, int, int], moment: str, currency: str, total: str) -> None:
    (bill,) = bill_api(Usage(*tokens), "chat", datetime.fromisoformat(moment), book=book, currency=currency)  # type: ignore[arg-type]
    assert bill.total == Decimal(total)


def test_a_bill_says_which_price_held(book: PriceBook) -> None:
    (bill,) = bill_api(Usage(*ONE), "chat", datetime.fromisoformat("2025-05-01T12:00+08:00"), book=book)
    assert (bill.entry, bill.window, bill.source) == ("chat since 2025-01-20", "holiday", "a test")
    assert bill.parts == {"cache_hit": Decimal("0.07"), "cache_miss": Decimal("0.275"), "output": Decimal("1.095")}


@pytest.mark.parametrize(
    "when, totals",
    [
        (None, ["0.72", "2.88"]),
        (date(2025, 4, 23), ["0.72", "2.88"]),
        (date(2025, 4, 26), ["0.72", "2.88"]),
        (date(2025, 5, 1), ["1.44"]),  # a holiday has one price all day
        (date(2025, 6, 2), ["1.44"]),
    ],
)
def test_who_does_not_know_the_moment_gets_two_prices(book: PriceBook, when: date | None, totals: list[str]) -> None:
    bills = bill_api(Usage(*ONE), "chat", when, book=book)
    assert [bill.total for bill in bills] == [Decimal(total) for total in totals]


@pytest.mark.parametrize(
    "day, start, end, totals",
    [
        (date(2025, 3, 8), "02:00", "03:00", ["0.875", "1.75"]),
        (date(2025, 3, 9), "02:00", "03:00", ["1.75"]),  # clocks go from 02:00 to 03:00: no such minute
        (date(2025, 3, 9), "02:30", "03:30", ["0.875", "1.75"]),  # from 03:00 on
        (date(2025, 11, 2), "01:00", "02:00", ["0.875", "1.75"]),  # that hour comes twice
        (date(2024, 2, 29), "23:59", "00:01", ["0.875", "1.75"]),
    ],
)
def test_a_day_has_the_prices_of_its_own_minutes(day: date, start: str, end: str, totals: list[str]) -> None:
    """New York's clocks, 2025-03-09 and 2025-11-02."""
    flat = BOOK[BOOK.index('[[api]]\nname = "flat"') :].replace(
        "since = 2025", 'timezone = "America/New_York"\nsince = 2024'
    )
    window = f'[[api.window]]\nname = "cheap"\nfrom = "{start}"\nto = "{end}"\nfactor = "0.5"\n'
    bills = bill_api(Usage(*ONE), "flat", day, book=PriceBook.model_validate(tomllib.loads(flat + window)))
    assert [bill.total for bill in bills] == [Decimal(total) for total in totals]


def test_an_unknown_date_has_two_prices_even_of_one_entry(book: PriceBook) -> None:
    assert [bill.total for bill in bill_api(Usage(*ONE), "flat", None, book=book)] == [Decimal("1.75")] * 2


def test_our_book_has_deepseek_r1_as_it_was_published() -> None:
    """2025-01-20: $0.14, $0.55, $2.19 and ¥1, ¥4, ¥16 per million tokens; the meter's nano-yuan say the same."""
    moment = datetime.fromisoformat("2025-02-01T12:00+00:00")
    for currency, parts in (("usd", ["0.14", "0.55", "2.19"]), ("cny", ["1", "4", "16"])):
        (bill,) = bill_api(Usage(*ONE), "deepseek-r1", moment, currency=currency)  # type: ignore[arg-type]
        assert list(bill.parts.values()) == [Decimal(part) for part in parts]
    meter = select_prices(load_price_tables(), "deepseek-r1", on=date(2025, 2, 1))
    assert [meter.hit, meter.miss, meter.output] == [1000, 4000, 16000]


def test_v3_s_bill_follows_from_its_hours() -> None:
    """DeepSeek-V3, arXiv 2412.19437, table 1: 180 K hours a trillion tokens, 14.8 T; 119 K; 5 K: $5.576 M."""
    hours = Decimal("180e3") * Decimal("14.8") + Decimal("119e3") + Decimal("5e3")
    bill = bill_training(hours, gpu_price("H800"))
    assert hours == 2_788_000
    assert bill.total == Decimal("5576000")
    assert any("research" in item for item in bill.leaves_out) and any("people" in item for item in bill.leaves_out)


def test_an_hour_is_priced_by_its_day_and_kind(book: PriceBook) -> None:
    prices = [
        gpu_price("H800", date(2025, 5, 31), book=book),
        gpu_price("H800", date(2025, 6, 1), book=book),
        gpu_price("H800", book=book, kind="spot"),
    ]
    assert [price.usd for price in prices] == [Decimal("2"), Decimal("1.75"), Decimal("0.9")]


@pytest.mark.parametrize(
    "usage, name, when, named",
    [
        (Usage(-1, 0, 0), "chat", None, "cache_hit is -1"),
        (Usage(0, 10**19, 0), "chat", None, "cache_miss"),
        (Usage(0, 0, 1.5), "chat", None, "output is 1.5"),  # type: ignore[arg-type]
        (Usage(0, 0, True), "chat", None, "output is True"),
        (Usage(1, 1, 1), "chatt", None, "there are: chat, flat"),
        (Usage(1, 1, 1), "chat", date(2024, 12, 31), "give a date from 2025-01-20"),
        (Usage(1, 1, 1), "chat", datetime(2025, 4, 23, 12), "timezone"),
    ],
)
def test_a_bill_that_cannot_be_is_refused(
    book: PriceBook, usage: Usage, name: str, when: date | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        bill_api(usage, name, when, book=book)


def test_a_price_in_another_currency_is_refused(book: PriceBook) -> None:
    with pytest.raises(ConfigError, match="no price in cny"):
        bill_api(Usage(*ONE), "flat", None, book=book, currency="cny")
    with pytest.raises(ConfigError, match="H800 .rental, since 2024-12-26, in usd"):
        gpu_price("H900", book=book)
    with pytest.raises(ConfigError, match="no rental price of 'H800' in cny .*since 2024-12-26, in usd"):
        gpu_price("H800", book=book, currency="cny")


def test_a_chip_is_priced_however_its_letters_are_cased(book: PriceBook) -> None:
    """As ``sprat plan --chip h800`` finds it in the catalogue."""
    assert gpu_price("h800", date(2025, 5, 31), book=book).usd == Decimal("2")


@pytest.mark.parametrize(
    "old, new, named",
    [
        ('since = 2024-12-26\nusd = "2"', 'usd = "2"', "since"),
        ('usd = "1.75"', 'usd = "-1.75"', "greater than or equal to 0"),
        ('usd = "1.75"', "usd = 1.75", "no exact amount"),
        ('usd = "1.75"', 'usd = "1e12"', "less than"),
        ('usd = "1.75"', 'usd = "nan"', "finite"),
        ('usd = "1.75"\n', "", "H800 since 2025-06-01 has no amount: give usd or cny"),
        ("since = 2025-06-01\nusd", "since = 2024-12-26\nusd", "two rental prices of h800 since 2024-12-26"),
        ("since = 2025-06-01\ntime", "since = 2025-01-20\ntime", "two api prices of chat since 2025-01-20"),
        ('factor = "0.5"', "", "give a factor or prices"),
        ('days = ["weekend"]', 'days = ["weekends"]', "weekends"),
        ('from = "22:00"', 'from = "25:00"', "pattern"),
        ('timezone = "Asia/Shanghai"', 'timezone = "Asia/Shangri-La"', "no timezone"),
        ('source = "a test"', 'source = ""', "source"),
        ('source = "a test"', 'source = "a test"\nprize = 1', "prize"),
    ],
)
def test_a_price_book_that_does_not_hold_is_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in BOOK
    path = tmp_path / "prices.toml"
    path.write_text(BOOK.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        load_prices(path)


@pytest.mark.parametrize("hours", [-1, float("nan"), float("inf"), 10**16])
def test_hours_that_cannot_be_are_refused(book: PriceBook, hours: float) -> None:
    with pytest.raises(ConfigError, match="GPU-hours"):
        bill_training(hours, gpu_price("H800", book=book))


def test_hours_are_billed_with_all_their_digits(book: PriceBook) -> None:
    """More than the 28 digits at which Python's decimals round by themselves."""
    bill = bill_training(Decimal("123456789012345.1234567890123456789"), gpu_price("H800", date(2025, 1, 1), book=book))
    assert bill.total == Decimal("246913578024690.2469135780246913578")
    for hours in ("1e-999999999", "0." + "1" * 60):
        with pytest.raises(ConfigError, match="cannot be billed exactly.*at most 50 digits"):
            bill_training(Decimal(hours), gpu_price("H800", book=book))


@pytest.mark.parametrize("moment", ["0001-01-01T00:00+08:00", "9999-12-31T23:59-12:00"])
def test_a_moment_at_the_end_of_the_calendar_is_refused(book: PriceBook, moment: str) -> None:
    with pytest.raises(ConfigError, match="the year is .*give a year from 2 to 9998"):
        bill_api(Usage(*ONE), "chat", datetime.fromisoformat(moment), book=book)


def test_a_price_book_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    for path in (tmp_path, tmp_path / "none.toml", tmp_path / "latin.toml", "/dev/null"):
        with pytest.raises(ConfigError, match="cannot read the price book"):
            load_prices(path)
