import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from taming_jax import figures


def test_tiles_are_arranged_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2)
    sheet = figures.tile_images(images, columns=3, gap=1)
    assert sheet.shape == (3 + 1 + 3, 3 * 5 - 1, 1)
    assert (sheet[:3, 5:9] == 1).all() and (sheet[4:, :4] == 3).all()
    assert (sheet[3] == 255).all() and (sheet[4:, 10:] == 255).all()


def test_loss_curves_show_every_metric(tmp_path, monkeypatch):
    rows = [{"step": s, "split": "train", "l1": 1 / s, "epoch": 0.1} for s in range(1, 300)]
    rows += [{"step": 299, "split": "validation", "l1": 0.1, "usage": 0.5, "sharpness": 2.0}]
    path, titles = tmp_path / "curves.png", []
    set_title = Axes.set_title
    monkeypatch.setattr(
        Axes, "set_title", lambda axes, *a, **k: titles.append(a[0]) or set_title(axes, *a, **k)
    )
    figures.plot_loss_curves(rows, path, "title", mark=150)
    assert titles == ["L1 (images in [0, 1])", "share of codes in use", "sharpness"]
    with Image.open(path) as image:
        assert image.size[0] > image.size[1]
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"], "no partial file is left"


def test_losses_that_are_not_positive_have_a_linear_scale(tmp_path, monkeypatch):
    scales = []
    monkeypatch.setattr(Axes, "set_yscale", lambda axes, scale: scales.append(scale))
    for values in ([1.0, 0.1], [1.0, -0.1], [0.0, 0.0]):
        rows = [{"step": i, "split": "train", "codebook": x} for i, x in enumerate(values)]
        figures.plot_loss_curves(rows, tmp_path / "curves.png", "title")
    assert scales == ["log"]


def test_long_class_names_are_not_cut_off():
    images = np.zeros((16, 64, 64, 3), np.float32)
    figure = figures.draw_grid(images, ["n01440764_tench", "n02835271_bicycle-built"], 8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for label in figure.axes[0].get_yticklabels():
        assert label.get_window_extent(canvas.get_renderer()).x0 > 5


def test_a_title_above_few_images_is_not_cut_off():
    images = np.zeros((9, 32, 32, 3), np.float32)
    title = "Validation images after step 4000; under each error its mean (0 to 1)"
    figure = figures.draw_grid(images, ["original", "reconstruction", "error"], 3, title)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure._suptitle.get_window_extent(canvas.get_renderer())
    assert box.x1 <= figure.bbox.x1


def test_captions_are_centered_below_their_columns():
    images = np.zeros((8, 28, 28, 1), np.float32)
    figure = figures.draw_grid(images, ["one", "two"], 4, "title", ["0.1", "0.2", "0.3", "0.4"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes, renderer = figure.axes[0], canvas.get_renderer()
    picture = axes.get_window_extent(renderer)
    for i, label in enumerate(axes.get_xticklabels()):
        box = label.get_window_extent(renderer)
        assert box.y0 > 0 and box.y1 < picture.y0
        assert abs((box.x0 + box.x1) / 2 - (picture.x0 + (i + 0.5) * picture.width / 4)) < 5


def test_a_grid_without_row_names_is_as_wide_as_its_images():
    images = np.zeros((32, 28, 28, 1), np.uint8)
    figure = figures.draw_grid(images, (), 16, "title")
    assert figure.get_figwidth() < 8.2 and not figure.axes[0].get_yticklabels()


def test_small_images_are_enlarged_without_smoothing():
    """Ten digits in a row are enlarged by a factor below three, for which matplotlib smooths by
    default."""
    for size, interpolation in ((28, "nearest"), (64, "antialiased")):
        images = np.zeros((30, size, size, 1), np.uint8)
        figure = figures.draw_grid(images, ["original", "reconstruction", "error"], 10)
        assert figure.axes[0].images[0].get_interpolation() == interpolation
