"""The U-Net of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752) and SDXL (Podell et al. 2023, arXiv
2307.01952). Between its residual blocks are transformers that read the text.

| option | Stable Diffusion 1.x | 2.x | SDXL |
|---|---|---|---|
| channel_mult | (1, 2, 4, 4) | (1, 2, 4, 4) | (1, 2, 4) |
| depth | (1, 1, 1, 0) | (1, 1, 1, 0) | (0, 2, 10) |
| middle_depth | 1 | 1 | 10 |
| num_heads | 8 | None | None |
| head_dim | None | 64 | 64 |
| text | [77, 768] | [77, 1024] | [77, 2048], pooled 1280 |
| time_ids | | | [6] |
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.arrays import kept
from diffusion.core.types import (
    NO_CONDITIONS,
    Array,
    Cond,
    ConditionSpec,
    InputError,
    Network,
    Perturbation,
    class_labels,
)
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.attention import Kernel
from diffusion.layers.conditioner import Conditioner, image_channels, images_of
from diffusion.layers.embeddings import sinusoidal
from diffusion.layers.functional import Blocks, functional
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.residual import BlockConfig, Downsample, ResidualBlock, Upsample, conv3x3
from diffusion.layers.spatial_transformer import SpatialTransformer
from diffusion.layers.stack import Remat, rematerialised

GUIDANCE = "guidance_scale"


@dataclasses.dataclass(frozen=True)
class UNetTextConfig:
    """The options of a U-Net that reads a text; `make` documents them."""

    shape: tuple[int, ...]
    num_classes: int
    conditions: Mapping[str, ConditionSpec] = dataclasses.field(hash=False)
    scalar_conditions: tuple[str, ...]
    width: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    depth: tuple[int, ...]
    middle_depth: int
    num_heads: int | tuple[int, ...] | None
    head_dim: int | None
    only_cross_attention: bool | tuple[bool, ...]
    scale_shift: bool
    freq_shift: Literal[0, 1]
    sin_first: bool
    number_features: int
    guidance_features: int
    null_class: bool
    dropout: float
    groups: int | None
    epsilon: float
    use_linear_projection: bool
    upcast_attention: bool
    kernel: Kernel
    remat: Remat
    outputs: int
    dtype: Literal["float32", "bfloat16"]

    def __post_init__(self):
        checks.images("unet_text", self.shape)
        checks.condition_kinds("unet_text", self.conditions, ("scalar", "vector", "text", "image"), self.shape)
        checks.network_size(
            width=self.width, num_res_blocks=self.num_res_blocks, outputs=self.outputs, epsilon=self.epsilon,
            head_dim=self.head_dim, groups=self.groups,
        )  # fmt: skip
        checks.rate(dropout=self.dropout)
        for name in ("width", "number_features", "guidance_features"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise InputError(name, f"must be even and positive, got {getattr(self, name)}")
        if not self.channels or min(self.channels) < 1:
            raise InputError("channel_mult", f"must be one or more positive numbers, got {self.channel_mult}")
        checks.at_most(checks.LARGEST, max(self.channels), "channel_mult")
        texts = [name for name, spec in self.conditions.items() if spec.kind == "text"]
        if len(texts) > 1:
            raise InputError("name", f"unet_text reads a single text, got {', '.join(texts)}")
        if self.text and self.text_spec.vocabulary:
            problem = f"unet_text reads vectors, and {self.text!r} has integers; encode them"
            raise InputError("name", problem)
        levels = len(self.channel_mult)
        for name in ("depth", "num_heads", "only_cross_attention"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise InputError(name, f"must have one entry for each of the {levels} levels, got {value}")
        for name, depth in (("depth", min(self.depth)), ("middle_depth", self.middle_depth)):
            checks.at_least(0, **{name: depth})
        if (self.num_heads is None) == (self.head_dim is None):
            raise InputError("num_heads", "or head_dim must be None, and the other one be given")
        if self.only_cross_attention not in (False, (False,) * levels) and not self.text:
            raise InputError("only_cross_attention", "must be False without a text")
        for level, channels in enumerate(self.channels):
            if self.groups and channels % self.groups:
                raise InputError("groups", f"must divide the {channels} channels of a level, got {self.groups}")
            attends = self.depth[level] or (level == levels - 1 and self.middle_depth)
            if attends and (not 0 < self.heads[level] <= channels or channels % self.heads[level]):
                name, value = ("num_heads", self.heads[level]) if self.num_heads else ("head_dim", self.head_dim)
                raise InputError(name, f"must divide the {channels} channels of a level, got {value}")

    @property
    def block(self) -> BlockConfig:
        """The options that all residual blocks share."""
        return BlockConfig(4 * self.width, self.dropout, self.scale_shift, groups=self.groups, epsilon=self.epsilon,
                           dtype=jnp.dtype(self.dtype))  # fmt: skip

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(round(self.width * multiplier) for multiplier in self.channel_mult)

    @property
    def heads(self) -> tuple[int, ...]:
        """The attention heads of each level."""
        if self.num_heads is None:
            return tuple(channels // self.head_dim * (channels % self.head_dim == 0) for channels in self.channels)
        return self.num_heads if isinstance(self.num_heads, tuple) else (self.num_heads,) * len(self.channels)

    @property
    def only_cross(self) -> tuple[bool, ...]:
        """Whether the transformers of each level lack self-attention."""
        value = self.only_cross_attention
        return value if isinstance(value, tuple) else (value,) * len(self.channels)

    @property
    def text(self) -> str | None:
        """The name of the text, or None."""
        return next((name for name, spec in self.conditions.items() if spec.kind == "text"), None)

    @property
    def text_spec(self) -> ConditionSpec | None:
        """The description of the text, or None."""
        return self.conditions.get(self.text)

    @property
    def numbers(self) -> dict[str, int]:
        """The names of scalars and vectors, and how many numbers each has."""
        specs = sorted(self.conditions.items())
        return {name: sum(spec.shape) or 1 for name, spec in specs if spec.kind in ("scalar", "vector")}

    @property
    def attention_blocks(self) -> Blocks:
        """The transformers with self-attention."""
        levels = sum(bool(depth) and not only for depth, only in zip(self.depth, self.only_cross, strict=True))
        before, after = levels * self.num_res_blocks, levels * (self.num_res_blocks + 1)
        has_middle = bool(self.middle_depth)
        return Blocks(before + has_middle + after, before if has_middle else None)


class Embedding(nnx.Module):
    """Maps the noise label, the class, the pooled text and numbers to a vector `[B, features]`.

    The sinusoidal features of each number are concatenated to the pooled text. A perceptron maps them to a vector that
    is added (SDXL, section 2.2).
    """

    def __init__(self, config: UNetTextConfig, *, rngs: Keys):
        self.config, block = config, config.block
        kwargs = dict(dtype=block.dtype, rngs=rngs)
        others = tuple(name for name in config.scalar_conditions if name != GUIDANCE)
        self.time = Conditioner(
            config.width, block.emb_features, config.num_classes, scalar_conditions=others,
            freq_shift=config.freq_shift, sin_first=config.sin_first, null_class=config.null_class, **kwargs,
        )  # fmt: skip
        zeros = nnx.initializers.zeros
        if GUIDANCE in config.scalar_conditions:
            features = config.guidance_features
            self.guidance_scale = Linear(features, config.width, use_bias=False, kernel_init=zeros, **kwargs)
        pooled = config.text_spec.pooled if config.text else 0
        if added := pooled + config.number_features * sum(config.numbers.values()):
            self.inner = Linear(added, block.emb_features, **kwargs)
            self.outer = Linear(block.emb_features, block.emb_features, **kwargs)
        self.has_added = bool(added)

    def __call__(self, c_noise: Array, cond: Cond) -> Array:
        config, offset = self.config, 0.0
        options = dict(freq_shift=config.freq_shift, sin_first=config.sin_first)
        if GUIDANCE in config.scalar_conditions and GUIDANCE in cond:
            offset = self.guidance_scale(guidance_features(cond[GUIDANCE], config.guidance_features))
        vector = self.time(c_noise, cond, offset).vector
        if not self.has_added:
            return vector
        added = [cond[config.text].pooled] if config.text and config.text_spec.pooled else []
        for name in config.numbers:
            waves = sinusoidal(cond[name].reshape(-1), config.number_features, **options)
            added.append(waves.reshape(len(c_noise), -1))
        return constrain(vector + self.outer(jax.nn.silu(self.inner(jnp.concatenate(added, axis=-1)))))


def guidance_features(scale: Array, features: int) -> Array:
    """Returns sines and cosines `[B, features]` of guidance scales `[B]`, of which 1 stands for no guidance, as latent
    consistency models embed them (Luo et al. 2023, arXiv 2310.04378)."""
    return sinusoidal(1000 * (scale - 1), features, freq_shift=1, sin_first=True)


class UNetText(nnx.Module):
    """Maps x `[B, H, W, C]`, c_noise `[B]` and cond to `[B, H, W, outputs * C]`, float32.

    Each level of the way down ends with a halving, rounded up. The way up has one block more per level than the way
    down. Each of its blocks receives, concatenated to its input, one tensor of the way down, in reverse order.
    """

    def __init__(self, config: UNetTextConfig, *, rngs: Keys):
        self.config = config
        width, block, channels = config.width, config.block, config.shape[2]
        context = config.text_spec.shape[1] if config.text else None
        self.embed = Embedding(config, rngs=rngs)
        self.conv_in = conv3x3(channels + image_channels(config.conditions), width, dtype=block.dtype, rngs=rngs)

        def stage(in_channels: int, out_channels: int, level: int, depth: int, only_cross: bool = False) -> nnx.Dict:
            parts = {"residual": ResidualBlock(in_channels, out_channels, block, rngs=rngs)}
            if depth:
                parts["transformer"] = SpatialTransformer(
                    out_channels, context, config.heads[level], depth, config.groups, only_cross_attention=only_cross,
                    kernel=config.kernel, remat=config.remat, dtype=block.dtype, rngs=rngs,
                )  # fmt: skip
            return nnx.Dict(parts)

        skips, current = [width], width  # channels of the tensors of the way down, and of the current one
        down, up, last = {}, {}, len(config.channels) - 1
        for level, out_channels in enumerate(config.channels):
            for index in range(config.num_res_blocks):
                down[f"{level}_{index}"] = stage(
                    current, out_channels, level, config.depth[level], config.only_cross[level]
                )
                current = out_channels
                skips.append(current)
            if level < last:
                down[f"{level}_down"] = Downsample(current, block, rngs=rngs)
                skips.append(current)
        first = stage(current, current, last, config.middle_depth)
        self.middle = nnx.Dict({"first": first, "second": stage(current, current, last, 0)})
        for level, out_channels in reversed(list(enumerate(config.channels))):
            for index in range(config.num_res_blocks + 1):
                up[f"{level}_{index}"] = stage(
                    current + skips.pop(), out_channels, level, config.depth[level], config.only_cross[level]
                )
                current = out_channels
            if level:
                up[f"{level}_up"] = Upsample(current, block, rngs=rngs)
        self.down, self.up = nnx.Dict(down), nnx.Dict(up)
        # The order of the forward pass, because the dicts of restored parameters are sorted by name.
        self.down_names, self.up_names = tuple(down), tuple(up)
        self.norm_out = block.norm(current, rngs)
        self.conv_out = conv3x3(current, config.outputs * channels, zero=True, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Array, c_noise: Array, cond: Cond, key: Array | None, perturbation: Perturbation | None = None
    ) -> Array:
        config, numbers = self.config, itertools.count()
        emb = self.embed(c_noise, cond)
        sequence, mask = self.read(cond) if config.text else (None, None)

        def run(stage: nnx.Dict, x: Array) -> Array:
            nonlocal key
            stage_key = None
            if key is not None:
                key, stage_key = jax.random.split(key)
            x = constrain(rematerialised(stage["residual"], config.remat)(x, emb, stage_key))
            if "transformer" not in stage:
                return x
            has_self_attention = not stage["transformer"].only_cross_attention
            is_perturbed = perturbation and has_self_attention and next(numbers) in perturbation.layers
            return constrain(stage["transformer"](x, sequence, mask, perturbation if is_perturbed else None))

        if image_channels(config.conditions):
            x = jnp.concatenate([x, images_of(config.conditions, cond)], axis=-1)
        x = self.conv_in(x.astype(config.block.dtype))
        skips = [x]
        for name in self.down_names:
            x = constrain(self.down[name](x)) if name.endswith("down") else run(self.down[name], x)
            skips.append(x)
        x = run(self.middle["second"], run(self.middle["first"], x))
        for name in self.up_names:
            if name.endswith("up"):
                x = constrain(self.up[name](x, size=skips[-1].shape[1:3]))
            else:
                x = run(self.up[name], jnp.concatenate([x, skips.pop()], axis=-1))
        return self.conv_out(jax.nn.silu(self.norm_out(x)).astype(jnp.float32))

    def read(self, cond: Cond) -> tuple[Array, Array]:
        """Returns the tokens of the text `[B, L, D]`, with zeros for padding, and their mask `[B, L]`."""
        name = self.config.text
        if kept(cond, name) is not True:  # values of `cond["null"]` have replaced what is not kept
            raise InputError(f"network.{name}", "is dropped, and unet_text has no learned null; give a text for it, "
                             "such as that of the empty prompt, in cond['null']")  # fmt: skip
        text = cond[name]
        return jnp.where(text.mask[..., None], text.tokens, 0).astype(self.config.block.dtype), text.mask


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS,
    scalar_conditions: tuple[str, ...] = (),
    width: int = 320,
    channel_mult: tuple[float, ...] = (1, 2, 4, 4),
    num_res_blocks: int = 2,
    depth: tuple[int, ...] = (1, 1, 1, 0),
    middle_depth: int = 1,
    num_heads: int | tuple[int, ...] | None = 8,
    head_dim: int | None = None,
    only_cross_attention: bool | tuple[bool, ...] = False,
    scale_shift: bool = False,
    freq_shift: Literal[0, 1] = 0,
    sin_first: bool = False,
    number_features: int = 256,
    guidance_features: int = 256,
    null_class: bool = True,
    dropout: float = 0.0,
    groups: int | None = None,
    epsilon: float = 1e-5,
    use_linear_projection: bool = False,
    upcast_attention: bool = False,
    kernel: Kernel = "auto",
    remat: Remat = "none",
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """Builds a U-Net that reads a text, for images or latents of shape `shape`.

    Args:
      shape: `(H, W, C)`; given by the data. The network also accepts other heights and widths.
      num_classes: The number of classes to condition on; 0 for none. Given by the data.
      conditions: The other conditions of the data. At most one text, of vectors: its tokens are read by
        cross-attention as they are, and its pooled vector by a perceptron together with the features of scalars and
        vectors (such as SDXL's `time_ids`). Images are further input channels, in the order of their names. A text that
        is dropped needs a value in `cond["null"]`; images that are dropped are 0, and scalars and vectors are never
        dropped.
      scalar_conditions: Scalars to condition on in addition to the noise label, among `step_size` and
        `guidance_scale`; see `layers.embeddings.ScalarEmbedding` and `guidance_features`.
      width: The channels of the first level; even.
      channel_mult: The channels of each level as multiples of `width`, rounded to whole numbers of channels.
      num_res_blocks: The number of residual blocks per level on the way down; one more on the way up.
      depth: The number of transformer blocks after each residual block of a level; 0 for none.
      middle_depth: The same between the two residual blocks of the middle.
      num_heads: The number of attention heads, of all levels or of each; None if `head_dim` is given.
      head_dim: The channels of an attention head; None if `num_heads` is given.
      only_cross_attention: Whether the transformers, of all levels or of each, read the text in place of
        self-attention. The middle always has self-attention.
      scale_shift: Whether the embedding scales and shifts a block's second norm. Otherwise it is added before the norm.
      freq_shift: 0 or 1; see `layers.embeddings.sinusoidal`.
      sin_first: Whether the sinusoidal features begin with the sines.
      number_features: The number of sinusoidal features of each number of scalars and vectors; even.
      guidance_features: The number of sinusoidal features of `guidance_scale`; even.
      null_class: Whether the table of classes has a row for the null class. Without it, the null class adds nothing.
      dropout: The dropout rate inside the residual blocks, in [0, 1).
      groups: The number of groups of every group norm. None: 32, or fewer where groups would have less than 4 channels.
      epsilon: The epsilon of the group norms, except those of the transformers (1e-6).
      use_linear_projection: Whether the first and the last layer of a transformer are written for diffusers as linear
        layers and not as 1x1 convolutions. It changes nothing here.
      upcast_attention: Whether diffusers computes the products of queries and keys in float32, which float16 requires
        for Stable Diffusion 2.1. It changes nothing here, where they are float32 always.
      kernel: The implementation of attention; see `layers.attention.attend`.
      remat: What the backward pass recomputes in each block; see `layers.stack.rematerialised`.
      outputs: The number of output values per channel; 2 for an objective with a learned variance.
      dtype: The compute dtype. Parameters, the statistics of norms and the last convolution are float32.
    """
    config = UNetTextConfig(**locals())
    return functional(lambda rngs: UNetText(config, rngs=rngs), shape, outputs, multiple=1,
                      conditions=class_labels(num_classes) | dict(conditions),
                      scalar_conditions=scalar_conditions, blocks=config.attention_blocks)  # fmt: skip
