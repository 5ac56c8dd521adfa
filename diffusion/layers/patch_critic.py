"""The critic of patches (PatchGAN: Isola et al. 2017, arXiv 1611.07004, section 3.2.2), with group norm."""

import math

import jax
from flax import nnx

from diffusion.core.types import Array
from diffusion.layers.keys import Keys


class PatchCritic(nnx.Module):
    """Maps images `[B, H, W, channels]` to a number per overlapping patch, `[B, h, w]`.

    Layers `conv_0`, `conv_1`, ... are 4x4 convolutions to `width`, 2 `width`, 4 `width` and at most 8 `width` channels.
    `num_layers` of them halve the image, and one does not. All but the first are followed by group norm, and all by
    leaky relu. The last convolution has one channel. Kernels are initialised from N(0, 0.02^2).

    Args:
      channels: The channels of the images.
      width: The channels after the first layer.
      num_layers: The number of layers with stride 2.
    """

    def __init__(self, channels: int, width: int, num_layers: int, *, rngs: Keys):
        self.num = num_layers + 1
        for level in range(self.num):
            after = width * min(2**level, 8)
            setattr(self, f"conv_{level}", _conv(channels, after, 2 if level < num_layers else 1, rngs))
            if level:
                norm = nnx.GroupNorm(after, math.gcd(after, 32), epsilon=1e-6, use_fast_variance=False, rngs=rngs)
                setattr(self, f"norm_{level}", norm)
            channels = after
        self.conv_out = _conv(channels, 1, 1, rngs)

    def __call__(self, x: Array) -> Array:
        for level in range(self.num):
            x = getattr(self, f"conv_{level}")(x)
            x = jax.nn.leaky_relu(getattr(self, f"norm_{level}")(x) if level else x, 0.2)
        return self.conv_out(x)[..., 0]


def smallest_side(num_layers: int) -> int:
    """Returns the smallest side of an image that has a patch. The two layers without stride remove a pixel each."""
    return 3 * 2**num_layers


def _conv(in_channels: int, out_channels: int, strides: int, rngs: Keys) -> nnx.Conv:
    return nnx.Conv(in_channels, out_channels, (4, 4), strides, padding=1, kernel_init=nnx.initializers.normal(0.02),
                    rngs=rngs)  # fmt: skip
