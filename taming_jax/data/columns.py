"""Chooses the columns of images and classes of a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from taming_jax.config.schema import DataConfig
from taming_jax.errors import UserError, say

TEXT = ("string", "large_string")
# Columns with these names hold classes, if a table has no column of the type of class labels.
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "species", "breed")


class Columns(NamedTuple):
    """The columns of a table of rows.

    `label` is None if there are no classes. `class_names` is empty unless classes are numbers with
    names.
    """

    image: str
    label: str | None
    class_names: tuple[str, ...]


def choose_columns(
    config: DataConfig,
    features: Mapping[str, Any],
    images: Sequence[str],
    label_kind: type,
    read: Callable[[str], Sequence[Any]] | None = None,
) -> Columns:
    """Returns the columns of images and classes.

    `images` are the columns that hold images, and the first of them is the default. `read` returns
    the values of a column of the training split. See `choose_label` for the column of classes.
    Raises UserError if there is no column of images, or none with the name that a setting gives.
    """
    names = list(features)
    if not images:
        raise UserError(
            f"the dataset has no column of images, only {', '.join(names)}; choose another dataset."
        )
    image = config.image_column or images[0]
    if image not in images:
        raise UserError(
            f"the dataset has no column '{image}' that holds images; set --data.image-column to "
            f"one of these: {', '.join(images)}."
        )
    labels = [name for name in names if isinstance(features[name], label_kind)]
    texts = [name for name in names if read and getattr(features[name], "dtype", None) in TEXT]
    label = choose_label(config.label_column, names, labels, texts, read)
    class_names = getattr(features[label], "names", None) if label else None
    return Columns(image, label, tuple(class_names or ()))


def choose_label(
    setting: str | None,
    names: Sequence[str],
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
    read: Callable[[str], Sequence[Any]] | None = None,
) -> str | None:
    """Returns the column of classes among the columns `names`, or None if there is none.

    It is the one in `setting`. Default: the first of `labels`, the columns of class labels; else
    one of `LABEL_NAMES`; else the only column of `texts` with at least two rows per value on
    average. `read` returns the values of a column. Raises UserError if there is no column
    `setting`."""
    if setting is not None and setting not in names:
        raise UserError(
            f"the dataset has no column '{setting}'; set --data.label-column to one of these: "
            f"{', '.join(names)}."
        )
    if setting or labels:
        return setting or labels[0]
    named = [name for label in LABEL_NAMES for name in names if name.lower() == label]
    if read:
        named = [name for name in named if any(value is not None for value in read(name))]
    if named or read is None:
        return named[0] if named else None
    classes = [name for name in texts if name != "split" and is_class_column(read(name))]
    return classes[0] if len(classes) == 1 else None


def is_class_column(values: Sequence[Any]) -> bool:
    """Returns whether values are texts, at least two of them distinct, each of which occurs at
    least twice on average."""
    are_texts = all(isinstance(value, str) for value in values)
    return are_texts and 1 < len(set(values)) <= len(values) / 2


def say_columns(source: str, columns: Columns, names: Iterable[str]) -> None:
    """Says which columns of a source are used, and which are not."""
    unused = [name for name in names if name not in (columns.image, columns.label)]
    label = f"classes from '{columns.label}'" if columns.label else "no classes"
    others = f" Unused columns: {', '.join(unused)}." if unused else ""
    advice = " Choose a column of classes with --data.label-column." if not columns.label else ""
    say(f"{source}: images from '{columns.image}', {label}.{others}{advice if unused else ''}")
