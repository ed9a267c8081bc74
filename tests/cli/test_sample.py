"""Tests of `scripts/sample.py` and of the methods of a run with both stages."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import taming_jax
from taming_jax import figures
from taming_jax.cli.sample_files import NpzFile, PngFolder
from taming_jax.data import datasets
from taming_jax.data.pixels import to_uint8
from taming_jax.errors import UserError
from taming_jax.parallel.devices import Devices
from taming_jax.run import Run
from taming_jax.sampler import Drawing, Sampler
from taming_jax.storage import folder_lock
from taming_jax.training.prior import PriorStage
from taming_jax.training.state import Net, TrainState
from tests import commands

STATIC = (("top_k", None), ("top_p", None))  # the sampling settings compiled into the program


@pytest.fixture(scope="module")
def run(prior_workdir):
    return taming_jax.load_run(prior_workdir)


@pytest.fixture
def sample(capsys):
    """Returns a function that runs the command in this process on one device and returns its exit
    status, stdout, and stderr."""

    def call(*arguments):
        status = commands.run_for_status("scripts/sample.py", "--devices", 1, *arguments)
        return status, *capsys.readouterr()

    return call


def test_samples_are_written_as_npz_as_a_grid_or_as_files(sample, run, prior_workdir, tmp_path):
    arguments = ["--workdir", prior_workdir, "--classes", "square", 0, 1, "--per-class", 3]
    arguments += ["--seed", 5, "--out"]
    for out in ("s.npz", "s.png", "folder"):
        status, output, err = sample(*arguments, tmp_path / out)
        assert status == 0 and f"Wrote 6 images of 2 classes to {tmp_path / out}." in output, err
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


def test_a_grid_shows_ten_of_many_classes(sample, prior_workdir, tmp_path, monkeypatch):
    names = tuple(f"a class with a long name, number {i}" for i in range(200))
    monkeypatch.setattr(Run, "class_names", names)
    requested = []

    def draw(self, drawing, **_):
        requested.extend(drawing.labels[::8])
        yield np.zeros((len(drawing.labels), 16, 16, 1), np.float32)

    monkeypatch.setattr(Sampler, "draw", draw)
    status, output, err = sample("--workdir", prior_workdir, "--out", tmp_path / "s.png")
    assert status == 0 and "There are 200 classes; choose others with --classes." in output, err
    assert len(requested) == 10 and requested[0] == 0 and requested[-1] == 199
    with Image.open(tmp_path / "s.png") as grid:
        assert grid.size[1] < 2 * grid.size[0]
    status, _, err = sample("--workdir", prior_workdir, "--out", tmp_path / "s.npz")
    assert status == 0 and requested[10:] == list(range(200)), err


def test_classes_without_training_images_are_not_drawn_by_default(
    sample, prior_workdir, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(Run, "trained_classes", [0, 2])
    flags = ["--workdir", prior_workdir, "--per-class", 1, "--out"]
    for name, classes, expected in (("a", (), [0, 2]), ("b", ("3", "disc"), [3, 0])):
        status, _, err = sample(*flags, tmp_path / f"{name}.npz", "--classes", *classes)
        assert status == 0 and np.load(tmp_path / f"{name}.npz")["labels"].tolist() == expected, err


def test_trained_classes_come_from_the_dataset(run, monkeypatch):
    assert run.trained_classes == [0, 1, 2, 3]
    monkeypatch.setattr(run, "dataset", run.dataset | {"untrained_classes": [1, 3]})
    assert run.trained_classes == [0, 2]


@pytest.mark.parametrize(("out", "files"), [("folder", PngFolder), ("s.npz", NpzFile)])
def test_an_interrupted_command_continues(
    sample, run, prior_workdir, tmp_path, monkeypatch, out, files
):
    out = tmp_path / out
    flags = [
        "--workdir",
        prior_workdir,
        "--classes",
        0,
        1,
        "--per-class",
        9,
        "--devices",
        1,
        "--out",
        out,
    ]
    write, batches = files.write, []

    def interrupt(self, rows, images):
        batches.append(len(images))
        if len(batches) == 2:
            raise KeyboardInterrupt
        write(self, rows, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write", interrupt)
        sample(*flags)
    if files is NpzFile:  # as if it had been killed while it wrote an image
        with (tmp_path / "s.npz.partial" / "images.u8").open("ab") as scratch:
            scratch.write(b"half")
    status, _, err = sample(*flags, "--seed", 1)
    assert status == 2 and "drawn with other settings (seed, see" in err, err
    folder = out if files is PngFolder else tmp_path / "s.npz.partial"
    with folder_lock(folder):
        status, _, err = sample(*flags)
    assert status == 2 and f"is drawing images in {folder}; wait for it" in err, err
    status, stdout, err = sample(*flags)
    assert status == 0 and f"{batches[0]} of 18 images have already been drawn." in stdout, err
    expected = to_uint8(run.sample([0, 1], 9, devices=1))
    if files is PngFolder:
        names = [f"000{label}_0000{i}.png" for label in (0, 1) for i in range(9)]
        images = np.stack([np.asarray(Image.open(out / name)) for name in names])[..., None]
        assert sorted(path.name for path in out.iterdir()) == sorted([*names, "samples.json"])
        status, stdout, err = sample(*flags[:6], 10, *flags[7:])
        assert status == 0 and "18 of 20 images have already been drawn." in stdout, err
    else:
        with np.load(out) as archive:
            images = archive["images"]
            assert archive["labels"].tolist() == [0] * 9 + [1] * 9
        assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    np.testing.assert_array_equal(images, expected)


def test_a_folder_of_other_pictures_is_refused(sample, prior_workdir, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0000_00000.png").write_bytes(b"a picture")
    status, _, err = sample("--workdir", prior_workdir, "--out", tmp_path / "mine")
    assert status == 2 and "holds other pictures; choose an empty folder" in err, err


def test_image_n_of_a_class_depends_only_on_the_seed(run):
    """It depends on neither the other images and classes nor the batch size or the devices."""
    expected = run.sample([2], 40, seed=1, devices=1)
    np.testing.assert_array_equal(run.sample([2], 3, seed=1, devices=1), expected[:3])
    np.testing.assert_array_equal(run.sample([0, 2], 7, seed=1, devices=1)[7:], expected[:7])
    np.testing.assert_array_equal(run.sample([2], 40, seed=1, devices=2), expected)
    np.testing.assert_array_equal(run.sample([2], 40, seed=1, devices=1, batch_size=9), expected)
    assert (run.sample([2], 3, seed=2, devices=1) != expected[:3]).any()


def test_few_images_are_drawn_in_small_batches_on_a_cpu(run, monkeypatch):
    batch_sizes = []
    draw = run.sampler._compile_once(1, (8, 8), STATIC)

    def draw_and_count(params, arrays):
        batch_sizes.append(len(arrays["labels"]))
        return draw(params, arrays)

    monkeypatch.setattr(run.sampler, "_compile_once", lambda *_: draw_and_count)
    run.sample([0], devices=1)
    run.sample([0], 9, devices=1)
    assert batch_sizes == [8, 8, 8]


def test_the_devices_draw_one_batch_ahead(run, monkeypatch):
    draw, drawn = run.sampler._compile_once(1, run.prior.grid, STATIC), []

    def draw_and_record(params, arrays):
        drawn.append(len(drawn))
        return draw(params, arrays)

    def draw_batches(batch_size):
        drawn.clear()
        drawing = run.sampler.plan_samples([0], 41)  # five batches of 8 and one image
        for batch in run.sampler.draw(drawing, devices=1, batch_size=batch_size):
            yield len(batch), len(drawn)

    monkeypatch.setattr(run.sampler, "_compile_once", lambda *_: draw_and_record)
    assert list(draw_batches(None)) == [(8, 2), (8, 3), (8, 4), (8, 5), (8, 6), (1, 6)]
    assert list(draw_batches(17)) == [(8, 4), (8, 5), (8, 6), (8, 6), (8, 6), (1, 6)]


def test_the_samples_in_training_figures_equal_those_of_the_run(
    run, prior_workdir, tmp_path, monkeypatch
):
    """The seed, the classes, and the numbers of images are the same."""
    config = dataclasses.replace(run.config, workdir=str(prior_workdir))
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


def test_sampling_reuses_the_compiled_program(run):
    run.sample([0], prefix=[1, 2], seed=8, devices=1)
    cache_misses = run.sampler._compile_once.cache_info().misses
    images = run.sample([1], prefix=[3, 4], seed=9, devices=1)
    assert run.sampler._compile_once.cache_info().misses == cache_misses
    assert images.shape == (1, 16, 16, 1)


def test_a_loaded_run_keeps_its_class_names_after_its_checkpoint_is_deleted(
    prior_workdir, tmp_path
):
    """Further training of stage 2 deletes old checkpoints."""
    run = taming_jax.load_run(shutil.copytree(prior_workdir, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run.class_names == ("disc", "square", "large disc", "large square")


def test_integers_are_class_numbers_and_strings_are_class_names(prior_workdir):
    """Some names look like the numbers of other classes, as names of folders may."""
    run = taming_jax.load_run(prior_workdir)
    run.class_names = ("1", "10", "2", "cat")
    assert run.to_labels([1, np.int64(2)]).tolist() == [1, 2]
    assert run.to_labels(["1", "10", "cat", "3"]).tolist() == [0, 1, 3, 3]
    assert run.to_labels(str(i) for i in (2, 10)).tolist() == [2, 1]
    assert run.to_labels(3).tolist() == run.to_labels("cat").tolist() == [3]
    for unknown in (-1, 4, "dog", "-1"):
        with pytest.raises(UserError, match="there is no class"):
            run.to_labels([unknown])


def test_one_guidance_scale_equals_a_constant_schedule(run):
    options = {"seed": 3, "devices": 1}
    np.testing.assert_array_equal(
        run.sample([1], 4, guidance_scale=3.0, **options),
        run.sample([1], 4, guidance_scale=(3.0, 3.0), **options),
    )


def test_the_log_likelihood_equals_that_of_the_codes(run):
    test = datasets.load(run.config.data).test
    images, labels = test.images[:11], test.labels[:11]
    codes = run.encode(images).reshape(11, -1)
    np.testing.assert_array_equal(run.tokens("test").images[:11], codes)
    tokens = run.prior.shift_right(labels, codes)
    logits = np.asarray(run.prior.apply({"params": run.transformer}, tokens), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_probs, codes[..., None], -1).sum((1, 2))
    np.testing.assert_allclose(run.log_likelihood(images, labels), expected, rtol=1e-5)
    by_name = [run.class_names[label] for label in labels]
    np.testing.assert_allclose(run.log_likelihood(images, by_name), expected, rtol=1e-5)
    with pytest.raises(UserError, match=r"\(8, 4\) codes, but .* only for grids of \(8, 8\)"):
        run.log_likelihood(images[:, :, :8], labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
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
        (
            "--complete /dev/null --keep 0.5 --mask m.png",
            "--keep and --mask cannot be used together",
        ),
    ],
)
def test_bad_input_is_reported_in_one_line(
    sample, prior_workdir, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    status, _, err = sample("--workdir", prior_workdir, "--out", "s.npz", *arguments.split())
    assert status == 2 and message in err, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_may_have_any_name(sample, prior_workdir, tmp_path):
    (tmp_path / "v1.5").mkdir()
    status, _, err = sample(
        "--workdir", prior_workdir, "--per-class", 1, "--out", tmp_path / "v1.5"
    )
    assert status == 0 and len(list((tmp_path / "v1.5").glob("*.png"))) == 4, err


def test_a_file_in_place_of_the_output_folder_is_reported(sample, prior_workdir, tmp_path):
    (tmp_path / "taken").write_text("mine")
    status, _, err = sample("--workdir", prior_workdir, "--out", tmp_path / "taken")
    assert status == 2 and "is a file" in err and err.count("\n") == 1, err


def test_a_run_without_a_prior_cannot_be_sampled(sample, vqgan_workdir, tmp_path):
    status, _, err = sample("--workdir", vqgan_workdir, "--out", tmp_path / "s.npz")
    assert status == 2 and "has no prior yet" in err and err.count("\n") == 1, err


def test_greedy_samples_of_a_class_are_equal(run):
    images = run.sample([3], 3, temperature=0.0, devices=1)
    assert (images == images[:1]).all()


def test_an_invalid_prefix_is_refused(run):
    for prefix in ([128], [-1], [0] * 65, [[0]]):
        with pytest.raises(
            UserError,
            match="a prefix must (hold at most 64 codes from 0 to 127|be a one-dimensional array)",
        ):
            run.sample([0], prefix=prefix)


def test_sampling_needs_no_dataset(prior_workdir, tmp_path, monkeypatch):
    """A run that was copied elsewhere still knows its classes."""
    monkeypatch.setattr(datasets, "load", None)
    copied_run = taming_jax.load_run(shutil.copytree(prior_workdir, tmp_path / "run"))
    assert copied_run.sample(["large disc"], devices=1).shape == (1, 16, 16, 1)


@pytest.mark.slow
def test_larger_images_are_sampled_in_windows(sample, run, prior_workdir, tmp_path):
    arguments = ["--workdir", prior_workdir, "--classes", 0, 1, "--per-class", 2]
    arguments += ["--guidance-scale", 1.5]
    status, _, err = sample(*arguments, "--size", "24x20", "--out", tmp_path / "s.npz")
    assert status == 0, err
    images = np.load(tmp_path / "s.npz")["images"]
    assert images.shape == (4, 20, 24, 1)
    settings = {"guidance_scale": 1.5, "size": (20, 24)}
    np.testing.assert_array_equal(images[:2], to_uint8(run.sample([0], 2, devices=1, **settings)))
    # At the size of the training images, windows and the cache draw the same images.
    images_of_training_size = run.sample([0], 2, size=(16, 16), devices=1)
    np.testing.assert_array_equal(images_of_training_size, run.sample([0], 2, devices=1))


@pytest.mark.slow
def test_completions_keep_part_of_each_picture_and_draw_the_rest(
    sample, run, prior_workdir, tmp_path
):
    pictures = datasets.load(run.config.data).test.images[:3]
    for i, image in enumerate(pictures):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    arguments = ["--workdir", prior_workdir, "--per-class", 2, "--out", tmp_path / "s.npz"]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    status, output, err = sample(*arguments, "--complete", *files, "--classes", 1, "--keep", 0.25)
    assert status == 0 and "Wrote 6 completions of 3 pictures to" in output, err
    archive = np.load(tmp_path / "s.npz")
    assert archive["labels"].tolist() == [1] * 6
    completions = run.complete(pictures, 1, 2, keep=0.25, devices=1)
    np.testing.assert_array_equal(archive["images"], to_uint8(completions))

    codes, rows = run.encode(pictures), np.arange(8)[:, None] < 2
    greedy = run.complete(pictures, [1, 0, 1], temperature=0, guidance_scale=1, keep=0.25)
    known = np.where(rows, codes, -1).reshape(3, -1)
    drawing = Drawing(np.array([1, 0, 1]), np.zeros(3, np.int32), known)
    batches = run.sampler.draw(drawing, temperature=0, guidance_scale=1)
    np.testing.assert_array_equal(greedy, np.concatenate(list(batches)))
    # If all codes but the last are kept, the top left corners equal the reconstructions.
    mask = np.ones((8, 8), bool)
    mask[-1, -1] = False
    almost_kept = run.complete(pictures, 0, mask=mask)
    np.testing.assert_allclose(almost_kept[:, :2, :2], run.decode(codes)[:, :2, :2], atol=0.2)
    # A mask of pixels keeps a code if it keeps most of its pixels. The class may be None.
    pixels = np.repeat(np.repeat(mask, 2, 0), 2, 1)
    pixels[0, 0] = False
    np.testing.assert_array_equal(run.complete(pictures, 0, mask=pixels), almost_kept)
    assert run.complete(pictures, None, mask=mask).shape == (3, 16, 16, 1)
    for written in (0, 5):  # the second command draws what is missing
        status, output, err = sample(*arguments[:-1], tmp_path / "c", "--complete", *files)
        assert status == 0 and (tmp_path / "c" / "0002_2_00001.png").exists(), err
        assert ("5 of 6 images have already been drawn." in output) == (written == 5)
        (tmp_path / "c" / "0001_1_00000.png").unlink()
    status, _, err = sample(*arguments[:-1], tmp_path / "c", "--complete", files[0])
    assert status == 2 and "drawn with other settings (images, see samples.json)" in err, err
    # The first column of a grid contains the pictures themselves.
    status, _, err = sample(*arguments[:-1], tmp_path / "c.png", "--complete", *files)
    assert status == 0, err
    with Image.open(tmp_path / "c.png") as grid:
        assert grid.size[0] > grid.size[1] / 2  # three columns, three rows


def test_invalid_completions_are_refused(run):
    images = np.zeros((2, 16, 16, 1), np.uint8)
    for arguments, message in (
        ({"classes": [0, 1, 2]}, "2 images and 3 classes"),
        ({"keep": 1.5}, "keep is 1.5; it must be a fraction"),
        ({"keep": 0.01}, "keep is 0.01; it must be a fraction"),
        ({"mask": np.ones((3, 3))}, "the mask is 3x3; it must be 8x8 codes, or 16x16"),
        ({"per_image": 0}, "there is nothing to draw: 0 completions"),
        ({"size": (16, 16)}, "has no sampling setting size"),
    ):
        with pytest.raises((UserError, TypeError), match=message):
            run.complete(images, **arguments)
