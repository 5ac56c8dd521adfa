"""The models of diffusers that are ours as well: `UNet2DModel` is `networks.unet`, `DiTTransformer2DModel` is
`networks.dit`. Names and conventions are those of diffusers 0.42.

A model is a folder with `config.json` and safetensors; a pipeline has such a folder, one for the noise schedule, and
`model_index.json`.
"""

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import jax

from diffusion.core.build import build, find
from diffusion.core.types import InputError, Params, Spec
from diffusion.interop import model_folder, tensors
from diffusion.interop.tensors import Pair, conv, copies, fused, linear, norm, pointwise, same, stacked
from diffusion.layers.norms import usual_groups

VERSION = "0.42.1"  # written into what we write
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention before 0.13


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its weights.

    Attributes:
      network: the config's section, `{"name": "unet", ...}`.
      spec: of the data it is for; the range of the raw values is not known here.
      params: float32 arrays.
    """

    network: Mapping[str, Any]
    spec: Spec
    params: Params


def read(path: str, *, null_class: bool = False) -> Model:
    """Reads a model's folder.

    Args:
      null_class: the last row of a U-Net's table of classes is for no class.

    Raises:
      InputError: the folder cannot be read, the model is another, or a tensor is missing, unknown or of another shape.
    """
    config = model_folder.read_json(path, "config.json")
    kind = config.get("_class_name")
    if kind == "UNet2DModel":
        network, spec = _read_unet({**_UNET_DEFAULTS, **config}, null_class)
    elif kind == "DiTTransformer2DModel":
        network, spec = _read_dit({**_DIT_DEFAULTS, **config})
    else:
        raise InputError("folder", f"{path} holds a {kind}; only UNet2DModel and DiTTransformer2DModel can be read")
    built = build("networks", network, field="config.json", shape=spec.shape, num_classes=spec.num_classes)
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    read = {_renamed(name): tensor for name, tensor in model_folder.read_tensors(path).items()}
    return Model(network, spec, tensors.to_ours(_pairs(network, spec), read, shapes))


def write(path: str, model: Model) -> None:
    """Writes a model's folder. Raises InputError naming the option that diffusers' model does not have."""
    network = _whole(model.network)
    if network["name"] == "unet":
        config = _unet_config(network, model.spec, tensors.lengths(model.params, "scale"))
    elif network["name"] == "dit":
        config = _dit_config(network, model.spec)
    else:
        raise InputError("network.name", f"{network['name']!r} has no counterpart in diffusers; unet and dit have one")
    model_folder.write(path, config, tensors.to_theirs(_pairs(network, model.spec), model.params))


def _renamed(name: str) -> str:
    head, _, tail = name.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{OLD_NAMES[last]}.{tail}" if last in OLD_NAMES and ".attentions." in name else name


def _whole(network: Mapping[str, Any]) -> dict[str, Any]:
    """The section with what it leaves to the defaults."""
    parameters = inspect.signature(find("networks", network["name"], field="network.name")).parameters
    given = ("shape", "num_classes")
    return {name: p.default for name, p in parameters.items() if name not in given} | dict(network)


def _pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    """The table of names."""
    return {"unet": _unet_pairs, "dit": _dit_pairs}[network["name"]](_whole(network), spec)


def _only(config: Mapping[str, Any], **allowed: Any) -> None:
    """Refuses a `config.json` that asks for what our network does not have."""
    for name, value in allowed.items():
        values = value if isinstance(value, tuple) else (value,)
        if config[name] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise InputError(f"config.json.{name}", f"is {config[name]!r}; only {wanted} can be read")


def _lacks(network: Mapping[str, Any], **allowed: Any) -> None:
    """Refuses to write a network with options that diffusers' has not."""
    for name, value in allowed.items():
        if network[name] != value:
            raise InputError(f"network.{name}", f"is {network[name]!r}; diffusers' model has {value!r} alone")


def _outputs(config: Mapping[str, Any]) -> int:
    """Values for each channel of x."""
    channels, out = config["in_channels"], config["out_channels"] or config["in_channels"]
    if out not in (channels, 2 * channels):
        raise InputError("config.json.out_channels", f"is {out}; {channels} or {2 * channels} can be read")
    return out // channels


def _size(config: Mapping[str, Any]) -> int:
    size = config["sample_size"]
    size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
    if not isinstance(size, int):
        raise InputError("config.json.sample_size", f"is {size}; must be the side of a square image")
    return size


# UNet2DModel

_UNET_DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
}  # fmt: skip
# A level's type of block: whether it attends, and how it resamples (None: as `downsample_type` says).
_DOWN = {"DownBlock2D": (False, "conv"), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, "resnet")}
_UP = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")}


def _levels(config: Mapping[str, Any], way: str) -> tuple[list[bool], set[str]]:
    """Which levels attend, from the largest image on, and the ways in which they resample."""
    kinds, field = {"down": _DOWN, "up": _UP}[way], f"{way}_block_types"
    for name in config[field]:
        if name not in kinds:
            raise InputError(f"config.json.{field}", f"{name!r} cannot be read; only {', '.join(kinds)}")
    if len(config[field]) != len(config["block_out_channels"]):
        raise InputError(f"config.json.{field}", "must be as many as block_out_channels")
    names = list(config[field]) if way == "down" else list(config[field])[::-1]
    ways = {kinds[name][1] or config[f"{way}sample_type"] for name in names[:-1]}
    return [kinds[name][0] for name in names], ways


