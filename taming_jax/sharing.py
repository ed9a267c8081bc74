"""Shares runs: as folders of plain files with a model card, and on the Hugging Face hub."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax import hub
from taming_jax.data.datasets import evenly_spaced
from taming_jax.errors import UserError, say
from taming_jax.evaluation.card import build_card, find_report_problem
from taming_jax.evaluation.table import REPORT, read_report
from taming_jax.interop.imports import (
    check_new_folder,
    create_run,
    prepare_for_training,
    write_run,
)
from taming_jax.pretrained import (
    FILES,
    Pretrained,
    is_pretrained,
    read_pretrained,
    write_pretrained,
)
from taming_jax.run import Run, load_run
from taming_jax.training.checkpoints import Store
from taming_jax.weights.arrays import hash_arrays

Source = Run | str | Path


def save_pretrained(
    run: Source,
    folder: str | Path,
    *,
    report: str | Path | dict[str, Any] | None = None,
    license: str | None = None,
    discriminator: bool = False,
    reconstructions: bool = False,
    name: str | None = None,
) -> None:
    """Writes a run (or that in a folder) to a new folder: `config.json`, `model.safetensors` with
    the generator and the prior, `dataset.json` with the fingerprint of the data, and a model card
    with pictures. `load_run` loads the folder.

    `report` is what `evaluate` returned, or the file that `taming-jax evaluate` wrote, by default
    `evaluation.json` in the run's folder. Without one, the card says that it is missing. `license`
    is the name of a licence, such as "mit". `discriminator` also writes the discriminator, for
    further training. `reconstructions` adds the figure of validation images that training drew.
    `name` is what the card calls the run, by default the name of the folder.

    Raises UserError if the folder is not empty, if the run or the report cannot be read, or if the
    run has no discriminator that belongs to its generator, or no such figure.
    """
    run = run if isinstance(run, Run) else load_run(run)
    networks: dict[str, Any] = {"generator": run.params}
    if run.transformer is not None:
        networks["transformer"] = run.transformer
    if discriminator:
        networks["discriminator"] = read_discriminator(run)
    content = Pretrained(run.config, run.step, run.dataset, jax.tree.map(np.asarray, networks))
    if report is None and (run.workdir / REPORT).exists():
        report = run.workdir / REPORT
    if isinstance(report, str | Path):
        report = read_report(Path(report))
    folder = Path(folder)
    with create_run(folder) as partial:
        if problem := find_report_problem(run, report):
            say(f"The model card has no figures, since {problem}.")
        write_pretrained(partial, content)
        pictures = draw_pictures(run, partial, reconstructions)
        card = build_card(run, name or folder.absolute().name, report, license, pictures)
        (partial / "README.md").write_text(card, encoding="utf-8")


def read_discriminator(run: Run) -> dict[str, Any]:
    """Returns the discriminator that was trained with a run's generator. Raises UserError if there
    is none."""
    if is_pretrained(run.workdir):
        network = read_pretrained(run.workdir).networks.get("discriminator")
    else:
        store, network = Store(run.workdir, "vqgan"), None
        checkpoint = store.load_best() if store.steps() else None
        net = checkpoint and checkpoint.nets.get("discriminator")
        if checkpoint and net and hash_arrays(checkpoint.generator) == hash_arrays(run.params):
            network = {"params": net["params"], "batch_stats": net["extra"]["batch_stats"]}
    if network is None:
        raise UserError(
            f"{run.workdir} has no discriminator that belongs to the run's generator; leave "
            "--discriminator out."
        )
    return network


def draw_pictures(run: Run, folder: Path, reconstructions: bool) -> list[tuple[str, str]]:
    """Draws samples of up to eight classes into a folder, and copies the reconstructions that
    training drew, if asked. Returns pairs of a title and a file name. Raises UserError if there are
    no reconstructions."""
    from taming_jax import figures  # slow to import

    pictures = []
    if run.transformer is not None:
        trained = run.trained_classes
        classes = [trained[i] for i in evenly_spaced(len(trained), 8)]
        images = run.sample(classes, 8)
        names = [run.class_names[i] for i in classes]
        figures.save(figures.draw_grid(images, names, 8), folder / "samples.png")
        pictures.append(("Samples, one row per class (seed 0)", "samples.png"))
    if reconstructions:
        file = run.workdir / "figures" / "reconstructions.png"
        if not file.exists():
            raise UserError(f"there is no {file}; leave --reconstructions out.")
        shutil.copyfile(file, folder / file.name)
        pictures.append(("Validation images, their reconstructions, and the error", file.name))
    return pictures


def push(run: Source, repository: str, *, private: bool = False, **settings: Any) -> str:
    """Uploads a run to the repository `user/name` on the Hugging Face hub, which is created if it
    does not exist, and returns its address. `settings` are those of `save_pretrained`.

    Raises UserError if the hub cannot be reached or refuses it, and like `save_pretrained`.
    """
    repository = repository.removeprefix(hub.PREFIX)
    hub.check_login(repository)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        save_pretrained(run, folder, name=repository, **settings)
        return hub.upload(folder, repository, private)


def pull(source: str | Path, workdir: str | Path) -> None:
    """Makes a run in the new folder `workdir` from a folder that `save_pretrained` wrote, or from
    `user/name` or `user/name@revision` on the Hugging Face hub. It has checkpoints with weights
    only, at step 0, from which training can continue.

    Raises UserError if the source does not exist or holds no run, or if `workdir` is not empty.
    """
    check_new_folder(Path(workdir))  # before the download
    folder = Path(source)
    if not folder.is_dir():
        folder = hub.download(str(source), FILES)
    content = read_pretrained(folder)
    write_run(Path(workdir), prepare_for_training(content.model), content.networks, content.dataset)
