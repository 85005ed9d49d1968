"""``sprat certify``: what a squeezed model lost against its original, one capability at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sprat.cli.progress import progress_bar
from sprat.cli.verb import ModelFolder, Overrides, Recipe, Result
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from sprat.eval.certificate import Certificate
    from sprat.eval.intervals import Estimate

_AGAINST_HELP = "The model that MODEL was made from."
Against = Annotated[Path, typer.Option("--against", metavar="ORIGINAL", help=_AGAINST_HELP)]
_TASK_HELP = "A JSONL file of yours, file.py:Class, or a task of the recipe; repeat for more."
Task = Annotated[list[str] | None, typer.Option("--task", metavar="NAME", help=_TASK_HELP)]
_TEXT_HELP = "A file or folder of text, in place of English and Chinese of this machine."
Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help=_TEXT_HELP)]
_MAX_LOSS_HELP = "The bar for each capability: leave with 1 where the upper 95 % bound of its loss is above it."
MaxLoss = Annotated[str | None, typer.Option("--max-loss", metavar="2%", help=_MAX_LOSS_HELP)]
_OUT_HELP = "Where certificate.json and certificate.html go."
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help=_OUT_HELP)]
_COUNT_HELP = "Problems for each task; left out: the recipe's number, or all of a file."
Count = Annotated[int | None, typer.Option("--count", min=1, help=_COUNT_HELP)]
_DOCUMENTS_HELP = "Documents of each text."
Documents = Annotated[int, typer.Option("--documents", min=2, help=_DOCUMENTS_HELP)]
_MAX_TOKENS_HELP = "Tokens of an answer, thinking included; left out: the recipe's, or 512 for a file."
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, max=2**31 - 1, help=_MAX_TOKENS_HELP)]
_PROMPTS_HELP = "Openings that both continue for 256 tokens; 0 leaves that out."
Prompts = Annotated[int, typer.Option("--prompts", min=0, help=_PROMPTS_HELP)]
Speed = Annotated[bool, typer.Option("--speed/--no-speed", help="Measure prefill and decode of both.")]
Offline = Annotated[bool, typer.Option("--offline", help="Fetch no package: without --text, no Chinese.")]


def certify(
    model: ModelFolder,
    against: Against,
    task: Task = None,
    text: Text = None,
    max_loss: MaxLoss = None,
    out: Out = Path("certificate"),
    count: Count = None,
    documents: Documents = 50,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Force or forbid thinking.")] = None,
    max_tokens: MaxTokens = None,
    prompts: Prompts = 32,
    speed: Speed = True,
    offline: Offline = False,
    recipe: Recipe = "quickstart",
    overrides: Overrides = None,
) -> Result:
    """Certify what MODEL lost against ORIGINAL: tasks, text, routing, long continuations, size and speed.

    Example: sprat certify small --against runs/mine --task questions.jsonl --max-loss 2%
    """
    bar = parse_share(max_loss)
    if out.is_file():
        raise ConfigError("this is a file", where=str(out), todo="give a folder: --out DIR")
    for folder in (out.resolve(), *out.resolve().parents):
        if (folder / "run.json").is_file():
            raise ConfigError(
                "it would change a finished run", where=str(folder), todo="give another folder: --out DIR"
            )
    from sprat.eval.certificate import write_certificate
    from sprat.pipeline.certify import CertifySettings
    from sprat.pipeline.certify import certify as measure
    from sprat.pipeline.recipe import load_recipe
    from sprat.report.certificate import write_page

    settings = CertifySettings(
        tasks=tuple(task or ()),
        text=text,
        max_loss=bar,
        count=count,
        documents=documents,
        thinking=think,
        max_tokens=max_tokens,
        prompts=prompts,
        speed=speed,
        offline=offline,
    )
    with progress_bar("certify") as on_progress:
        certificate = measure(
            model, against, settings, load_recipe(recipe, tuple(overrides or ())), on_progress=on_progress
        )
    write_certificate(certificate, out)
    page = write_page(certificate, out)
    return Result(certificate.to_dict(), _summary(certificate, page), exit_code=int(bool(certificate.failed)))


def parse_share(text: str | None) -> float | None:
    """A share: ``2%``, ``0.5 %`` or ``0.02``; None for none.

    Raises:
        ConfigError: it is no share from 0 to 1.

    >>> parse_share("2%"), parse_share("0.02"), parse_share(None)
    (0.02, 0.02, None)
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"{text!r} is no share", where="--max-loss", todo="write 2% or 0.02")
    return share


def _summary(certificate: Certificate, page: Path) -> str:
    """What came of it, for a person: a line for each capability, then the rest in short."""
    lines = []
    for name, loss in certificate.capabilities.items():
        verdict = {True: "  holds", False: "  FAILS", None: ""}[certificate.holds(loss)]
        lines.append(f"{name}: {_loss(loss)}{verdict}")
    for text in certificate.texts:
        kl, top = text.kl_mean, text.same_top
        lines.append(
            f"{text.name}: {text.bits_before:.4f} to {text.bits_after:.4f} bits per byte, KL {kl.value:.3g} nats "
            f"({kl.low:.3g} to {kl.high:.3g}), same likeliest token {top.value:.1%}"
        )
    for flips in certificate.routing:
        lines.append(f"{flips.text}: {flips.sets.value:.1%} of expert sets changed, {flips.slots.value:.1%} of experts")
    if (long := certificate.continuations) is not None:
        where = (
            "none at the median" if long.first_divergence is None else f"median token {long.first_divergence.value:.0f}"
        )
        lines.append(
            f"{long.prompts} continuations: first divergence {where}, loops {long.loops_before.value:.0%} before and "
            f"{long.loops_after.value:.0%} after"
        )
    for speed in certificate.speeds:
        lines.append(f"{speed.what}: {speed.before:,.0f} to {speed.after:,.0f} tokens/s ({speed.ratio.value:.2f}x)")
    before, after = certificate.original.bytes, certificate.model.bytes
    lines.append(f"on disk: {before / 1e6:,.1f} to {after / 1e6:,.1f} MB")
    return "\n".join([*lines, *certificate.missing, f"the page: {page}"])


def _loss(loss: Estimate | None) -> str:
    if loss is None:
        return "the original is never right, so nothing can be said"
    return f"loss {loss.value:+.2%} ({loss.low:+.2%} to {loss.high:+.2%}, {loss.count})"
