"""`vastscale COMMAND ...` runs the script of that command, as a checkout would."""

from __future__ import annotations

import difflib
import os
import runpy
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vastscale import ROOT, __version__

if TYPE_CHECKING:
    from pipeline.installation import Command

HOSTFILE_OPTIONS = ("--hostfile", "-H")


def main() -> None:
    """Run the command that `sys.argv` names; exits with its status, 2 for an unknown command."""
    sys.path.insert(0, str(ROOT))
    from pipeline.signals import end_at_once

    end_at_once()
    from pipeline.installation import COMMANDS, DATA_COMMANDS, DISTRIBUTED

    prog, table, arguments = "vastscale", COMMANDS, sys.argv[1:]
    if arguments[:1] == ["--version"]:
        print(f"vastscale {__version__}")
        return
    if arguments[:1] == ["data"]:
        prog, table, arguments = "vastscale data", DATA_COMMANDS, arguments[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(prog, table))
        return
    name, *arguments = arguments
    if name not in table:
        near = difflib.get_close_matches(name, [*table, "data"], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        print(f"error: unknown command {name}{hint} ({prog} --help lists all)", file=sys.stderr)
        sys.exit(2)
    script = table[name].script
    if prog == "vastscale" and name == "train" and _name_a_hostfile(arguments):
        script = DISTRIBUTED
    _run(script, f"{prog} {name}", arguments)


def _usage(prog: str, table: Mapping[str, Command]) -> str:
    rows = {name: command.summary for name, command in table.items()}
    closing = f"`{prog} COMMAND --help` lists the options of a command."
    if prog == "vastscale":
        rows["data ..."] = "make, check and inspect datasets; see `vastscale data --help`"
        closing += " `vastscale --version` prints the version."
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in rows.items()]
    return "\n".join([f"usage: {prog} COMMAND [OPTIONS]", "", *lines, "", closing])


def _name_a_hostfile(arguments: list[str]) -> bool:
    return any(argument.partition("=")[0] in HOSTFILE_OPTIONS for argument in arguments)


def _run(script: str, prog: str, arguments: list[str]) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would; its usage and errors name `prog`."""
    os.environ["VASTSCALE_COMMAND"] = prog
    path = str(ROOT / script)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
