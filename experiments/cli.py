"""What all jobs share on the command line: flags, one-line errors and exit codes.

Exit codes: 0 done, 2 bad config or input, 3 diverged, 70 hung or lost a process, 75 preempted after saving (run the
same command again to resume), 130 interrupted with nothing to save. `--debug` shows the traceback of an error.
"""

import contextlib
import functools
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.distributed import multihost
from diffusion.pipelines.config import read_config
from diffusion.training.resilience.guards import Diverged
from diffusion.training.resilience.preemption import PREEMPTED, SIGNALS, Preempted
from diffusion.training.resilience.watchdog import HUNG
from experiments import environment

BAD_INPUT, DIVERGED, INTERRUPTED = 2, 3, 130

# On a CPU, XLA's older convolutions differentiate faster than those of YNNPACK, which it prefers: a U-Net's train step
# takes 0.85 of the time. XLA ends the process at an unknown flag, so the flag is for the versions that know it.
CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
if (0, 10) <= jax.__version_info__ < (0, 13):
    os.environ["XLA_FLAGS"] = f"{CONVOLUTIONS} {os.environ.get('XLA_FLAGS', '')}"  # a flag given later takes precedence
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard's writer imports TensorFlow, which logs a lot

# Atomic additions in any order, and algorithms chosen by measuring them, make a GPU's sums differ between runs.
DETERMINISTIC_FLAGS = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


class _Path(flags.ArgumentParser):
    """Parses a path; `~` at its start is the home folder."""

    def __init__(self, name: str):
        self.name = name

    def parse(self, argument: str) -> str:
        if not argument:
            raise InputError(f"--{self.name}", "is empty; give a path")
        return os.path.expanduser(argument)


class _Paths(flags.ListParser):
    def parse(self, argument: str | list[str]) -> list[str]:
        return [os.path.expanduser(path) for path in super().parse(argument)]


def define_path(name: str, default: str | None, text: str, values: flags.FlagValues = flags.FLAGS) -> Any:
    """Defines a flag that is the path of a file or folder; jobs define all such flags in this way.

    Args:
      name, default, text: The name, the default and the help of the flag.
      values: The flags that it belongs to.
    """
    return flags.DEFINE(_Path(name), name, default, text, values)


def define_paths(name: str, text: str) -> Any:
    """Defines a flag that is a list of paths."""
    return flags.DEFINE(_Paths(), name, None, text)


COMPILED = define_path(
    "compiled", None, "Folder for compiled programs, so that the next start does not compile them again."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, if several processes run the job; goes with the next two."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: the number of processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: the index of this process, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "Whether several processes run the job, as the environment describes. Default: yes under srun "
    "and on GKE with TPUs; set it on the hosts of a TPU pod slice."
)  # fmt: skip
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "Compute the same bits at every start on a GPU too, which is slower. A CPU always does."
)
flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
flags.disclaim_key_flags()  # those that the functions here define belong to the job that calls them, and to its --help


class Config:
    """The flag `--config=FILE.py[:ARGUMENT]`, and a flag `--config.a.b=VALUE` for every option of the config."""

    def __init__(self, values: flags.FlagValues = flags.FLAGS):
        self.overrides: list[tuple[str, str]] = []
        self.path = define_path("config", None, "The experiment: a file with get_config().", values)

    @functools.cached_property
    def value(self) -> dict[str, Any]:
        """The resolved config.

        Raises:
          InputError: The file cannot be read, or an option does not exist.
        """
        return read_config(self.path.value, self.overrides)

    def take(self, argv: list[str]) -> list[str]:
        """Returns the command line without `--config.a.b=VALUE`, which it records."""
        end = argv.index("--") if "--" in argv else len(argv)
        rest = []
        for given in argv[:end]:
            name, equals, value = given.lstrip("-").partition("=")
            if not given.startswith("-") or not name.startswith("config."):
                rest.append(given)
            elif not equals:
                raise InputError(given, "has no value; flags are given as --name=value")
            else:
                self.overrides.append((name.removeprefix("config."), value))
        return rest + argv[end:]


_config: Config | None = None


def define_config() -> Config:
    """Defines the flags of a config for this job."""
    global _config
    _config = Config()
    return _config