def _read_unet(config: Mapping[str, Any], null_class: bool) -> tuple[dict[str, Any], Spec]:
    widths, size, classes = config["block_out_channels"], _size(config), config["num_class_embeds"] or 0
    attends, ways = _levels(config, "down")
    if _levels(config, "up") != (attends, ways) or len(ways) > 1:
        raise InputError("config.json.up_block_types", "must mirror down_block_types, with one way of resampling")
    if any(width % widths[0] for width in widths):
        raise InputError("config.json.block_out_channels", f"must be multiples of the first, got {list(widths)}")
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups = config["norm_num_groups"]
    _only(
        config, center_input_sample=False, time_embedding_type="positional",
        time_embedding_dim=(None, 4 * widths[0]), mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1,
        act_fn=("silu", "swish"), freq_shift=(0, 1), resnet_time_scale_shift=("default", "scale_shift"),
        class_embed_type=None, downsample_padding=(0, 1),
        attn_norm_num_groups=(groups,) if scale_shift and config["add_attention"] else (None, groups),
    )  # fmt: skip
    network = {
        "name": "unet",
        "width": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": tuple(size >> level for level, attend in enumerate(attends) if attend),
        "up_attention": "every",
        "middle_attention": config["add_attention"],
        "head_dim": config["attention_head_dim"],
        "scale_shift": scale_shift,
        "resample": "residual" if ways == {"resnet"} else "conv",
        "asymmetric_padding": config["downsample_padding"] == 0,
        "freq_shift": config["freq_shift"] == 1,
        "sin_first": not config["flip_sin_to_cos"],
        "null_class": null_class or not classes,  # without classes it says nothing
        "dropout": float(config["dropout"]),
        "groups": groups,
        "epsilon": config["norm_eps"],
        "outputs": _outputs(config),
    }
    return network, Spec((size, size, config["in_channels"]), classes - (null_class and bool(classes)))


def _unet_config(network: Mapping[str, Any], spec: Spec, normed: Collection[int]) -> dict[str, Any]:
    _lacks(
        network, up_attention="every", resample_filter=(1, 1), input_skip=False, rescale=False, embedding="sinusoidal"
    )
    if network["resample"] == "projected":
        raise InputError("network.resample", "is 'projected'; diffusers' U-Net has 'conv' and 'residual'")
    size, _, channels = spec.shape
    widths = [network["width"] * multiplier for multiplier in network["channel_mult"]]
    groups = {network["groups"] or usual_groups(channels) for channels in normed}
    if len(groups) > 1:
        raise InputError("network.groups", f"are {sorted(groups)} in different layers; diffusers' model has one number")
    residual = network["resample"] == "residual"
    kinds = {(False, False): "{way}Block2D", (True, False): "Attn{way}Block2D", (True, True): "Attn{way}Block2D",
             (False, True): "Resnet{way}sampleBlock2D"}  # fmt: skip
    types = [kinds[size >> level in network["attention_resolutions"], residual] for level in range(len(widths))]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        **_UNET_DEFAULTS,
        "sample_size": size,
        "in_channels": channels,
        "out_channels": network["outputs"] * channels,
        "freq_shift": int(network["freq_shift"]),
        "flip_sin_to_cos": not network["sin_first"],
        "down_block_types": [kind.format(way="Down") for kind in types],
        "up_block_types": [kind.format(way="Up") for kind in reversed(types)],
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "downsample_padding": 0 if network["asymmetric_padding"] else 1,
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "dropout": network["dropout"],
        "attention_head_dim": network["head_dim"],
        "norm_num_groups": min(groups),
        "attn_norm_num_groups": min(groups),
        "norm_eps": network["epsilon"],
        "resnet_time_scale_shift": "scale_shift" if network["scale_shift"] else "default",
        "add_attention": network["middle_attention"],
        "num_class_embeds": spec.num_classes + network["null_class"] if spec.num_classes else None,
    }


