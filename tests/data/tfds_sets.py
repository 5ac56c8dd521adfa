"""A TFDS builder with 20 tiny images, and the examples that reading it must return."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

HEIGHT, WIDTH, NAMES = 6, 4, ("circle", "square", "star")


def pixels(split: str, index: int) -> np.ndarray:
    return np.random.default_rng([len(split), index]).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def expected(split: str) -> dict[str, np.ndarray]:
    """Returns the images by their captions. Captions identify the images, because TFDS shuffles them."""
    return {f"{split} no. {i} é": pixels(split, i) for i in range({"train": 14, "test": 6}[split])}


class TinyThings(tfds.core.GeneratorBasedBuilder):
    """Yields images as encoded files, because TFDS uses TensorFlow to encode arrays."""

    VERSION = tfds.core.Version("1.2.0")
    code_path = None  # TFDS needs importlib_resources to find it

    def _info(self):
        features = {
            "attributes": {"Big": np.bool_},
            "caption": tfds.features.Text(),
            "filename": tfds.features.Text(),
            "image": tfds.features.Image(shape=(HEIGHT, WIDTH, 3)),
            "label": tfds.features.ClassLabel(names=NAMES),
            "texts": tfds.features.Sequence({"text": np.str_, "length": np.int64}),
            "wild": tfds.features.Image(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for index, (caption, image) in enumerate(expected(split).items()):
            yield (
                index,
                {
                    "attributes": {"Big": index % 2 == 1},
                    "caption": caption,
                    "filename": f"{index}.png",
                    "image": _file(image),
                    "label": index % 3,
                    "texts": [{"text": f"{word} {index}", "length": 3} for word in ("one", "two")],
                    "wild": _file(np.zeros((5 + index, 7, 3), np.uint8)),
                },
            )


def prepare(folder: str, file_format: str = "array_record") -> None:
    builder = TinyThings(data_dir=folder, file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _file(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return io.BytesIO(file.getvalue())
