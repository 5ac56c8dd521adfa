"""The convolutional U-Net of DDPM (Ho et al. 2020) with the residual blocks of ADM (Dhariwal & Nichol 2021)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.layers.attention import SpatialAttention
from diffusion.layers.embeddings import ConditionEmbedding
from diffusion.layers.functional import functional
from diffusion.layers.norms import group_norm
from diffusion.layers.residual import Downsample, ResidualBlock, Upsample, conv3x3
from diffusion.types import Array, Cond, InputError, Network


class UNet(nnx.Module):
    """x `[B, H, W, C]`, c_noise `[B]`, cond -> `[B, H, W, outputs * C]`, float32.

    Down: each level's blocks, then a halving. Every tensor on the way is kept, and the way up, with one block a level
    more, takes them back in reverse, each joined to the channels of one block's input.
    """

    def __init__(self, *, size, channels, num_classes, width, multipliers, blocks, attention, head_width, dropout,
                 outputs, dtype, rngs: nnx.Rngs):  # fmt: skip
        self.dtype = dtype
        kwargs = dict(dtype=dtype, rngs=rngs)
        emb_features = 4 * width
        self.embed = ConditionEmbedding(width, emb_features, num_classes, **kwargs)
        self.conv_in = conv3x3(channels, width, **kwargs)

        def stage(in_channels: int, out_channels: int, resolution: int) -> nnx.Dict:
            parts = {"residual": ResidualBlock(in_channels, out_channels, emb_features, dropout, **kwargs)}
            if resolution in attention:
                parts["attention"] = SpatialAttention(out_channels, head_width, **kwargs)
            return nnx.Dict(parts)

        kept, current = [width], width
        down, up = {}, {}
        for level, multiplier in enumerate(multipliers):
            for block in range(blocks):
                down[f"{level}_{block}"] = stage(current, width * multiplier, size >> level)
                current = width * multiplier
                kept.append(current)
            if level + 1 < len(multipliers):
                down[f"{level}_down"] = Downsample(current, **kwargs)
                kept.append(current)
        self.middle = nnx.Dict({
            "first": ResidualBlock(current, current, emb_features, dropout, **kwargs),
            "attention": SpatialAttention(current, head_width, **kwargs),
            "second": ResidualBlock(current, current, emb_features, dropout, **kwargs),
        })  # fmt: skip
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(blocks + 1):
                up[f"{level}_{block}"] = stage(current + kept.pop(), width * multiplier, size >> level)
                current = width * multiplier
            if level:
                up[f"{level}_up"] = Upsample(current, **kwargs)
        self.down, self.up = nnx.Dict(down), nnx.Dict(up)
        # Names in the order of the passes: the dicts themselves come back sorted from a checkpoint.
        self.down_names, self.up_names = tuple(down), tuple(up)
        self.norm_out = group_norm(current, **kwargs)
        self.conv_out = conv3x3(current, outputs * channels, zero=True, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array, c_noise: Array, cond: Cond, key: Array | None) -> Array:
        rngs = None if key is None else nnx.Rngs(dropout=key)

        def run(stage: nnx.Module, x: Array) -> Array:
            if not isinstance(stage, nnx.Dict):
                return stage(x)
            x = stage["residual"](x, emb, rngs)
            return stage["attention"](x) if "attention" in stage else x

        emb = self.embed(c_noise, cond)
        x = self.conv_in(x.astype(self.dtype))
        kept = [x]
        for name in self.down_names:
            x = run(self.down[name], x)
            kept.append(x)
        x = self.middle["first"](x, emb, rngs)
        x = self.middle["second"](self.middle["attention"](x), emb, rngs)
        for name in self.up_names:
            if not name.endswith("up"):
                x = jnp.concatenate([x, kept.pop()], axis=-1)
            x = run(self.up[name], x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)).astype(jnp.float32))


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    width: int = 128,
    multipliers: tuple[int, ...] = (1, 2, 2, 2),
    blocks: int = 2,
    attention: tuple[int, ...] = (16,),
    head_width: int = 64,
    dropout: float = 0.0,
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """A U-Net for images of `shape` (from the data's spec).

    Args:
      shape: `(H, W, C)`, H = W, divisible by 2 once for every level but the last.
      num_classes: labels to be conditioned on; 0 for none (from the data's spec).
      width: channels of the first level; must be even.
      multipliers: channels of each level, as multiples of `width`.
      blocks: residual blocks a level on the way down; one more on the way up.
      attention: the resolutions at which every block is followed by self-attention; the middle always has it.
      head_width: channels of an attention head; must divide the channels wherever there is attention.
      dropout: rate inside the residual blocks, in [0, 1).
      outputs: values for each channel: 2 for an objective with a learned variance.
      dtype: of the computation; parameters, norms' statistics and the last convolution are float32.
    """
    if len(shape) != 3 or shape[0] != shape[1]:
        raise InputError("shape", f"unet takes square images (H, W, C), got {shape}; choose another network or data")
    for name, value in (("width", width), ("blocks", blocks), ("head_width", head_width), ("outputs", outputs)):
        if value < 1:
            raise InputError(name, f"must be at least 1, got {value}")
    if width % 2:
        raise InputError("width", f"must be even, got {width}")
    if not multipliers or min(multipliers) < 1:
        raise InputError("multipliers", f"must be one or more positive numbers, got {multipliers}")
    halvings = len(multipliers) - 1
    if shape[0] % (1 << halvings):
        raise InputError("multipliers", f"{shape[0]} pixels cannot be halved {halvings} times; use fewer levels")
    if not 0 <= dropout < 1:
        raise InputError("dropout", f"must be in [0, 1), got {dropout}")
    sizes = [shape[0] >> level for level in range(len(multipliers))]
    for resolution in attention:
        if resolution not in sizes:
            raise InputError("attention", f"no level has resolution {resolution}; the levels have {sizes}")
    attended = {m for m, size in zip(multipliers, sizes, strict=True) if size in attention} | {multipliers[-1]}
    for channels in (width * m for m in sorted(attended)):
        if channels % head_width:
            raise InputError("head_width", f"{head_width} does not divide the {channels} channels that attend")
    return functional(lambda rngs: UNet(
        size=shape[0], channels=shape[2], num_classes=num_classes, width=width, multipliers=multipliers, blocks=blocks,
        attention=attention, head_width=head_width, dropout=dropout, outputs=outputs, dtype=jnp.dtype(dtype), rngs=rngs,
    ), outputs)  # fmt: skip
