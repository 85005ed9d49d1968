"""Money: what a request costs, in integer nano-yuan, from dated price tables.

One yuan is 10^9 nano-yuan, so that ¥1 per million tokens is exactly 1,000 nano-yuan a token and no
sum of token prices is ever rounded. A cost is three products added up: prompt tokens found in the
cache, prompt tokens computed, and tokens written (thinking included). Tables are data with a date, those of
the planner's book (``sprat/plan/prices.toml``) and of ``prices.toml``; a request is priced by the one of its day.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from sprat.config.base import Config
from sprat.errors import ServeError
from sprat.plan.prices import load_prices

NANO_PER_YUAN = 1_000_000_000
DEFAULT_PRICES = "deepseek-r1"
PRICES_FILE = Path(__file__).with_name("prices.toml")


class Prices(Config):
    """One table: nano-yuan per token from the day ``since`` on."""

    name: str = Field(min_length=1)
    since: date
    hit: int = Field(ge=0)  # a prompt token found in the cache
    miss: int = Field(ge=0)  # a prompt token computed
    output: int = Field(ge=0)  # a token written, thinking included
    source: str = ""


@dataclass(frozen=True)
class Cost:
    """What one request cost, nano-yuan; ``total`` is the sum of the three."""

    hit: int
    miss: int
    output: int
    prices: Prices

    @property
    def total(self) -> int:
        """Nano-yuan in all."""
        return self.hit + self.miss + self.output

    def to_dict(self) -> dict[str, Any]:
        """The ``sprat.cost`` object of an answer."""
        return {
            "unit": "nano_yuan",
            "hit": self.hit,
            "miss": self.miss,
            "output": self.output,
            "total": self.total,
            "prices": {"name": self.prices.name, "since": self.prices.since.isoformat()},
        }


def load_price_tables(path: str | Path | None = None) -> list[Prices]:
    """The price tables of a TOML file with ``[[price]]`` entries; None: ours, and those in yuan of the price book.

    Raises:
        ServeError: the file is missing, no TOML, or an entry does not hold.
    """
    if path is None:
        return [*_book_tables(), *load_price_tables(PRICES_FILE)]
    path = Path(path)
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("price", [])
        tables = [Prices.model_validate(entry) for entry in entries]
    except FileNotFoundError:
        raise ServeError("no such price table", where=str(path), todo="give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, TypeError) as error:
        raise ServeError(f"cannot read the price table: {error}", where=str(path), todo="mend the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ServeError(f"price table: {key}: {first['msg']}", where=str(path), todo="correct that value") from None
    if not tables:
        raise ServeError("the price table is empty", where=str(path), todo="add a [[price]] entry")
    return tables


def _book_tables() -> list[Prices]:
    """The entries of the planner's book that have prices in yuan, the same all day, as nano-yuan per token."""
    tables = []
    for entry in load_prices().api:
        yuan = entry.prices.get("cny")
        if yuan is None or entry.window:
            continue
        amounts = {"hit": yuan.cache_hit, "miss": yuan.cache_miss, "output": yuan.output}
        nano = {part: amount * 1000 for part, amount in amounts.items()}  # a millionth of a yuan is 1,000 nano-yuan
        if all(amount == int(amount) for amount in nano.values()):
            whole = {part: int(amount) for part, amount in nano.items()}
            tables.append(Prices(name=entry.name, since=entry.since, source=entry.source, **whole))
    return tables


def select_prices(tables: Sequence[Prices], name: str = DEFAULT_PRICES, *, on: date | None = None) -> Prices:
    """The table ``name`` that holds on the day ``on`` (today when None).

    Raises:
        ServeError: no table of that name holds on that day.
    """
    day = on or date.today()
    valid = [table for table in tables if table.name == name and table.since <= day]
    if not valid:
        names = ", ".join(sorted({table.name for table in tables}))
        raise ServeError(f"no price table {name!r} on {day.isoformat()}", where="prices", todo=f"known tables: {names}")
    return max(valid, key=lambda table: table.since)


def price_request(prices: Prices, *, hit: int, miss: int, output: int) -> Cost:
    """Price token counts exactly.

    >>> r1 = Prices(name="r1", since=date(2025, 1, 20), hit=1000, miss=4000, output=16000)
    >>> price_request(r1, hit=1_000_000, miss=1_000_000, output=1_000_000).total == 21 * NANO_PER_YUAN
    True
    """
    if min(hit, miss, output) < 0:
        raise ValueError("token counts cannot be negative")
    return Cost(hit * prices.hit, miss * prices.miss, output * prices.output, prices)


class Meter:
    """Prices requests and keeps this process's running totals (no accounts yet: a restart forgets).

    Cancelled requests are metered too: the tokens were computed.
    """

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.requests = 0
        self.nano_yuan = 0

    def record(self, *, hit: int, miss: int, output: int) -> Cost:
        """Price one finished request and add it to the totals. Call it once a request."""
        cost = price_request(self.prices, hit=hit, miss=miss, output=output)
        self.requests += 1
        self.nano_yuan += cost.total
        return cost
