"""The magnitude-preserving U-Net of EDM2, configuration G (Karras et al. 2023, "Analyzing and Improving the Training
Dynamics of Diffusion Models", arXiv 2312.02696, section 2 and appendix B)."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.arrays import kept
from diffusion.core.types import Array, Cond, InputError, Network, Perturbation, class_labels
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.attention import Kernel, attention
from diffusion.layers.conditioner import with_noise
from diffusion.layers.embeddings import fourier_with_phases
from diffusion.layers.functional import Blocks, functional
from diffusion.layers.keys import Keys
from diffusion.layers.magnitude import MPConv, MPLinear, mp_cat, mp_silu, mp_sum, normalize_all, pixel_norm
from diffusion.layers.resample import BOX, double, halve
from diffusion.layers.stack import Remat, rematerialised

LARGEST = 256.0  # a block's output is clipped to +- this value
LABEL_BALANCE = 0.5  # share of the class in the embedding


@dataclasses.dataclass(frozen=True)
class EDM2Config:
    """The options of an EDM2 U-Net; `make` documents them."""

    shape: tuple[int, ...]
    num_classes: int
    scalar_conditions: tuple[str, ...]
    width: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    head_dim: int
    dropout: float
    res_balance: float
    attn_balance: float
    concat_balance: float
    bandwidth: float
    kernel: Kernel
    remat: Remat
    outputs: int
    dtype: Literal["float32", "bfloat16"]

    def __post_init__(self):
        checks.images("edm2", self.shape)
        checks.network_size(
            width=self.width, num_res_blocks=self.num_res_blocks, head_dim=self.head_dim, bandwidth=self.bandwidth,
            outputs=self.outputs,
        )  # fmt: skip
        checks.rate(dropout=self.dropout)
        checks.levels(self.shape, self.width, self.channel_mult, self.attention_resolutions, self.head_dim)
        for name in ("res_balance", "attn_balance", "concat_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(name, f"must be in [0, 1], got {getattr(self, name)}")

    @property
    def emb_features(self) -> int:
        """The width of the embedding."""
        return self.width * max(self.channel_mult)

    def attends(self, level: int) -> bool:
        """Returns whether the blocks of a level have self-attention."""
        return min(self.shape[:2]) >> level in self.attention_resolutions

    @property
    def attention_blocks(self) -> Blocks:
        """The blocks with self-attention."""
        levels = sum(map(self.attends, range(len(self.channel_mult))))
        before = levels * self.num_res_blocks
        return Blocks(before + 1 + levels * (self.num_res_blocks + 1), before)


class EDM2Block(nnx.Module):
    """silu and convolution, twice, then self-attention if `attends`.

    Between the convolutions the embedding scales the channels, with a learned gain that starts at 0. On the way down
    (`side` "enc") the input is normalised to magnitude 1 at every pixel; on the way up ("dec") it is not.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: EDM2Config,
        *,
        side: Literal["enc", "dec"],
        resample: Callable | None = None,
        attends: bool = False,
        rngs: Keys,
    ):
        self.config, self.side, self.resample = config, side, resample
        self.heads = out_channels // config.head_dim if attends else 0
        kwargs = dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.skip = None if in_channels == out_channels else MPLinear(in_channels, out_channels, **kwargs)
        self.conv1 = MPConv(out_channels if side == "enc" else in_channels, out_channels, **kwargs)
        self.emb = MPLinear(config.emb_features, out_channels, **kwargs)
        self.emb_gain = nnx.Param(jnp.zeros(()))
        self.dropout = nnx.Dropout(config.dropout)
        self.conv2 = MPConv(out_channels, out_channels, **kwargs)
        if attends:
            self.qkv = MPLinear(out_channels, 3 * out_channels, **kwargs)
            self.out = MPLinear(out_channels, out_channels, **kwargs)

    def __call__(self, x: Array, emb: Array, key: Array | None, perturbation: Perturbation | None = None) -> Array:
        """Maps x `[B, H, W, Cin]` and emb `[B, E]` to `[B, H', W', Cout]`; a `key` of None disables dropout."""
        if self.resample is not None:
            x = self.resample(x, BOX)
        if self.side == "enc":
            x = pixel_norm(self._skip(x))
        y = self.conv1(mp_silu(x))
        scale = 1 + self.emb(emb, self.emb_gain[...])[:, None, None, :]
        y = self.dropout(mp_silu(y * scale), deterministic=key is None, rngs=key)
        y = self.conv2(y)
        if self.side == "dec":
            x = self._skip(x)
        x = mp_sum(x, y, self.config.res_balance)
        if self.heads:
            x = mp_sum(x, self._attention(x, perturbation), self.config.attn_balance)
        return jnp.clip(x, -LARGEST, LARGEST)

    def _skip(self, x: Array) -> Array:
        return x if self.skip is None else self.skip(x)

    def _attention(self, x: Array, perturbation: Perturbation | None) -> Array:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = (pixel_norm(qkv[:, :, part]) for part in range(3))
        attend = attention(perturbation, (H, W))
        return self.out(attend(q, k, v, kernel=self.config.kernel).reshape(B, H, W, C))


