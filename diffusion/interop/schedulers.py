"""Reads and writes the schedulers of diffusers: `scheduler_config.json`, and the sections `objective`, `sampler` and
`guidance` of a config.

`CLASSES` has the schedulers of the tables of betas. Keys that are absent from a file have the defaults of their class,
which differ between classes. A key that changes the result is read or, if it cannot be, refused (`treatment`); keys
that a class does not have are without effect there and ignored, with a warning if no class has them. Writing searches
for the configuration that would be read as the given sections.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from diffusion.core import model_folder
from diffusion.core.build import build, defaults, find
from diffusion.core.types import InputError
from diffusion.interop import other_schedulers

BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
LEVELS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta_sigmas",
          "use_lu_lambdas": "exponential"}  # fmt: skip
_SPACINGS = ("leading", "linspace", "trailing")
_FIELD = "scheduler_config.json"

# Defaults that several classes share.
_TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
          "trained_betas": None, "prediction_type": "epsilon"}  # fmt: skip
_LATENT = {**_TABLE, "beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_NO_CLIP = {**_CLIP, "clip_sample": False}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_LEVELS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
_SHIFT = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_SOLVER = {**_TABLE, **_THRESHOLD, **_LEVELS, **_FLOW, "solver_order": 2, "solver_type": "midpoint",
           "lower_order_final": True}  # fmt: skip
_DPM = {**_SOLVER, **_SHIFT, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf, "variance_type": None}  # fmt: skip
_FEW_STEPS = {**_LATENT, **_NO_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "beta_schedule": "scaled_linear",
              "original_inference_steps": 50, "set_alpha_to_one": True, "timestep_scaling": 10.0}  # fmt: skip

# What is read in every class that has it. The rest must have the default, except for what is without effect.
_READ = {*_TABLE, *_LEADING, *_THRESHOLD, *_CLIP, *_ZERO_SNR, *LEVELS, "final_sigmas_type", "set_alpha_to_one",
         "original_inference_steps"}  # fmt: skip
# What has no effect on the models that are read, or is refused where it has one.
_IGNORED = {"flow_shift", "time_shift_type", "lambda_min_clipped", "euler_at_final"}
# What diffusers refuses, or computes as NaN, for a last step to sigma = 0.
_NOT_TO_DATA = (("algorithm_type", "dpmsolver"), ("algorithm_type", "sde-dpmsolver"), ("predict_x0", False))
Treatment = Literal["read", "ignored", "default"]
# Keys whose treatment differs between classes.
_NO_VARIANCE = {"variance_type": "ignored"}  # a learned variance is not part of the prediction
_ON_LATTICE = dict.fromkeys((*_LEADING, "set_alpha_to_one"), "ignored")
_WITHOUT_CLIPPING = {**dict.fromkeys((*_CLIP, *_THRESHOLD), "ignored"), "clip_sample": "default",
                     "thresholding": "default"}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Class:
    """A class of schedulers.

    Attributes:
      defaults: Its keys and their defaults.
      samplers: The sampler for each value of `key`; one of any value if there is no key.
      key: The entry that selects the sampler.
      options: Options of the sampler by the entry that has them.
      aliases: For an entry, values that diffusers replaces by another one.
      spacing: How times are placed: at points of the `table`; at points or `between` them; `multistep` for solvers that
        leave out the last of steps + 1 points; or on LCM's `lattice`.
      end: Where the last step ends: at 0, at the first point of the table (`sigma_min`), or as an entry says.
      keeps_noise: Whether clipping x0 leaves the noise as it was.
      steps: The number of steps of a run that has been read.
      treatment: Of keys that are treated differently than in other classes.
    """

    defaults: Mapping[str, Any]
    samplers: Mapping[Any, Mapping[str, Any]]
    key: str | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    spacing: Literal["table", "between", "multistep", "lattice"] = "between"
    end: Literal["zero", "sigma_min", "set_alpha_to_one", "final_sigmas_type"] = "zero"
    keeps_noise: bool = False
    steps: int = 25
    treatment: Mapping[str, Treatment] = dataclasses.field(default_factory=dict)


def _dpm_solvers(**options: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{sde}dpmsolver{plus}": {"name": f"dpm_solver{'_pp' if plus else ''}", "sde": bool(sde), **options}
        for sde in ("", "sde-")
        for plus in ("++", "")
    }


_ORDER = {"solver_order": "order", "lower_order_final": "lower_order_final"}
_DPM_OPTIONS = {**_ORDER, "solver_type": "solver_type"}
_DPM_ALIASES = {"solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
                "algorithm_type": {"deis": "dpmsolver++"}}  # fmt: skip
CLASSES = {
    "DDIMScheduler": Class(
        {**_TABLE, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "set_alpha_to_one": True},
        {None: {"name": "ddim", "eta": 0.0}}, spacing="table", end="set_alpha_to_one", keeps_noise=True, steps=50,
    ),
    "DDPMScheduler": Class(
        {**_TABLE, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "variance_type": "fixed_small"},
        {foreign: {"name": "ancestral", "variance": variance} for foreign, variance in
         (("fixed_small", "beta_tilde"), ("fixed_large", "beta"), ("learned_range", "learned"))},
        "variance_type", aliases={"variance_type": {"fixed_small_log": "fixed_small"}}, spacing="table", steps=250,
    ),
    "PNDMScheduler": Class(
        {**_TABLE, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
        {skip: {"name": "pndm", "prk": not skip} for skip in (True, False)}, "skip_prk_steps", spacing="table",
        end="set_alpha_to_one", steps=50,
    ),
    "EulerDiscreteScheduler": Class(
        {**_TABLE, **_LEVELS, **_LINSPACE, **_ZERO_SNR, "interpolation_type": "linear", "sigma_min": None,
         "sigma_max": None, "timestep_type": "discrete", "final_sigmas_type": "zero"},
        {None: {"name": "euler"}}, end="final_sigmas_type",
    ),
    "EulerAncestralDiscreteScheduler": Class(
        {**_TABLE, **_LINSPACE, **_ZERO_SNR}, {None: {"name": "euler_ancestral"}}
    ),
    "HeunDiscreteScheduler": Class({**_LATENT, **_LEVELS, **_LINSPACE, **_NO_CLIP}, {None: {"name": "heun"}}),
    "KDPM2DiscreteScheduler": Class({**_LATENT, **_LEVELS, **_LINSPACE}, {None: {"name": "dpm2"}}),
    "KDPM2AncestralDiscreteScheduler": Class({**_LATENT, **_LEVELS, **_LINSPACE}, {None: {"name": "dpm2_ancestral"}}),
    "LMSDiscreteScheduler": Class({**_TABLE, **_LEVELS, **_LINSPACE}, {None: {"name": "lms"}}),
    "DPMSolverMultistepScheduler": Class(
        {**_DPM, **_LINSPACE, **_ZERO_SNR, "use_lu_lambdas": False, "euler_at_final": False},
        _dpm_solvers(singlestep=False), "algorithm_type", _DPM_OPTIONS, _DPM_ALIASES, "multistep", "final_sigmas_type",
        treatment=_NO_VARIANCE,
    ),
    "DPMSolverSinglestepScheduler": Class(
        {**_DPM, "lower_order_final": False}, _dpm_solvers(singlestep=True, inner_points="grid"), "algorithm_type",
        _DPM_OPTIONS, _DPM_ALIASES, "multistep", "final_sigmas_type", treatment=_NO_VARIANCE,
    ),
    "UniPCMultistepScheduler": Class(
        {**_SOLVER, **_SHIFT, **_LINSPACE, **_ZERO_SNR, "solver_type": "bh2", "predict_x0": True,
         "disable_corrector": [], "solver_p": None, "final_sigmas_type": "zero", "sigma_min": None, "sigma_max": None,
         "shift_terminal": None},
        {True: {"name": "unipc", "prediction": "x0"}, False: {"name": "unipc", "prediction": "eps"}}, "predict_x0",
        {**_ORDER, "solver_type": "variant"},
        {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}, "multistep", "final_sigmas_type",
    ),
    "DEISMultistepScheduler": Class(
        {**_SOLVER, **_SHIFT, **_LINSPACE, "algorithm_type": "deis", "solver_type": "logrho"},
        {"deis": {"name": "deis"}}, "algorithm_type", _ORDER,
        {"algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
         "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho")}, "multistep", "sigma_min",
        treatment={"algorithm_type": "default"},
    ),
    "SASolverScheduler": Class(
        {**_TABLE, **_THRESHOLD, **_LEVELS, **_FLOW, **_LINSPACE, "predictor_order": 2, "corrector_order": 2,
         "tau_func": None, "algorithm_type": "data_prediction", "lower_order_final": True,
         "lambda_min_clipped": -math.inf, "variance_type": None},
        {"data_prediction": {"name": "sa_solver", "prediction": "x0"},
         "noise_prediction": {"name": "sa_solver", "prediction": "eps"}}, "algorithm_type",
        {name: name for name in ("predictor_order", "corrector_order", "lower_order_final")}, spacing="multistep",
        end="sigma_min", treatment=_NO_VARIANCE,
    ),
    "LCMScheduler": Class(_FEW_STEPS, {None: {"name": "lcm"}}, spacing="lattice", steps=4, treatment=_ON_LATTICE),
    "TCDScheduler": Class(
        _FEW_STEPS, {None: {"name": "tcd"}}, spacing="lattice", end="sigma_min", steps=4,
        treatment={**_ON_LATTICE, **_WITHOUT_CLIPPING},
    ),
}  # fmt: skip
_KEYS = {key for kind in CLASSES.values() for key in kind.defaults}.union(*other_schedulers.CLASSES.values())
FEW_STEP = ("LCMScheduler", "TCDScheduler")  # for consistency models


def treatment(name: str) -> dict[str, Treatment]:
    """Returns what becomes of each key of a class.

    `read`: it determines the sections of a config. `ignored`: it has no effect on them, and is refused where it has one
    on the samples. `default`: a value that does not mean the same as the default is refused.
    """
    if name in other_schedulers.CLASSES:
        return other_schedulers.treatment(name)
    kind = CLASSES[name]
    read = {*_READ, *kind.options, kind.key}
    usual = {key: "ignored" if key in _IGNORED else "read" if key in read else "default" for key in kind.defaults}
    return {**usual, **kind.treatment}


def read(config: Mapping[str, Any], outputs: int = 1) -> dict[str, Any]:
    """Returns the sections `objective`, `sampler` and `guidance` that correspond to a scheduler's configuration.

    Args:
      config: The content of `scheduler_config.json`.
      outputs: The network's number of output values per channel.

    Raises:
      InputError: naming the class or the entry that is not supported.
    """
    name = config.get("_class_name", "DDPMScheduler")
    unknown = sorted(key for key in config.keys() - _KEYS if not key.startswith("_"))
    if unknown:
        logger.warning("%s: ignored, as no scheduler that is read has them: %s", _FIELD, ", ".join(unknown))
    if name in other_schedulers.CLASSES:
        return other_schedulers.read(name, config)
    if name not in CLASSES:
        problem = f"{name} cannot be read; convert the model's folder alone, with the objective of --config"
        raise InputError(f"{_FIELD}._class_name", problem)
    kind = CLASSES[name]
    config = {**kind.defaults, **{key: value for key, value in config.items() if key in kind.defaults}}
    for key, values in kind.aliases.items():
        config[key] = values.get(config[key], config[key])
    objective = _objective(config, outputs)
    if name in FEW_STEP:
        objective = {"name": "consistency", "discretization": {"name": "fixed"}, "time_sampler": {"name": "uniform"},
                     "sigma_min": 0.0, **{key: objective[key] for key in ("schedule", "parameterization")}}  # fmt: skip
    _check(name, kind, config, objective, outputs)
    grid = _grid(kind, config)
    sampler = {**kind.samplers[config[kind.key] if kind.key else None]}
    sampler |= {native: config[foreign] for foreign, native in kind.options.items()}
    if name == "DPMSolverSinglestepScheduler" and grid["name"] != "to_sigma_min":
        sampler["lower_order_final"] = True  # as diffusers sets it for runs that end in data
    if name == "SASolverScheduler":  # adds noise at timesteps from 200 to 800; index i is at time (i + 1) / T
        sampler |= {"low": 200.5 / config["num_train_timesteps"], "high": min(801.5 / config["num_train_timesteps"], 1)}
    guidance = {"name": "cfg", "scale": 1.0}
    threshold = _threshold(kind, config)
    return {
        "objective": objective,
        "sampler": {**sampler, "steps": kind.steps, "grid": grid},
        "guidance": guidance | ({"threshold": threshold} if threshold else {}),
    }


def _refuse(key: str, expected: Any, value: Any) -> InputError:
    return InputError(f"{_FIELD}.{key}", f"must be {expected} to be read, got {value!r}")


def _check(name: str, kind: Class, config: Mapping[str, Any], objective: Mapping[str, Any], outputs: int) -> None:
    """Raises InputError if an entry that changes the result cannot be followed."""
    for key, what in treatment(name).items():
        if what == "default" and config[key] != kind.defaults[key]:
            raise _refuse(key, repr(kind.defaults[key]), config[key])
    if kind.key and config[kind.key] not in kind.samplers:
        raise _refuse(kind.key, " or ".join(map(repr, kind.samplers)), config[kind.key])
    if config.get("variance_type") == "learned_range" and name == "DDPMScheduler" and outputs != 2:
        raise InputError(f"{_FIELD}.variance_type", "learned_range requires a model with 2 output values per channel")
    if config.get("final_sigmas_type", "zero") not in ("zero", "sigma_min"):
        raise _refuse("final_sigmas_type", "'zero' or 'sigma_min'", config["final_sigmas_type"])
    if config.get("euler_at_final") and config["final_sigmas_type"] == "sigma_min":
        raise _refuse("euler_at_final", "False for final_sigmas_type = 'sigma_min'", True)
    if config.get("timestep_spacing", "leading") not in _SPACINGS:
        raise _refuse("timestep_spacing", " or ".join(map(repr, _SPACINGS)), config["timestep_spacing"])
    if config["beta_schedule"] == "sigmoid" and name != "DDPMScheduler":
        raise _refuse("beta_schedule", " or ".join(map(repr, list(BETAS)[:3])), "sigmoid")
    lowest = config.get("lambda_min_clipped", -math.inf)
    if lowest > -math.inf and build("schedules", objective["schedule"]).table.min() / 2 < lowest:
        raise _refuse("lambda_min_clipped", "-Infinity, or below the schedule's values", lowest)


def _objective(config: Mapping[str, Any], outputs: int) -> dict[str, Any]:
    """Returns the section `objective` for a table of betas."""
    for field, known in (("beta_schedule", BETAS), ("prediction_type", PREDICTIONS)):
        if config[field] not in known:
            raise InputError(f"{_FIELD}.{field}", f"must be among {', '.join(known)} to be read, got {config[field]!r}")
    betas, length = config["trained_betas"], config["num_train_timesteps"]
    schedule = {"name": "vp", "num_steps": length}
    if betas is not None:
        if len(betas) != length:
            problem = f"must have num_train_timesteps = {length} entries, got {len(betas)}"
            raise InputError(f"{_FIELD}.trained_betas", problem)
        schedule["trained_betas"] = tuple(betas)
    else:
        schedule["betas"] = BETAS[config["beta_schedule"]]
        if schedule["betas"] != "cosine":
            schedule |= {key: float(config[key]) for key in ("beta_start", "beta_end")}
    schedule["zero_terminal_snr"] = bool(config.get("rescale_betas_zero_snr"))
    return {
        "name": "denoising",
        "schedule": schedule,
        "parameterization": {"name": PREDICTIONS[config["prediction_type"]], "c_noise": "index"},
        "time_sampler": {"name": "discrete"},
        "weighting": {"name": "simple"},
        "learned_variance": outputs == 2,
    }


def _grid(kind: Class, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the time grid."""
    if kind.spacing == "lattice":
        grid = {"name": "lattice", "points": config["original_inference_steps"]}
    else:
        grid = {"name": config.get("timestep_spacing", "linspace")}
        if grid["name"] == "leading":
            grid["steps_offset"] = config["steps_offset"]
        if grid["name"] == "linspace" and kind.spacing == "between":
            grid["rounded"] = False
        if grid["name"] != "trailing" and kind.spacing == "multistep":
            grid["endpoint"] = False
    levels = [LEVELS[key] for key in LEVELS if config.get(key)]
    if levels:  # multistep solvers place the levels within the whole table
        ends = {"name": "linspace"} if kind.spacing == "multistep" else grid
        grid = {"name": levels[0], "ends": ends}
    to_data = {"zero": True, "sigma_min": False, "set_alpha_to_one": config.get("set_alpha_to_one"),
               "final_sigmas_type": config.get("final_sigmas_type") == "zero"}  # fmt: skip
    return grid if to_data[kind.end] else {"name": "to_sigma_min", "grid": grid}


