"""The convolutional U-Net: DDPM's (Ho et al. 2020, arXiv 2006.11239), DDPM++ and NCSN++ (Song et al. 2021, arXiv
2011.13456) and ADM's (Dhariwal & Nichol 2021, arXiv 2105.05233) by their options.

| option | DDPM | DDPM++ | NCSN++ | ADM |
|---|---|---|---|---|
| scale_shift | False | False | False | True |
| resample | conv | projected | projected | residual |
| resample_filter | (1, 1) | (1, 1) | (1, 3, 3, 1) | (1, 1) |
| asymmetric_padding | True | | | |
| input_skip | False | False | True | False |
| rescale | False | True | True | False |
| up_attention | every | last | last | every |
| head_dim | None | None | None | 64 |
| embedding | sinusoidal | sinusoidal | fourier | sinusoidal |
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import Array, Cond, InputError, Network
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.attention import Kernel, SpatialAttention
from diffusion.layers.embeddings import ConditionEmbedding
from diffusion.layers.functional import functional
from diffusion.layers.keys import Keys
from diffusion.layers.resample import MEAN, halve
from diffusion.layers.residual import Downsample, ResidualBlock, Style, Upsample, conv3x3
from diffusion.layers.stack import Remat, rematerialised


class UNet(nnx.Module):
    """x `[B, H, W, C]`, c_noise `[B]`, cond -> `[B, H, W, outputs * C]`, float32.

    Down: each level's blocks, then a halving. Every tensor on the way is kept, and the way up, with one block a level
    more, takes them back in reverse, each joined to the channels of one block's input.
    """

    def __init__(self, *, size, channels, num_classes, scalar_conditions, width, channel_mult, num_res_blocks, attention_resolutions, up_attention,
                 middle_attention, head_dim, resample, asymmetric_padding, input_skip, embedding, freq_shift, sin_first,
                 null_class, kernel, remat, outputs, style: Style, rngs: Keys):  # fmt: skip
        self.style, self.remat = style, remat
        self.embed = ConditionEmbedding(
            2 * width if embedding == "fourier" else width, style.emb_features, num_classes, scalar_conditions=scalar_conditions,
            kind=embedding, last=freq_shift, sin_first=sin_first, null_class=null_class, dtype=style.dtype,
            rngs=rngs,
        )  # fmt: skip
        self.conv_in = conv3x3(channels, width, dtype=style.dtype, rngs=rngs)

        def attend(channels: int) -> SpatialAttention:
            return SpatialAttention(channels, channels // (head_dim or channels), style, kernel=kernel, rngs=rngs)

        def stage(in_channels: int, out_channels: int, attends: bool) -> nnx.Dict:
            parts = {"residual": ResidualBlock(in_channels, out_channels, style, rngs=rngs)}
            return nnx.Dict({**parts, "attention": attend(out_channels)} if attends else parts)

        def resized(channels: int, to: Literal["halve", "double"]) -> nnx.Module:
            if resample != "conv":
                block = ResidualBlock(
                    channels, channels, style, resample=to, projected=resample == "projected", rngs=rngs
                )
                return nnx.Dict({"residual": block})
            if to == "halve":
                return Downsample(channels, style, asymmetric_padding=asymmetric_padding, rngs=rngs)
            return Upsample(channels, style, rngs=rngs)

        kept, current, pyramid = [width], width, channels
        down, up, inputs = {}, {}, {}
        for level, multiplier in enumerate(channel_mult):
            for block in range(num_res_blocks):
                down[f"{level}_{block}"] = stage(current, width * multiplier, size >> level in attention_resolutions)
                current = width * multiplier
                kept.append(current)
            if level + 1 < len(channel_mult):
                down[f"{level}_down"] = resized(current, "halve")
                kept.append(current)
                if input_skip:
                    inputs[f"{level}_down"] = conv3x3(pyramid, current, dtype=style.dtype, rngs=rngs)
                    pyramid = current
        self.middle = nnx.Dict({
            "first": stage(current, current, middle_attention),
            "second": stage(current, current, False),
        })  # fmt: skip
        for level, multiplier in reversed(list(enumerate(channel_mult))):
            for block in range(num_res_blocks + 1):
                attends = size >> level in attention_resolutions and (
                    up_attention == "every" or block == num_res_blocks
                )
                up[f"{level}_{block}"] = stage(current + kept.pop(), width * multiplier, attends)
                current = width * multiplier
            if level:
                up[f"{level}_up"] = resized(current, "double")
        self.down, self.up, self.inputs = nnx.Dict(down), nnx.Dict(up), nnx.Dict(inputs)
        # Names in the order of the passes: the dicts themselves come back sorted from a checkpoint.
        self.down_names, self.up_names = tuple(down), tuple(up)
        self.norm_out = style.norm(current, rngs)
        self.conv_out = conv3x3(current, outputs * channels, zero=True, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array, c_noise: Array, cond: Cond, key: Array | None) -> Array:
        emb = self.embed(c_noise, cond)

        def run(stage: nnx.Module, x: Array) -> Array:
            nonlocal key
            if not isinstance(stage, nnx.Dict):
                return constrain(stage(x))
            mine = None
            if key is not None:
                key, mine = jax.random.split(key)

            def pass_through(x: Array, emb: Array, mine: Array | None) -> Array:
                x = stage["residual"](x, emb, mine)
                return stage["attention"](x) if "attention" in stage else x

            return constrain(rematerialised(pass_through, self.remat)(x, emb, mine))

        pyramid = x = x.astype(self.style.dtype)
        x = self.conv_in(x)
        kept = [x]
        for name in self.down_names:
            x = run(self.down[name], x)
            if name in self.inputs:
                pyramid = x = self.style.add(x, self.inputs[name](halve(pyramid, self.style.resample_filter)))
            kept.append(x)
        x = run(self.middle["second"], run(self.middle["first"], x))
        for name in self.up_names:
            if not name.endswith("up"):
                x = jnp.concatenate([x, kept.pop()], axis=-1)
            x = run(self.up[name], x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)).astype(jnp.float32))


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    scalar_conditions: tuple[str, ...] = (),
    width: int = 128,
    channel_mult: tuple[int, ...] = (1, 2, 2, 2),
    num_res_blocks: int = 2,
    attention_resolutions: tuple[int, ...] = (16,),
    up_attention: Literal["every", "last"] = "every",
    middle_attention: bool = True,
    head_dim: int | None = 64,
    scale_shift: bool = True,
    resample: Literal["conv", "residual", "projected"] = "conv",
    resample_filter: tuple[int, ...] = MEAN,
    asymmetric_padding: bool = False,
    input_skip: bool = False,
    rescale: bool = False,
    embedding: Literal["sinusoidal", "fourier"] = "sinusoidal",
    freq_shift: bool = False,
    sin_first: bool = False,
    null_class: bool = True,
    dropout: float = 0.0,
    groups: int | None = None,
    epsilon: float = 1e-5,
    kernel: Kernel = "auto",
    remat: Remat = "none",
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """A U-Net for images of `shape` (from the data's spec).

    Args:
      shape: `(H, W, C)`, H = W, divisible by 2 once for every level but the last; it says which levels attend, and the
        network takes images of other such sizes too.
      num_classes: labels to be conditioned on; 0 for none (from the data's spec).
      scalar_conditions: numbers that it is told beside the noise label, `r` and `guidance`; see `layers.embeddings.Numbers`.
      width: channels of the first level; must be even.
      channel_mult: channels of each level, as multiples of `width`.
      num_res_blocks: residual blocks a level on the way down; one more on the way up.
      attention_resolutions: the resolutions at which blocks are followed by self-attention.
      up_attention: after `every` block of such a level on the way up, or after the `last`; on the way down every one.
      middle_attention: also between the two blocks of the middle.
      head_dim: channels of an attention head; must divide the channels wherever there is attention. None: one head.
      scale_shift: the embedding scales and shifts a block's second norm; else it is added before it.
      resample: by a strided `conv`, and one after nearest neighbours on the way up; or in a `residual` block, whose
        input may be `projected` as well.
      resample_filter: the filter that halves and doubles, where no strided convolution does; see `layers.resample`.
      asymmetric_padding: strided convolutions pad below and right alone, which published DDPM weights want.
      input_skip: the halved input, convolved, is added after each halving.
      rescale: sums of two are divided by sqrt(2).
      embedding: of the noise label: `sinusoidal` for labels up to 1,000 or so, `fourier` for small ones (log sigma).
      freq_shift: the sinusoidal embedding reaches its lowest frequency, 1 / 10,000, as DDPM's does and ADM's not.
      sin_first: its sines stand before its cosines, which published DDPM weights want.
      null_class: the table of classes has a row for no class; without it, nothing is added for no class.
      dropout: rate inside the residual blocks, in [0, 1).
      groups: of every group norm; None for 32, or fewer where they would have less than 4 channels.
      epsilon: of the group norms.
      kernel: how attention is computed; see `layers.attention.attend`.
      remat: what of a block the backward pass computes again; see `layers.stack.rematerialised`.
      outputs: values for each channel: 2 for an objective with a learned variance.
      dtype: of the computation; parameters, norms' statistics and the last convolution are float32.
    """
    checks.square_images("unet", shape)
    checks.positive(
        width=width, num_res_blocks=num_res_blocks, outputs=outputs, epsilon=epsilon, head_dim=head_dim, groups=groups
    )
    checks.rate(dropout=dropout)
    if width % 2:
        raise InputError("width", f"must be even, got {width}")
    checks.levels(shape[0], width, channel_mult, attention_resolutions, head_dim, middle_attention=middle_attention)
    if (
        not resample_filter
        or len(resample_filter) % 2
        or resample_filter != resample_filter[::-1]
        or sum(resample_filter) == 0
    ):
        raise InputError(
            "resample_filter", f"must be a symmetric filter of an even number of weights, got {resample_filter}"
        )
    for channels in (width * m for m in channel_mult):
        if groups and channels % groups:
            raise InputError("groups", f"{groups} do not divide the {channels} channels of a level")
    style = Style(4 * width, dropout, scale_shift, rescale, resample_filter, groups, epsilon, jnp.dtype(dtype))
    return functional(lambda rngs: UNet(
        size=shape[0], channels=shape[2], num_classes=num_classes, scalar_conditions=scalar_conditions, width=width,
        channel_mult=channel_mult, num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions, up_attention=up_attention,
        middle_attention=middle_attention, head_dim=head_dim, resample=resample, asymmetric_padding=asymmetric_padding,
        input_skip=input_skip, embedding=embedding, freq_shift=freq_shift, sin_first=sin_first,
        null_class=null_class, kernel=kernel, remat=remat, outputs=outputs, style=style, rngs=rngs,
    ), shape, outputs, multiple=2 ** (len(channel_mult) - 1), scalar_conditions=scalar_conditions)  # fmt: skip
