"""Networks that compute the features from which distances are computed.

The network is part of each distance's name: only distances from InceptionV3 with the original
weights are called FID and KID.
"""

import dataclasses
import functools
import hashlib
import os
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from taming_jax.data.datasets import Split
from taming_jax.data.pixels import to_float
from taming_jax.errors import UserError
from taming_jax.metrics import classifier
from taming_jax.models import inception
from taming_jax.models.inception import InceptionV3
from taming_jax.models.lpips import load_lpips, vgg_features
from taming_jax.parallel.devices import Devices
from taming_jax.storage import atomic_write, expand_user, user_cache
from taming_jax.weights.arrays import hash_arrays
from taming_jax.weights.layout import (
    build_inception_layout,
    convert_shapes,
    convert_to_flax,
    flatten_shapes,
)
from taming_jax.weights.state_dict import check_state_dict, open_state_dict

MICRO_BATCH = 32  # images per device, independent of the number of devices
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
)
# Images from VGG_MIN_SIZE to VGG_MAX_SIZE keep their size for VGG16. Smaller ones are resized to
# VGG_MIN_SIZE, larger ones to VGG_LARGE_SIZE.
VGG_MIN_SIZE, VGG_MAX_SIZE, VGG_LARGE_SIZE = 16, 64, 128

Outputs = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that computes features."""

    name: str
    """The name in the report: "InceptionV3", "VGG16" or "classifier"."""
    distance: str
    """The name of the Fréchet distance of its features."""
    dimensions: int
    apply: Callable[[Any, jax.Array], Outputs]
    """A function from parameters and images float [b,h,w,c] in [-1, 1] to features [b,d] and class
    probabilities [b,k], or [b,0] if the network does not classify."""
    params: Any
    size: Callable[[int], int]
    """A function from the height of square images to the height that they are resized to."""
    resize: str
    """A description of the resizing, for the report."""

    @functools.cached_property
    def weights(self) -> str:
        """A hash of the parameters."""
        return hash_arrays(self.params)


def resize_clean(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes images uint8 [n,h,w,c] to float32 [n,size,size,c] in [0, 255] like clean-fid (arXiv
    2104.11222): each channel with Pillow in float32, bicubic and antialiased. Returns images of
    this size unchanged, as uint8."""
    n, h, w, c = images.shape
    if h == w == size:
        return images
    resized = np.empty((n, size, size, c), np.float32)
    for i, channel in np.ndindex(n, c):
        plane = Image.fromarray(images[i, ..., channel].astype(np.float32), mode="F")
        plane = plane.resize((size, size), Image.Resampling.BICUBIC)
        resized[i, ..., channel] = np.asarray(plane)
    return np.clip(resized, 0, 255)


def resize_legacy(images: jax.Array) -> jax.Array:
    """Resizes images [b,h,w,c] for InceptionV3 like pytorch-fid: bilinear, not antialiased."""
    shape = (len(images), inception.SIZE, inception.SIZE, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=False)


def load_vgg() -> Extractor:
    """Loads VGG16 with LPIPS's weights. The features are the spatial means of its last convolution.
    Images of 16 to 64 px stay unchanged; smaller ones are resized to 16 px, larger ones to 128 px.
    """

    def apply(params: Any, images: jax.Array) -> Outputs:
        features = vgg_features(params, images)[-1].mean((1, 2))
        return features, jnp.zeros((len(images), 0))

    return Extractor(
        "VGG16", "FD-VGG16", 512, apply, load_lpips()["vgg"],
        size=lambda side: VGG_LARGE_SIZE if side > VGG_MAX_SIZE else max(side, VGG_MIN_SIZE),
        resize=f"none from {VGG_MIN_SIZE} to {VGG_MAX_SIZE} px, else to {VGG_MIN_SIZE} or "
        f"{VGG_LARGE_SIZE} px, antialiased bicubic",
    )  # fmt: skip


