"""Bills: exact ones of API use, and that of a training run with what it leaves out.

A bill of API use is made of three products, of prompt tokens found in the cache, prompt tokens computed, and tokens
written (thinking included), each times a price per million, and nothing is rounded. Who does not know the moment gets
two bills, the lowest and the highest that may hold, and never a mean that nobody would be charged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal, localcontext

from sprat.errors import ConfigError
from sprat.plan.prices import (
    EXACT,
    PARTS,
    ApiPrices,
    Currency,
    GpuPrice,
    Part,
    PriceBook,
    TokenPrices,
    load_prices,
)

MILLION = 1_000_000
_MOST_TOKENS = 10**18
_MOST_DIGITS = _MOST_PLACES = 50  # of GPU-hours; a price has 30 digits at most, so that their product is exact
# What a bill of GPU-hours does not hold (DeepSeek-V3, arXiv 2412.19437, section 1, says so of its own).
LEFT_OUT = (
    "earlier research and ablations on architecture, algorithms and data",
    "data: licences, collection, cleaning, synthesis",
    "people",
    "storage, network and idle hours beyond those of the run",
)


@dataclass(frozen=True)
class Usage:
    """Tokens: of the prompt found in the cache, of the prompt computed, written."""

    cache_hit: int
    cache_miss: int
    output: int


@dataclass(frozen=True)
class ApiBill:
    """What some use of an API costs; ``parts`` are its three products, ``window`` says which prices held."""

    parts: dict[Part, Decimal]
    currency: Currency
    entry: str
    window: str
    source: str

    @property
    def total(self) -> Decimal:
        """The sum of the parts, exact."""
        with localcontext(EXACT):
            return sum(self.parts.values(), Decimal(0))


@dataclass(frozen=True)
class TrainingBill:
    """GPU-hours times a price, and what that leaves out."""

    gpu_hours: Decimal
    price: Decimal
    total: Decimal
    currency: Currency
    source: str
    leaves_out: tuple[str, ...] = LEFT_OUT


def bill_api(
    usage: Usage,
    name: str,
    when: datetime | date | None,
    *,
    book: PriceBook | None = None,
    currency: Currency = "usd",
) -> tuple[ApiBill, ...]:
    """The bill of ``usage``: one where it is certain, else the lowest and the highest that may hold.

    Args:
        when: a moment with its timezone; a day (by the price's own clock), on which windows may make two prices; None:
            not known, so that any entry and window of ``name`` may hold.

    >>> [bill.total for bill in bill_api(Usage(10**6, 10**6, 10**6), "deepseek-r1", date(2025, 2, 1), currency="cny")]
    [Decimal('21')]

    Raises:
        ConfigError: no such price at that time, a moment without a timezone, or tokens that cannot be.
    """
    for part in PARTS:
        count = getattr(usage, part)
        if type(count) is not int or not 0 <= count <= _MOST_TOKENS:
            todo = f"give a whole number from 0 to {_MOST_TOKENS}"
            raise ConfigError(f"{part} is {str(count)[:40]} tokens", where="usage", todo=todo)
    if when is not None and not 1 < when.year < 9999:  # elsewhere it has no date in every timezone
        raise ConfigError(f"the year is {when.year}", where="when", todo="give a year from 2 to 9998")
    book = book or load_prices()
    entries = sorted((entry for entry in book.api if entry.name == name), key=lambda entry: entry.since)
    if not entries:
        known = ", ".join(sorted({entry.name for entry in book.api})) or "none"
        raise ConfigError(f"no price is called {name!r}", where="prices", todo=f"there are: {known}")
    if when is None:
        options = [(entry, *option) for entry in entries for option in entry.on(None, currency)]
    elif isinstance(when, datetime):
        if when.tzinfo is None:
            raise ConfigError(f"{when.isoformat()} has no timezone", where="when", todo="add one, such as +08:00")
        entry = _entry(entries, when)
        options = [(entry, *entry.at(when, currency))]
    else:
        entry = _entry(entries, when)
        options = [(entry, *option) for option in entry.on(when, currency)]
    bills = [_bill(usage, entry, window, prices, currency) for entry, window, prices in options]
    low, high = min(bills, key=lambda bill: bill.total), max(bills, key=lambda bill: bill.total)
    return (low,) if when is not None and low.total == high.total else (low, high)


def _entry(entries: Sequence[ApiPrices], when: datetime | date) -> ApiPrices:
    """The newest of ``entries`` that holds at ``when``, by the date in its own timezone."""
    for entry in reversed(entries):
        day = when.astimezone(entry.zone).date() if isinstance(when, datetime) else when
        if entry.since <= day:
            return entry
    first = entries[0]
    what = f"no price of {first.name!r} on {when.isoformat()}"
    raise ConfigError(what, where="prices", todo=f"give a date from {first.since.isoformat()} on")


def _bill(usage: Usage, entry: ApiPrices, window: str, prices: TokenPrices, currency: Currency) -> ApiBill:
    with localcontext(EXACT):
        parts = {part: getattr(usage, part) * getattr(prices, part) / MILLION for part in PARTS}
    return ApiBill(parts, currency, f"{entry.name} since {entry.since.isoformat()}", window, entry.source)


def bill_training(gpu_hours: Decimal | int | float, price: GpuPrice, *, currency: Currency = "usd") -> TrainingBill:
    """GPU-hours times ``price``.

    >>> from sprat.plan.prices import gpu_price
    >>> f"{bill_training(2_788_000, gpu_price('H800')).total / MILLION:.3f} M"
    '5.576 M'

    Raises:
        ConfigError: the hours are negative, absurd or have too many digits, or the price is in another currency.
    """
    hours = Decimal(repr(gpu_hours)) if isinstance(gpu_hours, float) else Decimal(gpu_hours)
    amount: Decimal | None = getattr(price, currency)
    if not hours.is_finite() or not 0 <= hours < 10**15:
        raise ConfigError(f"{gpu_hours} GPU-hours", where="bill", todo="give a number from 0 to 10^15")
    _, digits, exponent = hours.as_tuple()
    if len(digits) > _MOST_DIGITS or abs(int(exponent)) > _MOST_PLACES:
        todo = f"give at most {_MOST_DIGITS} digits, {_MOST_PLACES} of them behind the point"
        raise ConfigError(f"{str(gpu_hours)[:40]} GPU-hours cannot be billed exactly", where="bill", todo=todo)
    if amount is None:
        raise ConfigError(f"no price of {price.chip} in {currency}", where="bill", todo="use the other currency")
    source = f"{price.chip} {price.kind} since {price.since.isoformat()}: {price.source}"
    with localcontext(EXACT):
        return TrainingBill(hours, amount, hours * amount, currency, source)
