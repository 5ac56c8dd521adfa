"""The magnitude-preserving U-Net of EDM2, configuration G (Karras et al. 2023, "Analyzing and Improving the Training
Dynamics of Diffusion Models", arXiv 2312.02696, section 2 and appendix B)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import Array, Cond, InputError, Network
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.attention import Kernel, attend
from diffusion.layers.functional import functional
from diffusion.layers.keys import Keys
from diffusion.layers.magnitude import (
    MPConv,
    MPLinear,
    fourier_features,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_all,
    pixel_norm,
)
from diffusion.layers.resample import MEAN, double, halve
from diffusion.layers.stack import Remat, rematerialised

LARGEST = 256.0  # that a block's output can be, in either direction
LABEL_BALANCE = 0.5  # share of the class in the embedding


class Block(nnx.Module):
    """silu and convolution, twice, then self-attention if there are `heads`. Between the two the embedding scales the
    channels, by a gain that starts at 0.

    On the way down (`side` "enc") the input is brought to magnitude 1 at every pixel; on the way up ("dec") it is not.
    """

    def __init__(self, in_channels, out_channels, emb_features, *, side: Literal["enc", "dec"], resample=None, heads=0,
                 dropout, res_balance, attn_balance, kernel, dtype, rngs: Keys):  # fmt: skip
        self.side, self.resample, self.heads, self.kernel = side, resample, heads, kernel
        self.res_balance, self.attn_balance = res_balance, attn_balance
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.skip = None if in_channels == out_channels else MPLinear(in_channels, out_channels, **kwargs)
        self.conv1 = MPConv(out_channels if side == "enc" else in_channels, out_channels, **kwargs)
        self.emb = MPLinear(emb_features, out_channels, **kwargs)
        self.emb_gain = nnx.Param(jnp.zeros(()))
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = MPConv(out_channels, out_channels, **kwargs)
        if heads:
            self.qkv = MPLinear(out_channels, 3 * out_channels, **kwargs)
            self.out = MPLinear(out_channels, out_channels, **kwargs)

    def __call__(self, x: Array, emb: Array, key: Array | None) -> Array:
        """x `[B, H, W, Cin]`, emb `[B, E]` -> `[B, H', W', Cout]`; `key` None switches dropout off."""
        if self.resample is not None:
            x = self.resample(x, MEAN)
        if self.side == "enc":
            x = pixel_norm(self._skip(x))
        y = self.conv1(mp_silu(x))
        scale = 1 + self.emb(emb, self.emb_gain[...])[:, None, None, :]
        y = self.dropout(mp_silu(y * scale), deterministic=key is None, rngs=key)
        y = self.conv2(y)
        if self.side == "dec":
            x = self._skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.heads:
            x = mp_sum(x, self._attend(x), self.attn_balance)
        return jnp.clip(x, -LARGEST, LARGEST)

    def _skip(self, x: Array) -> Array:
        return x if self.skip is None else self.skip(x)

    def _attend(self, x: Array) -> Array:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = (pixel_norm(qkv[:, :, part]) for part in range(3))
        return self.out(attend(q, k, v, kernel=self.kernel).reshape(B, H, W, C))


class EDM2(nnx.Module):
    """x `[B, H, W, C]`, c_noise `[B]`, cond -> `[B, H, W, outputs * C]`, float32.

    Every tensor on the way down is kept, and the way up, with one block a level more, takes them back in reverse, each
    joined to the channels of one block's input. Row `num_classes` of the classes' weights is the null embedding, used
    where `keep` is False.
    """

    def __init__(self, *, size, channels, num_classes, scalar_conditions, width, channel_mult, num_res_blocks, attention_resolutions, head_dim,
                 concat_balance, bandwidth, remat, outputs, dtype, rngs: Keys, **block):  # fmt: skip
        self.width, self.num_classes, self.bandwidth = width, num_classes, bandwidth
        self.concat_balance, self.remat, self.dtype = concat_balance, remat, dtype
        kwargs = dict(dtype=dtype, rngs=rngs)
        emb_features = width * max(channel_mult)
        self.emb_noise = MPLinear(width, emb_features, **kwargs)
        self.emb_label = MPLinear(num_classes + 1, emb_features, **kwargs) if num_classes else None
        self.scalar_conditions = scalar_conditions
        self.numbers = nnx.Dict({name: MPLinear(width, emb_features, **kwargs) for name in scalar_conditions})
        self.number_gains = nnx.Dict({name: nnx.Param(jnp.zeros(())) for name in scalar_conditions})
        self.conv_in = MPConv(channels + 1, width, **kwargs)

        def stage(side, in_channels: int, out_channels: int, *, attends: bool = False, resample=None) -> Block:
            heads = out_channels // head_dim if attends else 0
            return Block(in_channels, out_channels, emb_features, side=side, resample=resample, heads=heads,
                         **block, **kwargs)  # fmt: skip

        kept, current = [width], width
        down, up = {}, {}
        for level, multiplier in enumerate(channel_mult):
            if level:
                down[f"{level}_down"] = stage("enc", current, current, resample=halve)
                kept.append(current)
            for index in range(num_res_blocks):
                attends = size >> level in attention_resolutions
                down[f"{level}_{index}"] = stage("enc", current, width * multiplier, attends=attends)
                current = width * multiplier
                kept.append(current)
        self.middle = nnx.Dict({
            "first": stage("dec", current, current, attends=True),
            "second": stage("dec", current, current),
        })  # fmt: skip
        for level, multiplier in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                attends = size >> level in attention_resolutions
                up[f"{level}_{index}"] = stage("dec", current + kept.pop(), width * multiplier, attends=attends)
                current = width * multiplier
            if level:
                up[f"{level}_up"] = stage("dec", current, current, resample=double)
        self.down, self.up = nnx.Dict(down), nnx.Dict(up)
        # Names in the order of the passes: the dicts themselves come back sorted from a checkpoint.
        self.down_names, self.up_names = tuple(down), tuple(up)
        self.conv_out = MPConv(current, outputs * channels, dtype=jnp.float32, rngs=rngs)
        self.out_gain = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Array, c_noise: Array, cond: Cond, key: Array | None) -> Array:
        emb = self._embed(c_noise, cond)

        def run(block: Block, x: Array) -> Array:
            nonlocal key
            mine = None
            if key is not None:
                key, mine = jax.random.split(key)
            return constrain(rematerialised(lambda *inputs: block(*inputs), self.remat)(x, emb, mine))

        # The channel of ones stands in for the biases that no layer has.
        x = self.conv_in(jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1))
        kept = [x]
        for name in self.down_names:
            x = run(self.down[name], x)
            kept.append(x)
        x = run(self.middle["second"], run(self.middle["first"], x))
        for name in self.up_names:
            if not name.endswith("up"):
                x = mp_cat(x, kept.pop(), self.concat_balance)
            x = run(self.up[name], x)
        return self.conv_out(x, self.out_gain[...])

    def _embed(self, c_noise: Array, cond: Cond) -> Array:
        emb_BxE = self.emb_noise(fourier_features(c_noise, self.width, self.bandwidth))
        for name in self.scalar_conditions:
            if name in cond:
                features = fourier_features(cond[name], self.width, self.bandwidth)
                emb_BxE += self.numbers[name](features, self.number_gains[name][...])
        if self.num_classes:
            index = jnp.where(cond.get("keep", True), cond["label"], self.num_classes)
            rows = self.num_classes + 1
            label_BxE = self.emb_label(jax.nn.one_hot(index, rows) * rows**0.5)
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
    """An EDM2 U-Net for images or latents of `shape` (from the data's spec). The default is EDM2-S; the paper's others
    have width 128 (XS), 256 (M), 320 (L), 384 (XL) and 448 (XXL).

    Its weights are normalised after every step (`Network.project`), so the learning rate is how far they turn in one:
    the paper's is about 0.01, with Adam, and falls. Weight decay only reaches the gains. Inputs should have unit
    variance, as the parameterization `edm` gives them. For guidance the paper trains a model without classes
    apart; here the null class is one row more in the classes' weights, normalised with them. No uncertainty head.

    Args:
      shape: `(H, W, C)`, H = W, divisible by 2 once for every level but the last.
      num_classes: labels to be conditioned on; 0 for none (from the data's spec).
      scalar_conditions: numbers that it is told beside the noise label, `r` and `guidance`; see `layers.embeddings.Numbers`.
      width: channels of the first level.
      channel_mult: channels of each level, as multiples of `width`; the embedding is as wide as the widest.
      num_res_blocks: residual blocks a level on the way down; one more on the way up.
      attention_resolutions: the resolutions at which every block has self-attention; the first in the middle always has it.
      head_dim: channels of an attention head; must divide the channels wherever there is attention.
      dropout: rate inside the residual blocks, in [0, 1).
      res_balance, attn_balance, concat_balance: in [0, 1], the share of what a block adds, of what attention adds, and
        of what is kept on the way down beside what comes up.
      bandwidth: of the noise label's Fourier features: 1 for labels of order 1, as `c_noise` "log_sigma" gives; 0.001
        for those from 0 to 1,000.
      kernel: how attention is computed; see `layers.attention.attend`.
      remat: what of a block the backward pass computes again; see `layers.stack.rematerialised`.
      outputs: values for each channel: 2 for an objective with a learned variance.
      dtype: of the computation; parameters, norms' statistics and the last convolution are float32.
    """
    checks.square_images("edm2", shape)
    checks.positive(width=width, num_res_blocks=num_res_blocks, head_dim=head_dim, bandwidth=bandwidth, outputs=outputs)
    checks.rate(dropout=dropout)
    checks.levels(shape[0], width, channel_mult, attention_resolutions, head_dim)
    balances = {"res_balance": res_balance, "attn_balance": attn_balance, "concat_balance": concat_balance}
    for name, value in balances.items():
        if not 0 <= value <= 1:
            raise InputError(name, f"must be in [0, 1], got {value}")
    return functional(lambda rngs: EDM2(
        size=shape[0], channels=shape[2], num_classes=num_classes, scalar_conditions=scalar_conditions, width=width,
        channel_mult=channel_mult, num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions, head_dim=head_dim, dropout=dropout,
        bandwidth=bandwidth, kernel=kernel, remat=remat, outputs=outputs, dtype=jnp.dtype(dtype), rngs=rngs, **balances,
    ), shape, outputs, scalar_conditions=scalar_conditions, project=normalize_all)  # fmt: skip
