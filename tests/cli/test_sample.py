"""`scripts/sample.py`, and what a run of both stages can do."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import taming_jax
from taming_jax import figures
from taming_jax.cli.sample import choose_classes
from taming_jax.cli.sample_files import NpzFile, PngFolder
from taming_jax.data import datasets
from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.parallel.devices import Devices
from taming_jax.run import Run
from taming_jax.training.prior import PriorStage
from taming_jax.training.state import Net, TrainState
from tests import commands


@pytest.fixture(scope="module")
def run(both):
    return taming_jax.load_run(both)


@pytest.fixture
def sample(capsys):
    """The command in this process, on one device: its exit status, stdout and stderr."""

    def call(*arguments):
        status = commands.status_of("scripts/sample.py", "--devices", 1, *arguments)
        return status, *capsys.readouterr()

    return call


def test_the_same_images_as_npz_as_a_grid_and_as_files(sample, run, both, tmp_path):
    given = ["--workdir", both, "--classes", "square", 0, 1, "--per-class", 3, "--seed", 5, "--out"]
    for out in ("s.npz", "s.png", "folder"):
        status, said, err = sample(*given, tmp_path / out)
        assert status == 0 and f"Wrote 6 images of 2 classes to {tmp_path / out}." in said, err
    archive = np.load(tmp_path / "s.npz")
    images, labels = archive["images"], archive["labels"]
    assert images.dtype == np.uint8 and images.shape == (6, 16, 16, 1)
    assert labels.tolist() == [1, 1, 1, 0, 0, 0]
    expected = to_uint8(run.sample(["square", 0], 3, seed=5, devices=1))
    np.testing.assert_array_equal(images, expected)
    files = [f"000{label}_0000{i}.png" for label in (1, 0) for i in range(3)]
    assert {f.name for f in (tmp_path / "folder").glob("*.png")} == set(files)
    for name, image in zip(files, images, strict=True):
        np.testing.assert_array_equal(Image.open(tmp_path / "folder" / name), image[..., 0])
    with Image.open(tmp_path / "s.png") as grid:
        assert min(grid.size) > 100


def test_a_grid_has_a_few_rows_of_many_classes(sample, both, tmp_path, monkeypatch):
    names = tuple(f"a class with a long name, number {i}" for i in range(200))
    monkeypatch.setattr(Run, "class_names", names)
    asked = []

    def draw(self, classes, per_class, **_):
        asked.extend(classes)
        return np.zeros((len(classes) * per_class, 16, 16, 1), np.float32)

    monkeypatch.setattr(Run, "sample", draw)
    status, said, err = sample("--workdir", both, "--out", tmp_path / "s.png")
    assert status == 0 and "There are 200 classes; choose others with --classes." in said, err
    assert len(asked) == 10 and asked[0] == 0 and asked[-1] == 199
    with Image.open(tmp_path / "s.png") as grid:
        assert grid.size[1] < 2 * grid.size[0]

    def draw_samples(self, labels, numbers, **_):
        asked.extend(labels[::8])
        yield np.zeros((len(labels), 16, 16, 1), np.float32)

    monkeypatch.setattr(Run, "draw_samples", draw_samples)
    status, _, err = sample("--workdir", both, "--out", tmp_path / "s.npz")
    assert status == 0 and asked[10:] == list(range(200)), err


def test_classes_without_training_images_are_not_drawn_by_default(run, monkeypatch):
    assert choose_classes(run, (), None).tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(run, "dataset", run.dataset | {"untrained_classes": [1, 3]})
    assert choose_classes(run, (), None).tolist() == [0, 2]
    assert choose_classes(run, (), 1).tolist() == [0]
    assert choose_classes(run, ("3", "disc"), None).tolist() == [3, 0]


@pytest.mark.parametrize(("out", "files"), [("folder", PngFolder), ("s.npz", NpzFile)])
def test_an_interrupted_command_continues(sample, run, both, tmp_path, monkeypatch, out, files):
    out = tmp_path / out
    flags = ["--workdir", both, "--classes", 0, 1, "--per-class", 9, "--devices", 1, "--out", out]
    write, batches = files.write, []

    def interrupt(self, labels, numbers, images):
        batches.append(len(images))
        if len(batches) == 2:
            raise KeyboardInterrupt
        write(self, labels, numbers, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write", interrupt)
        sample(*flags)
    if files is NpzFile:  # as if it had been killed while it wrote an image
        with (tmp_path / "s.npz.partial").open("ab") as scratch:
            scratch.write(b"half")
    status, _, err = sample(*flags, "--seed", 1)
    assert status == 2 and "drawn with other settings (seed, see" in err, err
    status, stdout, err = sample(*flags)
    assert status == 0 and f"{batches[0]} of 18 images are drawn already." in stdout, err
    expected = to_uint8(run.sample([0, 1], 9, devices=1))
    if files is PngFolder:
        names = [f"000{label}_0000{i}.png" for label in (0, 1) for i in range(9)]
        images = np.stack([np.asarray(Image.open(out / name)) for name in names])[..., None]
        assert sorted(path.name for path in out.iterdir()) == sorted([*names, "samples.json"])
        status, stdout, err = sample(*flags[:6], 10, *flags[7:])
        assert status == 0 and "18 of 20 images are drawn already." in stdout, err
    else:
        with np.load(out) as archive:
            images = archive["images"]
            assert archive["labels"].tolist() == [0] * 9 + [1] * 9
        assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    np.testing.assert_array_equal(images, expected)


def test_a_folder_of_other_pictures_is_refused(sample, both, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0000_00000.png").write_bytes(b"a picture")
    status, _, err = sample("--workdir", both, "--out", tmp_path / "mine")
    assert status == 2 and "holds other pictures; choose an empty folder" in err, err


def test_image_n_of_a_class_depends_on_nothing_else(run):
    """Not on the other classes, how many of them, the batch size or the devices."""
    expected = run.sample([2], 40, seed=1, devices=1)
    np.testing.assert_array_equal(run.sample([2], 3, seed=1, devices=1), expected[:3])
    np.testing.assert_array_equal(run.sample([0, 2], 7, seed=1, devices=1)[7:], expected[:7])
    np.testing.assert_array_equal(run.sample([2], 40, seed=1, devices=2), expected)
    np.testing.assert_array_equal(run.sample([2], 40, seed=1, devices=1, batch_size=9), expected)
    assert (run.sample([2], 3, seed=2, devices=1) != expected[:3]).any()


def test_one_image_costs_a_small_batch_on_a_cpu(run, monkeypatch):
    drawn = []
    draw = run._sampler._compile_once(1, None, (8, 8))

    def counted(params, arrays):
        drawn.append(len(arrays["labels"]))
        return draw(params, arrays)

    monkeypatch.setattr(run._sampler, "_compile_once", lambda *_: counted)
    run.sample([0], devices=1)
    run.sample([0], 9, devices=1)
    assert drawn == [8, 8, 8]


def test_training_draws_the_images_that_sampling_draws(run, both, tmp_path, monkeypatch):
    """Of the same seed, classes and numbers."""
    config = dataclasses.replace(run.config, workdir=str(both))
    stage = PriorStage(config, Devices(1))
    params = {"transformer": run.transformer, "generator": run.params}
    state = TrainState(jnp.int32(2), {name: Net(x, ()) for name, x in params.items()})
    shown = []
    monkeypatch.setattr(figures, "plot_loss_curves", lambda *_, **__: None)
    monkeypatch.setattr(figures, "draw_grid", lambda images, *_: shown.append(images))
    monkeypatch.setattr(figures, "save", lambda *_: None)
    stage.draw_figures(state, tmp_path, {}, [])
    expected = run.sample(range(4), 8, seed=config.seed, devices=1)
    np.testing.assert_array_equal(shown[0], to_uint8(expected))


def test_what_was_compiled_is_used_again(run):
    run.sample([0], prefix=[1, 2], seed=8, devices=1)
    compiled = run._sampler._compile_once.cache_info().misses
    other = run.sample([1], prefix=[3, 4], seed=9, devices=1)
    assert run._sampler._compile_once.cache_info().misses == compiled
    assert other.shape == (1, 16, 16, 1)


def test_the_names_of_classes_outlive_the_checkpoint(both, tmp_path):
    """As where stage 2 trains on, and its store keeps another."""
    run = taming_jax.load_run(shutil.copytree(both, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run.class_names == ("disc", "square", "large disc", "large square")


def test_classes_by_number_are_numbers_and_by_name_names(both):
    """Names that are other classes' numbers, as folders may have."""
    run = taming_jax.load_run(both)
    run.class_names = ("1", "10", "2", "cat")
    assert run.to_labels([1, np.int64(2)]).tolist() == [1, 2]
    assert run.to_labels(["1", "10", "cat", "3"]).tolist() == [0, 1, 3, 3]
    assert run.to_labels(str(i) for i in (2, 10)).tolist() == [2, 1]
    assert run.to_labels(3).tolist() == run.to_labels("cat").tolist() == [3]
    for unknown in (-1, 4, "dog", "-1"):
        with pytest.raises(UserError, match="there is no class"):
            run.to_labels([unknown])


