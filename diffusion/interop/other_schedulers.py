"""Schedulers of diffusers without a table of betas: those of flow matching, EDM and consistency models."""

from collections.abc import Mapping
from typing import Any

from diffusion.core.types import InputError

_FIELD = "scheduler_config.json"
_FLOW = {"num_train_timesteps": 1000, "shift": 1.0}
_FLOW_OPTIONS = {"use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None,
                 "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
                 "stochastic_sampling": False}  # fmt: skip
_WITHOUT_EFFECT = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
                   "time_shift_type": "exponential"}  # fmt: skip
_LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
_EDM = {**_LEVELS, "sigma_schedule": "karras", "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "final_sigmas_type": "zero"}  # fmt: skip
_SOLVER = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
           "euler_at_final": False, "thresholding": False, "dynamic_thresholding_ratio": 0.995,
           "sample_max_value": 1.0}  # fmt: skip
_CONSISTENCY = {**_LEVELS, "num_train_timesteps": 40, "s_noise": 1.0, "clip_denoised": True}
# The classes, with their defaults.
CLASSES = {
    "FlowMatchEulerDiscreteScheduler": {**_FLOW, **_FLOW_OPTIONS, **_WITHOUT_EFFECT},
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {**_EDM, **_SOLVER},
    "CMStochasticIterativeScheduler": _CONSISTENCY,
}
# What must have the default, and what has no effect on the models that are read or is refused where it has one.
_DEFAULT_ONLY, _IGNORED = {*_FLOW_OPTIONS, "s_noise"}, {*_WITHOUT_EFFECT, "euler_at_final"}
_SAMPLERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}


def treatment(name: str) -> dict[str, str]:
    """Returns what becomes of each key of one of `CLASSES`; see `schedulers.treatment`."""
    found = {
        key: "default" if key in _DEFAULT_ONLY else "ignored" if key in _IGNORED else "read" for key in CLASSES[name]
    }
    if name.startswith(("FlowMatch", "EDM")):
        found["num_train_timesteps"] = "default" if name.startswith("FlowMatch") else "ignored"
    return found


