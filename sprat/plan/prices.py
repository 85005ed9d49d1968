"""The price book: what an hour of an accelerator and a million tokens cost, since when, and who says so.

Which price holds is a question of the moment: the newest entry of that name by the date in its own timezone, then the
first of its windows (times of the day on workdays, weekends, holidays). Amounts are ``Decimal`` and never rounded: the
arithmetic traps what is inexact.
"""

from __future__ import annotations

import tomllib
from datetime import UTC, date, datetime, timedelta, tzinfo
from datetime import time as day_time
from decimal import Context, Decimal, Inexact, localcontext
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from sprat.config.base import Config, parse
from sprat.errors import ConfigError, TrustError
from sprat.files.regular_file import open_regular_file

PRICES_FILE = Path(__file__).with_name("prices.toml")
EXACT = Context(prec=80, traps=[Inexact])
Currency = Literal["usd", "cny"]
CURRENCIES: tuple[Currency, ...] = ("usd", "cny")
Part = Literal["cache_hit", "cache_miss", "output"]
PARTS: tuple[Part, ...] = ("cache_hit", "cache_miss", "output")
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_DAYS = ("workday", "weekend", "holiday", *WEEKDAYS)


def _decimal(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError(f"{value} is no exact amount: write it as text")
    return value


def _zone(name: str) -> tzinfo:
    """The clock of an offset such as ``+08:00``, or of a place such as ``Asia/Shanghai``."""
    try:
        if name[:1] in "+-":
            return datetime.strptime(name, "%z").tzinfo or UTC
        return UTC if name == "UTC" else ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"no timezone is called {name!r}: use an offset such as +08:00") from None


Amount = Annotated[Decimal, Field(ge=0, lt=Decimal(10**9), max_digits=30)]


class TokenPrices(Config):
    """Amounts per million tokens."""

    cache_hit: Amount
    cache_miss: Amount
    output: Amount

    _exact = field_validator("cache_hit", "cache_miss", "output", mode="before")(_decimal)

    def scaled(self, factor: Decimal) -> TokenPrices:
        """Each times ``factor``, exactly."""
        with localcontext(EXACT):
            return TokenPrices.model_construct(**{part: getattr(self, part) * factor for part in PARTS})


