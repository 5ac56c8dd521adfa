"""Diffusion models in JAX and Flax: train, sample and compare methods on one CPU, one GPU or a TPU pod.

    import diffusion as df

    run = df.load("runs/digits")
    x = run.sample(num=16, labels=[3], sampler="unipc", steps=20, guidance=1.5)

Public names are imported when they are first used, so that `import diffusion` is fast and has no side effects.
"""

import importlib
from typing import Any

_NAMES = {
    "ArraySpec": "diffusion.core.types:ArraySpec",
    "ConditionSpec": "diffusion.core.types:ConditionSpec",
    "CheckpointOptions": "diffusion.training.options:CheckpointOptions",
    "Denoised": "diffusion.core.types:Denoised",
    "InputError": "diffusion.core.types:InputError",
    "Network": "diffusion.core.types:Network",
    "Options": "diffusion.training.options:Options",
    "Run": "diffusion.pipelines.run:Run",
    "Spec": "diffusion.core.types:Spec",
    "Text": "diffusion.core.types:Text",
    "Trainer": "diffusion.training.trainer:Trainer",
    "build": "diffusion.core.build:build",
    "class_labels": "diffusion.core.types:class_labels",
    "config": "diffusion.pipelines.config",
    "hooks": "diffusion.training.hooks",
    "images": "diffusion.core.images",
    "load": "diffusion.pipelines.run:open_run",
    "names": "diffusion.core.build:names",
    "network": "diffusion.layers.functional:functional",
    "read_config": "diffusion.pipelines.config:read_config",
    "sample": "diffusion.pipelines.run:sample",
    "types": "diffusion.core.types",
    "writers": "diffusion.training.metrics",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'diffusion' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    found = importlib.import_module(module)
    globals()[name] = found = getattr(found, attribute) if attribute else found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