def read(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sections `objective`, `sampler` and `guidance` for one of `CLASSES`.

    Raises:
      InputError: naming the entry that is not supported.
    """
    config = {**CLASSES[name], **{key: value for key, value in config.items() if key in CLASSES[name]}}
    for key, what in treatment(name).items():
        if what == "default" and config[key] != CLASSES[name][key]:
            problem = f"must be {CLASSES[name][key]!r} to be read, got {config[key]!r}"
            raise InputError(f"{_FIELD}.{key}", problem)
    guidance: dict[str, Any] = {"name": "cfg", "scale": 1.0}
    if name.startswith("FlowMatch"):
        objective, sampler = _flow(name, config)
    elif name.startswith("EDM"):
        objective, sampler = _edm(name, config)
        if config.get("thresholding"):
            limits = {"limit": 1.0, "sample_max_value": float(config["sample_max_value"])}
            guidance["threshold"] = {"percentile": float(config["dynamic_thresholding_ratio"]), **limits}
    else:
        objective, sampler = _consistency(config)
        if config["clip_denoised"]:
            guidance["threshold"] = {"percentile": 1.0, "limit": 1.0}
    return {"objective": objective, "sampler": sampler, "guidance": guidance}


def _flow(name: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    objective = {"name": "flow_matching", "schedule": {"name": "flow"},
                 "parameterization": {"name": "velocity", "c_noise": "time"}}  # fmt: skip
    shift = float(config["shift"])
    last = shift * 0.001 / (1 + (shift - 1) * 0.001)  # the shifted level of the first of 1,000 timesteps
    sampler = {"name": "euler" if name == _SAMPLERS["euler"] else "heun"}
    return objective, {**sampler, "steps": 25, "grid": {"name": "shifted", "shift": shift, "last": last}}


def _edm(name: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    known = {"prediction_type": ("epsilon", "v_prediction"), "sigma_schedule": ("karras", "exponential"),
             "final_sigmas_type": ("zero", "sigma_min"), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
             "euler_at_final": (False, config["final_sigmas_type"] == "zero")}  # fmt: skip
    for key, values in known.items():
        if key in config and config[key] not in values:
            problem = f"must be {' or '.join(map(repr, dict.fromkeys(values)))} to be read, got {config[key]!r}"
            raise InputError(f"{_FIELD}.{key}", problem)
    data = float(config["sigma_data"])
    objective = {
        "name": "denoising",
        "schedule": {"name": "edm", "sigma_min": float(config["sigma_min"]), "sigma_max": float(config["sigma_max"])},
        "parameterization": {"name": "edm", "sigma_data": data, "negative": config["prediction_type"] != "epsilon"},
        "time_sampler": {"name": "log_normal"},
        "weighting": {"name": "edm", "sigma_data": data},
    }
    grid = {"name": config["sigma_schedule"]}
    if grid["name"] == "karras":
        grid["rho"] = float(config["rho"])
    if config["final_sigmas_type"] == "sigma_min":
        grid = {"name": "to_sigma_min", "grid": grid}
    sampler = {"name": "euler"}
    if name != "EDMEulerScheduler":
        sampler = {"name": "dpm_solver_pp", "order": config["solver_order"],
                   "sde": config["algorithm_type"].startswith("sde"), "solver_type": config["solver_type"],
                   "lower_order_final": config["lower_order_final"]}  # fmt: skip
    return objective, {**sampler, "steps": 25, "grid": grid}


def _consistency(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    low, data, points = float(config["sigma_min"]), float(config["sigma_data"]), config["num_train_timesteps"]
    objective = {
        "name": "consistency",
        "discretization": {"name": "fixed", "points": points, "rho": float(config["rho"])},
        "schedule": {"name": "edm", "sigma_min": low, "sigma_max": float(config["sigma_max"])},
        "parameterization": {"name": "consistency", "sigma_data": data, "sigma_min": low,
                             "c_noise": "log_sigma_1000"},
        "sigma_min": low,
    }  # fmt: skip
    grid = {"name": "karras", "rho": float(config["rho"]), "points": points}
    return objective, {"name": "consistency", "sigma_min": low, "steps": 1, "grid": grid}


def entries(
    objective: Mapping[str, Any], sampler: Mapping[str, Any], guidance: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns the configuration that may be read as the sections; None if none of `CLASSES` suits the objective."""
    parts = {key: objective.get(key) or {} for key in ("schedule", "parameterization")}
    schedule, parameterization = ({"name": part} if isinstance(part, str) else part for part in parts.values())
    grid = sampler.get("grid", {})
    grid = {"name": grid} if isinstance(grid, str) else grid
    inner = grid.get("grid", grid)
    inner = {"name": inner} if isinstance(inner, str) else inner
    threshold = guidance.get("threshold") or {}
    levels = {key: schedule.get(key, _LEVELS[key]) for key in ("sigma_min", "sigma_max")}
    levels |= {"sigma_data": parameterization.get("sigma_data", 0.5), "rho": inner.get("rho", 7.0)}
    kind = (objective["name"], schedule.get("name"), parameterization.get("name"))
    if objective["name"] == "flow_matching":
        plain = schedule.get("name", "flow") == "flow" and schedule.get("shift", 1.0) == 1
        if not plain or parameterization.get("name", "velocity") != "velocity":
            return None
        name = _SAMPLERS.get(sampler["name"], _SAMPLERS["euler"])
        return {"_class_name": name, **CLASSES[name], "shift": grid.get("shift", 1.0)}
    if kind == ("denoising", "edm", "edm") and parameterization.get("c_noise", "log_sigma") == "log_sigma":
        config = {**_EDM, **levels, "sigma_schedule": inner.get("name"),
                  "prediction_type": "v_prediction" if parameterization.get("negative") else "epsilon",
                  "final_sigmas_type": "sigma_min" if inner is not grid else "zero"}  # fmt: skip
        if sampler["name"] != "dpm_solver_pp":
            return {"_class_name": "EDMEulerScheduler", **config}
        lower = sampler.get("lower_order_final")
        config |= {**_SOLVER, "solver_order": sampler.get("order", 2), "thresholding": bool(threshold),
                   "algorithm_type": "sde-dpmsolver++" if sampler.get("sde") else "dpmsolver++",
                   "solver_type": sampler.get("solver_type", "midpoint"),
                   "lower_order_final": inner is grid if lower is None else lower,
                   "dynamic_thresholding_ratio": threshold.get("percentile", 0.995),
                   "sample_max_value": threshold.get("sample_max_value", 1.0)}  # fmt: skip
        return {"_class_name": "EDMDPMSolverMultistepScheduler", **config}
    if kind == ("consistency", "edm", "consistency") and parameterization.get("c_noise") == "log_sigma_1000":
        points = {"num_train_timesteps": grid.get("points", 40)}
        clip = {"clip_denoised": bool(threshold)}
        return {"_class_name": "CMStochasticIterativeScheduler", **_CONSISTENCY, **levels, **points, **clip}
    return None
