"""Writes the same pictures in every supported format."""

import io
import json

import numpy as np
from PIL import Image

NAMES = ("a dog", "zèbre", "çat")  # in the order of their code points


def make_picture(seed, width=70, height=50, mode="RGB"):
    """Returns a smooth picture with a little noise, so that its JPEG resembles that of a
    photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 20) + y / rng.uniform(3, 20)) for _ in range(3)]
    values = np.stack(waves, -1) * 100 + 128 + rng.normal(0, 5, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_split(count, first=0):
    """Returns the encoded pictures and their labels, which are in ascending order."""
    sizes = [(70 + 3 * (i % 7), 50 + 5 * (i % 5)) for i in range(count)]
    contents = [encode(make_picture(first + i, *size), quality=90) for i, size in enumerate(sizes)]
    return contents, [i * len(NAMES) // count for i in range(count)]


SPLITS = {"train": make_split(42), "validation": make_split(9, 100), "test": make_split(9, 200)}


def write_folder(root, splits=SPLITS):
    for name, (contents, labels) in splits.items():
        for i, (content, label) in enumerate(zip(contents, labels, strict=True)):
            file = root / name / NAMES[label] / f"{i:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return root


def write_parquet(root, splits=SPLITS, label="label", metadata=True, rows=16):
    import pyarrow
    import pyarrow.parquet as parquet

    root.mkdir(parents=True, exist_ok=True)
    for name, (contents, labels) in splits.items():
        images = [{"bytes": content, "path": None} for content in contents]
        image_type = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        table = pyarrow.table({"image": pyarrow.array(images, image_type), label: labels})
        if metadata:
            features = {"image": {"_type": "Image"}, label: {"names": NAMES, "_type": "ClassLabel"}}
            schema_metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            table = table.replace_schema_metadata(schema_metadata)
        parquet.write_table(table, root / f"{name}-00000-of-00001.parquet", row_group_size=rows)
    return root


def write_tfds(root, splits=SPLITS):
    """Writes a dataset in the format of TensorFlow Datasets and returns its folder."""
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=NAMES),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, _):
            return {name: self._generate_examples(*part) for name, part in splits.items()}

        def _generate_examples(self, contents, labels):
            for i, (content, label) in enumerate(zip(contents, labels, strict=True)):
                yield i, {"image": io.BytesIO(content), "label": label}

    builder = Toy(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path
