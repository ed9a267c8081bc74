"""Networks that turn images into the features that distances are taken of.

Which network it is belongs to every distance's name: only those of InceptionV3 with the original's
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
from taming_jax.files import user_cache, write_whole
from taming_jax.metrics import classifier
from taming_jax.models import inception
from taming_jax.models.inception import InceptionV3
from taming_jax.models.lpips import load_lpips, vgg_features
from taming_jax.parallel.devices import Devices
from taming_jax.weights.arrays import hash_arrays
from taming_jax.weights.layout import expected, inception_layout, ours, paths
from taming_jax.weights.state_dict import check, open_state_dict

MICRO = 32  # images a device sees at once: one size, whatever the number of devices
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
)
# VGG16 sees images from VGG_LEAST to VGG_MOST pixels as they are; larger ones become VGG_LARGE.
VGG_LEAST, VGG_MOST, VGG_LARGE = 16, 64, 128

Outputs = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that features come from."""

    name: str
    """In the report: "InceptionV3", "VGG16", "classifier"."""
    distance: str
    """What the Fréchet distance of its features is called."""
    dimensions: int
    apply: Callable[[Any, jax.Array], Outputs]
    """Parameters and images float [b,h,w,c] in [-1, 1] to features [b,d] and, where it classifies,
    probabilities [b,k] (else [b,0])."""
    params: Any
    size: Callable[[int], int]
    """The height and width that images are resized to, from what they have."""
    resize: str
    """The same in words, for the report."""

    @functools.cached_property
    def weights(self) -> str:
        """A hash of the parameters."""
        return hash_arrays(self.params)


def resized_clean(images: np.ndarray, size: int) -> np.ndarray:
    """Images uint8 [n,h,w,c] as float32 [n,size,size,c] in [0, 255], resized as clean-fid does
    (arXiv 2104.11222): each channel by Pillow, in floats, bicubic and antialiased. Images of that
    size are returned as they are."""
    n, h, w, c = images.shape
    if h == w == size:
        return images
    resized = np.empty((n, size, size, c), np.float32)
    for i, channel in np.ndindex(n, c):
        plane = Image.fromarray(images[i, ..., channel].astype(np.float32), mode="F")
        plane = plane.resize((size, size), Image.Resampling.BICUBIC)
        resized[i, ..., channel] = np.asarray(plane)
    return np.clip(resized, 0, 255)


def resized_legacy(images: jax.Array) -> jax.Array:
    """Images [b,h,w,c] for InceptionV3 as pytorch-fid resizes: bilinearly, not antialiased."""
    shape = (len(images), inception.SIZE, inception.SIZE, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=False)


def vgg() -> Extractor:
    """VGG16's last convolution, averaged over space, with LPIPS's weights: images of 16 to 64 px as
    they are, smaller ones at 16, larger ones at 128."""

    def apply(params: Any, images: jax.Array) -> Outputs:
        features = vgg_features(params, images)[-1].mean((1, 2))
        return features, jnp.zeros((len(images), 0))

    return Extractor(
        "VGG16", "FD-VGG16", 512, apply, load_lpips()["vgg"],
        size=lambda side: VGG_LARGE if side > VGG_MOST else max(side, VGG_LEAST),
        resize=f"none of {VGG_LEAST} to {VGG_MOST} px, else to {VGG_LEAST} or {VGG_LARGE} px, "
        "antialiased bicubic",
    )  # fmt: skip


