"""What images are measured by: networks that turn them into features.

Which one is part of every figure's name: only InceptionV3's with the weights of the original are
called FID and KID.
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

from taming_jax.data.batches import to_float
from taming_jax.data.datasets import Split
from taming_jax.errors import UserError
from taming_jax.files import text_hash, user_cache, write_whole
from taming_jax.metrics import classifier
from taming_jax.models import inception
from taming_jax.models.inception import InceptionV3
from taming_jax.models.lpips import load_lpips, vgg_features
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices
from taming_jax.weights.arrays import digest, named_arrays
from taming_jax.weights.inception import inception_layout
from taming_jax.weights.layout import expected, ours, paths
from taming_jax.weights.state_dict import check, open_state_dict

MICRO = 32  # images a device sees at once: one size, whatever the number of devices
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
WHERE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
VGG_SIZES = 16, 64, 128  # the least, the most, and what larger images are made

Answer = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that features come from."""

    name: str
    """In the report: "InceptionV3", "VGG16", "classifier"."""
    distance: str
    """What the Fréchet distance of its features is called."""
    dimensions: int
    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    """Parameters and images float [b,h,w,c] in [-1, 1] to features [b,d] and, where it classifies,
    probabilities [b,k] (else [b,0])."""
    params: Any
    weights: str
    """A hash of the parameters."""
    prepare: Callable[[np.ndarray], np.ndarray]
    """Images uint8 [n,h,w,c] to what `apply` sees, uint8 or float32 in [0, 255]."""
    resize: str
    """How, for the report."""
    classes: bool = False
    """Whether the probabilities are of the dataset's own classes."""


def hash_of(tree: Any) -> str:
    """The first 16 digits of a hash over a tree's arrays."""
    named = named_arrays(tree)
    return text_hash({"/".join(path): digest(array) for path, array in named.items()})[:16]


def colour(images: np.ndarray) -> np.ndarray:
    """Gray as three channels."""
    return np.repeat(images, 3, -1) if images.shape[-1] == 1 else images


def resized_clean(images: np.ndarray, size: int, kind: Image.Resampling) -> np.ndarray:
    """As clean-fid does (arXiv 2104.11222): each channel by Pillow, in floats, antialiased."""
    n, h, w, c = images.shape
    if h == w == size:
        return images
    found = np.empty((n, size, size, c), np.float32)
    for i in range(n):
        for channel in range(c):
            plane = Image.fromarray(images[i, ..., channel].astype(np.float32), mode="F")
            found[i, ..., channel] = np.asarray(plane.resize((size, size), kind))
    return np.clip(found, 0, 255)


def resized_legacy(images: jax.Array) -> jax.Array:
    """Images [b,h,w,c] for InceptionV3 as pytorch-fid resizes: bilinearly, not antialiased."""
    shape = (len(images), inception.SIZE, inception.SIZE, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=False)


def fits_vgg(side: int) -> bool:
    """Whether VGG16 sees images of so many pixels a side as they are."""
    return VGG_SIZES[0] <= side <= VGG_SIZES[1]


def vgg() -> Extractor:
    """VGG16's last convolution, averaged over space, with LPIPS's weights: images of 16 to 64 px as
    they are, smaller ones at 16, larger ones at 128."""
    params = load_lpips()["vgg"]
    least, most, large = VGG_SIZES

    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = vgg_features(params, images)[-1].mean((1, 2))
        return features, jnp.zeros((len(images), 0))

    def prepare(images: np.ndarray) -> np.ndarray:
        side = max(images.shape[1:3])
        if fits_vgg(side):
            return images
        return resized_clean(images, large if side > most else least, Image.Resampling.BICUBIC)

    return Extractor(
        "VGG16", "FD-VGG16", 512, apply, params, hash_of(params), prepare,
        f"none of {least} to {most} px, else to {least} or {large} px, antialiased bicubic",
    )  # fmt: skip


