"""The train step: one pure function from state and batch to the next state and the metrics."""

import functools
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from diffusion.core import trees
from diffusion.core.arrays import scaled
from diffusion.core.types import Array, Autoencoder, Batch, Network, Objective, Params, TextEncoder
from diffusion.encoders import text_conditions
from diffusion.training.ema import EMA
from diffusion.training.optimizer import Optimizer
from diffusion.training.options import check_drop_rate
from diffusion.training.players import gradients, players_of
from diffusion.training.resilience.guards import Guard, select_if_ok
from diffusion.training.state import TrainState, averaged, averages, trainable

Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def make_step(
    objective: Objective,
    network: Network,
    optimizer: Optimizer,
    ema: EMA,
    *,
    seed: int,
    cond_drop_rate: float | Mapping[str, float] = 0.0,
    accumulate: int = 1,
    guard: Guard | None = None,
    matches: trees.Matches | None = None,
    autoencoder: Autoencoder | None = None,
    encoded: bool = False,
    text_encoder: TextEncoder | None = None,
) -> Step:
    """Returns the step as a pure function `step(state, batch, frozen)`, to be jitted with the state donated.

    `frozen` holds the arrays that a step reads and never changes: `params`, the leaves of the networks that are not
    trained, `pretrained`, the networks that the loss reads, `autoencoder` and `text_encoder`, their parameters, and
    `null_text`, the text in place of a dropped one. They are in neither the state nor its checkpoints.

    Args:
      objective, network, optimizer, ema: The parts of the training.
      seed: The key of step n is `fold_in(key(seed), n)`.
      cond_drop_rate: Fraction of the examples whose conditions are dropped; see `draw_keep`.
      accumulate: Number of micro-batches, processed in turn, over which the gradient is averaged. It must divide the
        batch size. All randomness of the loss is drawn for the whole batch, so only dropout depends on it.
      guard: Decides whether a step is good; by default, whether its numbers are finite. A bad step changes no
        parameter, average or optimizer state, and discards the result of `update_state`. The changes of `before_step`,
        which depend on the state and the step number alone, are kept, and the step number increases.
      matches: Whether the leaf of a path is trained; None for all.
      autoencoder: Encodes the batch into the latents that are trained on; None to train on the data themselves.
      encoded: Whether batches hold the results of `autoencoder.posterior` in place of the data.
      text_encoder: Encodes the text of the batch, unless it is encoded already; None for data without text.
    """
    guard, players = guard or Guard(), players_of(objective)

    def losses_of(*args) -> tuple[dict[str, Array], dict[str, Array]]:
        """Returns the loss `[B]` of each player, and metrics."""
        if players is not None:
            return objective.losses(*args)
        loss, metrics = objective.loss(*args)
        return {"loss": loss}, metrics

    def step(
        state: TrainState, batch: Batch, frozen: Mapping[str, Params] = MappingProxyType({})
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key_keep, key_draw, key_net = jax.random.split(key, 3)
        keep = draw_keep(key_keep, cond_drop_rate, batch["cond"], batch["x"].shape[0])
        skipped, request = batch.get("skipped"), batch.get("request")
        batch = Batch(x=scaled(batch["x"]), cond={**batch["cond"], "keep": keep})
        batch["cond"] = text_conditions.encoded(
            text_encoder, frozen.get("text_encoder"), frozen.get("null_text"), batch["cond"],
            draw_keep_parts(jax.random.fold_in(key, 5), cond_drop_rate, batch["x"].shape[0]),
        )  # fmt: skip
        if autoencoder is not None:
            moments = batch["x"] if encoded else autoencoder.posterior(frozen["autoencoder"], batch["x"])
            batch["x"] = autoencoder.sample(moments, jax.random.fold_in(key, 4))
        fixed = {**frozen.get("params", {}), **frozen.get("pretrained", {})}
        prepared, objective_state = objective.before_step(
            trees.merge(state.params, fixed),
            trees.merge(averaged(state, ema.main), fixed),
            batch,
            state.objective_state,
            jax.random.fold_in(key, 3),
            state.step,
        )
        batch["draws"] = objective.draw(batch, key_draw, state.step, objective_state)
        learned = trainable(prepared, objective, matches)
        ema_params = trees.merge(prepared, state.ema[ema.main])

        def gradient(micro, key):
            def mean_losses(learned):
                params = trees.merge(prepared, learned)
                losses, metrics = losses_of(network.apply, params, ema_params, micro, key, state.step)
                means = {name: jnp.mean(loss) for name, loss in losses.items()}
                metrics = dict(metrics)
                for_state = metrics.pop("for_state", None)
                return means, (metrics, (losses, for_state))

            grads, (metrics, each) = gradients(mean_losses, learned, players)
            return (metrics, grads), each

        if accumulate == 1:
            (metrics, grads), each = gradient(batch, key_net)
        else:
            keys = jax.random.split(key_net, accumulate)
            (metrics, grads), each = _mean_over(gradient, _split(batch, accumulate), keys)
            each = _joined(each)
        losses, for_state = each
        loss = functools.reduce(jnp.add, losses.values())
        given = loss if for_state is None else for_state
        updated_state, seen = objective.update_state(objective_state, batch["draws"], given)
        metrics = {"loss": jnp.mean(loss), **metrics, **seen}
        if players is not None:
            metrics |= {f"loss_{name}": jnp.mean(loss) for name, loss in losses.items()}
        if skipped is not None:
            metrics["skipped"] = jnp.sum(skipped)
        if request is not None:
            metrics["request"] = jnp.max(request)

        norms = _norms(grads)
        metrics["grad_norm"] = optax.global_norm(norms)
        if optimizer.learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(optimizer.learning_rate(state.step - state.guard["bad"]))
        ok, counters = guard.check_step(state.guard, metrics["loss"], metrics["grad_norm"])
        metrics |= {"bad_steps": counters["bad"], "in_row": counters["in_row"], "norms": norms}

        updated, opt_state = optimizer.update(grads, state.opt_state, learned, state.step, players)
        if network.project is not None:
            projected = _projected(trees.merge(prepared, updated), network, prepared)
            updated = trainable(projected, objective, matches)
        new_ema = ema.update(state.ema, averages(updated, objective), state.step)
        updated, new_ema, opt_state, objective_state = select_if_ok(
            ok, (updated, new_ema, opt_state, updated_state), (learned, state.ema, state.opt_state, objective_state)
        )
        others = {name: prepared[name] for name in objective.frozen if name in state.params}
        return TrainState(state.step + 1, {**others, **updated}, new_ema, opt_state, objective_state, counters), metrics

    return step


def draw_keep(
    key: Array, rate: float | Mapping[str, float], conditions: Collection[str], size: int
) -> Array | dict[str, Array]:
    """Draws which conditions of `size` examples are kept; see `keep` in `core.types`.

    Args:
      rate: The share of the examples that lose all conditions. A mapping has a share per condition, drawn
        independently of each other, and as `joint` the share at which all are dropped together.
      conditions: The names of all conditions.

    Returns:
      Bool `[size]`, or a dict of these by condition for a mapping.

    Raises:
      InputError: The mapping names an unknown condition.
    """
    if not isinstance(rate, Mapping):
        return jax.random.uniform(key, (size,)) >= rate
    check_drop_rate(rate, conditions)

    def draw(index: int, rate: float) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, index), (size,)) >= rate

    together = draw(0, rate.get("joint", 0.0))
    return {name: together & draw(index, rate.get(name, 0.0)) for index, name in enumerate(sorted(conditions), 1)}


