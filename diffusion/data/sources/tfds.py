"""Image data sets of TensorFlow Datasets by name, prepared as ArrayRecord files and read without TensorFlow."""

import difflib
import functools
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffusion.core.types import InputError, Spec
from diffusion.data import image_ops

PREPARE = "python -m experiments.prepare_data --config=..."
Keys = tuple[str, ...]  # of a feature in the nested dicts of an example


class Tfds:
    """Examples `[H, W, C]` in [-1, 1], with `label` and `caption` where they are asked for.

    Attributes:
      name: of the set and its split, for messages.
      records: serialized examples by index.
      keys: where the `image`, the `label` and the `caption` are in an example, of those there are.
      features: what tfds parses, the features of the top level that have them.
    """

    def __init__(
        self, name: str, records: Sequence[bytes], features: Mapping[str, Any],
        chosen: Mapping[str, tuple[Keys, Any]], transform: image_ops.Transform, shape: tuple[int, int, int],
    ):  # fmt: skip
        import tensorflow_datasets as tfds

        self.name, self.records, self.transform = name, records, transform
        self.keys = {kind: keys for kind, (keys, _) in chosen.items()}
        self.features = tfds.features.FeaturesDict({keys[0]: features[keys[0]] for keys in self.keys.values()})
        self.decoders = tfds.decode.SkipDecoding()  # the file of an image is left to us
        for key in reversed(self.keys["image"]):
            self.decoders = {key: self.decoders}
        self.class_names = _class_names(*chosen["label"]) if "label" in chosen else ()
        self.spec = Spec(shape=shape, num_classes=len(self.class_names), captions="caption" in chosen)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._example(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The example with its random crop and flip, and any one of its captions."""
        return self._example(index, rng)

    @property
    def stages(self) -> tuple[tuple[str, Callable], ...]:
        """What `self[index]` does, one after the other."""
        return (
            ("read", self._read),
            ("decode", lambda read: {**read, "image": _image(read["image"])}),
            ("transform", lambda decoded: self._transformed(decoded, None)),
        )

    def _example(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        read = self._read(index)
        try:
            return self._transformed({**read, "image": _image(read["image"])}, rng)
        except image_ops.Unreadable as error:
            raise InputError("data", f"example {index} of {self.name} {error}") from None

    def _read(self, index: int) -> dict[str, Any]:
        """The image's file, the label and the caption, of those there are."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} examples, no number {index}")
        try:
            record = self.records[index]
        except Exception as error:
            problem = f"example {index} of {self.name} cannot be read: {error}; remove the set and prepare it anew"
            raise InputError("data", problem) from None
        if not isinstance(record, Mapping):  # tfds.testing.mock_data has no records, but the examples themselves
            record = self.features.deserialize_example_np(record, decoders=self.decoders)
        return {kind: functools.reduce(operator.getitem, keys, record) for kind, keys in self.keys.items()}

    def _transformed(self, read: Mapping[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
        example = {"x": self.transform(read["image"], rng), "cond": {}}
        if "label" in read:
            label = int(read["label"])
            if not 0 <= label < self.spec.num_classes:  # tfds has -1 where a test set keeps its labels to itself
                raise image_ops.Unreadable(
                    f"has the label {label}, not one of {self.spec.num_classes}; set labels=False"
                )
            example["cond"]["label"] = np.int32(label)
        if "caption" in read:
            example["caption"] = _caption(read["caption"], rng)
        return example


def make(
    dataset: str,
    split: str = "train",
    data_dir: str | None = None,
    size: int | image_ops.Size | None = None,
    channels: Literal[1, 3] | None = None,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    labels: bool = True,
    captions: bool = False,
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
) -> Tfds:
    """A set that `python -m experiments.prepare_data` has prepared. A feature inside another is named as `attributes/Male`.

    Args:
      dataset: name, config and version as tfds has them, such as `mnist` or `imagenet_resized/64x64`.
      split: one of the set's, or a part or a sum of them, such as `train[:90%]`.
      data_dir: folder of all sets; tfds' own if not given, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      size: that images are scaled to cover, and cropped to, a number for a square or (height, width); without it they
        stay as they are, if all have one size.
      channels: 3, or 1 for grey; as the set has them if not given.
      crop: the middle, or in training a random part at a random scale of up to 1.25.
      flip: mirror half of the images in training.
      labels: whether to give them, if the set has classes.
      captions: whether to give them; the set must have them. Of several for one image, training draws one.
      image: which feature is the image; if not given the set's main one, or else the first by name.
      label: likewise, of the classes; a bool will do as well.
      caption: likewise, a text; it must be given where the set has several.
    """
    if crop == "random" and size is None:
        raise InputError("crop", "is of images scaled to a size; give one")
    if label and not labels:
        raise InputError("label", f"is {label!r}, but labels = False; leave one of them out")
    if caption and not captions:
        raise InputError("caption", f"is {caption!r}; set captions = True as well")
    info, records = _open(dataset, split, os.path.expanduser(data_dir) if data_dir else None)
    found = _candidates(info)
    chosen = {"image": _choose("image", image, found["image"], dataset)}
    classes = [path for path, (_, feature) in found["label"].items() if hasattr(feature, "names")]
    if labels and (label or classes):
        chosen["label"] = _choose("label", label or classes[0], found["label"], dataset)
    if captions:
        if not caption and len(found["caption"]) > 1:
            raise InputError("caption", f"{dataset} has several texts; name one: {', '.join(found['caption'])}")
        chosen["caption"] = _choose("caption", caption, found["caption"], dataset)
    height, width, depth = chosen["image"][1].shape
    if size is not None:
        height, width = size = image_ops.check("size", size)
    elif not height or not width:
        raise InputError("size", f"{dataset} has images of many sizes; give one for all, a number or (height, width)")
    transform = image_ops.Transform(size, channels or (1 if depth == 1 else 3), crop, flip)
    return Tfds(f"{dataset}, {split}", records, info.features, chosen, transform, (height, width, transform.channels))


def _candidates(info: Any) -> dict[str, dict[str, tuple[Keys, Any]]]:
    """The features that may be the image, the label and the caption: by path, keys and feature. What the set calls its
    input and its target comes first, and the others by name, for a prepared set keeps no order."""
    import tensorflow_datasets as tfds

    def leaves(feature: Any, keys: Keys, several: bool) -> Iterator[tuple[Keys, Any, bool]]:
        if isinstance(feature, tfds.features.FeaturesDict):
            for key in feature:
                yield from leaves(feature[key], (*keys, key), several)
        elif type(feature) is tfds.features.Sequence:
            yield from leaves(feature.feature, keys, True)
        else:
            yield keys, feature, several

    found = {"image": {}, "label": {}, "caption": {}}
    for keys, feature, several in leaves(info.features, (), False):
        kind = None
        if type(feature) is tfds.features.Image:
            kind = "image" if feature.np_dtype == np.uint8 and not several else None
        elif isinstance(feature, tfds.features.ClassLabel):
            kind = "label" if feature.num_classes and not several else None
        elif isinstance(feature, tfds.features.Tensor) and feature.shape == ():
            if feature.np_dtype == np.bool_ and not several:
                kind = "label"
            elif feature.np_dtype in (np.str_, np.object_):
                kind = "caption"
        if kind:
            found[kind]["/".join(keys)] = (keys, feature)
    main = info.supervised_keys or ()
    return {kind: {path: of[path] for path in sorted(of, key=lambda path: (path not in main, path))}
            for kind, of in found.items()}  # fmt: skip


def _choose(keyword: str, path: str | None, found: Mapping[str, tuple[Keys, Any]], dataset: str) -> tuple[Keys, Any]:
    if not found:
        raise InputError(keyword, f"{dataset} has no feature that could be one")
    if path is None:
        path = next(iter(found))
    if path not in found:
        raise InputError(keyword, f"{dataset} has no {keyword} {path!r}; one of: {', '.join(found)}")
    return found[path]


def _open(dataset: str, split: str, data_dir: str | None) -> tuple[Any, Sequence[bytes]]:
    """A prepared set's info and the records of a split."""
    import tensorflow_datasets as tfds

    builder = builder_of(dataset, data_dir)
    prepare = PREPARE + (f" --data_dir={data_dir}" if data_dir else "")
    try:
        records = builder.as_data_source(split=split, file_format="array_record").data_source
    except Exception:
        if not builder.is_prepared():
            raise InputError("dataset", f"there is no {builder.data_dir}; prepare it: {prepare}") from None
        formats = builder.info.available_file_formats()
        if tfds.core.FileFormat.ARRAY_RECORD not in formats:
            there = ", ".join(sorted(one.value for one in formats))
            problem = f"{builder.data_dir} has {there} alone, and array_record is read; convert it: {prepare}"
            raise InputError("dataset", problem) from None
        known = ", ".join(builder.info.splits)
        problem = f"{split!r} has no examples in {dataset}; one of: {known}, or a part such as train[:90%]"
        raise InputError("split", problem) from None
    try:
        records[0]
    except Exception as error:
        problem = f"{builder.data_dir} cannot be read: {error}; remove it and prepare it anew"
        raise InputError("dataset", problem) from None
    return builder.info, records


def builder_of(dataset: str, data_dir: str | None) -> Any:
    """tfds' builder of a set, prepared or not. Its folder suffices; its code, where there is any, says what is missing.
    Raises InputError naming `dataset`."""
    import tensorflow_datasets as tfds

    parsed = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::[\d.*]+)?", dataset)
    if not parsed:  # tfds would look for others in the network
        raise InputError("dataset", f"{dataset!r} is no name such as mnist, mnist:3.0.1 or imagenet_resized/64x64")
    try:
        return tfds.core.read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except Exception:
        pass
    try:
        return tfds.builder(dataset, data_dir=data_dir)
    except Exception as error:
        name, config = parsed.groups()
        known = tfds.list_builders(with_community_datasets=False)
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3))
            problem = f"there is no {dataset} in {data_dir or tfds.core.constants.DATA_DIR}, and tfds knows no {name!r}"
            raise InputError("dataset", problem + (f", but {near}" if near else "")) from None
        configs = tfds.builder_cls(name).builder_configs
        if config and config not in configs:
            raise InputError("dataset", f"{name} has no {config!r}; one of: {', '.join(configs) or 'none'}") from None
        raise InputError("dataset", f"{dataset} cannot be opened: {error}") from None


def _class_names(keys: Keys, feature: Any) -> tuple[str, ...]:
    return tuple(feature.names) if hasattr(feature, "names") else (f"not {keys[-1]}", keys[-1])


def _image(value: bytes | np.ndarray) -> Image.Image:
    if isinstance(value, bytes):
        return image_ops.decode(value)
    return Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)


def _caption(value: Any, rng: np.random.Generator | None) -> str:
    if isinstance(value, (list, np.ndarray)) and np.ndim(value):
        if not len(value):
            raise image_ops.Unreadable("has no caption")
        value = value[0 if rng is None else rng.integers(len(value))]
    return value.decode() if isinstance(value, bytes) else str(value)