def inception_v3(file: Path, legacy: bool = False) -> Extractor:
    """InceptionV3 with the original's weights from pytorch-fid's file, as clean-fid resizes, or, as
    a legacy, bilinearly without antialiasing, as pytorch-fid does. UserError for another file."""
    if not file.is_file():
        raise UserError(
            f"there is no file {file}; get InceptionV3's weights from {WHERE}, or take "
            "--features vgg."
        )
    model = InceptionV3()
    image = jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    shapes = paths(jax.eval_shape(model.init, jax.random.key(0), image))
    layout = inception_layout(shapes)
    try:
        held, _ = open_state_dict(file)
        # Of a training the original knows more: a second head, and how long BatchNorm ran.
        check(
            file, held, expected(layout, shapes),
            lambda name: "AuxLogits" in name or name.endswith("num_batches_tracked"),
            "InceptionV3",
        )  # fmt: skip
        variables = jax.tree.map(np.ascontiguousarray, ours(layout, held))
    except UserError as error:
        raise UserError(
            f"{file} does not hold InceptionV3's weights ({str(error).rstrip('.')}); get them from "
            f"{WHERE}."
        ) from error

    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        if legacy:
            images = resized_legacy(images)
        features, logits = cast(Answer, model.apply(params, images))
        # The Inception Score's classes are without the bias, as in the graph it was defined by.
        return features, jax.nn.softmax(logits - params["params"]["fc"]["bias"])

    def prepare(images: np.ndarray) -> np.ndarray:
        images = colour(images)
        if legacy:
            return images
        return resized_clean(images, inception.SIZE, Image.Resampling.BICUBIC)

    original = hashlib.sha256(file.read_bytes()).hexdigest().startswith("6726825d")
    way = "bilinear, not antialiased" if legacy else "antialiased bicubic"
    return Extractor(
        "InceptionV3", "FID" if original else "FD-InceptionV3", inception.FEATURES, apply,
        variables, hash_of(variables), prepare, f"to {inception.SIZE} px, {way}",
    )  # fmt: skip


def digits(train: Split, classes: int) -> Extractor:
    """MNIST's own: the features of a classifier trained on its training split, the first time.
    UserError for a split that has not enough to learn from."""
    if classes < 2 or len(train.images) < classifier.BATCH:
        raise UserError(
            f"{len(train.images)} training images of {classes} classes are too few for a "
            "classifier; take --features vgg."
        )
    of = hashlib.sha256(train.images.tobytes() + train.labels.tobytes()).hexdigest()[:16]
    file = user_cache() / f"classifier-{classifier.VERSION}-{of}.npz"
    params = distributed.from_first(lambda: classifier.kept(file, train, classes))
    model = classifier.Classifier(classes)

    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, logits = cast(Answer, model.apply({"params": params}, images))
        return features, jax.nn.softmax(logits)

    return Extractor(
        "classifier", "FD-classifier", classifier.FEATURES, apply, params, hash_of(params),
        lambda images: images, "none", classes=True,
    )  # fmt: skip


def extractor_of(
    name: str, weights: Path | None, legacy: bool, of_digits: Callable[[], Extractor]
) -> Extractor:
    """The features that a protocol names: of several processes, the same. UserError where they
    cannot be had."""
    if name == "classifier":
        return of_digits()
    if name not in ("auto", "inception", "vgg"):
        raise UserError(f"there are no features '{name}'; take auto, inception, vgg or classifier.")
    file = weights
    if name != "vgg" and file is None:
        file = distributed.from_first(found_weights)
        if name == "inception" and file is None:
            file = distributed.from_first(downloaded)
    if name == "vgg" or file is None:
        return distributed.agreed(vgg)
    return distributed.agreed(functools.partial(inception_v3, file, legacy))


def found_weights() -> Path | None:
    """InceptionV3's file in the user's cache, or in PyTorch's."""
    torch = Path(os.environ.get("TORCH_HOME") or "~/.cache/torch").expanduser()
    places = (user_cache() / INCEPTION_FILE, torch / "hub" / "checkpoints" / INCEPTION_FILE)
    return next((place for place in places if place.is_file()), None)


def downloaded() -> Path:
    """InceptionV3's file, fetched into the user's cache. UserError without a network."""
    file = user_cache() / INCEPTION_FILE
    print(f"Fetching {WHERE} (91 MiB).", flush=True)
    try:
        with urllib.request.urlopen(WHERE, timeout=60) as answer:
            content = answer.read()
        if not hashlib.sha256(content).hexdigest().startswith("6726825d"):
            raise OSError("what came is another file")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"InceptionV3's weights cannot be had from {WHERE} ({error}); fetch the file elsewhere "
            f"and put it at {file}, or name it by --weights, or take --features vgg."
        ) from error
    return file


class Features:
    """An extractor on the devices, in batches of one size."""

    def __init__(self, extractor: Extractor, devices: Devices):
        self.extractor, self._devices = extractor, devices
        self.size = MICRO * len(devices)
        self._params = devices.replicate(extractor.params)

        def features(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.default_matmul_precision("highest"):
                return extractor.apply(params, to_float(images))

        self._apply = devices.compile(features)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [n,d] and probabilities [n,k] of images uint8 [n,h,w,c]."""
        prepare, devices = self.extractor.prepare, self._devices
        return devices.in_batches(
            lambda own: self._apply(self._params, devices.shard(prepare(own))), images, self.size
        )
