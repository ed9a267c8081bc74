"""The model card of a run: the README.md of a repository with its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from taming_jax.evaluation.table import collect_metrics, format_number
from taming_jax.parallel.distributed import get_versions
from taming_jax.run import Run

# The metrics of a report that a card explains.
MEANINGS = {
    "psnr": "dB", "ssim": "1 is best", "lpips": "VGG16, lower is better",
    "usage": "share of the codes in use", "perplexity": "of the codes",
    "accuracy": "share of samples that a classifier reads as their class",
    "precision": "arXiv 1904.06991", "recall": "arXiv 1904.06991",
    "density": "arXiv 2002.09797", "coverage": "arXiv 2002.09797",
}  # fmt: skip


def find_report_problem(run: Run, report: dict[str, Any] | None) -> str:
    """Returns why a report does not describe a run's weights, or an empty string if it does."""
    if report is None:
        return "the run has not been evaluated"
    if report["protocol"].get("hash") != run.hash_weights():
        return "the evaluation report is that of other weights"
    return ""


def build_card(
    run: Run,
    repository: str,
    report: dict[str, Any] | None,
    license: str | None,
    pictures: Sequence[tuple[str, str]],
) -> str:
    """Returns the card of a run, in Markdown. `pictures` are pairs of a title and a file."""
    data = run.config.data
    tags = ["jax", "flax", "vq-gan", "image-tokenizer", "image-generation"]
    metadata: dict[str, Any] = {"library_name": "taming_jax", "tags": tags}
    if license is not None:
        metadata["license"] = license
    if "/" in data.name:
        metadata["datasets"] = [data.name]
    name = repository.rsplit("/", 1)[-1]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).rstrip(), "---", f"# {name}", ""]
    lines += [describe_model(run), ""]
    for title, file in pictures:
        lines += [f"![{title}]({file})", "", f"{title}.", ""]
    lines += ["## How to load it", "", *describe_loading(run, repository), ""]
    lines += ["## Data", "", describe_data(run), "", "## Evaluation", ""]
    problem = find_report_problem(run, report)
    if report is None or problem:
        lines.append(
            f"There are no figures here: {problem}. `taming-jax evaluate --workdir RUN` measures "
            "reconstructions and samples, and writes the report that this section is made from."
        )
    else:
        lines += describe_report(report)
    lines += ["", "## Licence", ""]
    lines.append(
        f"These weights are published under the licence `{license}`." if license is not None
        else "The author has not chosen a licence for these weights."
    )  # fmt: skip
    version = get_versions()["taming_jax"]
    lines += ["", f"`config.json` holds all settings. Written by taming_jax {version}.", ""]
    return "\n".join(lines)


def describe_model(run: Run) -> str:
    """Returns sentences about the networks and their training."""
    config, data = run.config, run.config.data
    grid = config.grid_size
    sentences = [
        f"A VQ-GAN that turns {'gray' if data.channels == 1 else 'color'} images of "
        f"{data.image_size}x{data.image_size} pixels into {grid}x{grid} codes and back. There are "
        f"{config.vqgan.codebook_size:,} codes (quantizer `{config.vqgan.quantizer}`)."
    ]
    batch_size = config.vqgan.batch_size
    if run.transformer is not None:
        count, batch_size = len(run.class_names), config.prior.batch_size
        classes = f"{count} class{'es' * (count > 1)}"
        sentences.append(f"A prior (`{config.prior.kind}`) draws new images of {classes}.")
    if run.step:  # of a run that was imported or pulled, it is not known
        name = "It" if run.transformer is None else "The prior"
        sentences.append(f"{name} was trained for {run.step:,} steps of {batch_size} images.")
    return " ".join(sentences)


def describe_loading(run: Run, repository: str) -> list[str]:
    """Returns lines that show how to load the run."""
    lines = ["```python", "import taming_jax", ""]
    address = f"hf://{repository}" if "/" in repository else repository
    lines += [f'run = taming_jax.load_run("{address}")']
    if run.transformer is not None:
        lines += [f"images = run.sample({run.trained_classes[0]}, 8)  # float [-1, 1]"]
    lines += ["codes = run.encode(pictures)  # uint8 [n, h, w, c]", "```", ""]
    workdir = f"runs/{repository.rsplit('/', 1)[-1]}"
    lines += [
        f"`taming-jax pull {repository} --workdir {workdir}` makes a run of it, for the other"
    ]
    lines += ["commands and for further training."]
    return lines


def describe_data(run: Run) -> str:
    """Returns sentences about the data that the run was trained on."""
    dataset = run.dataset or {}
    sentences = [f"Dataset `{run.config.data.name}`"]
    if "images" in dataset:
        counts = (f"{count:,} {name} images" for name, count in dataset["images"].items())
        sentences.append(f": {', '.join(counts)}")
    sentences.append(".")
    if names := dataset.get("class_names"):
        shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
        sentences.append(f" Classes: {shown}.")
    return "".join(sentences)


def describe_report(report: dict[str, Any]) -> list[str]:
    """Returns lines with a table of the metrics, and the protocol."""
    lines = ["| of | metric | value | |", "| --- | --- | ---: | --- |"]
    for (kind, name), value in collect_metrics(report).items():
        lines.append(f"| {kind} | {name} | {format_number(value)} | {MEANINGS.get(name, '')} |")
    protocol = {name: value for name, value in report["protocol"].items() if value is not None}
    if "reference_file" in protocol:  # its folder is of no use to others
        protocol["reference_file"] = Path(protocol["reference_file"]).name
    hidden = ("run", "config", "generator", "hash", "dataset_hash", "images_hash", "weights")
    phrases = [f"{name} {value}" for name, value in protocol.items() if name not in hidden]
    lines += ["", f"Protocol: {', '.join(phrases)}."]
    lines += [f"\nWarning: {warning}" for warning in report["warnings"]]
    return lines
