"""Files with the weights of LPIPS on a VGG16 with few channels."""

import numpy as np
import safetensors.numpy

from diffusion.encoders.vision.lpips import STAGES


def random_tensors(widths=(2, 2, 3, 3, 4), seed=0):
    """Returns the tensors of a VGG16 whose stages have these widths, and those of LPIPS, by their published names."""
    rng = np.random.default_rng(seed)
    vgg, linear, width = {}, {}, 3
    for stage, numbers in enumerate(STAGES):
        for number in numbers:
            shape = widths[stage], width, 3, 3
            vgg[f"features.{number}.weight"] = rng.normal(size=shape) * np.sqrt(2 / (9 * width))
            vgg[f"features.{number}.bias"] = 0.1 * rng.normal(size=shape[0])
            width = shape[0]
        linear[f"lin{stage}.model.1.weight"] = rng.uniform(size=(1, width, 1, 1))
    vgg["classifier.0.weight"] = rng.normal(size=(2, 2))  # which is not used
    return [{name: tensor.astype(np.float32) for name, tensor in part.items()} for part in (vgg, linear)]


def write(folder, **options):
    """Writes the two files and returns their paths."""
    paths = []
    for name, tensors in zip(("vgg16", "lpips"), random_tensors(**options), strict=True):
        paths.append(str(folder / f"{name}.safetensors"))
        safetensors.numpy.save_file(tensors, paths[-1])
    return tuple(paths)