def test_one_guidance_scale_is_two_that_are_equal(run):
    draw = {"seed": 3, "devices": 1}
    np.testing.assert_array_equal(
        run.sample([1], 4, guidance_scale=3.0, **draw),
        run.sample([1], 4, guidance_scale=(3.0, 3.0), **draw),
    )


def test_the_log_likelihood_is_that_of_the_codes(run):
    test = datasets.load(run.config.data).test
    images, labels = test.images[:11], test.labels[:11]
    codes = run.encode(images).reshape(11, -1)
    np.testing.assert_array_equal(run.tokens("test").images[:11], codes)
    tokens = run.prior.shift_right(labels, codes)
    logits = np.asarray(run.prior.apply({"params": run.transformer}, tokens), np.float64)
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(likely, codes[..., None], -1).sum((1, 2))
    np.testing.assert_allclose(run.log_likelihood(images, labels), expected, rtol=1e-5)
    by_name = [run.class_names[label] for label in labels]
    np.testing.assert_allclose(run.log_likelihood(images, by_name), expected, rtol=1e-5)
    with pytest.raises(UserError, match=r"\(8, 4\) codes, but .* likelihoods only of \(8, 8\)"):
        run.log_likelihood(images[:, :, :8], labels)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--classes 0 cat", "no class 'cat'; the classes are 0 to 3: disc, square, large disc"),
        ("--classes 4", "no class '4'"),
        ("--top-k 129", "top-k is 129; it must be from 1 to 128"),
        ("--top-k 0", "top-k is 0"),
        ("--top-p 1.5", "top-p is 1.5"),
        ("--temperature -1", "the temperature is -1.0"),
        ("--guidance-scale -1", "the guidance scale is"),
        ("--guidance-scale 1 2 3", "the guidance scale is"),
        ("--per-class 0", "there is nothing to draw: 0 images of 4 classes"),
        ("--batch-size 0", "the batch size is 0"),
        ("--devices 64", "--devices is 64, but the number of"),
        ("--devices 0", "--devices is 0"),
        ("--out /proc/s.npz", "/proc/s.npz cannot be written"),
        ("--out nowhere/s.npz", "cannot be written (No such file or directory)"),
        ("--out s.jpg", "name a .npz or a .png file"),
        ("--seed -1", "the seed is -1"),
        ("--workdir nowhere", "there is no folder nowhere"),
        ("--size 17x16", "multiples of 2, and at least 16 and 16"),
        ("--size 32x14", "the size is (14, 32)"),
        ("--keep top", "--keep and --mask apply only to completed pictures"),
        ("--complete none.png", "there is no picture none.png"),
        ("--complete /dev/null", "/dev/null cannot be read as a picture"),
        ("--complete /dev/null --keep 0.5 --mask m.png", "--keep and --mask exclude each other"),
    ],
)
def test_bad_input_is_a_sentence(sample, both, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    status, _, err = sample("--workdir", both, "--out", "s.npz", *arguments.split())
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_have_any_name(sample, both, tmp_path):
    (tmp_path / "v1.5").mkdir()
    status, _, err = sample("--workdir", both, "--per-class", 1, "--out", tmp_path / "v1.5")
    assert status == 0 and len(list((tmp_path / "v1.5").glob("*.png"))) == 4, err


def test_a_file_in_the_way_of_the_folder_is_a_sentence(sample, both, tmp_path):
    (tmp_path / "taken").write_text("mine")
    status, _, err = sample("--workdir", both, "--out", tmp_path / "taken")
    assert status == 2 and "is a file" in err and err.count("\n") == 1, err


def test_a_run_without_a_prior_has_nothing_to_sample(sample, stage1, tmp_path):
    status, _, err = sample("--workdir", stage1, "--out", tmp_path / "s.npz")
    assert status == 2 and "has no prior yet" in err and err.count("\n") == 1, err


def test_greedy_images_of_a_class_are_all_the_same(run):
    images = run.sample([3], 3, temperature=0.0, devices=1)
    assert (images == images[:1]).all()


def test_a_prefix_that_is_no_codes_is_a_sentence(run):
    for prefix in ([128], [-1], [0] * 65, [[0]]):
        with pytest.raises(
            UserError,
            match="a prefix must (hold at most 64 codes from 0 to 127|be a one-dimensional array)",
        ):
            run.sample([0], prefix=prefix)


def test_samples_need_no_data(both, tmp_path, monkeypatch):
    """A run that was copied elsewhere knows its classes."""
    monkeypatch.setattr(datasets, "load", None)
    elsewhere = taming_jax.load_run(shutil.copytree(both, tmp_path / "run"))
    assert elsewhere.sample(["large disc"], devices=1).shape == (1, 16, 16, 1)


@pytest.mark.slow
def test_larger_images_are_drawn_in_windows(sample, run, both, tmp_path):
    given = ["--workdir", both, "--classes", 0, 1, "--per-class", 2, "--guidance-scale", 1.5]
    status, _, err = sample(*given, "--size", "24x20", "--out", tmp_path / "s.npz")
    assert status == 0, err
    images = np.load(tmp_path / "s.npz")["images"]
    assert images.shape == (4, 20, 24, 1)
    settings = {"guidance_scale": 1.5, "size": (20, 24)}
    np.testing.assert_array_equal(images[:2], to_uint8(run.sample([0], 2, devices=1, **settings)))
    # Of the training images' size, they are those that the cache draws.
    whole = run.sample([0], 2, size=(16, 16), devices=1)
    np.testing.assert_array_equal(whole, run.sample([0], 2, devices=1))


@pytest.mark.slow
def test_the_rest_of_pictures_is_drawn(sample, run, both, tmp_path):
    pictures = datasets.load(run.config.data).test.images[:3]
    for i, image in enumerate(pictures):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    given = ["--workdir", both, "--per-class", 2, "--out", tmp_path / "s.npz"]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    status, said, err = sample(*given, "--complete", *files, "--classes", 1, "--keep", 0.25)
    assert status == 0 and "Wrote 6 completions of 3 pictures to" in said, err
    archive = np.load(tmp_path / "s.npz")
    assert archive["labels"].tolist() == [1] * 6
    found = run.complete(pictures, 1, 2, keep=0.25, devices=1)
    np.testing.assert_array_equal(archive["images"], to_uint8(found))

    codes, rows = run.encode(pictures), np.arange(8)[:, None] < 2
    drawn = run.complete(pictures, [1, 0, 1], temperature=0, guidance_scale=1, keep=0.25)
    known = np.where(rows, codes, -1).reshape(3, -1)
    parts = run.draw_samples(np.array([1, 0, 1]), np.zeros(3, np.int32), known=known, temperature=0,
                      guidance_scale=1)  # fmt: skip
    np.testing.assert_array_equal(drawn, np.concatenate(list(parts)))
    # All but the last code kept: the pictures' reconstructions, but for what that code touches.
    mask = np.ones((8, 8), bool)
    mask[-1, -1] = False
    nearly = run.complete(pictures, 0, mask=mask)
    np.testing.assert_allclose(nearly[:, :2, :2], run.decode(codes)[:, :2, :2], atol=0.2)
    # A mask of pixels keeps codes of which most are kept; of no class is a class as well.
    pixels = np.repeat(np.repeat(mask, 2, 0), 2, 1)
    pixels[0, 0] = False
    np.testing.assert_array_equal(run.complete(pictures, 0, mask=pixels), nearly)
    assert run.complete(pictures, None, mask=mask).shape == (3, 16, 16, 1)
    status, _, err = sample(*given[:-1], tmp_path / "c", "--complete", *files)
    assert status == 0 and (tmp_path / "c" / "0002_2_00001.png").exists(), err
    # A grid begins with the pictures themselves.
    status, _, err = sample(*given[:-1], tmp_path / "c.png", "--complete", *files)
    assert status == 0, err
    with Image.open(tmp_path / "c.png") as grid:
        assert grid.size[0] > grid.size[1] / 2  # three columns, three rows


def test_what_cannot_be_completed_is_a_sentence(run):
    images = np.zeros((2, 16, 16, 1), np.uint8)
    for arguments, says in (
        ({"classes": [0, 1, 2]}, "2 images and 3 classes"),
        ({"keep": 1.5}, "keep is 1.5; it must be a share"),
        ({"keep": 0.01}, "keep is 0.01; it must be a share"),
        ({"mask": np.ones((3, 3))}, "the mask is 3x3; it must be 8x8 codes, or 16x16"),
        ({"per_image": 0}, "there is nothing to draw: 0 completions"),
        ({"size": (16, 16)}, "multiple values"),
    ):
        with pytest.raises((UserError, TypeError), match=says):
            run.complete(images, **arguments)
