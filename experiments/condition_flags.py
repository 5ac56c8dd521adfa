"""The flags that say what the samples of `experiments.sample` show."""

from typing import Any

from absl import flags

from diffusion.core.types import InputError
from diffusion.data import size_conditions
from diffusion.pipelines import overrides
from diffusion.pipelines.generator import check_numbers
from diffusion.pipelines.run import Run
from experiments import cli

LABELS = flags.DEFINE_list("labels", None, "Classes, numbers or names, repeated in turn up to --num. Default: all.")
PROMPTS = flags.DEFINE_string(
    "prompts", None, 'Texts, as "a red circle; two blue squares", repeated in turn up to --num. Default: the captions '
    "of the data's first examples."
)  # fmt: skip
PROMPTS_FILE = cli.define_path("prompts_file", None, "A UTF-8 file with a prompt per line, in place of --prompts.")
PER_PROMPT = flags.DEFINE_integer(
    "per_prompt", None, "Draw this many samples of each prompt, one after the other, in place of --num."
)
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What guidance moves away from.")
PROMPT_WEIGHTS = flags.DEFINE_enum(
    "prompt_weights", None, ["a1111", "comfyui"], "The rule by which (word:1.3) weights words of prompts. Default: "
    "brackets are text."
)  # fmt: skip
SIZE = flags.DEFINE_string("size", None, "Height and width of the samples, as 512,768, or both as 768. Default: those "
                           "of the data.")  # fmt: skip
ORIGINAL_SIZE = flags.DEFINE_string(
    "original_size", None, "Height and width, as for --size, of the images that samples look like parts or reductions "
    "of, for models that read it (SDXL, PixArt). Default: those of the samples."
)  # fmt: skip
CROP = flags.DEFINE_string(
    "crop", None, "How many pixels at the top and on the left, as 0,256, samples look cut off by, for SDXL. Default: 0."
)


def sized(run: Run) -> Run:
    """Returns the run with samples of --size."""
    if SIZE.value is None:
        return run
    try:
        return run.at_size(_pair("size", SIZE.value))
    except InputError as error:
        raise InputError("--size", error.problem) from None


def numbered(num: flags.FlagHolder[int]) -> tuple[int, list[str] | None]:
    """Returns the number of samples by --num or --per_prompt, and the prompts of the flags, or None."""
    given = _prompts()
    if PER_PROMPT.value is None:
        return num.value, given
    check_numbers("--", seed=0, per_prompt=PER_PROMPT.value)
    if given is None:
        raise InputError("--per_prompt", "requires --prompts or --prompts_file; give one, or leave it out")
    if num.present:
        raise InputError("--per_prompt", "and --num exclude each other; leave one out")
    each = [prompt for prompt in given for _ in range(PER_PROMPT.value)]
    return len(each), each


def _prompts() -> list[str] | None:
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
        cond = run.conditions(num, labels, _size_conditions(run), prompts, NEGATIVE_PROMPT.value, PROMPT_WEIGHTS.value)
    except InputError as error:
        named = error.field in ("labels", "prompts", "negative_prompt", "prompt_weights")
        raise InputError(f"--{error.field}", error.problem) if named else error from None
    if run.spec.class_names:
        print(f"classes: {run.spec.classes()}")
    return cond


def _size_conditions(run: Run) -> dict[str, Any]:
    """Returns the conditions of --original_size and --crop; none if neither is given."""
    given = {flag.name: _pair(flag.name, flag.value) for flag in (ORIGINAL_SIZE, CROP) if flag.value is not None}
    if not given:
        return {}
    crop, original = given.get("crop", (0, 0)), given.get("original_size")
    if original is not None and min(original) < 1:
        raise InputError("--original_size", f"must be positive, got {ORIGINAL_SIZE.value}")
    cond = size_conditions.of_samples(run.spec.conditions, run.spec.shape[:2], original, crop)
    for name in given:
        if not run.spec.is_image or not cond or (name == "crop" and size_conditions.TIME_IDS not in cond):
            raise InputError(f"--{name}", "the model has no condition on it; leave it out")
    return cond


def _pair(name: str, text: str) -> tuple[int, int]:
    """Parses the flag of two whole numbers, `512,768`, or of one that stands for both."""
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) > 2 or not all(map(overrides.is_whole, numbers)):
        raise InputError(f"--{name}", f"must be one or two whole numbers, as 768 or 512,768; got {text!r}")
    first, *rest = map(int, numbers)
    return (first, *rest) if rest else (first, first)
