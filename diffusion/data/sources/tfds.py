"""Image data sets of TensorFlow Datasets (TFDS), prepared as ArrayRecord files and read without TensorFlow."""

import difflib
import functools
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffusion.core.types import ArraySpec, InputError, Spec, class_labels
from diffusion.data import image_ops

PREPARE = "python -m experiments.prepare_data --config=..."
LOCATION_KEYWORDS = ("data_dir",)  # see pipeline.location_keywords

Keys = tuple[str, ...]  # path of a feature in the nested dicts of an example


class Tfds:
    """Examples `[H, W, C]` uint8, with `label` and `caption` if requested.

    Attributes:
      name: The data set and its split, for messages.
      records: Serialized examples by index.
      keys: The path of `image` and, if used, of `label` and `caption` in an example.
      features: The top-level features that contain them, which TFDS parses.
    """

    def __init__(
        self, name: str, records: Sequence[bytes], features: Mapping[str, Any],
        chosen: Mapping[str, tuple[Keys, Any]], transform: image_ops.Transform, shape: tuple[int, int, int],
    ):  # fmt: skip
        import tensorflow_datasets as tfds

        self.name, self.records, self.transform = name, records, transform
        self.keys = {kind: keys for kind, (keys, _) in chosen.items()}
        self.features = tfds.features.FeaturesDict({keys[0]: features[keys[0]] for keys in self.keys.values()})
        self.decoders = tfds.decode.SkipDecoding()  # this class decodes images itself
        for key in reversed(self.keys["image"]):
            self.decoders = {key: self.decoders}
        names = _class_names(*chosen["label"]) if "label" in chosen else ()
        self.spec = Spec(ArraySpec(shape, dtype="uint8"), class_labels(len(names), names), "caption" in chosen)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._example(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the example with its random crop and flip, and a random one of its captions."""
        return self._example(index, rng)

    @property
    def stages(self) -> tuple[tuple[str, Callable], ...]:
        """The functions, with their names, whose composition is `self[index]`."""
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
        """Returns the encoded image and, if used, the label and the caption."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        try:
            record = self.records[index]
            if not isinstance(record, Mapping):  # tfds.testing.mock_data provides parsed examples instead of records
                record = self.features.deserialize_example_np(record, decoders=self.decoders)
        except Exception as error:
            problem = f"example {index} of {self.name} cannot be read: {error}"
            raise InputError("data", f"{problem}; remove the data set and prepare it again") from None
        return {kind: functools.reduce(operator.getitem, keys, record) for kind, keys in self.keys.items()}

    def _transformed(self, read: Mapping[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
        example = {"x": self.transform(read["image"], rng), "cond": {}}
        if "label" in read:
            label = int(read["label"])
            if not 0 <= label < self.spec.num_classes:  # TFDS uses -1 in test sets without labels
                problem = f"must have a label from 0 to {self.spec.num_classes - 1}, got {label}; set labels=False"
                raise image_ops.Unreadable(problem)
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
    """Opens a data set prepared by `python -m experiments.prepare_data`.

    Nested features are named by their path, such as `attributes/Male`.

    Args:
      dataset: Name, config and version as in TFDS, such as `mnist` or `imagenet_resized/64x64`.
      split: A split of the data set, or a slice or a sum of splits, such as `train[:90%]`.
      data_dir: Folder of all data sets; defaults to that of TFDS, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      size: Size that images are resized to cover and then cropped to, a number for a square or (height, width). Without
        it, images are not resized and must all have one size.
      channels: 3, or 1 for grey; defaults to that of the data set.
      crop: `center`, or `random` for a random part at a random scale of up to 1.25 in training.
      flip: Whether to mirror half of the images in training.
      labels: Whether to return labels, if the data set has classes.
      captions: Whether to return captions, which the data set must have. If an image has several, training draws one.
      image: The feature to use as the image; defaults to the supervised input, or else to the first image by name.
      label: The feature to use as the label, a class or a bool; defaults to the supervised target, or else to the first
        class by name.
      caption: The feature to use as the caption, a text; required if the data set has several.
    """
    if crop == "random" and size is None:
        raise InputError("crop", "must be 'center' for images that are not resized; set size")
    if label and not labels:
        raise InputError("label", f"must not be set if labels = False, got {label!r}; remove one of them")
    if caption and not captions:
        raise InputError("caption", f"expects captions = True, got {caption!r} without it; set both")
    info, records = _open(dataset, split, os.path.expanduser(data_dir) if data_dir else None)
    found = _candidates(info)
    chosen = {"image": _choose("image", image, found["image"], dataset)}
    classes = [path for path, (_, feature) in found["label"].items() if hasattr(feature, "names")]
    if labels and (label or classes):
        chosen["label"] = _choose("label", label or classes[0], found["label"], dataset)
    if captions:
        if not caption and len(found["caption"]) > 1:
            raise InputError("caption", f"must be set, as {dataset} has several texts: {', '.join(found['caption'])}")
        chosen["caption"] = _choose("caption", caption, found["caption"], dataset)
    height, width, depth = chosen["image"][1].shape
    if size is not None:
        height, width = size = image_ops.check_size("size", size)
    elif not height or not width:
        raise InputError("size", f"must be a number or (height, width), as {dataset} has images of several sizes")
    transform = image_ops.Transform(size, channels or (1 if depth == 1 else 3), crop, flip)
    return Tfds(f"{dataset}, {split}", records, info.features, chosen, transform, (height, width, transform.channels))


def _candidates(info: Any) -> dict[str, dict[str, tuple[Keys, Any]]]:
    """Returns the features that can be used as image, label and caption: `{kind: {path: (keys, feature)}}`.

    The supervised input and target of the data set come first. The others are sorted by name, because a prepared data
    set does not keep their order.
    """
    import tensorflow_datasets as tfds

    def leaves(feature: Any, keys: Keys, in_sequence: bool) -> Iterator[tuple[Keys, Any, bool]]:
        if isinstance(feature, tfds.features.FeaturesDict):
            for key in feature:
                yield from leaves(feature[key], (*keys, key), in_sequence)
        elif type(feature) is tfds.features.Sequence:
            yield from leaves(feature.feature, keys, True)
        else:
            yield keys, feature, in_sequence

    found = {"image": {}, "label": {}, "caption": {}}
    for keys, feature, in_sequence in leaves(info.features, (), False):
        kind = None
        if type(feature) is tfds.features.Image:
            kind = "image" if feature.np_dtype == np.uint8 and not in_sequence else None
        elif isinstance(feature, tfds.features.ClassLabel):
            kind = "label" if feature.num_classes and not in_sequence else None
        elif isinstance(feature, tfds.features.Tensor) and feature.shape == ():
            if feature.np_dtype == np.bool_ and not in_sequence:
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
        raise InputError(keyword, f"{dataset} has no feature that can be used as the {keyword}")
    if path is None:
        path = next(iter(found))
    if path not in found:
        raise InputError(keyword, f"must be a feature of {dataset}, one of: {', '.join(found)}; got {path!r}")
    return found[path]


def _open(dataset: str, split: str, data_dir: str | None) -> tuple[Any, Sequence[bytes]]:
    """Returns the info of a prepared data set and the records of a split."""
    import tensorflow_datasets as tfds

    builder = builder_of(dataset, data_dir)
    prepare = PREPARE + (f" --data_dir={data_dir}" if data_dir else "")
    try:
        records = builder.as_data_source(split=split, file_format="array_record").data_source
    except Exception:
        if not builder.is_prepared():
            raise InputError("dataset", f"there is no {builder.data_dir}; prepare the data set: {prepare}") from None
        formats = builder.info.available_file_formats()
        if tfds.core.FileFormat.ARRAY_RECORD not in formats:
            available = ", ".join(sorted(one.value for one in formats))
            problem = f"{builder.data_dir} must have the format array_record, got {available}; convert it: {prepare}"
            raise InputError("dataset", problem) from None
        known = ", ".join(builder.info.splits)
        problem = f"must be one of {known}, or a slice such as train[:90%], with examples in {dataset}; got {split!r}"
        raise InputError("split", problem) from None
    try:
        records[0]
    except Exception as error:
        problem = f"{builder.data_dir} cannot be read: {error}; remove it and prepare it again"
        raise InputError("dataset", problem) from None
    return builder.info, records


def builder_of(dataset: str, data_dir: str | None) -> Any:
    """Returns the TFDS builder of a data set, prepared or not.

    The files of a prepared data set suffice. If there are none, the builder is made from its code.

    Raises:
      InputError: There is no such data set; the error names the field `dataset`.
    """
    import tensorflow_datasets as tfds

    parsed = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::[\d.*]+)?", dataset)
    if not parsed:  # TFDS would look up other forms over the network
        problem = f"must be a name such as mnist, mnist:3.0.1 or imagenet_resized/64x64, got {dataset!r}"
        raise InputError("dataset", problem)
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
            folder = data_dir or tfds.core.constants.DATA_DIR
            problem = f"there is no {dataset} in {folder}, and {name!r} is not a TFDS data set"
            raise InputError("dataset", problem + (f"; did you mean {near}?" if near else "")) from None
        configs = tfds.builder_cls(name).builder_configs
        if config and config not in configs:
            problem = f"{name} has no config {config!r}; one of: {', '.join(configs) or 'none'}"
            raise InputError("dataset", problem) from None
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
