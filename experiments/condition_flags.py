"""The flags that say what the samples of `experiments.sample` show."""

from typing import Any

from absl import flags

from diffusion.core.types import InputError
from diffusion.pipelines import overrides
from diffusion.pipelines.run import Run
from experiments import cli

LABELS = flags.DEFINE_list("labels", None, "Classes, numbers or names, repeated in turn up to --num. Default: all.")
PROMPTS = flags.DEFINE_string(
    "prompts", None, 'Texts, as "a red circle; two blue squares", repeated in turn up to --num. Default: the captions '
    "of the data's first examples."
)  # fmt: skip
PROMPTS_FILE = cli.define_path("prompts_file", None, "A UTF-8 file with a prompt per line, in place of --prompts.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What guidance moves away from.")
PROMPT_WEIGHTS = flags.DEFINE_enum(
    "prompt_weights", None, ["a1111", "comfyui"], "The rule by which (word:1.3) weights words of prompts. Default: "
    "brackets are text."
)  # fmt: skip
SIZE = flags.DEFINE_string("size", None, "Height and width of the samples, as 512,768, or both as 768. Default: those "
                           "of the data.")  # fmt: skip


def sized(run: Run) -> Run:
    """Returns the run with samples of --size."""
    if SIZE.value is None:
        return run
    try:
        return run.at_size(_pair("size", SIZE.value))
    except InputError as error:
        raise InputError("--size", error.problem) from None


def prompts() -> list[str] | None:
    """Returns the prompts of the flags, or None."""
    path = PROMPTS_FILE.value
    if path is None:
        return None if PROMPTS.value is None else [text for text in map(str.strip, PROMPTS.value.split(";")) if text]
    if PROMPTS.value is not None:
        raise InputError("--prompts_file", "and --prompts exclude each other; leave one out")
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise InputError("--prompts_file", f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError("--prompts_file", f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not any(lines):
        raise InputError("--prompts_file", f"{path} holds no prompt; write one per line")
    return [line for line in lines if line]


def conditions(run: Run, num: int, prompts: list[str] | None) -> dict[str, Any]:
    """Returns the conditions of the samples, and prints which classes their labels are."""
    given = LABELS.value
    labels = None if given is None else [int(label) if overrides.is_whole(label) else label for label in given]
    try:
        cond = run.conditions(
            num, labels, prompts=prompts, negative_prompt=NEGATIVE_PROMPT.value, prompt_weights=PROMPT_WEIGHTS.value
        )
    except InputError as error:
        named = error.field in ("labels", "prompts", "negative_prompt", "prompt_weights")
        raise InputError(f"--{error.field}", error.problem) if named else error from None
    if run.spec.class_names:
        print(f"classes: {run.spec.classes()}")
    return cond


def _pair(name: str, text: str) -> tuple[int, int]:
    """Parses the flag of two whole numbers, `512,768`, or of one that stands for both."""
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) > 2 or not all(map(overrides.is_whole, numbers)):
        raise InputError(f"--{name}", f"must be one or two whole numbers, as 768 or 512,768; got {text!r}")
    first, *rest = map(int, numbers)
    return (first, *rest) if rest else (first, first)
