"""The convolutional U-Net. Its options give those of DDPM (Ho et al. 2020, arXiv 2006.11239), DDPM++ and NCSN++ (Song
et al. 2021, arXiv 2011.13456) and ADM (Dhariwal & Nichol 2021, arXiv 2105.05233).

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

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import (
    NO_CONDITIONS,
    PREVIOUS_X0,
    Array,
    Cond,
    ConditionSpec,
    InputError,
    Network,
    Perturbation,
    class_labels,
)
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.attention import CrossAttention, Kernel, SpatialAttention
from diffusion.layers.conditioner import Conditioner, Embedded, has_text, image_channels, images_of
from diffusion.layers.functional import Blocks, functional
from diffusion.layers.keys import Keys
from diffusion.layers.resample import BOX, Filter, halve
from diffusion.layers.residual import BlockConfig, Downsample, ResidualBlock, Upsample, conv3x3
from diffusion.layers.stack import Remat, rematerialised


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The options of a U-Net; `make` documents them."""

    shape: tuple[int, ...]
    num_classes: int
    conditions: Mapping[str, ConditionSpec] = dataclasses.field(hash=False)
    scalar_conditions: tuple[str, ...]
    self_conditioning: bool
    width: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    up_attention: Literal["every", "last"]
    middle_attention: bool
    middle_attention_groups: int | None
    head_dim: int | None
    scale_shift: bool
    resample: Literal["conv", "residual", "projected"]
    resample_filter: Filter
    asymmetric_padding: bool
    input_skip: bool
    rescale: bool
    embedding: Literal["sinusoidal", "fourier"]
    embedding_scale: float
    freq_shift: Literal[0, 1]
    sin_first: bool
    null_class: bool
    dropout: float
    groups: int | None
    epsilon: float
    kernel: Kernel
    remat: Remat
    outputs: int
    dtype: Literal["float32", "bfloat16"]

    def __post_init__(self):
        checks.images("unet", self.shape)
        checks.condition_kinds("unet", self.conditions, ("scalar", "vector", "text", "image"), self.shape)
        checks.network_size(
            width=self.width, num_res_blocks=self.num_res_blocks, outputs=self.outputs, epsilon=self.epsilon,
            head_dim=self.head_dim, groups=self.groups,
        )  # fmt: skip
        checks.rate(dropout=self.dropout)
        if self.width % 2:
            raise InputError("width", f"must be even, got {self.width}")
        checks.levels(self.shape, self.width, self.channel_mult, self.attention_resolutions, self.head_dim,
                      middle_attention=self.middle_attention or has_text(self.conditions))  # fmt: skip
        weights = self.resample_filter
        if not weights or len(weights) % 2 or weights != weights[::-1] or sum(weights) == 0:
            raise InputError("resample_filter", "must be a symmetric filter with an even number of weights and a "
                             f"nonzero sum, got {weights}")  # fmt: skip
        for channels in self.channels:
            if self.groups and channels % self.groups:
                raise InputError("groups", f"must divide the {channels} channels of a level, got {self.groups}")
        groups = self.middle_attention_groups
        if groups is not None and (groups < 0 or (groups and self.channels[-1] % groups)):
            problem = f"must be 0 or divide the {self.channels[-1]} channels of the last level, got {groups}"
            raise InputError("middle_attention_groups", problem)

    @property
    def block(self) -> BlockConfig:
        """The options that all blocks share."""
        return BlockConfig(4 * self.width, self.dropout, self.scale_shift, self.rescale, self.resample_filter,
                           self.groups, self.epsilon, jnp.dtype(self.dtype))  # fmt: skip

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(round(self.width * multiplier) for multiplier in self.channel_mult)

    def attends(self, level: int) -> bool:
        """Returns whether there is self-attention at a level."""
        return min(self.shape[:2]) >> level in self.attention_resolutions

    @property
    def attention_blocks(self) -> Blocks:
        """The blocks with self-attention."""
        levels = sum(map(self.attends, range(len(self.channel_mult))))
        before, after = levels * self.num_res_blocks, levels
        if self.up_attention == "every":
            after *= self.num_res_blocks + 1
        return Blocks(before + self.middle_attention + after, before if self.middle_attention else None)