def config_of(given: Iterable[str]) -> dict[str, Any]:
    """Returns the config that flags `--config=...` and `--config.a.b=...` stand for.

    Raises:
      InputError: A job would reject it.
    """
    values = flags.FlagValues()
    config = Config(values)
    try:
        values(config.take(["", *given]))
    except flags.Error as error:
        raise InputError("--config", str(error)) from error
    if config.path.value is None:
        raise InputError("--config", "is missing")
    return _as_flags(lambda: config.value)


def run(main: Callable[..., None], *, together: bool = True, takes_rest: bool = False) -> None:
    """Parses the flags and runs `main`.

    Args:
      main: Takes no arguments, or with `takes_rest` those after `--`.
      together: Whether several processes may run the job; they are connected first.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs what it raises
    # Where one array of a checkpoint cannot be read, the pending reads of the others fail unobserved.
    sys.unraisablehook = lambda what: sys.__unraisablehook__(what) if "--debug" in sys.argv else None
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    environment.open_streams()
    _show_library_log()
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
            with contextlib.suppress(OSError):  # a full disk
                stream.flush()
        if code not in (HUNG, INTERRUPTED):
            multihost.leave()
        # Any other exit waits: for threads of Orbax, ten minutes after a save that failed; for the other processes of
        # the job, which may wait for this one, five minutes.
        os._exit(code)


def exit_on_signals() -> None:
    """Lets SIGTERM and SIGINT end the process with exit code 75, while there is nothing to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(sys.stderr.fileno(), f"{name}: stopped outside of training; run it again to resume\n".encode())
        os._exit(PREEMPTED)

    for number in SIGNALS:
        signal.signal(number, leave)


def use_compilation_cache(folder: str) -> None:
    """Keeps every compiled program in a folder, however fast it was compiled, and looks there first."""
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder) if "://" not in folder else folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class _LibraryLog(logging.Handler):
    """Prints the library's log: information to stdout, warnings to stderr with `warning: ` in front."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            print(f"warning: {record.getMessage()}", file=sys.stderr, flush=True)
        else:
            print(record.getMessage(), flush=True)


def _show_library_log() -> None:
    logger = logging.getLogger("diffusion")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_LibraryLog()]


def _parse(argv: list[str], takes_rest: bool) -> list[str]:
    try:
        rest = flags.FLAGS(_config.take(argv) if _config else argv)
        if len(rest) > 1 and not (takes_rest and "--" in argv):
            raise InputError(rest[1] or "''", "is not a flag; flags are given as --name=value")
        if _config and _config.path.value is not None:
            _as_flags(lambda: _config.value)
        return rest
    except (InputError, flags.Error) as error:
        if "--debug" in argv:
            raise
        missing = re.search(r"Flag --(\S+) must have a value other than None", str(error))
        if missing:
            error = InputError(f"--{missing[1]}", "is missing")
        # absl wraps what the parser of a flag raises.
        cause = error.__context__ if isinstance(error, flags.Error) else None
        _fail(cause if isinstance(cause, InputError) else error, BAD_INPUT)


def _as_flags(read: Callable[[], Any]) -> Any:
    """Reads a config; an error that names `config.a.b` names the flag `--config.a.b` instead."""
    try:
        return read()
    except InputError as error:
        if error.field.startswith("config."):
            raise InputError(f"--{error.field}", error.problem) from error
        raise


def _guard(main: Callable[[], None], together: bool) -> None:
    try:
        if DETERMINISTIC.value:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAGS}"
        if COMPILED.value:
            use_compilation_cache(COMPILED.value)
        if together:
            _join()
        main()
        sys.stdout.flush()
    except Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if flags.FLAGS.debug and not isinstance(error, multihost.Missing):
            raise
        if isinstance(error, InputError):
            _fail(error, BAD_INPUT)
        if isinstance(error, Diverged):
            _fail(error, DIVERGED)
        if isinstance(error, multihost.Missing):
            _fail(f"{error}; start all processes again", HUNG)
        if multihost.is_loss(error):
            _fail(f"lost another process ({error}); start all processes again", HUNG)
        problem = environment.problem_of(error)
        if problem:
            _fail(problem, BAD_INPUT)
        raise


def _join() -> None:
    """Connects to the other processes, if there are any; only the process that writes files prints."""
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
