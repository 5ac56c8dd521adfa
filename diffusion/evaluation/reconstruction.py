"""How well an autoencoder reconstructs held-out images, from their most probable latents."""

import dataclasses
import functools

import jax
import numpy as np

from diffusion.core import checks
from diffusion.core.arrays import scaled
from diffusion.core.build import build
from diffusion.core.types import Array, InputError, Params, SampleMetric, Source
from diffusion.encoders.vision import lpips as perceptual
from diffusion.layers.autoencoder import AutoencoderApply

LEAST_ERROR = 1e-10  # of a mean square on [0, 1], which limits the PSNR to 100 dB


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """An `AutoencoderMetric`; see `make`."""

    held_out: Source
    num: int
    batch_size: int
    codes: bool
    readable: SampleMetric | None
    lpips: Params | None
    kind = "autoencoder"

    @property
    def names(self) -> tuple[str, ...]:
        readable = () if self.readable is None else ("readable_shapes",)
        distance = () if self.lpips is None else ("lpips",)
        return ("psnr", *distance, *readable, *(("codes_used", "perplexity") if self.codes else ()))

    def check(self, network: AutoencoderApply) -> None:
        """Raises InputError if the network is no autoencoder of such images or has no codes that could be counted, or
        if the images have no LPIPS."""
        if not isinstance(network, AutoencoderApply):
            raise InputError("network.name", "must be an autoencoder, whose reconstructions are measured")
        if self.lpips is not None:
            perceptual.check_shape(network.shape, "eval.metrics.reconstruction.lpips")
        if self.codes and not hasattr(network, "quantize"):
            problem = f"counts the codes of autoencoder_vq, and the network is {network.name}; set it to False"
            raise InputError("eval.metrics.reconstruction.codes", problem)
        *sides, channels = self.held_out.spec.shape
        if channels != network.shape[-1] or any(side % network.factor for side in sides):
            problem = f"must have sides divisible by {network.factor} and {network.shape[-1]} channels"
            raise InputError("eval.data", f"{problem}, got {self.held_out.spec.shape}")

    def __call__(self, network: AutoencoderApply, params: Params) -> dict[str, float]:
        num = min(self.num, len(self.held_out))
        found = None if self.readable is None else self.readable.init()
        psnr, distances, indices = [], [], []
        for start in range(0, num, self.batch_size):
            # The last batch is filled up with the last example, so that all have one compiled size.
            rows = np.minimum(np.arange(start, start + min(self.batch_size, num)), num - 1)
            x = scaled(np.stack([self.held_out[int(row)]["x"] for row in rows])).astype(np.float32)
            y, codes = jax.tree.map(np.asarray, self._reconstructed(network, params, x))
            count = min(len(rows), num - start)
            y = np.clip(y, -1, 1)
            if self.lpips is not None:
                distances.append(np.asarray(_distance(self.lpips, x, y))[:count])
            x, y = x[:count], y[:count]
            error = np.square((y - x) / 2, dtype=np.float64).mean(axis=(1, 2, 3))
            psnr.append(-10 * np.log10(np.maximum(error, LEAST_ERROR)))
            if found is not None:
                found = self.readable.update(found, y, {})
            if codes is not None:
                indices.append(codes[:count].ravel())
        values = {"psnr": float(np.concatenate(psnr).mean())}
        if distances:
            values["lpips"] = float(np.concatenate(distances).mean())
        if found is not None:
            values["readable_shapes"] = self.readable.result(found)["readable_shapes"]
        if self.codes:
            counts = np.unique(np.concatenate(indices), return_counts=True)[1]
            share = counts / counts.sum()
            values |= {"codes_used": float(len(counts)), "perplexity": float(np.exp(-np.sum(share * np.log(share))))}
        return values

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _reconstructed(self, network: AutoencoderApply, params: Params, x: Array) -> tuple[Array, Array | None]:
        """Returns the reconstructions of x `[B, H, W, C]`, and their codes `[B, h, w]` if they are counted."""
        z = network.sample(network.encode(params, x), None)
        return network.decode(params, z), network.quantize(params, z).indices if self.codes else None


_distance = jax.jit(perceptual.distance)


def make(
    train: Source, held_out: Source, num: int = 1000, batch_size: int = 50, codes: bool = False,
    lpips: tuple[str, ...] = (),
) -> Reconstruction:  # fmt: skip
    """Builds the metric. The values are
      psnr: The peak signal-to-noise ratio in dB, -10 log10 of the mean squared error on [0, 1], averaged over images.
        Reconstructions are clipped to the range of images, and an image counts for at most 100 dB.
      lpips: With `lpips`, the perceptual distance of images and reconstructions, averaged over images.
      readable_shapes: For drawn shapes, the share of reconstructions that their parser can read; see `readable_shapes`.
      codes_used, perplexity: With `codes`, the number of codes that occur, and exp of the entropy of their frequencies.

    Args:
      num: Number of held-out images; the first ones are used.
      batch_size: Number of images reconstructed at once.
      codes: Whether to count codes; the network must be `autoencoder_vq`.
      lpips: The files with the weights of VGG16 and of LPIPS; see `encoders.vision.lpips.read`. Empty: no LPIPS.
    """
    checks.at_least(1, num=num, batch_size=batch_size)
    readable = None
    if hasattr(held_out, "closest"):
        readable = build("evaluation", "readable_shapes", train=train, held_out=held_out)
    params = perceptual.read(lpips, "lpips") if lpips else None
    return Reconstruction(held_out, num, batch_size, codes, readable, params)