def _unet_pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    levels, blocks = len(network["channel_mult"]), network["num_res_blocks"]

    def residual(ours: str, theirs: str, projected: bool) -> list[Pair]:
        pairs = [
            *norm(f"{ours}/norm1", f"{theirs}.norm1"),
            *conv(f"{ours}/conv1", f"{theirs}.conv1"),
            *linear(f"{ours}/emb", f"{theirs}.time_emb_proj"),
            *norm(f"{ours}/norm2", f"{theirs}.norm2"),
            *conv(f"{ours}/conv2", f"{theirs}.conv2"),
        ]
        return [*pairs, *pointwise(f"{ours}/skip", f"{theirs}.conv_shortcut")] if projected else pairs

    def attention(ours: str, theirs: str) -> list[Pair]:
        return [
            *norm(f"{ours}/norm", f"{theirs}.group_norm"),
            *fused(f"{ours}/qkv", [f"{theirs}.to_{part}" for part in "qkv"]),
            *linear(f"{ours}/out", f"{theirs}.to_out.0"),
        ]

    def resampler(ours: str, theirs: str) -> list[Pair]:
        if network["resample"] == "residual":
            return residual(f"{ours}/residual", theirs, projected=False)
        return conv(f"{ours}/conv", f"{theirs}.conv")

    pairs = [
        *linear("embed/inner", "time_embedding.linear_1"),
        *linear("embed/outer", "time_embedding.linear_2"),
        *conv("conv_in", "conv_in"),
        *norm("norm_out", "conv_norm_out"),
        *conv("conv_out", "conv_out"),
        *residual("middle/first/residual", "mid_block.resnets.0", projected=False),
        *residual("middle/second/residual", "mid_block.resnets.1", projected=False),
    ]
    if spec.num_classes:
        pairs.append(same("embed/label/embedding", "class_embedding.weight"))
    if network["middle_attention"]:
        pairs += attention("middle/first/attention", "mid_block.attentions.0")
    for level, multiplier in enumerate(network["channel_mult"]):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        grows = multiplier != network["channel_mult"][max(level - 1, 0)]
        attends = spec.shape[0] >> level in network["attention_resolutions"]
        for block in range(blocks + 1):
            if block < blocks:
                projected = grows and block == 0
                pairs += residual(f"down/{level}_{block}/residual", f"{down}.resnets.{block}", projected)
            pairs += residual(f"up/{level}_{block}/residual", f"{up}.resnets.{block}", projected=True)
            if attends and block < blocks:
                pairs += attention(f"down/{level}_{block}/attention", f"{down}.attentions.{block}")
            if attends:
                pairs += attention(f"up/{level}_{block}/attention", f"{up}.attentions.{block}")
        if level + 1 < levels:
            pairs += resampler(f"down/{level}_down", f"{down}.downsamplers.0")
        if level:
            pairs += resampler(f"up/{level}_up", f"{up}.upsamplers.0")
    return pairs


# DiTTransformer2DModel

_DIT_DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
    "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": 32, "patch_size": 2,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "upcast_attention": False,
    "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-5,
}  # fmt: skip


def _read_dit(config: Mapping[str, Any]) -> tuple[dict[str, Any], Spec]:
    _only(config, dropout=0, attention_bias=True, activation_fn="gelu-approximate", upcast_attention=False,
          norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=(1e-5, 1e-6))  # fmt: skip
    size = _size(config)
    network = {
        "name": "dit",
        "patch_size": config["patch_size"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "freq_shift": True,
        "outputs": _outputs(config),
    }
    return network, Spec((size, size, config["in_channels"]), config["num_embeds_ada_norm"])


def _dit_config(network: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    _lacks(network, mlp_ratio=4, positions="sincos", norm="layer", qk_norm=False, mlp="gelu", freq_shift=True)
    if not spec.num_classes:
        raise InputError("data", "has no classes; diffusers' DiT is conditioned on one")
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": VERSION,
        **_DIT_DEFAULTS,
        "num_attention_heads": network["num_heads"],
        "attention_head_dim": network["width"] // network["num_heads"],
        "in_channels": spec.shape[2],
        "out_channels": network["outputs"] * spec.shape[2],
        "num_layers": network["depth"],
        "sample_size": spec.shape[0],
        "patch_size": network["patch_size"],
        "num_embeds_ada_norm": spec.num_classes,
        "norm_eps": 1e-6,
    }


def _dit_pairs(network: Mapping[str, Any], spec: Spec) -> list[Pair]:
    prefixes = [f"transformer_blocks.{index}." for index in range(network["depth"])]
    p, C, D = network["patch_size"], spec.shape[2], network["width"]
    embedder = [
        *linear("embed/inner", "norm1.emb.timestep_embedder.linear_1"),
        *linear("embed/outer", "norm1.emb.timestep_embedder.linear_2"),
        same("embed/label/embedding", "norm1.emb.class_embedder.embedding_table.weight"),
    ]
    block = [
        *linear("blocks/blocks/modulation", "norm1.linear"),
        *fused("blocks/blocks/qkv", [f"attn1.to_{part}" for part in "qkv"]),
        *linear("blocks/blocks/out", "attn1.to_out.0"),
        *linear("blocks/blocks/up", "ff.net.0.proj"),
        *linear("blocks/blocks/down", "ff.net.2"),
    ]
    patches = Pair(
        "patches_in/kernel",
        ("pos_embed.proj.weight",),
        lambda tensors: tensors[0].transpose(2, 3, 1, 0).reshape(p * p * C, D),
        lambda array: [array.reshape(p, p, C, D).transpose(3, 2, 0, 1)],
    )
    return [
        *copies(embedder, prefixes),  # every block of theirs has its own copy of the embeddings
        *stacked(block, prefixes),
        patches,
        same("patches_in/bias", "pos_embed.proj.bias"),
        *linear("modulation", "proj_out_1"),
        *linear("patches_out", "proj_out_2"),
    ]