def _threshold(kind: Class, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the section `guidance.threshold`; None if x0 is not clipped."""
    keep = {"keep_noise": True} if kind.keeps_noise else {}
    if config.get("thresholding"):
        limits = {"limit": 1.0, "sample_max_value": float(config["sample_max_value"])}
        return {"percentile": float(config["dynamic_thresholding_ratio"]), **limits, **keep}
    if config.get("clip_sample"):
        return {"percentile": 1.0, "limit": float(config["clip_sample_range"]), **keep}
    return None


def problem(objective: Mapping[str, Any]) -> str:
    """Describes why no scheduler can sample the models of an objective; empty if one can."""
    schedule, parameterization = (_named(objective.get(name)) for name in ("schedule", "parameterization"))
    if other_schedulers.entries(objective, {"name": ""}, {}) is not None:
        return ""
    if objective["name"] not in ("denoising", "consistency") or schedule.get("name", "vp") != "vp":
        return "the objective is not denoising with schedule vp, nor one of EDM, flow matching or consistency models"
    if parameterization.get("name", "eps") not in PREDICTIONS.values():
        return f"diffusers does not support parameterization {parameterization['name']!r}"
    if parameterization.get("c_noise", "time") != "index":
        return "the network was not trained on table indices (objective.parameterization.c_noise = 'index')"
    return ""


def prediction_of(objective: Mapping[str, Any]) -> str:
    """Returns the `prediction_type` of an objective, or the name of its parameterization if it has none."""
    name = _named(objective.get("parameterization")).get("name", "eps")
    return next((foreign for foreign, native in PREDICTIONS.items() if native == name), name)


def write(sections: Mapping[str, Any], outputs: int, *, splits: bool) -> tuple[dict[str, Any], bool]:
    """Returns the scheduler's configuration that is read as the sections, and whether there is one.

    If there is none, it is the configuration for the objective with a usual sampler.

    Args:
      sections: The section `objective` of a config, for which there is no `problem`; and optionally `sampler` and
        `guidance`, of which only `threshold` is a matter of the scheduler.
      outputs: The network's number of output values per channel.
      splits: Whether the pipeline removes a learned variance from the network's output before it calls the scheduler.
    """
    objective, threshold = sections["objective"], {"threshold": (sections.get("guidance") or {}).get("threshold")}
    usual = _usual_sampler(objective, outputs, splits)
    sampler = sections.get("sampler") or usual
    for choice, guidance in itertools.product((sampler, usual), (threshold, {})):
        wanted = _canonical(choice, guidance)
        for candidate in _candidates(objective, choice, guidance, outputs, splits):
            try:
                read_back = read(candidate, outputs)
            except InputError:
                continue
            if _canonical(read_back["sampler"], read_back["guidance"]) == wanted:
                config = {
                    "_class_name": candidate["_class_name"],
                    "_diffusers_version": model_folder.VERSION,
                    **candidate,
                }
                return config, choice is sampler and guidance is threshold
    raise AssertionError(f"no scheduler for {objective}")


def _usual_sampler(objective: Mapping[str, Any], outputs: int, splits: bool) -> dict[str, Any]:
    """Returns a sampler for the objective that diffusers has."""
    part = _named(objective.get("schedule"))
    schedule = part.get("name", "vp")
    if objective["name"] == "flow_matching":
        return {"name": "euler", "grid": {"name": "shifted", "shift": 1.0, "last": 0.001}}
    if objective["name"] == "consistency" and schedule == "vp":
        return {"name": "lcm", "grid": {"name": "lattice"}}
    if objective["name"] == "consistency":
        sigma_min = objective.get("sigma_min", 0.002)
        return {"name": "consistency", "sigma_min": sigma_min, "grid": {"name": "karras", "points": 40}}
    if schedule == "edm":
        return {"name": "euler", "grid": {"name": "karras"}}
    if splits and part.get("betas") != "sigmoid":
        return {"name": "ddim", "grid": {"name": "leading"}}
    variance = "learned" if outputs == 2 and not splits else "beta_tilde"
    return {"name": "ancestral", "variance": variance, "grid": {"name": "leading"}}


def _candidates(
    objective: Mapping[str, Any], sampler: Mapping[str, Any], guidance: Mapping[str, Any], outputs: int, splits: bool
) -> Iterator[dict[str, Any]]:
    """Yields configurations that may be read as the sections."""
    other = other_schedulers.entries(objective, sampler, guidance)
    if other is not None:
        yield other
        return
    options, threshold = _full("samplers", sampler), _named(guidance.get("threshold"))
    grid = _named(sampler.get("grid", "trailing"))
    inner = _named(grid.get("grid") or grid)
    inner = _named(inner.get("ends") or inner)
    few_step = objective["name"] == "consistency"
    learned = "learned_range" if outputs == 2 and not splits else None
    for name, kind in CLASSES.items():
        if (name in FEW_STEP) != few_step or (learned and "variance_type" not in kind.defaults):
            continue
        for value, native in kind.samplers.items():
            if not native.items() <= options.items():
                continue
            fixed = {**_table(objective), "variance_type": learned, "steps_offset": inner.get("steps_offset", 0)}
            fixed |= {"original_inference_steps": inner.get("points", 50), **_clipping(threshold)}
            fixed |= {foreign: options[own] for foreign, own in kind.options.items() if options[own] is not None}
            fixed |= {kind.key: value} if kind.key else {}
            if name == "DDPMScheduler" and (value == "learned_range") != bool(learned):
                continue
            # The default first, for solvers with noise levels that do not depend on it.
            spacings = dict.fromkeys((kind.defaults.get("timestep_spacing", "linspace"), *_SPACINGS))
            ends = ("zero", "sigma_min")
            for spacing, levels, end in itertools.product(spacings, (None, *_LEVELS), ends):
                if end == "zero" and (kind.key, value) in _NOT_TO_DATA:
                    continue
                entries = {"timestep_spacing": spacing, "final_sigmas_type": end, "set_alpha_to_one": end == "zero"}
                entries |= fixed | ({levels: True} if levels else {})
                known = {key: entries.get(key, default) for key, default in kind.defaults.items()}
                yield {"_class_name": name, **known}


def _table(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of the table of betas and of the prediction."""
    schedule, parameterization = (_named(objective.get(name)) for name in ("schedule", "parameterization"))
    betas = schedule.get("betas", "linear")
    start, end = (0.00085, 0.012) if betas == "scaled_linear" else (1e-4, 0.02)
    table = schedule.get("trained_betas")
    return {
        "num_train_timesteps": schedule.get("num_steps", 1000),
        "beta_schedule": next(foreign for foreign, native in BETAS.items() if native == betas),
        "beta_start": schedule.get("beta_start") or start,
        "beta_end": schedule.get("beta_end") or end,
        "trained_betas": None if table is None else list(table),
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
        "prediction_type": next(
            foreign for foreign, native in PREDICTIONS.items() if native == parameterization.get("name", "eps")
        ),
    }


def _clipping(threshold: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `guidance.threshold`."""
    percentile, limit = threshold.get("percentile", 1.0), threshold.get("limit", 1.0)
    if not threshold or percentile == 1:
        return {"clip_sample": bool(threshold), "clip_sample_range": float(limit), "thresholding": False}
    highest = threshold.get("sample_max_value", math.inf)
    return {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": percentile,
            "sample_max_value": highest}  # fmt: skip


def _canonical(sampler: Mapping[str, Any], guidance: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the sampler with its grid, without the number of steps, and the threshold, with all defaults."""
    full = _full("samplers", sampler)
    full["grid"] = _full("grids", sampler.get("grid", "trailing"))
    if full.get("lower_order_final", False) is None:
        full["lower_order_final"] = full["grid"]["name"] != "to_sigma_min"
    threshold = _named(guidance.get("threshold"))
    options = defaults(find("guidance", "threshold", field=""), later=("denoise",))
    return full, {**options, **threshold} if threshold else {}


def _full(family: str, part: Any) -> dict[str, Any]:
    """Returns a sampler or a grid with the defaults of its options."""
    part = _named(part)
    make = find(family, part["name"], field=family)
    later = ("schedule", "steps", "grid", "unroll") if family == "samplers" else ("schedule", "steps")
    full = defaults(make, later=later) | {key: value for key, value in part.items() if key not in later}
    nested = {key: _full("grids", full[key]) for key in ("grid", "ends") if full.get(key) is not None}
    return full | nested


def _named(part: Any) -> dict[str, Any]:
    """Returns a part of a config as a dict; empty if it is None."""
    return {"name": part} if isinstance(part, str) else dict(part or {})
