"""What serving costs: the bound that the experts' exchange sets on decoding, nodes for a day's traffic, money a token.

Two things that are computed from published throughput and nothing else:

- *Decode bound.* With experts spread so far that each device holds one, a step of a layer must send every token to its
  experts in FP8 and fetch the results in BF16. With two micro-batches, one computing while the other communicates, a
  layer takes that twice, and no GPU is faster than its links (arXiv 2505.09343, section 2.3.2).
- *A day.* A node prefills or decodes, each at its own rate; nodes of both kinds, times their price, is the day's cost.
  The published rates are those of nodes given to one phase alone, so they are not added up over one node.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from sprat.errors import ConfigError
from sprat.plan.prices import GpuPrice
from sprat.plan.shapes import ModelShape

DISPATCH_BYTES, COMBINE_BYTES = 1, 2  # of a number: FP8 there, BF16 back
_DAY = 86400


@dataclass(frozen=True)
class DecodeBound:
    """The least time of decoding: seconds of one exchange of a layer, and of a token through all layers."""

    layer_step: float
    token: float

    @property
    def tokens_per_second(self) -> float:
        """Of one request."""
        return 1 / self.token


def decode_bound(
    shape: ModelShape, *, bytes_per_second: float, tokens_per_device: int = 32, width: int | None = None
) -> DecodeBound:
    """The decode bound of a mixture of experts over devices that each hold one expert of a layer.

    Args:
        bytes_per_second: of a device's link.
        tokens_per_device: of a micro-batch; the published figure has 32.
        width: of the hidden state; the published figure writes 7K for 7,168 and computes with 7,000.

    >>> from sprat.plan.families import load_shape
    >>> bound = decode_bound(load_shape("v3"), bytes_per_second=50e9, width=7000)
    >>> f"{bound.layer_step * 1e6:.2f} us, {bound.token * 1e3:.2f} ms"
    '120.96 us, 14.76 ms'

    Raises:
        ConfigError: the model has no experts, or a number is not positive.
    """
    mixtures = [block.mixture for block in shape.blocks if block.mixture is not None]
    if not mixtures:
        raise ConfigError(f"{shape.name} has no experts", where="decode bound", todo="use a mixture of experts")
    _positive(bytes_per_second=bytes_per_second, tokens_per_device=tokens_per_device, width=width or shape.hidden)
    experts = max(mix.top_k + (1 if mix.shared_ffn else 0) for mix in mixtures)
    numbers = tokens_per_device * experts * (width or shape.hidden)
    step = (DISPATCH_BYTES + COMBINE_BYTES) * numbers / bytes_per_second
    return DecodeBound(step, 2 * step * len(shape.layers))


@dataclass(frozen=True)
class Traffic:
    """Tokens of a day: of prompts, of those the ones found in the cache, and written."""

    prompt: float
    cached: float
    output: float

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that are found in the cache."""
        return self.cached / self.prompt if self.prompt else 0.0


@dataclass(frozen=True)
class DayOfServing:
    """Nodes (mean over the day) of each phase, and what they cost."""

    prefill_nodes: float
    decode_nodes: float
    cost: Decimal
    currency: str
    prompt_cost_per_million: Decimal
    output_cost_per_million: Decimal
    source: str

    @property
    def nodes(self) -> float:
        """Of both phases."""
        return self.prefill_nodes + self.decode_nodes


def day_of_serving(
    traffic: Traffic,
    price: GpuPrice,
    *,
    prefill_rate: float,
    decode_rate: float,
    measured_hit_rate: float | None = None,
    gpus_per_node: int = 8,
    currency: str = "usd",
) -> DayOfServing:
    """Nodes and money for a day of ``traffic``.

    Args:
        price: of a GPU-hour.
        prefill_rate: prompt tokens a second of a node that prefills, cached ones counted as the published rate does.
        measured_hit_rate: share of cached tokens at which ``prefill_rate`` was measured, since only the others are
            computed; None: that of ``traffic``.
        decode_rate: tokens written a second of a node that decodes.

    Raises:
        ConfigError: a number is negative, zero where it divides, or the price is in another currency.
    """
    _positive(prefill_rate=prefill_rate, decode_rate=decode_rate, gpus_per_node=gpus_per_node)
    if not (0 <= traffic.cached <= traffic.prompt < 1e24 and 0 <= traffic.output < 1e24):
        raise ConfigError(f"traffic {traffic}", where="serving", todo="give tokens of a day, cached among the prompt's")
    given: Decimal | None = getattr(price, currency, None)
    if given is None:
        raise ConfigError(f"no price of {price.chip} in {currency}", where="serving", todo="use the other currency")
    amount = given
    measured = traffic.hit_rate if measured_hit_rate is None else measured_hit_rate
    if not 0 <= measured < 1:
        todo = "give a share from 0 to below 1"
        raise ConfigError(f"measured_hit_rate is {measured}", where="serving", todo=todo)
    computed_rate = prefill_rate * (1 - measured)
    prefill = (traffic.prompt - traffic.cached) / _DAY / computed_rate
    decode = traffic.output / _DAY / decode_rate

    def cost(nodes: float) -> Decimal:
        return Decimal(repr(nodes * gpus_per_node * 24)) * amount

    def per_million(nodes: float, tokens: float) -> Decimal:
        return cost(nodes) / Decimal(repr(tokens / 1e6)) if tokens else Decimal(0)

    return DayOfServing(
        prefill, decode, cost(prefill + decode), currency, per_million(prefill, traffic.prompt),
        per_million(decode, traffic.output), price.source,
    )  # fmt: skip


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < 1e30:
            raise ConfigError(f"{name} is {value}", where="serving", todo="give a positive number")
