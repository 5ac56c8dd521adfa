"""Reads and writes model folders of text encoders: `CLIPTextModel`, `CLIPTextModelWithProjection` and `T5EncoderModel`
of transformers, of its versions 4 and 5.

Names of tensors of CLIP begin with `text_model.`, or, from transformers 5.6 on without a projection, do not. Both are
read, and names with the prefix are written, which all versions can read.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import model_folder, tensor_file, tensors, trees
from diffusion.core.types import InputError, Params
from diffusion.encoders.text_transformers import ClipConfig, T5Config, TextTransformer, clip, t5

logger = logging.getLogger(__name__)

CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_TYPES = {CLIP: "clip_text_model", PROJECTED: "clip_text_model", T5: "t5"}
# The entries of `config.json` that matter to a model, with the values that an absent one stands for.
_ENTRIES = {
    "clip_text_model": {
        "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "max_position_embeddings": 77, "projection_dim": 512, "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu", "eos_token_id": 49407,
    },
    "t5": {
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    },
}  # fmt: skip
# Those that do not change the function of an encoder.
_OTHERS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "attention_dropout", "dropout",
    "dropout_rate", "classifier_dropout", "initializer_factor", "initializer_range", "bos_token_id", "pad_token_id",
    "eos_token_id", "decoder_start_token_id", "is_encoder_decoder", "is_decoder", "use_cache", "output_past",
    "tie_word_embeddings", "scale_decoder_outputs", "num_decoder_layers", "n_positions", "task_specific_params",
    "feed_forward_proj", "dense_act_fn", "is_gated_act", "gradient_checkpointing", "return_dict",
}  # fmt: skip
_TANH = ("gelu", "gelu_new", "gelu_pytorch_tanh")  # names of the function in `feed_forward_proj` and `dense_act_fn`
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A text encoder in a model folder.

    Attributes:
      kind: The class of transformers: `CLIP`, `PROJECTED` or `T5`.
      config: The entries of `config.json` that matter.
      params: The parameters, in the dtypes that they are stored with, or their shapes.
      digest: SHA-256 of the parameters, however they are distributed over files; empty for shapes.
    """

    kind: str
    config: Mapping[str, Any]
    params: Params
    digest: str = ""

    def transformer(self, dtype: str = "float32") -> TextTransformer:
        """Returns the model, which computes in a dtype."""
        config = dict(self.config)
        if self.kind == T5:
            return t5(T5Config(**config, dtype=dtype))
        projection = config.pop("projection_dim") if self.kind == PROJECTED else 0
        config.pop("projection_dim", None)
        return clip(ClipConfig(**config, projection_dim=projection, dtype=dtype))


def kind_of(path: str) -> str:
    """Returns the kind of the text encoder in a folder; see `Stored`. Raises InputError if it is of none."""
    return _kind(path, model_folder.read_json(path, "config.json"))


