"""The command line. Each command is a thin call into a module below, imported only when it runs."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from .. import __version__
from . import folders, run, serving, training  # noqa: F401  (they add their commands to the app)
from .options import app, fail


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ctc-drafter {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Lossless speculative decoding of frozen Hugging Face LLMs: the same text, sooner."""


def main() -> None:
    """Entry point of `ctc-drafter` and `python -m ctc_drafter`."""
    for name in ("torchao", "torch.utils._pytree"):  # where torchao is, it tells of each of its libraries that fails
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except KeyboardInterrupt:
        fail("Interrupted.", 130)