def inception_v3(file: Path, legacy: bool = False) -> Extractor:
    """InceptionV3 with the original's weights from pytorch-fid's file. Images are resized as
    clean-fid does, or, with `legacy`, bilinearly without antialiasing, as pytorch-fid does.
    UserError for another file."""
    model = InceptionV3()
    image = jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    shapes = paths(jax.eval_shape(model.init, jax.random.key(0), image))
    layout = inception_layout(shapes)
    try:
        tensors, _ = open_state_dict(file)
        # The file also holds what only training needs: a second head, and how long BatchNorm ran.
        check(
            file, tensors, expected(layout, shapes),
            lambda name: "AuxLogits" in name or name.endswith("num_batches_tracked"),
            "InceptionV3",
        )  # fmt: skip
        variables = jax.tree.map(np.ascontiguousarray, ours(layout, tensors))
    except UserError as error:
        raise UserError(
            f"{file} does not hold InceptionV3's weights ({str(error).rstrip('.')}); get them from "
            f"{INCEPTION_URL}, or take --features vgg."
        ) from error

    def apply(params: Any, images: jax.Array) -> Outputs:
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, -1)
        if legacy:
            images = resized_legacy(images)
        features, logits = cast(Outputs, model.apply(params, images))
        # The Inception Score's classes are without the bias, as in the graph it was defined by.
        return features, jax.nn.softmax(logits - params["params"]["fc"]["bias"])

    way = "bilinear, not antialiased" if legacy else "antialiased bicubic"
    return Extractor(
        "InceptionV3", "FID" if is_original(file.read_bytes()) else "FD-InceptionV3",
        inception.FEATURES, apply, variables,
        size=lambda side: side if legacy else inception.SIZE,
        resize=f"to {inception.SIZE} px, {way}",
    )  # fmt: skip


def digits(train: Split, classes: int) -> Extractor:
    """The features of a classifier of a dataset's own classes, MNIST's digits as a rule, trained on
    its training split the first time and kept. UserError for a split that is too small."""
    if classes < 2 or len(train.images) < classifier.BATCH:
        raise UserError(
            f"{len(train.images)} training images of {classes} classes are too few for a "
            "classifier; take --features vgg."
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


def pretrained(name: str, weights: str | Path | None, legacy_resize: bool) -> Extractor:
    """The features that a protocol names: "inception", "vgg", or "auto", which is InceptionV3 where
    its file `weights` is given or on this machine, else VGG16; in all processes the same. UserError
    for another name, and where the weights are missing or cannot be used."""
    if name not in ("auto", "inception", "vgg"):
        raise UserError(f"there are no features '{name}'; take auto, inception, vgg or classifier.")
    file = None
    if name != "vgg":
        file = weights or find_inception(fetch=name == "inception")
    return inception_v3(Path(file), legacy_resize) if file else vgg()


def find_inception(fetch: bool) -> Path | None:
    """InceptionV3's file in the user's cache or in PyTorch's, else, with `fetch`, downloaded into
    the user's cache. UserError where that fails."""
    torch = Path(os.environ.get("TORCH_HOME") or "~/.cache/torch").expanduser()
    file = user_cache() / INCEPTION_FILE
    for place in (file, torch / "hub" / "checkpoints" / INCEPTION_FILE):
        if place.is_file():
            return place
    if not fetch:
        return None
    print(f"Fetching {INCEPTION_URL} (91 MiB).", flush=True)
    try:
        with urllib.request.urlopen(INCEPTION_URL, timeout=60) as response:
            content = response.read()
        if not is_original(content):
            raise OSError("what came is another file")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"InceptionV3's weights cannot be had from {INCEPTION_URL} ({error}); fetch the file "
            f"elsewhere and put it at {file}, or name it by --weights, or take --features vgg."
        ) from error
    return file


def is_original(content: bytes) -> bool:
    """Whether these are the bytes of pytorch-fid's file, whose name ends in their hash."""
    return hashlib.sha256(content).hexdigest().startswith("6726825d")


class Features:
    """An extractor on the devices, in batches of one size."""

    def __init__(self, extractor: Extractor, devices: Devices):
        self.extractor, self._devices = extractor, devices
        self.size = MICRO * len(devices)
        self._params = devices.replicate(extractor.params)

        def features(params: Any, images: jax.Array) -> Outputs:
            with jax.default_matmul_precision("highest"):
                return extractor.apply(params, to_float(images))

        self._apply = devices.compile(features)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [n,d] and probabilities [n,k] of images uint8 [n,h,w,c]."""
        devices, size = self._devices, self.extractor.size(images.shape[1])

        def apply(rows: np.ndarray) -> Outputs:
            return self._apply(self._params, devices.shard(resized_clean(rows, size)))

        return devices.in_batches(apply, images, self.size)