def read(
    path: str,
    variant: str | None = None,
    weights: bool = True,
    place: Callable[[Params], Any] | None = None,
) -> Stored:
    """Reads the text encoder in a model folder.

    The parameters are read one after the other from the mapped files and put on the devices, so that the memory of the
    host holds copies of one at a time, in addition to those that stay there.

    Args:
      path: The folder, with `config.json` and safetensors.
      variant: The variant of the weights; see `model_folder.open_tensors`.
      weights: Whether to read the weights. Otherwise their shapes are returned, with the dtype in `config.json`.
      place: Maps the shapes of the parameters to their shardings, such as `sharding.of_state` with a mesh. None: all
        are on the default device.

    Raises:
      InputError: The folder cannot be read, its model is not supported, or its tensors do not fit `config.json`.
    """
    content = model_folder.read_json(path, "config.json")
    kind = _kind(path, content)
    stored = Stored(kind, _checked(path, kind, content), None)
    dtype = _DTYPES.get({"fp16": "float16", "bf16": "bfloat16"}.get(variant, _dtype_of(content)), np.float32)
    shapes = jax.eval_shape(stored.transformer().init, jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    if not weights:
        return dataclasses.replace(stored, params=shapes)
    shardings, digests = None if place is None else trees.by_path(place(shapes)), {}

    def put(name: str, array: np.ndarray) -> jax.Array:
        tensor_file.check_finite(name, array)
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        digests[name] = f"{name}{array.dtype}{array.shape}{hashlib.sha256(content).hexdigest()}"
        if shardings is None:
            return jnp.array(array)
        return jax.make_array_from_callback(array.shape, shardings[name], lambda index: array[index])

    foreign = _renamed(kind, model_folder.open_tensors(path, variant, model_folder.TRANSFORMERS_WEIGHTS))
    params = tensors.to_native(_pairs(kind, stored.config), foreign, shapes, put)
    digest = hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()
    return dataclasses.replace(stored, params=params, digest=digest)


def foreign_of(stored: Stored) -> dict[str, np.ndarray]:
    """Returns the tensors of a text encoder by their names in transformers."""
    foreign = tensors.to_foreign(_pairs(stored.kind, stored.config), stored.params)
    if stored.kind == T5:
        return foreign
    return {name if name == "text_projection.weight" else f"text_model.{name}": value
            for name, value in foreign.items()}  # fmt: skip


def write(path: str, stored: Stored) -> None:
    """Writes a model folder, which transformers can read."""
    foreign = foreign_of(stored)
    gated = {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False} if stored.kind == T5 else {}
    dtype = next(iter(foreign.values())).dtype.name
    about = {"architectures": [stored.kind], "model_type": _TYPES[stored.kind], "torch_dtype": dtype}
    model_folder.write(path, {**about, **stored.config, **gated}, foreign, model_folder.TRANSFORMERS_WEIGHTS)


def _kind(path: str, content: Mapping[str, Any]) -> str:
    """Returns the kind of model that a `config.json` describes, by its class, or else by its type."""
    architectures, model_type = content.get("architectures") or (), content.get("model_type")
    for kind in _TYPES:
        if kind in architectures and model_type in (None, _TYPES[kind]):
            return kind
    for kind in (CLIP, T5):
        if model_type == _TYPES[kind]:
            return kind
    hint = "; save its text model alone, as CLIPTextModelWithProjection" if model_type == "clip" else ""
    found = f"{path} has a model of the type {model_type!r}"
    raise InputError("config.json.model_type", f"must be 'clip_text_model' or 't5' to be read; {found}{hint}")


def _dtype_of(content: Mapping[str, Any]) -> str:
    return str(content.get("dtype") or content.get("torch_dtype")).removeprefix("torch.")


def _checked(path: str, kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a `config.json` that matter, with defaults. Raises InputError for values that cannot be
    read, and warns of entries that are not known."""
    entries = _ENTRIES[_TYPES[kind]]
    unknown = [key for key in content if key not in entries and key not in _OTHERS and key[0] != "_"]
    if unknown:
        logger.warning("%s: config.json has the unknown entries %s, which are ignored", path, ", ".join(unknown))
    config = {key: content.get(key, default) for key, default in entries.items()}
    for key, default in entries.items():
        value = config[key]
        if isinstance(default, int) and (type(value) is not int or value < 1):
            raise InputError(f"config.json.{key}", f"must be a positive integer to be read, got {value!r}")
        if isinstance(default, float) and not (isinstance(value, (int, float)) and value > 0):
            raise InputError(f"config.json.{key}", f"must be a positive number to be read, got {value!r}")
    if kind == T5:
        _check_gated_gelu(content)
        return config
    if config["hidden_act"] not in ("quick_gelu", "gelu"):
        problem = f"must be 'quick_gelu' or 'gelu' to be read, got {config['hidden_act']!r}"
        raise InputError("config.json.hidden_act", problem)
    if config["hidden_size"] % config["num_attention_heads"]:
        problem = f"must be divisible by num_attention_heads = {config['num_attention_heads']}"
        raise InputError("config.json.hidden_size", f"{problem}, got {config['hidden_size']}")
    return config


def _check_gated_gelu(content: Mapping[str, Any]) -> None:
    """Raises InputError for a T5 with another function than the gated GELU, as T5 before v1.1 has."""
    function = content.get("feed_forward_proj")
    if function is None and "dense_act_fn" in content:  # files of other tools leave `feed_forward_proj` out
        function = f"{'gated-' if content.get('is_gated_act') else ''}{content['dense_act_fn']}"
    if function not in tuple(f"gated-{name}" for name in _TANH):
        problem = f"must be 'gated-gelu' to be read, got {function or 'relu'!r}; use T5 v1.1"
        raise InputError("config.json.feed_forward_proj", problem)


def _renamed(kind: str, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of an encoder by the names in `_pairs`, without those that it does not read."""
    if kind == T5:
        kept = {name: value for name, value in found.items() if not name.startswith(("decoder.", "lm_head."))}
        duplicate = kept.pop("encoder.embed_tokens.weight", None)
        return kept if duplicate is None else {"shared.weight": duplicate} | kept
    kept = {name.removeprefix("text_model."): value for name, value in found.items()}
    kept.pop("embeddings.position_ids", None)
    if kind == CLIP:
        kept.pop("text_projection.weight", None)
    return kept


def _pairs(kind: str, config: Mapping[str, Any]) -> list[tensors.Pair]:
    """Returns the table of arrays and tensors; the names of CLIP's are without prefix."""

    def kernel(native: str, foreign: str) -> tensors.Pair:
        return tensors.permuted(f"layers/blocks/{native}/kernel", foreign, 1, 0)

    if kind == T5:
        attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
        block = [
            tensors.same("layers/blocks/norm1/scale", "layer.0.layer_norm.weight"),
            *(kernel(name, f"{attention}.{name[0]}.weight") for name in ("q", "k", "v", "out")),
            tensors.same("layers/blocks/norm2/scale", "layer.1.layer_norm.weight"),
            kernel("gate", f"{mlp}.wi_0.weight"),
            kernel("up", f"{mlp}.wi_1.weight"),
            kernel("down", f"{mlp}.wo.weight"),
        ]
        return [
            tensors.same("token_embedding", "shared.weight"),
            tensors.same("relative_bias", f"encoder.block.0.{attention}.relative_attention_bias.weight"),
            *tensors.stacked(block, [f"encoder.block.{index}." for index in range(config["num_layers"])]),
            tensors.same("final_norm/scale", "encoder.final_layer_norm.weight"),
        ]
    block = [
        *tensors.norm("layers/blocks/norm1", "layer_norm1"),
        *(pair for name in ("q", "k", "v", "out")
          for pair in tensors.linear(f"layers/blocks/{name}", f"self_attn.{name}_proj")),
        *tensors.norm("layers/blocks/norm2", "layer_norm2"),
        *tensors.linear("layers/blocks/fc1", "mlp.fc1"),
        *tensors.linear("layers/blocks/fc2", "mlp.fc2"),
    ]  # fmt: skip
    projection = [tensors.permuted("projection/kernel", "text_projection.weight", 1, 0)] if kind == PROJECTED else []
    return [
        tensors.same("token_embedding", "embeddings.token_embedding.weight"),
        tensors.same("position_embedding", "embeddings.position_embedding.weight"),
        *tensors.stacked(block, [f"encoder.layers.{index}." for index in range(config["num_hidden_layers"])]),
        *tensors.norm("final_norm", "final_layer_norm"),
        *projection,
    ]