class UNet(nnx.Module):
    """Maps x `[B, H, W, C]`, c_noise `[B]` and cond to `[B, H, W, outputs * C]`, float32.

    Texts are read by cross-attention after every self-attention and in the middle. Each level of the way down ends with
    a halving. The way up has one block more per level than the way down. Each of
    its blocks receives, concatenated to its input, one tensor of the way down, in reverse order.
    """

    def __init__(self, config: UNetConfig, *, rngs: Keys):
        self.config = config
        width, block, channels = config.width, config.block, config.shape[2]
        self.embed = Conditioner(
            2 * width if config.embedding == "fourier" else width, block.emb_features, config.num_classes,
            conditions=config.conditions, scalar_conditions=config.scalar_conditions, kind=config.embedding,
            scale=config.embedding_scale,
            freq_shift=config.freq_shift, sin_first=config.sin_first, null_class=config.null_class, dtype=block.dtype,
            rngs=rngs,
        )  # fmt: skip
        self.conv_in = conv3x3(channels, width, dtype=block.dtype, rngs=rngs)
        if image_channels(config.conditions):
            self.conv_images = conv3x3(
                image_channels(config.conditions), width, zero=True, bias=False, dtype=block.dtype, rngs=rngs
            )

        def stage(
            in_channels: int, out_channels: int, attends: bool, reads: bool | None = None, groups: int | None = None
        ) -> nnx.Dict:
            parts = {"residual": ResidualBlock(in_channels, out_channels, block, rngs=rngs)}
            heads = out_channels // (config.head_dim or out_channels)
            if attends:
                parts["attention"] = SpatialAttention(
                    out_channels, heads, block, groups=groups, kernel=config.kernel, rngs=rngs
                )
            if has_text(config.conditions) and (attends if reads is None else reads):
                parts["cross_norm"] = block.norm(out_channels, rngs)
                parts["cross"] = CrossAttention(
                    out_channels, block.emb_features, heads, kernel=config.kernel, dtype=block.dtype, rngs=rngs
                )
            return nnx.Dict(parts)

        def resampler(channels: int, to: Literal["halve", "double"]) -> nnx.Module:
            if config.resample != "conv":
                projected = config.resample == "projected"
                return nnx.Dict({"residual": ResidualBlock(channels, channels, block, resample=to, projected=projected,
                                                           rngs=rngs)})  # fmt: skip
            if to == "halve":
                return Downsample(channels, block, asymmetric_padding=config.asymmetric_padding, rngs=rngs)
            return Upsample(channels, block, rngs=rngs)

        # Channels of the tensors of the way down, of the current one, and of the input pyramid.
        skips, current, pyramid = [width], width, channels
        down, up, inputs = {}, {}, {}
        for level, out_channels in enumerate(config.channels):
            for index in range(config.num_res_blocks):
                down[f"{level}_{index}"] = stage(current, out_channels, config.attends(level))
                current = out_channels
                skips.append(current)
            if level + 1 < len(config.channels):
                down[f"{level}_down"] = resampler(current, "halve")
                skips.append(current)
                if config.input_skip:
                    inputs[f"{level}_down"] = conv3x3(pyramid, current, dtype=block.dtype, rngs=rngs)
                    pyramid = current
        self.middle = nnx.Dict({
            "first": stage(
                current, current, config.middle_attention, reads=True, groups=config.middle_attention_groups
            ),
            "second": stage(current, current, False),
        })  # fmt: skip
        for level, out_channels in reversed(list(enumerate(config.channels))):
            for index in range(config.num_res_blocks + 1):
                attends = config.up_attention == "every" or index == config.num_res_blocks
                up[f"{level}_{index}"] = stage(current + skips.pop(), out_channels, attends and config.attends(level))
                current = out_channels
            if level:
                up[f"{level}_up"] = resampler(current, "double")
        self.down, self.up, self.inputs = nnx.Dict(down), nnx.Dict(up), nnx.Dict(inputs)
        # The order of the forward pass, because the dicts of restored parameters are sorted by name.
        self.down_names, self.up_names = tuple(down), tuple(up)
        self.norm_out = block.norm(current, rngs)
        self.conv_out = conv3x3(current, config.outputs * channels, zero=True, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Array, c_noise: Array, cond: Cond, key: Array | None, perturbation: Perturbation | None = None
    ) -> Array:
        block, embedded, numbers = self.config.block, self.embed(c_noise, cond), itertools.count()

        def run(stage: nnx.Module, x: Array) -> Array:
            nonlocal key
            if not isinstance(stage, nnx.Dict):
                return constrain(stage(x))
            stage_key = None
            if key is not None:
                key, stage_key = jax.random.split(key)
            is_perturbed = "attention" in stage and perturbation is not None and next(numbers) in perturbation.layers

            def forward(x: Array, embedded: Embedded, key: Array | None) -> Array:
                x = stage["residual"](x, embedded.vector, key)
                if "attention" in stage:
                    x = stage["attention"](x, perturbation if is_perturbed else None)
                if "cross" in stage:
                    tokens = stage["cross_norm"](x).reshape(len(x), -1, x.shape[-1])
                    x += stage["cross"](tokens, embedded.sequence, embedded.mask).reshape(x.shape)
                return x

            return constrain(rematerialised(forward, self.config.remat)(x, embedded, stage_key))

        pyramid = x = x.astype(block.dtype)
        x = self.conv_in(x)
        if image_channels(self.config.conditions):
            x += self.conv_images(images_of(self.config.conditions, cond).astype(block.dtype))
        skips = [x]
        for name in self.down_names:
            x = run(self.down[name], x)
            if name in self.inputs:
                pyramid = x = block.add(x, self.inputs[name](halve(pyramid, block.resample_filter)))
            skips.append(x)
        x = run(self.middle["second"], run(self.middle["first"], x))
        for name in self.up_names:
            if not name.endswith("up"):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = run(self.up[name], x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)).astype(jnp.float32))


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS,
    scalar_conditions: tuple[str, ...] = (),
    self_conditioning: bool = False,
    width: int = 128,
    channel_mult: tuple[float, ...] = (1, 2, 2, 2),
    num_res_blocks: int = 2,
    attention_resolutions: tuple[int, ...] = (16,),
    up_attention: Literal["every", "last"] = "every",
    middle_attention: bool = True,
    middle_attention_groups: int | None = None,
    head_dim: int | None = 64,
    scale_shift: bool = True,
    resample: Literal["conv", "residual", "projected"] = "conv",
    resample_filter: tuple[int, ...] = BOX,
    asymmetric_padding: bool = False,
    input_skip: bool = False,
    rescale: bool = False,
    embedding: Literal["sinusoidal", "fourier"] = "sinusoidal",
    embedding_scale: float = 16.0,
    freq_shift: Literal[0, 1] = 0,
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
    """Builds a U-Net for images of shape `shape`.

    Args:
      shape: `(H, W, C)` with H and W divisible by 2 once per level after the first; given by the data. It determines
        which levels have attention. The network also accepts images of other sizes with this divisibility.
      num_classes: The number of classes to condition on; 0 for none. Given by the data.
      conditions: The other conditions of the data, of the kinds scalar, vector, text and image. Given by the data.
      scalar_conditions: Scalars to condition on in addition to the noise label, among `step_size` and
        `guidance_scale`; see `layers.embeddings.ScalarEmbedding`.
      self_conditioning: Whether to read an earlier estimate of x0, in additional channels that have no effect at
        initialisation. The objective needs the option of the same name.
      width: The channels of the first level; even.
      channel_mult: The channels of each level as multiples of `width`, rounded to whole numbers of channels.
      num_res_blocks: The number of residual blocks per level on the way down; one more on the way up.
      attention_resolutions: The resolutions, of the shorter side, at which residual blocks are followed by
        self-attention.
      up_attention: Whether attention on the way up follows `every` block of such a level or only the `last`. On the
        way down it follows every block.
      middle_attention: Whether there is attention between the two blocks of the middle.
      middle_attention_groups: The number of groups of the norm before that attention: None for `groups`, 0 for no norm.
      head_dim: The channels of an attention head; must divide the channels wherever there is attention. None: one head.
      scale_shift: Whether the embedding scales and shifts a block's second norm. Otherwise it is added before the norm.
      resample: How levels are halved and doubled. `conv`: by a strided convolution, and by nearest-neighbour
        upsampling and a convolution. `residual`: inside a residual block. `projected`: the same with a linear layer on
        the skip connection.
      resample_filter: The filter that halves and doubles where no strided convolution does; see `layers.resample`.
      asymmetric_padding: Whether strided convolutions are padded only at the bottom and on the right. Published DDPM
        weights require it.
      input_skip: Whether the halved input, after a convolution, is added after each halving.
      rescale: Whether sums of two tensors are divided by sqrt(2).
      embedding: The features of the noise label: `sinusoidal` for labels up to about 1,000, `fourier` for small ones
        (log sigma).
      embedding_scale: The standard deviation of the frequencies of `fourier`; 16 for NCSN++ (Song et al. 2021), 0.02
        for iCT (Song & Dhariwal 2023, arXiv 2310.14189).
      freq_shift: 0 for the sinusoidal frequencies of ADM, 1 for those of DDPM, whose lowest is exactly 1 / 10,000; see
        `layers.embeddings.sinusoidal`.
      sin_first: Whether the sinusoidal features begin with the sines. Published DDPM weights require it.
      null_class: Whether the table of classes has a row for the null class. Without it, the null class adds nothing.
      dropout: The dropout rate inside the residual blocks, in [0, 1).
      groups: The number of groups of every group norm. None: 32, or fewer where groups would have less than 4 channels.
      epsilon: The epsilon of the group norms.
      kernel: The implementation of attention; see `layers.attention.attend`.
      remat: What the backward pass recomputes in each block; see `layers.stack.rematerialised`.
      outputs: The number of output values per channel; 2 for an objective with a learned variance.
      dtype: The compute dtype. Parameters, the statistics of norms and the last convolution are float32.
    """
    if self_conditioning:
        conditions = {**conditions, PREVIOUS_X0: ConditionSpec("image", shape)}
    config = UNetConfig(**locals())
    return functional(lambda rngs: UNet(config, rngs=rngs), shape, outputs, multiple=2 ** (len(channel_mult) - 1),
                      conditions=class_labels(num_classes) | dict(conditions),
                      scalar_conditions=scalar_conditions, blocks=config.attention_blocks)  # fmt: skip
