"""`python -m vhead.compat.trl ARGUMENTS...` is `python ARGUMENTS...` with trl's value-head names installed.

The process becomes that program's: arguments, main module, tracebacks, signals and exit status are plain Python's,
since plain Python is what runs.
"""

import os
import sys

from vhead.compat.trl.workers import reach_workers

_MODULE = "vhead.compat.trl"

_USAGE = f"""\
usage: python -m {_MODULE} SCRIPT ARGUMENTS...
       python -m {_MODULE} -m MODULE ARGUMENTS...

Runs a program as python would, with trl's value-head classes being vhead's in it and in its worker processes.
"""


def interpreter_options(words: list[str]) -> list[str]:
    """The options of Python's own command line.

    Args:
        words: The command line without the interpreter and without the program's arguments; this module's name is last.
    """
    *options, program = words
    if not program.endswith(_MODULE):  # Run by the path of its folder.
        return options
    # Python takes "-B -m NAME", "-Bm NAME" and "-BmNAME" alike.
    last = options.pop() if program == _MODULE else program.removesuffix(_MODULE)
    kept = last.removesuffix("m")
    return options if kept == "-" else [*options, kept]


def main() -> None:
    """Replaces this process by the program's.

    Raises:
        SystemExit: There is no program to run, or Python was told to ignore the environment.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_USAGE)
        sys.exit(0 if arguments else 2)
    if sys.flags.ignore_environment or sys.flags.no_site:
        sys.stderr.write(
            f"{_MODULE}: python's -I, -E and -S keep it out of the program; call {_MODULE}.install() there instead\n"
        )
        sys.exit(2)
    reach_workers()
    options = interpreter_options(sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)])
    os.execv(sys.executable, [sys.executable, *options, *arguments])  # noqa: S606, no shell is wanted


if __name__ == "__main__":
    main()
