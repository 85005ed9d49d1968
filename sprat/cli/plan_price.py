"""``sprat plan price``: the exact bill of API use, or of GPU-hours, from the price book."""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING, Any, cast

from sprat.cli.verb import Result
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from decimal import Decimal

    from sprat.plan.prices import Currency, PriceBook


def price(
    book: PriceBook, *, usage: str | None, hours: str | None, api: str, chip: str, at: str | None, currency: str
) -> Result:
    """The bill of ``usage`` (HIT,MISS,OUTPUT tokens) of ``api``, or of ``hours`` of ``chip``.

    Raises:
        ConfigError: neither or both are given, or one of them cannot be read or priced.
    """
    if currency not in ("usd", "cny"):
        raise ConfigError(f"no currency is called {currency[:20]!r}", where="--currency", todo="give usd or cny")
    if (usage is None) == (hours is None):
        todo = "give --usage HIT,MISS,OUTPUT tokens, or --hours GPU-HOURS"
        raise ConfigError("what is to be priced", where="sprat plan price", todo=todo)
    money = cast("Currency", currency)
    if hours is not None:
        return _price_hours(book, hours, chip, at, money)
    return _price_usage(book, usage or "", api, at, money)


def _price_usage(book: PriceBook, usage: str, api: str, at: str | None, currency: Currency) -> Result:
    """One bill, or the lowest and the highest."""
    from sprat.plan.bills import Usage, bill_api

    parts = [part.strip().replace("_", "") for part in usage.split(",")]
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
        todo = "give three whole numbers: found in the cache, computed, written"
        raise ConfigError(f"no usage: {usage[:60]!r}", where="--usage", todo=todo)
    bills = bill_api(Usage(*map(int, parts)), api, _moment(at), book=book, currency=currency)
    rows = [
        {
            "total": str(bill.total),
            "currency": bill.currency,
            "parts": {name: str(amount) for name, amount in bill.parts.items()},
            "price": bill.entry,
            "window": bill.window,
            "source": bill.source,
        }
        for bill in bills
    ]
    names = ("",) if len(bills) == 1 else ("at least ", "at most ")
    lines = [
        f"{name}{_plain(bill.total)} {bill.currency.upper()}  ({bill.entry}, {bill.window}: {bill.source})"
        for name, bill in zip(names, bills, strict=True)
    ]
    return Result({"bills": rows}, "\n".join(lines))


def _price_hours(book: PriceBook, hours: str, chip: str, at: str | None, currency: Currency) -> Result:
    """The bill of GPU-hours, and what it leaves out."""
    from decimal import Decimal, InvalidOperation

    from sprat.plan.bills import bill_training
    from sprat.plan.prices import gpu_price

    try:
        amount = Decimal(hours)
    except InvalidOperation:
        raise ConfigError(f"{hours[:40]!r} is no number of hours", where="--hours", todo="give a number") from None
    moment = _moment(at)
    day = moment.date() if isinstance(moment, datetime) else moment
    bill = bill_training(amount, gpu_price(chip, day, book=book, currency=currency), currency=currency)
    data: dict[str, Any] = {
        "total": str(bill.total),
        "currency": currency,
        "gpu_hours": str(bill.gpu_hours),
        "price": str(bill.price),
        "source": bill.source,
        "leaves_out": list(bill.leaves_out),
    }
    text = f"{_plain(bill.total)} {currency.upper()}  ({_plain(bill.gpu_hours)} hours x {bill.price}; {bill.source})\n"
    return Result(data, text + "it leaves out: " + "; ".join(bill.leaves_out))


def _plain(amount: Decimal) -> str:
    """All its digits, and no exponent."""
    return f"{amount:,f}"


def _moment(text: str | None) -> datetime | date | None:
    """A moment with its timezone, or a day."""
    if text is None:
        return None
    try:
        moment = date.fromisoformat(text) if len(text) <= 10 else datetime.fromisoformat(text)
    except ValueError:
        todo = "write 2025-02-01, or 2025-02-01T12:00+08:00"
        raise ConfigError(f"{text[:40]!r} is no date", where="--at", todo=todo) from None
    if isinstance(moment, datetime) and moment.tzinfo is None:
        raise ConfigError(f"{text[:40]} has no timezone", where="--at", todo="add one, such as +08:00")
    return moment