class EDM2(nnx.Module):
    """Maps x `[B, H, W, C]`, c_noise `[B]` and cond to `[B, H, W, outputs * C]`, float32.

    The way up has one block more per level than the way down. Each of its blocks receives, concatenated to its input,
    one tensor of the way down, in reverse order. Where `keep` is False the class is replaced by the null class, row
    `num_classes` of the weights of the classes.
    """

    def __init__(self, config: EDM2Config, *, rngs: Keys):
        self.config = config
        width, emb_features, scalars = config.width, config.emb_features, config.scalar_conditions
        kwargs = dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.emb_noise = MPLinear(width, emb_features, **kwargs)
        self.emb_label = MPLinear(config.num_classes + 1, emb_features, **kwargs) if config.num_classes else None
        self.numbers = nnx.Dict({name: MPLinear(width, emb_features, **kwargs) for name in scalars})
        self.number_gains = nnx.Dict({name: nnx.Param(jnp.zeros(())) for name in scalars})
        self.conv_in = MPConv(config.shape[2] + 1, width, **kwargs)

        def block(in_channels: int, out_channels: int, **options) -> EDM2Block:
            return EDM2Block(in_channels, out_channels, config, **options, rngs=rngs)

        skips, current = [width], width  # channels of the tensors of the way down, and of the current one
        down, up = {}, {}
        for level, multiplier in enumerate(config.channel_mult):
            if level:
                down[f"{level}_down"] = block(current, current, side="enc", resample=halve)
                skips.append(current)
            for index in range(config.num_res_blocks):
                attends = config.attends(level)
                down[f"{level}_{index}"] = block(current, width * multiplier, side="enc", attends=attends)
                current = width * multiplier
                skips.append(current)
        self.middle = nnx.Dict({
            "first": block(current, current, side="dec", attends=True),
            "second": block(current, current, side="dec"),
        })  # fmt: skip
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                attends, in_channels = config.attends(level), current + skips.pop()
                up[f"{level}_{index}"] = block(in_channels, width * multiplier, side="dec", attends=attends)
                current = width * multiplier
            if level:
                up[f"{level}_up"] = block(current, current, side="dec", resample=double)
        self.down, self.up = nnx.Dict(down), nnx.Dict(up)
        # The order of the forward pass, because the dicts of restored parameters are sorted by name.
        self.down_names, self.up_names = tuple(down), tuple(up)
        self.conv_out = MPConv(current, config.outputs * config.shape[2], dtype=jnp.float32, rngs=rngs)
        self.out_gain = nnx.Param(jnp.zeros(()))

    def __call__(
        self, x: Array, c_noise: Array, cond: Cond, key: Array | None, perturbation: Perturbation | None = None
    ) -> Array:
        emb, numbers = self._embedding(c_noise, cond), itertools.count()

        def run(block: EDM2Block, x: Array) -> Array:
            nonlocal key
            block_key = None
            if key is not None:
                key, block_key = jax.random.split(key)
            is_perturbed = block.heads and perturbation is not None and next(numbers) in perturbation.layers
            more = (perturbation,) if is_perturbed else ()
            forward = rematerialised(lambda *inputs: block(*inputs, *more), self.config.remat)
            return constrain(forward(x, emb, block_key))

        # The channel of ones replaces the biases, which the layers do not have.
        x = self.conv_in(jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1))
        skips = [x]
        for name in self.down_names:
            x = run(self.down[name], x)
            skips.append(x)
        x = run(self.middle["second"], run(self.middle["first"], x))
        for name in self.up_names:
            if not name.endswith("up"):
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = run(self.up[name], x)
        return self.conv_out(x, self.out_gain[...])

    def _embedding(self, c_noise: Array, cond: Cond) -> Array:
        width, bandwidth, num_classes = self.config.width, self.config.bandwidth, self.config.num_classes
        emb_BxE = self.emb_noise(fourier_with_phases(c_noise, width, bandwidth))
        for name in self.config.scalar_conditions:
            if name in cond:
                features = fourier_with_phases(cond[name], width, bandwidth)
                emb_BxE += self.numbers[name](features, self.number_gains[name][...])
        if num_classes:
            index = jnp.where(kept(cond, "label"), cond["label"], num_classes)
            rows = num_classes + 1
            label_BxE = with_noise(self.emb_label(jax.nn.one_hot(index, rows) * rows**0.5), cond)
            emb_BxE = mp_sum(emb_BxE, label_BxE, LABEL_BALANCE)
        return constrain(mp_silu(emb_BxE))


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    scalar_conditions: tuple[str, ...] = (),
    width: int = 192,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    num_res_blocks: int = 3,
    attention_resolutions: tuple[int, ...] = (16, 8),
    head_dim: int = 64,
    dropout: float = 0.0,
    res_balance: float = 0.3,
    attn_balance: float = 0.3,
    concat_balance: float = 0.5,
    bandwidth: float = 1.0,
    kernel: Kernel = "auto",
    remat: Remat = "none",
    outputs: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """Builds an EDM2 U-Net for images or latents of shape `shape`.

    The default is EDM2-S. The paper's others have width 128 (XS), 256 (M), 320 (L), 384 (XL) and 448 (XXL).

    The weights are normalised after every step (`Network.project`), so the learning rate determines how far they rotate
    per step: the paper's is about 0.01, with Adam, and decays. Weight decay affects only the gains. Inputs should have
    unit variance, as with the parameterization `edm`. For guidance the paper trains a separate model without classes;
    here the null class is one more row of the weights of the classes, normalised with them. There is no uncertainty
    head.

    Args:
      shape: `(H, W, C)` with H and W divisible by 2 once per level after the first; given by the data. The network also
        accepts images of other sizes with this divisibility.
      num_classes: The number of classes to condition on; 0 for none. Given by the data.
      scalar_conditions: Scalars to condition on in addition to the noise label, among `step_size` and
        `guidance_scale`; see `layers.embeddings.ScalarEmbedding`.
      width: The channels of the first level.
      channel_mult: The channels of each level as multiples of `width`. The embedding is as wide as the widest level.
      num_res_blocks: The number of residual blocks per level on the way down; one more on the way up.
      attention_resolutions: The resolutions, of the shorter side, at which every block has self-attention. The first
        block of the middle always has it.
      head_dim: The channels of an attention head; must divide the channels wherever there is attention.
      dropout: The dropout rate inside the residual blocks, in [0, 1).
      res_balance, attn_balance, concat_balance: The shares, in [0, 1], of a block's output in its sum with the skip
        connection, of attention's output in its sum, and of the way down in concatenations.
      bandwidth: The bandwidth of the noise label's Fourier features: 1 for labels of order 1, such as those of
        `c_noise` "log_sigma"; 0.001 for labels from 0 to 1,000.
      kernel: The implementation of attention; see `layers.attention.attend`.
      remat: What the backward pass recomputes in each block; see `layers.stack.rematerialised`.
      outputs: The number of output values per channel; 2 for an objective with a learned variance.
      dtype: The compute dtype. Parameters, the statistics of norms and the last convolution are float32.
    """
    config = EDM2Config(**locals())
    return functional(lambda rngs: EDM2(config, rngs=rngs), shape, outputs, multiple=2 ** (len(channel_mult) - 1),
                      conditions=class_labels(num_classes), scalar_conditions=scalar_conditions,
                      project=normalize_all, blocks=config.attention_blocks)  # fmt: skip
