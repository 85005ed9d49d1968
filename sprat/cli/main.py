"""The command ``sprat``: its verbs in the order of the pipeline."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sprat import __version__
from sprat.cli import (
    certify,
    distill,
    doctor,
    evaluate,
    export,
    finetune,
    inference,
    models,
    plan,
    quantize,
    quickstart,
    replay,
    rl,
    road,
    sample,
    serve,
    stages,
    train,
    verify,
    verify_export,
)
from sprat.cli.verb import describe_error, flush_stdout, print_err, verb
from sprat.errors import ServeError

app = typer.Typer(
    name="sprat",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sprat {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """A complete low-cost LLM system: data, training, reasoning, distillation, INT4, serving, proof."""


class Command(TyperCommand):
    """A verb. Of an option that is given twice the last counts, but no text is passed over for another."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse a second --text or --calibrate, then read ``args`` as ever."""
        given = [option.name for option in self.make_parser(ctx).parse_args(args=list(args))[2]]
        for name in ("text", "calibrate"):
            if given.count(name) > 1:
                ctx.fail(f"--{name} is given twice, and takes one folder or file; put both texts into one folder.")
        return super().parse_args(ctx, args)


class ServeCommand(Command):
    """``serve``, whose settings may stand in a file as well: a wrong one has the same exit code there and here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read ``args`` as ever."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.exit_code = ServeError.exit_code
            raise


# Verb, function, and what the list of verbs says of it.
VERBS = (
    ("quickstart", quickstart.quickstart, "The whole road in one command, then the chat page."),
    ("road", road.road, "Stages of your own from one file; or zero, r1."),
    ("plan", plan.plan, "What a run will cost, before it starts."),
    ("doctor", doctor.doctor, "What this machine has, and what it lacks."),
    ("data", stages.data, "Text and tasks to tokenizer and packed rows."),
    ("train", train.train, "Pre-train on them; or any model on text of yours."),
    ("sft", finetune.sft, "Fine-tune any model on conversations of yours."),
    ("dpo", finetune.dpo, "Let a model prefer the chosen of two answers."),
    ("rl", rl.rl, "Reinforce what a verifier of yours pays, on questions of yours."),
    ("sample", sample.sample, "Keep a model's own right answers as examples."),
    ("replay", replay.replay, "Recompute a step of RL, bit for bit."),
    ("distill", distill.distill, "A student from any teacher's answers."),
    ("quantize", quantize.quantize, "Any model, or a road's student, in INT4 or INT8."),
    ("merge", export.merge, "Put an adapter into the weights of its base."),
    ("export", export.export, "Take a model away: GGUF, Hugging Face."),
    ("eval", evaluate.evaluate, "Score a model: tasks of yours, held-out problems, a text."),
    ("certify", certify.certify, "What a squeezed model lost against its original."),
    ("fetch", inference.fetch, "Download a small real model."),
    ("models", models.models, "Which models are on this disk; remove one."),
    ("run", inference.run, "Ask a model once."),
    ("chat", inference.chat, "Talk with a model."),
    ("serve", serve.serve, "Serve a model and its chat page."),
    ("report", verify.report, "Write a road's report.html."),
    ("verify", verify.verify, "Prove a run or a whole road."),
    ("verify-export", verify_export.verify_export, "Prove what was taken away."),
)

GOES_ON = {
    "quickstart",
    "road",
    "data",
    "train",
    "sft",
    "dpo",
    "rl",
    "sample",
    "distill",
    "quantize",
}  # when it was stopped

for _name, _function, _short in VERBS:
    _class = ServeCommand if _name == "serve" else Command
    app.command(_name, cls=_class, short_help=_short)(verb(_function, goes_on=_name in GOES_ON))


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="sprat")
    except OSError as error:  # not of a verb: the help or the version could not be written
        if "--debug" in sys.argv:
            raise
        message, code = describe_error(error)
        print_err(f"sprat: {message}")
        flush_stdout()
        sys.exit(code)
