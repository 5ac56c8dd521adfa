"""What all jobs share at the command line: flags, one-line errors and exit codes.

Exit codes: 0 done, 2 bad config or input, 3 diverged. `--debug` shows the traceback behind an error.
"""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from diffusion.training.loop import Diverged
from diffusion.types import InputError

BAD_INPUT, DIVERGED = 2, 3

flags.DEFINE_bool("debug", False, "Show the traceback behind an error.")


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`, which takes no arguments."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns at every read
    app.run(lambda _: _guard(main), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"{rest[1]!r} is no flag; flags are given as --name=value")
        return rest
    except Exception as error:  # a config file runs while it is parsed, and may raise anything
        if "--debug" in argv:
            raise
        _fail(error, BAD_INPUT)


def _guard(main: Callable[[], None]) -> None:
    try:
        main()
    except InputError as error:
        if flags.FLAGS.debug:
            raise
        _fail(error, BAD_INPUT)
    except Diverged as error:
        if flags.FLAGS.debug:
            raise
        _fail(error, DIVERGED)


def _fail(error: Exception, code: int) -> None:
    known = isinstance(error, (InputError, Diverged, flags.Error))
    text = str(error) if known else f"{type(error).__name__}: {error}"
    print("error: " + " ".join(text.split()), file=sys.stderr)
    sys.exit(code)
