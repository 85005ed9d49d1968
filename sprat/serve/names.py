"""What a served model is called: by its name, by others, and by those of the adapters beside it."""

from __future__ import annotations

from dataclasses import dataclass

from sprat.serve.errors import RequestError


@dataclass(frozen=True)
class Names:
    """What a request may give as its model: the served name, other names of it, and adapters (``base:adapter`` too)."""

    served: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    def all(self) -> tuple[str, ...]:
        """Every name, the served one first; adapters as ``served:adapter``."""
        return (self.served, *self.aliases, *(f"{self.served}:{adapter}" for adapter in self.adapters))

    def adapter(self, model: str) -> str | None:
        """The adapter that ``model`` means, None for the model alone.

        Raises:
            RequestError: 404, no such model.
        """
        if model in (self.served, *self.aliases):
            return None
        base, _, adapter = model.rpartition(":")
        if adapter in self.adapters and base in ("", self.served, *self.aliases):
            return adapter
        message = f"The model {model[:100]!r} does not exist here"
        raise RequestError(404, message, param="model", code="model_not_found")

    def has(self, model: str) -> bool:
        """Whether ``model`` is one of them; an adapter may be named without its base."""
        base, _, adapter = model.rpartition(":")
        names = (self.served, *self.aliases)
        return model in names or (adapter in self.adapters and base in ("", *names))

    def parent(self, model: str) -> str | None:
        """The model that an adapter's name stands beside; None for the model itself."""
        return None if model in (self.served, *self.aliases) else self.served
