"""The flags that change how a run samples, shared by the jobs that draw samples."""

from absl import flags

from diffusion.core.types import InputError
from diffusion.pipelines.run import Run, open_run
from experiments import cli

FLAGS = {
    name: flags.DEFINE_string(name, None, text)
    for name, text in {
        "sampler": "The sampler, such as ddim or heun:churn=40. Default: the config's, with its options.",
        "grid": "The time grid, such as karras or karras:rho=5. Default: the config's.",
        "steps": "Number of steps of the sampler. Default: the config's.",
        "evaluations": "Number of evaluations of the model, in place of --steps: takes as many steps as fit.",
        "guidance": "Guidance: its scale (1 is none), or apg:scale=2:eta=0.5. Default: the config's.",
        "interval": "Guide only at times lo,hi, or at noise levels sigma / alpha lo,hi,sigma.",
        "rescale": "Rescale the guided x0 to its standard deviation before guidance by a share in [0, 1]; 0.7:output=v",
        "threshold": "Keep x0 in range: 1 clips it, a number below 1 is the percentile of dynamic thresholding; "
        "1:keep_noise=true.",
        "unroll": "Sampler steps per iteration of the loop.",
    }.items()
}
EMA = flags.DEFINE_string("ema", None, "Which average of the parameters to use, or none. Default: the config's last.")
STEP = flags.DEFINE_integer("step", None, "The step of the checkpoint. Default: the newest.")
ALLOW_IMPORTS = flags.DEFINE_bool(
    "allow_imports",
    False,
    "Import the parts of other packages that the run's config names. Use it if you trust the run.",
)
AUTOENCODER = cli.define_path(
    "autoencoder", None, "The file or folder of the run's autoencoder, if it was moved. Default: autoencoder.path."
)
TEXT_ENCODER = cli.define_path(
    "text_encoder", None, "The folder of the run's text encoder, if it was moved. Default: text_encoder.path."
)
TILES = flags.DEFINE_integer(
    "tiles", None, "Decode tiles of this side in pixels one at a time, so that large images fit into memory. Default: "
    "autoencoder.tile."
)  # fmt: skip
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "The dtype that the network computes in. Default: network.dtype."
)
CLIP_SKIP = flags.DEFINE_integer(
    "clip_skip", None, "How many of the last layers of CLIP prompts are read without, as in diffusers; one less than "
    "in other tools. Negative prompts are read with all."
)  # fmt: skip
BATCH_SIZE = flags.DEFINE_integer("batch_size", 250, "Samples drawn at once; the samples do not depend on it.")


def opened(workdir: str) -> Run:
    """Returns the run of a workdir that the flags choose."""
    encoders = {
        name: {"path": flag.value} if flag.value else {}
        for name, flag in (("autoencoder", AUTOENCODER), ("text_encoder", TEXT_ENCODER))
    }
    if TILES.value is not None:
        encoders["autoencoder"]["tile"] = TILES.value
    names = {"clip_skip": "--clip_skip", "network.dtype": "--dtype", "autoencoder.tile": "--tiles"}
    if not AUTOENCODER.value:
        names["autoencoder"] = "--tiles"
    try:
        return open_run(
            workdir, EMA.value, STEP.value, allow_imports=ALLOW_IMPORTS.value, clip_skip=CLIP_SKIP.value,
            network={"dtype": DTYPE.value} if DTYPE.value else None,
            **{name: section or None for name, section in encoders.items()},
        )  # fmt: skip
    except InputError as error:
        given = names.get(error.field) in (f"--{flag.name}" for flag in (CLIP_SKIP, DTYPE, TILES) if flag.present)
        raise InputError(names[error.field], error.problem) if given else error from None


def chosen() -> dict[str, str]:
    """Returns the flags that were given, by name.

    Raises:
      InputError: Both --steps and --evaluations were given.
    """
    given = {name: flag.value for name, flag in FLAGS.items() if flag.value is not None}
    if {"steps", "evaluations"} <= given.keys():
        raise InputError("--steps", "follows from --evaluations; give one of the two")
    return given