class Window(Config):
    """A time of the day at which other prices hold: from ``from`` up to ``to``, past midnight where it ends before."""

    name: str = Field(min_length=1)
    start: str = Field("00:00", alias="from", pattern=r"^([01]\d|2[0-3]):[0-5]\d$")
    end: str = Field("24:00", alias="to", pattern=r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$")
    days: tuple[str, ...] = ()  # on which it begins; none: every day
    factor: Annotated[Decimal, Field(ge=0, le=1000, max_digits=30)] | None = None
    prices: dict[Currency, TokenPrices] | None = None

    _exact = field_validator("factor", mode="before")(_decimal)

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if unknown := [day for day in self.days if day not in _DAYS]:
            raise ValueError(f"{unknown[0]!r} is no kind of day: use {', '.join(_DAYS)}")
        if (self.factor is None) == (self.prices is None):
            raise ValueError(f"window {self.name!r}: give a factor or prices, and not both")
        if self.start == self.end:
            raise ValueError(f"window {self.name!r} begins and ends at {self.start}")
        return self

    def holds(self, local: datetime, entry: ApiPrices) -> bool:
        """Whether it holds at ``local`` time; the part after midnight belongs to the day on which it began."""
        now = local.strftime("%H:%M")
        if self.start < self.end:
            return self.start <= now < self.end and self._begins(local.date(), entry)
        if now >= self.start:
            return self._begins(local.date(), entry)
        return now < self.end and self._begins(local.date() - timedelta(days=1), entry)

    def _begins(self, day: date, entry: ApiPrices) -> bool:
        return not self.days or bool(set(self.days) & entry.kinds_of(day))


class ApiPrices(Config):
    """Prices of one model from the day ``since`` on, until a newer entry of the same name holds."""

    name: str = Field(min_length=1)
    since: date
    timezone: str = "UTC"
    source: str = Field(min_length=1)
    prices: dict[Currency, TokenPrices] = Field(min_length=1)
    window: tuple[Window, ...] = ()
    holidays: tuple[date, ...] = ()
    workdays: tuple[date, ...] = ()  # of a weekend, that are worked

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        _zone(name)
        return name

    @property
    def zone(self) -> tzinfo:
        """Its clock."""
        return _zone(self.timezone)

    def kinds_of(self, day: date) -> set[str]:
        """What ``day`` is: its weekday; a holiday; else a weekend's day or a workday."""
        weekday = WEEKDAYS[day.weekday()]
        if day in self.holidays:
            return {"holiday", weekday}
        return {"weekend" if day.weekday() >= 5 and day not in self.workdays else "workday", weekday}

    def at(self, moment: datetime, currency: Currency) -> tuple[str, TokenPrices]:
        """(name of the window, or "list"; the prices) that hold at ``moment``."""
        base = self.in_currency(currency)
        for window in self.window:
            if window.holds(moment.astimezone(self.zone), self):
                return window.name, self._of_window(window, currency, base)
        return "list", base

    def in_currency(self, currency: Currency) -> TokenPrices:
        """The prices outside windows.

        Raises:
            ConfigError: the entry has none in ``currency``.
        """
        if currency not in self.prices:
            where, todo = f"price of {self.name} since {self.since}", f"use {' or '.join(self.prices)}"
            raise ConfigError(f"no price in {currency}", where=where, todo=todo)
        return self.prices[currency]

    def _of_window(self, window: Window, currency: Currency, base: TokenPrices) -> TokenPrices:
        if window.prices is None:
            return base.scaled(window.factor or Decimal(0))
        if currency not in window.prices:
            where, todo = f"window {window.name!r} of {self.name}", f"use {' or '.join(window.prices)}"
            raise ConfigError(f"no price in {currency}", where=where, todo=todo)
        return window.prices[currency]

    def on(self, day: date | None, currency: Currency) -> list[tuple[str, TokenPrices]]:
        """All prices that hold at some minute of ``day`` by the entry's clock; None: of any day."""
        if day is None:
            base = self.in_currency(currency)
            return [("list", base), *((w.name, self._of_window(w, currency, base)) for w in self.window)]
        midnight = datetime.combine(day, day_time(), self.zone).astimezone(UTC)
        options: list[tuple[str, TokenPrices]] = []
        for minute in range(26 * 60):  # the longest day: clocks that are set back make it longer than 24 hours
            moment = midnight + timedelta(minutes=minute)
            if moment.astimezone(self.zone).date() == day and (option := self.at(moment, currency)) not in options:
                options.append(option)
        return options


class GpuPrice(Config):
    """An hour of one accelerator from the day ``since`` on."""

    chip: str = Field(min_length=1)
    kind: Literal["rental", "spot", "own"] = "rental"
    since: date
    usd: Amount | None = None
    cny: Amount | None = None
    source: str = Field(min_length=1)

    _exact = field_validator("usd", "cny", mode="before")(_decimal)

    @property
    def currencies(self) -> tuple[Currency, ...]:
        """Those in which it has an amount."""
        return tuple(each for each in CURRENCIES if getattr(self, each) is not None)

    @model_validator(mode="after")
    def _has_an_amount(self) -> Self:
        if not self.currencies:
            raise ValueError(
                f"the price of {self.chip} since {self.since} has no amount: give {' or '.join(CURRENCIES)}"
            )
        return self


class PriceBook(Config):
    """All prices, each with its date and source."""

    gpu: tuple[GpuPrice, ...] = ()
    api: tuple[ApiPrices, ...] = ()

    @model_validator(mode="after")
    def _each_holds_alone(self) -> Self:
        """Refuse two prices of the same thing since the same day."""
        keys: list[tuple[object, ...]] = [("api", each.name, each.since) for each in self.api]
        keys += [(each.kind, each.chip.lower(), each.since, money) for each in self.gpu for money in each.currencies]
        for key in {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"two {key[0]} prices of {key[1]} since {key[2]}: keep one, or give each its day")
        return self


def load_prices(path: str | Path = PRICES_FILE) -> PriceBook:
    """The price book at ``path``.

    Raises:
        ConfigError: it is missing, no TOML, or an entry does not hold: a price without a date, a negative one.
    """
    try:
        with open_regular_file(path) as stream:
            table = tomllib.loads(stream.read().decode("utf-8"))
    except (OSError, TrustError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the price book: {error}", where=str(path), todo="give a TOML file") from None
    return parse(PriceBook, table, where=str(path))


def gpu_price(
    chip: str,
    on: date | None = None,
    *,
    kind: str = "rental",
    book: PriceBook | None = None,
    currency: Currency = "usd",
) -> GpuPrice:
    """The newest price of an hour of ``chip``, however its letters are cased, that holds ``on`` a day (None: of all).

    Raises:
        ConfigError: the book has none; it names those it has.
    """
    book = book or load_prices()
    fits = [price for price in book.gpu if price.chip.lower() == chip.lower() and price.kind == kind]
    fits = [price for price in fits if currency in price.currencies and (on is None or price.since <= on)]
    if not fits:
        each_of = [(each, " and ".join(each.currencies)) for each in book.gpu]
        known = ", ".join(f"{each.chip} ({each.kind}, since {each.since}, in {money})" for each, money in each_of)
        what = f"no {kind} price of {chip!r} in {currency}" + (f" on {on.isoformat()}" if on else "")
        raise ConfigError(what, where="prices", todo=f"add it to a price book; there are: {known or 'none'}")
    return max(fits, key=lambda price: price.since)
