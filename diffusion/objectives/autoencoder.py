"""Training of autoencoders as in latent diffusion (Esser et al. 2021, arXiv 2012.09841; Rombach et al. 2022, arXiv
2112.10752).

    z = E(x),  y = D(z)           for `autoencoder_kl`, z is a sample of the posterior
    generator   minimises  d(x, y) + kl_weight KL + codebook_weight L_q + equivariance d(t(x), D(t(z))) - f lambda C(y)
    critic      minimises  f (mean max(0, 1 - C(x)) + mean max(0, 1 + C(y))) / 2            (hinge)

    d(x,y) = |x - y| + perceptual_weight LPIPS(x, y)
    lambda = disc_weight min(|d d(x, y) / d K| / (|d C(y) / d K| + 1e-4), 1e4)  K, the kernel of the last convolution
    L_q    = mean (z - sg[q])^2 + beta mean (sg[z] - q)^2                       q, the codes of `autoencoder_vq`
           = beta mean (z - sg[q])^2                                            codebook = ema

sg stops the gradient, and f is 1 from step `disc_start` and 0 before. The distance d of a variational autoencoder is
summed over the pixels and channels of an image, and so is KL over the latent; that of the others is their mean. LPIPS
(`encoders.vision.lpips`), one number per image, is added to the error of each pixel and channel before. As in the
published code, the factor beta is on the term that moves the codes; with `legacy=False` it is on the other one, as in
the paper.

With `codebook=ema` the codes are moving averages of their latents, and unused ones restart (`base.codebook`); they are
computed after a step and are in the parameters from the next step on.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from diffusion.core import checks, trees
from diffusion.core.arrays import expand, flat_mean
from diffusion.core.types import Apply, Array, Batch, Denoiser, InputError, Network, Params, Player, Schedule
from diffusion.encoders.vision import lpips
from diffusion.layers.autoencoder import AutoencoderApply
from diffusion.layers.functional import split
from diffusion.layers.patch_critic import PatchCritic, smallest_side
from diffusion.layers.resample import BOX, halve
from diffusion.objectives.base.codebook import CodebookUpdate

PLAYERS = {"critic": Player(("critic",), averaged=False), "generator": Player(("net",))}
MOST_WEIGHT, EPSILON = 1e4, 1e-4  # of lambda
RESTART_THRESHOLD = 0.1  # of the averages by default


class Reconstruction(NamedTuple):
    """The result of one pass through the autoencoder.

    Attributes:
      features: The input of the decoder's last convolution.
      y: The reconstructions `[B, H, W, C]`.
      slope: The gradient of d(x, y) with respect to y.
      loss: The loss without the adversarial term, `[B]`.
      metrics: The mean of each term, before it is weighted, and what `Objective.loss` adds to the metrics.
    """

    features: Array
    y: Array
    slope: Array
    loss: Array
    metrics: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class AutoencoderTraining:
    """The objective of an autoencoder; see `make`. The dict of networks has `net`, and `critic` if there is one."""

    squared: bool
    perceptual_weight: float
    perceptual_path: tuple[str, ...]
    kl_weight: float
    codebook_weight: float
    beta: float
    legacy: bool
    codebook: CodebookUpdate | None
    equivariance: float
    disc_weight: float
    disc_start: int
    disc_layers: int
    disc_width: int

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("perceptual",) if self.perceptual_weight else ()

    @functools.cached_property
    def pretrained(self) -> dict[str, Params]:
        """The parameters of LPIPS, which are read when a training first needs them.

        Raises:
          InputError: They cannot be read.
        """
        return {name: lpips.read(self.perceptual_path, "objective.perceptual_path") for name in self.frozen}

    @property
    def players(self) -> Mapping[str, Player] | None:
        """The two players, or None without a critic."""
        return PLAYERS if self.disc_weight else None

    @property
    def schedule(self) -> Schedule:
        """Raises InputError, since there is nothing to sample."""
        problem = "autoencoder has nothing to sample; write a folder with experiments.convert and train on its latents"
        raise InputError("objective.name", problem)

    def schedule_for(self, params: Mapping) -> Schedule:
        return self.schedule

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        return self.schedule  # raises

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        """Returns the networks.

        Raises:
          InputError: The network is not an autoencoder, or its images do not fit the options.
        """
        net = network.apply
        if not isinstance(net, AutoencoderApply):
            problem = "must be an autoencoder for this objective: autoencoder_kl, autoencoder_vq or autoencoder_tiny"
            raise InputError("network.name", problem)
        height, width, channels = net.shape
        if self.equivariance and (height != width or net.latent_shape[0] % 2):
            problem = "requires square images with an even number of latents per side; the latents are of shape "
            raise InputError("objective.equivariance", f"{problem}{net.latent_shape}; use 0")
        if self.perceptual_weight:
            smallest = net.shape if not self.equivariance else (height // 2, width // 2, channels)
            lpips.check_shape(smallest, "objective.perceptual_weight")
        if not self.disc_weight:
            return {"net": self._checked(network.init(key), net.name)}
        if min(height, width) < smallest_side(self.disc_layers):
            problem = f"{self.disc_layers} layers require images of at least {smallest_side(self.disc_layers)} pixels"
            raise InputError("objective.disc_layers", f"{problem} per side, got {height} x {width}; use fewer")
        key_net, key_critic = jax.random.split(key)
        params = self._checked(network.init(key_net), net.name)
        return {"net": params, "critic": self._critic(channels)[0](key_critic)}

    def initial_state(self, params: Mapping) -> Mapping[str, Array]:
        return self.codebook.initial_state(_codebook(params["net"])) if self.codebook else {}

    def before_step(
        self, params: Mapping, ema_params: Mapping, batch: Batch, objective_state: Mapping[str, Array], key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:  # fmt: skip
        """Replaces the codes by those that follow from the last step."""
        if not self.codebook:
            return dict(params), objective_state
        codes = self.codebook.codes(objective_state, _codebook(params["net"]))
        change = {"net": {"quantize": {"embedding": {"embedding": codes}}}}
        return trees.merge(params, change), objective_state

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Draws `keys [B]`, for the sample of each posterior or the restart of codes, and `turns [B]`, a number of
        quarter turns."""
        size = len(batch["x"])
        key_sample, key_turns = jax.random.split(key)
        draws = {"keys": jax.random.split(key_sample, size)}
        return draws | ({"turns": jax.random.randint(key_turns, (size,), 0, 4)} if self.equivariance else {})

    def update_state(
        self, objective_state: Mapping[str, Array], draws: Mapping[str, Array], loss: Any
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        if not self.codebook:
            return objective_state, {}
        return self.codebook.update_state(objective_state, loss["z"], loss["indices"], draws["keys"][0])

    def loss(
        self, net: AutoencoderApply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        found = self._forward(net, params, batch)
        return found.loss, found.metrics

    def losses(
        self, net: AutoencoderApply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        x, found = batch["x"], self._forward(net, params, batch)
        judge = functools.partial(self.judge, params["critic"])
        real, (fake, pullback) = judge(x), jax.vjp(judge, found.y)
        (slope,) = pullback(jnp.full_like(fake, -1 / fake[0].size))
        fooled = _with_slope(-flat_mean(fake), slope, found.y)
        weight = self.adaptive_weight(net, params["net"], found.features, found.slope / len(x), slope / len(x))
        on = jnp.where(step >= self.disc_start, 1.0, 0.0)
        hinge = (flat_mean(jax.nn.relu(1 - real)) + flat_mean(jax.nn.relu(1 + fake))) / 2
        metrics = {"adaptive_weight": weight, "real_logit": jnp.mean(real), "fake_logit": jnp.mean(fake)}
        return {"critic": on * hinge, "generator": found.loss + on * weight * fooled}, {**found.metrics, **metrics}

    def reconstruct(self, net: AutoencoderApply, params: Mapping, x: Array) -> Array:
        """Returns the reconstructions of images `[B, H, W, C]` in [-1, 1] from their most probable latents."""
        return net.decode(params["net"], net.sample(net.encode(params["net"], x), None))

    def distance(self, net: AutoencoderApply, params: Mapping, x: Array, y: Array) -> tuple[Array, dict[str, Array]]:
        """Returns d(x, y) `[B]` of images `[B, H, W, C]`, and the mean of each of its terms."""
        over_image = _sums if hasattr(net, "kl") else flat_mean
        difference = jnp.square(x - y) if self.squared else jnp.abs(x - y)
        metrics = {"error": jnp.mean(over_image(difference))}
        if self.perceptual_weight:
            perceptual = lpips.distance(params["perceptual"], x, y)
            metrics["lpips"] = jnp.mean(perceptual)
            difference += self.perceptual_weight * expand(perceptual, x)
        return over_image(difference), metrics

    def judge(self, params: Params, x: Array) -> Array:
        """Returns C(x) `[B, h, w]` for each patch of images `[B, H, W, C]`, from the parameters of the critic."""
        return self._critic(x.shape[-1])[1](params)(x)

    def codebook_loss(self, z: Array, codes: Array) -> Array:
        """Returns L_q `[B]` of latents `[B, h, w, c]` and their codes."""
        commitment = flat_mean(jnp.square(jax.lax.stop_gradient(codes) - z))
        if self.codebook and self.codebook.averages:
            return self.beta * commitment
        codebook = flat_mean(jnp.square(codes - jax.lax.stop_gradient(z)))
        return commitment + self.beta * codebook if self.legacy else codebook + self.beta * commitment

    def adaptive_weight(
        self, net: AutoencoderApply, params: Params, features: Array, distance_slope: Array, slope: Array
    ) -> Array:
        """Returns lambda, a constant, by differentiating the last convolution alone.

        Args:
          net, params: The autoencoder.
          features: The input of the last convolution.
          distance_slope, slope: The gradients of the means of d(x, y) and of -C(y), with respect to y.
        """
        params, features, distance_slope, slope = jax.lax.stop_gradient((params, features, distance_slope, slope))
        path = (*net.last_layer, "kernel")

        def output(kernel: Array) -> Array:
            changed = functools.reduce(lambda tree, name: {name: tree}, reversed(path), kernel)
            return net.output(trees.merge(params, changed), features)

        _, pullback = jax.vjp(output, functools.reduce(lambda tree, name: tree[name], path, params))
        of_distance, of_critic = (jnp.linalg.norm(pullback(dy)[0]) for dy in (distance_slope, slope))
        return self.disc_weight * jnp.minimum(of_distance / (of_critic + EPSILON), MOST_WEIGHT)

    def _critic(self, channels: int):
        """Returns `init` and `merge` of the critic."""
        return split(lambda rngs: PatchCritic(channels, self.disc_width, self.disc_layers, rngs=rngs))

    def _checked(self, params: Params, name: str) -> Params:
        """Returns the parameters of a network after checking that it has a codebook, if one is to be updated."""
        if self.codebook and _codebook(params) is None:
            field = "codebook" if self.codebook.averages else "restart_threshold"
            problem = f"requires a codebook, and the network {name} has none; use autoencoder_vq without fsq_levels"
            raise InputError(f"objective.{field}", problem)
        return params

    def _forward(self, net: AutoencoderApply, networks: Mapping, batch: Batch) -> Reconstruction:
        x, draws, params = batch["x"], batch["draws"], networks["net"]
        encoded = net.encode(params, x)
        z = jax.vmap(net.sample)(encoded, draws["keys"])
        features = net.features(params, z)
        y = net.output(params, features)
        distance = functools.partial(self.distance, net, networks, x)
        value, pullback, metrics = jax.vjp(distance, jax.lax.stop_gradient(y), has_aux=True)
        (slope,) = pullback(jnp.ones_like(value))
        loss = _with_slope(value, slope, y)
        if hasattr(net, "kl"):
            kl = net.kl(encoded)
            loss, metrics["kl"] = loss + self.kl_weight * kl, jnp.mean(kl)
        if (codebook := _codebook(params)) is not None:
            quantized = net.quantize(params, z)
            apart = self.codebook_loss(z, quantized.codes)
            loss += self.codebook_weight * apart
            perplexity = _perplexity(quantized.indices, len(codebook))
            metrics |= {"codebook_loss": jnp.mean(apart), "perplexity": perplexity}
            if self.codebook:
                metrics["for_state"] = {"z": z, "indices": quantized.indices}
        if self.equivariance:
            small_x, small_z = (halve(_turned(images, draws["turns"]), BOX) for images in (x, z))
            change, _ = self.distance(net, networks, small_x, net.decode(params, small_z))
            loss, metrics["equivariance"] = loss + self.equivariance * change, jnp.mean(change)
        return Reconstruction(features, y, slope, loss, metrics)


def _with_slope(value: Array, slope: Array, y: Array) -> Array:
    """Returns `value [B]` with the derivative `slope` in y, so that a slope that lambda also needs is computed once."""
    value, slope = jax.lax.stop_gradient((value, slope))
    return value + _sums(slope * (y - jax.lax.stop_gradient(y)))


def _codebook(params: Params) -> Array | None:
    """Returns the codes `[K, d]` of an autoencoder; None if it has none, as one that rounds to levels."""
    return params["quantize"]["embedding"]["embedding"] if params.get("quantize") else None


def _sums(x: Array) -> Array:
    """Returns the sum over all axes but the first."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _turned(x: Array, turns: Array) -> Array:
    """Returns square images `[B, H, H, C]`, each turned by a number of quarter turns, `[B]`."""
    branches = [functools.partial(jnp.rot90, k=number) for number in range(4)]
    return jax.vmap(lambda image, number: jax.lax.switch(number, branches, image))(x, turns)


def _perplexity(indices: Array, num: int) -> Array:
    """Returns exp of the entropy of the codes' frequencies in a batch, from 1 to `num`."""
    share = jnp.bincount(indices.reshape(-1), length=num) / indices.size
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def make(
    loss: Literal["l1", "l2"] = "l1",
    perceptual_weight: float = 0.0,
    perceptual_path: tuple[str, ...] = (),
    kl_weight: float = 1e-6,
    codebook_weight: float = 1.0,
    beta: float = 0.25,
    legacy: bool = True,
    codebook: Literal["gradient", "ema"] = "gradient",
    codebook_decay: float = 0.99,
    restart_threshold: float | None = None,
    equivariance: float = 0.0,
    disc_weight: float = 0.0,
    disc_start: int = 0,
    disc_layers: int = 3,
    disc_width: int = 64,
) -> AutoencoderTraining:
    """Builds the training of an autoencoder. The network must be one: `autoencoder_kl`, `_vq` or `_tiny`.

    Args:
      loss: The error per pixel and channel, |x - y| or (x - y)^2.
      perceptual_weight: The weight of LPIPS, 0 for none.
      perceptual_path: The files with the weights of VGG16 and of LPIPS; see `encoders.vision.lpips.read`.
      kl_weight: The weight of the divergence of the posterior from N(0, 1), of `autoencoder_kl` alone.
      codebook_weight: The weight of L_q, of `autoencoder_vq` with a codebook alone.
      beta: The weight of the second term of L_q, and with averages of its only one.
      legacy: Whether beta is on the term that moves the codes; otherwise on the one that moves the latents. It has no
        effect on averages.
      codebook: `gradient` trains the codes by the gradient of L_q, `ema` makes each the moving average of its latents.
      codebook_decay: The decay of the averages of latents and of the usage of codes, in [0, 1).
      restart_threshold: A code restarts at a random latent of the batch if its average usage is below this share of
        that of a code in a codebook whose codes are used equally often, in [0, 1); 0 for none. None: 0.1 with `ema`,
        where it makes the codes start from data, and 0 with `gradient`, as published.
      equivariance: The weight of the error of transformed latents (EQ-VAE: Kouzelis et al. 2025, arXiv 2502.09509, eq.
        5), 0 for none. The transform is a random number of quarter turns, followed by halving; the paper also draws the
        scale.
      disc_weight: The weight of the adversarial term; 0 trains without a critic.
      disc_start: The first step at which critic and adversarial term are on; below `train.steps`.
      disc_layers: The number of times that the critic halves an image.
      disc_width: The channels of the critic's first layer.
    """
    checks.at_least(0, perceptual_weight=perceptual_weight, kl_weight=kl_weight, codebook_weight=codebook_weight,
                    beta=beta, equivariance=equivariance, disc_weight=disc_weight, disc_start=disc_start)  # fmt: skip
    checks.at_least(1, disc_layers=disc_layers, disc_width=disc_width)
    checks.at_most(12, disc_layers, "disc_layers")
    checks.at_most(checks.LARGEST, disc_width, "disc_width")
    if restart_threshold is None:
        restart_threshold = RESTART_THRESHOLD if codebook == "ema" else 0.0
    checks.rate(codebook_decay=codebook_decay, restart_threshold=restart_threshold)
    update = CodebookUpdate(codebook == "ema", codebook_decay, restart_threshold)
    if perceptual_weight and not perceptual_path:
        problem = "is empty; give the files with the weights of VGG16 and LPIPS, or set perceptual_weight to 0"
        raise InputError("perceptual_path", problem)
    if perceptual_path and not perceptual_weight:
        raise InputError("perceptual_weight", "is 0, so that perceptual_path is not used; set it, or remove the path")
    return AutoencoderTraining(
        loss == "l2", perceptual_weight, perceptual_path, kl_weight, codebook_weight, beta, legacy,
        update if codebook == "ema" or restart_threshold else None, equivariance, disc_weight, disc_start, disc_layers,
        disc_width,
    )  # fmt: skip