def draw_keep_parts(key: Array, rate: float | Mapping[str, float], size: int) -> dict[str, Array]:
    """Draws for which of `size` examples the output of single text encoders is kept, bool `[size]` by encoder.

    Args:
      rate: As for `draw_keep`; the share of the examples that lose the output of an encoder is `text.NAME`.
    """
    rates = {name[5:]: rate[name] for name in sorted(rate) if name[:5] == "text."} if isinstance(rate, Mapping) else {}
    keys = jax.random.split(key, len(rates) + 1)
    return {name: jax.random.uniform(key, (size,)) >= rate for key, (name, rate) in zip(keys, rates.items())}  # noqa: B905


def _norms(grads: dict[str, Params]) -> dict[str, Array]:
    """Returns the norm of the gradient of each top-level module of each network."""
    modules = {f"{name}/{top}": module for name, network in grads.items() for top, module in network.items()}
    return {name: optax.global_norm(module) for name, module in modules.items()}


def _projected(learned: dict[str, Params], network: Network, params: dict[str, Params]) -> dict[str, Params]:
    """Applies `network.project` to the networks with the same parameter tree as `params["net"]`.

    They are copies of the network, such as a teacher that is trained jointly. The other parameters that an objective
    trains (VDM's noise schedule) have a different tree and stay as they are.
    """
    structure = jax.tree.structure(params["net"])
    return {
        name: network.project(value) if jax.tree.structure(value) == structure else value
        for name, value in learned.items()
    }


def _split(batch: Batch, parts: int) -> Batch:
    """Splits `[B, ...]` into `[parts, B / parts, ...]` with stride `parts`, so that each device keeps its examples."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _joined(parts):
    """Returns arrays `[B, ...]` in the order of the batch from `[parts, B / parts, ...]`; the inverse of `_split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def _mean_over(function, *stacked):
    """Applies `function(...) -> (mean, each)` along the leading axis of the arguments.

    Returns the average of the first results and the stack of the second, by a scan that keeps one gradient at a time.
    """
    parts = jax.tree.leaves(stacked)[0].shape[0]
    shapes, _ = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], stacked))

    def add(total, inputs):
        mean, each = function(*inputs)
        return jax.tree.map(jnp.add, total, mean), each

    total, each = jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), stacked)
    return jax.tree.map(lambda x: x / parts, total), each