def load_inception(file: Path, legacy: bool = False) -> Extractor:
    """Loads InceptionV3 with the original weights from pytorch-fid's file. Images are resized as
    in clean-fid or, with `legacy`, as in pytorch-fid: bilinear, not antialiased. Raises UserError
    if the file does not have the arrays of InceptionV3."""
    model = InceptionV3()
    image = jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    shapes = flatten_shapes(jax.eval_shape(model.init, jax.random.key(0), image))
    layout = build_inception_layout(shapes)
    try:
        tensors, _ = open_state_dict(file)
        # The file also has arrays for training: a second head, and BatchNorm's batch counters.
        check_state_dict(
            file, tensors, convert_shapes(layout, shapes),
            lambda name: "AuxLogits" in name or name.endswith("num_batches_tracked"),
            "InceptionV3",
        )  # fmt: skip
        variables = jax.tree.map(np.ascontiguousarray, convert_to_flax(layout, tensors))
    except UserError as error:
        raise UserError(
            f"{file} does not have InceptionV3's weights ({str(error).rstrip('.')}); download them "
            f"from {INCEPTION_URL}, or use --features vgg."
        ) from error

    def apply(params: Any, images: jax.Array) -> Outputs:
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, -1)
        if legacy:
            images = resize_legacy(images)
        features, logits = cast(Outputs, model.apply(params, images))
        # The logits of the Inception Score have no bias, as in the graph that defined the score.
        return features, jax.nn.softmax(logits - params["params"]["fc"]["bias"])

    method = "bilinear, not antialiased" if legacy else "antialiased bicubic"
    return Extractor(
        "InceptionV3", "FID" if is_original(file.read_bytes()) else "FD-InceptionV3",
        inception.FEATURES, apply, variables,
        size=lambda side: side if legacy else inception.SIZE,
        resize=f"to {inception.SIZE} px, {method}",
    )  # fmt: skip


def load_digit_classifier(train: Split, classes: int) -> Extractor:
    """Loads a classifier for a dataset's classes (usually MNIST digits). The first call trains it
    on the training split and caches it. Raises UserError if the split is too small."""
    if classes < 2 or len(train.images) < classifier.BATCH:
        raise UserError(
            f"{len(train.images)} training images of {classes} classes are too few to train a "
            "classifier; use --features vgg."
        )
    content = hashlib.sha256(train.images.tobytes() + train.labels.tobytes()).hexdigest()
    file = user_cache() / f"classifier-{classifier.VERSION}-{content[:16]}.npz"
    params = classifier.load_or_train(file, train, classes)
    model = classifier.Classifier(classes)

    def apply(params: Any, images: jax.Array) -> Outputs:
        features, logits = cast(Outputs, model.apply({"params": params}, images))
        return features, jax.nn.softmax(logits)

    return Extractor(
        "classifier", "FD-classifier", classifier.FEATURES, apply, params,
        size=lambda side: side, resize="none",
    )  # fmt: skip


def load_pretrained(name: str, weights: str | Path | None, legacy_resize: bool) -> Extractor:
    """Loads the extractor that a protocol names: "inception", "vgg", or "auto", which is
    InceptionV3 if `weights` is set or its file is in a cache, else VGG16. Raises UserError for
    another name, and if the weights are missing or invalid."""
    if name not in ("auto", "inception", "vgg"):
        raise UserError(
            f"the features '{name}' do not exist; use auto, inception, vgg or classifier."
        )
    file = None
    if name != "vgg":
        file = weights or find_inception(fetch=name == "inception")
    return load_inception(Path(file), legacy_resize) if file else load_vgg()


def find_inception(fetch: bool) -> Path | None:
    """Returns the path of InceptionV3's file in the user's cache or in PyTorch's. If it is missing,
    returns None, or with `fetch` downloads it, and raises UserError if that fails."""
    torch = expand_user(os.environ.get("TORCH_HOME") or "~/.cache/torch")
    file = user_cache() / INCEPTION_FILE
    for path in (file, torch / "hub" / "checkpoints" / INCEPTION_FILE):
        if path.is_file():
            return path
    if not fetch:
        return None
    print(f"Downloading {INCEPTION_URL} (91 MiB).", flush=True)
    try:
        with urllib.request.urlopen(INCEPTION_URL, timeout=60) as response:
            content = response.read()
        if not is_original(content):
            raise OSError("the checksum does not match")
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, content)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot download InceptionV3's weights from {INCEPTION_URL} ({error}); put the file "
            f"at {file}, name it with --weights, or use --features vgg."
        ) from error
    return file


def is_original(content: bytes) -> bool:
    """Returns whether the content is that of pytorch-fid's file, whose name contains its hash."""
    return hashlib.sha256(content).hexdigest().startswith("6726825d")


class Features:
    """An extractor that runs on the devices, in batches of a fixed size."""

    def __init__(self, extractor: Extractor, devices: Devices):
        self.extractor, self._devices = extractor, devices
        self.batch_size = MICRO_BATCH * len(devices)
        self._params = devices.replicate(extractor.params)

        def extract(params: Any, images: jax.Array) -> Outputs:
            with jax.default_matmul_precision("highest"):
                return extractor.apply(params, to_float(images))

        self._apply = devices.compile(extract)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features [n,d] and probabilities [n,k] of images uint8 [n,h,w,c]."""
        devices, size = self._devices, self.extractor.size(images.shape[1])

        def apply(rows: np.ndarray) -> Outputs:
            return self._apply(self._params, devices.shard(resize_clean(rows, size)))

        return devices.map_batches(apply, images, self.batch_size)
