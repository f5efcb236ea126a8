"""The commands about folders: inspect says what one is, export writes one for other libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Loading, command, load_target


@command
def inspect(
    path: Annotated[str, typer.Argument(help="A drafter, a target, or a result file of `bench`.", metavar="PATH")],
    target: Annotated[
        str | None, typer.Option("--target", help="Load this target and say whether the drafter fits it.")
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Load the target and let it score a draft tree.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    how: Loading,
) -> None:
    """Say what a folder or result file is, and check it. Exit code 1 if a check fails."""
    from json import dumps

    from ..bench.report import report_console
    from ..inspection import inspect_path, is_well, report_table, result_line

    report = inspect_path(
        path,
        lambda name: load_target(name, how),
        target=target,
        self_test=self_test,
        trust_remote_code=how.trust_remote_code,
    )
    if json:
        print(dumps(report, indent=1))
    elif report["what"] == "result":
        print(result_line(report))
    else:
        report_console().print(report_table(report))
    if not is_well(report):
        sys.stdout.flush()
        raise typer.Exit(1)


@command
def export(
    drafter: Annotated[str, typer.Argument(help="Drafter folder, `ctc` or `paper`.")],
    to: Annotated[str, typer.Option("--to", help="transformers, speculators or vllm.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a drafter as a folder that another library can use."""
    from ..integrations.export import export as write

    print(write(drafter, to, output, overwrite=overwrite))
