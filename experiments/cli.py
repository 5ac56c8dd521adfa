"""What all jobs share at the command line: flags, one-line errors and exit codes.

Exit codes: 0 done, 2 bad config or input, 3 diverged, 70 stuck, 75 preempted and saved: start it again, 130 interrupted
where there is nothing to save. `--debug` shows the traceback behind an error.
"""

import contextlib
import functools
import io
import logging as std_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from glob import glob
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.distributed import multihost
from diffusion.training.resilience.guards import Diverged
from diffusion.training.resilience.preemption import STOPPED, Preempted
from diffusion.training.resilience.watchdog import STUCK

BAD_INPUT, DIVERGED, INTERRUPTED = 2, 3, 130

# On a CPU, XLA's older convolutions differentiate faster than those of YNNPACK, which it prefers: a U-Net's train step
# takes 0.85 of the time. XLA ends the process at a flag that it does not know, so this is for the versions that do.
CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
if (0, 10) <= jax.__version_info__ < (0, 13):
    os.environ["XLA_FLAGS"] = f"{CONVOLUTIONS} {os.environ.get('XLA_FLAGS', '')}"  # a flag given later wins

# Atomic additions in no order, and algorithms chosen by how fast they were just now, make a GPU's sums differ.
DETERMINISTIC_FLAGS = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"

COMPILED = flags.DEFINE_string(
    "compiled", None, "Folder to keep compiled programs in, so that the next start need not compile them again."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where several processes do the job together; each is told the three."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "Whether other processes do the job with this one, of whom the environment tells. Default: in "
    "srun and GKE with TPUs, yes; on the hosts of a TPU pod slice say so."
)  # fmt: skip
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "The same bits from every start on a GPU, too, where that is slower; a CPU needs no flag."
)
flags.DEFINE_bool("debug", False, "Show the traceback behind an error.")


def run(main: Callable[..., None], *, together: bool = True, takes_rest: bool = False) -> None:
    """Parses the flags and runs `main`.

    Args:
      main: takes no arguments, or with `takes_rest` those that stand after `--`.
      together: whether other processes may do the job with this one; they are joined first.
    """
    logging.set_verbosity(logging.FATAL)  # Orbax logs what is raised as well
    # Where one array of a checkpoint cannot be read, the reads of the others fail after Orbax has told of it.
    sys.unraisablehook = lambda what: sys.__unraisablehook__(what) if "--debug" in sys.argv else None
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    try:
        app.run(
            lambda argv: _guard(functools.partial(main, argv[1:]) if takes_rest else main, together),
            flags_parser=functools.partial(_parse, takes_rest=takes_rest),
        )
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not code or main.__module__ != "__main__":
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Any other exit waits: for threads of Orbax, ten minutes after a save that failed; for the other processes of
        # the job, which wait for this one.
        os._exit(code)


def define_config(values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None) -> flags.FlagHolder:
    """The flag `--config`, and with it `--config.a.b` for every such field in `argv`, by default the command line."""
    return config_flags.DEFINE_config_file(
        "config", None, "The experiment: a file with get_config().", lock_config=True, flag_values=values, sys_argv=argv
    )


def config_of(given: Iterable[str]) -> dict[str, Any]:
    """The config that flags `--config=...` and `--config.a.b=...` stand for, by the parser that jobs have.

    Raises:
      InputError: where a job would refuse it.
    """
    values, argv = flags.FlagValues(), ["", *given]
    config = define_config(values, argv)
    try:
        _read(values, argv)
        return config.value.to_dict()
    except Exception as error:
        refusal = _refusal(argv, error)
        raise refusal if isinstance(refusal, InputError) else InputError("--config", str(refusal)) from error


def _parse(argv: list[str], takes_rest: bool) -> list[str]:
    try:
        rest = _read(flags.FLAGS, argv)
        if len(rest) > 1 and not (takes_rest and "--" in argv):
            raise InputError(rest[1] or "''", "is no flag; flags are given as --name=value")
        return rest
    except Exception as error:  # a config file runs while it is parsed, and may raise anything
        if "--debug" in argv:
            raise
        _fail(_refusal(argv, error), BAD_INPUT)


def _read(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """What is no flag of the command line."""
    _check_config_file(argv[: argv.index("--")] if "--" in argv else argv)
    with contextlib.redirect_stderr(io.StringIO()):  # config_flags prints a traceback of its own
        return values(argv)


def _refusal(argv: list[str], error: Exception) -> Exception:
    return _unknown_key(argv, error) or _in_config(argv, error)


def _check_config_file(argv: list[str]) -> None:
    for given in argv[1:]:
        name, equals, value = given.partition("=")
        path = value.partition(":")[0]  # what follows the colon is the config's own argument
        if name in ("--config", "-config") and equals:
            if not os.path.isfile(path):
                raise InputError("--config", f"no file {path!r}; there are: {', '.join(sorted(glob('configs/*.py')))}")
            with open(path, encoding="utf-8") as source:
                if "def get_config(" not in source.read():
                    raise InputError("--config", f"{path} has no get_config()")


def _unknown_key(argv: list[str], error: Exception) -> InputError | None:
    """ConfigDict says which key it lacks, as in `'stepz'\\nDid you mean "steps"`, but not where it was asked for."""
    if not isinstance(error, (AttributeError, KeyError)):
        return None
    text = str(error.args[0]) if error.args else ""
    key = (re.findall(r"\w+", text) or [""])[0]
    guess = re.findall(r'Did you mean "(\w+)"', text)
    for given in argv[1:]:
        field = given.partition("=")[0].lstrip("-")
        if key in field.split("."):
            nearest = f"; did you mean {guess[0]!r}?" if guess else ""
            return InputError(f"--{field}", f"the config has no {key!r}{nearest}")
    return None


def _in_config(argv: list[str], error: Exception) -> Exception:
    """What is neither ours nor the flags' own was raised by the config file."""
    if isinstance(error, (InputError, flags.Error)):
        return error
    given = next((value for value in argv if value.lstrip("-").startswith("config=")), "--config")
    return InputError(given, f"raised {type(error).__name__}: {error}")


def use_compilation_cache(folder: str) -> None:
    """Keeps every compiled program there, however fast it was compiled, and looks there first."""
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder) if "://" not in folder else folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _guard(main: Callable[[], None], together: bool) -> None:
    try:
        if DETERMINISTIC.value:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAGS}"
        if COMPILED.value:
            use_compilation_cache(COMPILED.value)
        if together:
            _join()
        main()
    except InputError as error:
        if flags.FLAGS.debug:
            raise
        _fail(error, BAD_INPUT)
    except Diverged as error:
        if flags.FLAGS.debug:
            raise
        _fail(error, DIVERGED)
    except Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(STOPPED)
    except multihost.Missing as error:
        _fail(f"{error}; start all of them again", STUCK)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not multihost.is_loss(error) or flags.FLAGS.debug:
            raise
        _fail(f"lost another process ({error}); start all of them again", STUCK)


def _join() -> None:
    """Joins the other processes, if there are any; those that do not write files do not tell of them either."""
    given = {"--coordinator": COORDINATOR, "--num_processes": NUM_PROCESSES, "--process_id": PROCESS_ID}
    missing = [name for name, flag in given.items() if flag.value is None]
    if not missing:
        multihost.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    elif len(missing) < len(given):
        raise InputError(missing[0], f"is missing; {', '.join(given)} go together")
    elif DISTRIBUTED.value or (DISTRIBUTED.value is None and multihost.is_announced()):
        multihost.initialize()
    else:
        return
    if not files.writes():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _fail(error: Exception | str, code: int) -> NoReturn:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)
