"""The tables and figures that compare runs of several quantizers, priors and seeds."""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taming_jax.config.priors import PRIOR_CONFIGS
from taming_jax.config.quantizers import QUANTIZER_CONFIGS
from taming_jax.data.datasets import evenly_spaced
from taming_jax.data.pixels import to_uint8
from taming_jax.errors import RunFailed, UserError
from taming_jax.evaluation.report import evaluate
from taming_jax.run import Run, load_run
from taming_jax.storage import atomic_write, write_arrays
from taming_jax.training.writers import read_rows

RESULT, PICTURES = "result.json", "pictures.npz"  # in the folder of each run
TABLE = "comparison.md"
PICTURE_COUNT = 10
# The columns of the tables by their headings, and where a result holds their values.
TOKENIZER_COLUMNS = {
    "codes": "codes", "bits per image": "bits_per_image", "psnr": "psnr", "ssim": "ssim",
    "lpips": "lpips", "fd": "fd", "usage": "usage", "perplexity": "perplexity",
    "parameters": "parameters", "seconds per step": "seconds_per_step",
    "minutes of steps": "step_minutes",
}  # fmt: skip
PRIOR_COLUMNS = {
    "fd": "fd", "precision": "precision", "recall": "recall", "accuracy": "accuracy",
    "nats per code": "nats_per_code", "seconds for 1 image": "latency",
    "images per second (of 64)": "throughput", "parameters": "parameters",
    "seconds per step": "seconds_per_step", "minutes of steps": "step_minutes",
}  # fmt: skip


def measure_run(run: Run, stage: str, images: int | None, samples: int) -> dict[str, Any]:
    """Evaluates a run after one of its stages, and returns the values for the tables. Writes
    pictures into its folder: reconstructions for stage 1, samples for the prior."""
    config, folder = run.config, run.workdir
    report = evaluate(
        run, features="vgg", images=images, samples=samples if stage == "prior" else 0
    )
    reconstruction = report["reconstruction"]
    speeds = read_rows(folder / "metrics" / f"{stage}_speed.jsonl")
    seconds = 1 / statistics.median(row["steps_per_second"] for row in speeds)
    log = read_rows(folder / "metrics" / f"{stage}.jsonl")
    trained = run.transformer if stage == "prior" else run.params
    result = {
        "hash": run.hash_weights(),
        "protocol": report["protocol"],
        "parameters": sum(x.size for x in jax.tree.leaves(trained)),
        "seconds_per_step": seconds,
        "step_minutes": log[-1]["step"] * seconds / 60,
    }
    if stage == "prior":
        result |= report["samples"]
        if "likelihood_bits_per_code" in reconstruction:
            result["nats_per_code"] = reconstruction["likelihood_bits_per_code"] * math.log(2)
        classes = run.trained_classes
        chosen = [classes[i] for i in evenly_spaced(len(classes), PICTURE_COUNT)]
        pictures = {"pictures": to_uint8(run.sample(chosen))}
    else:
        pixels = config.data.image_size**2
        result |= reconstruction | {
            "codes": config.vqgan.codebook_size,
            "bits_per_image": reconstruction["bits_per_pixel"] * pixels,
            "entropy_bits_per_image": reconstruction["entropy_bits_per_pixel"] * pixels,
            "usage_by_step": [
                (row["step"], row["usage"]) for row in log if row["split"] == "validation"
            ],
        }
        test = run.load_data().test.images
        originals = test[evenly_spaced(len(test), PICTURE_COUNT)]
        pictures = {"pictures": run.reconstruct(originals), "originals": originals}
    write_arrays(folder / PICTURES, pictures)
    return result


def measure_speeds(workdir: Path) -> None:
    """Measures how fast all priors in a workdir draw images, unless this is known for all of them.
    They take turns, so that a busy machine slows all of them.

    Adds the `latency` of one image in seconds, and the `throughput` of 64 images in images per
    second, to the results: medians of five calls, without compilation.
    """
    results = [result for result in read_results(workdir) if result["prior"]]
    if all("latency" in result for result in results):
        return
    runs = [load_run(workdir / result["folder"]) for result in results]

    def time_call(run: Run, count: int) -> float:
        start = time.perf_counter()
        run.sample(run.trained_classes[0], count)
        return time.perf_counter() - start

    seconds = {}
    for count in (1, 64):
        for run in runs:
            time_call(run, count)  # compiles
        rounds = [[time_call(run, count) for run in runs] for _ in range(5)]
        seconds[count] = [statistics.median(times) for times in zip(*rounds, strict=True)]
    for result, one, many in zip(results, seconds[1], seconds[64], strict=True):
        result |= {"latency": one, "throughput": 64 / many}
        atomic_write(workdir / result["folder"] / RESULT, json.dumps(result).encode())


def read_results(workdir: Path) -> list[dict[str, Any]]:
    """Returns the results of all runs in a workdir, by quantizer, prior and seed."""
    results = [json.loads(file.read_text()) for file in workdir.glob(f"*/*/{RESULT}")]
    quantizers, priors = list(QUANTIZER_CONFIGS), ["", *PRIOR_CONFIGS]

    def get_key(result: dict[str, Any]) -> Any:
        quantizer, prior = result["quantizer"], result["prior"]
        kinds = quantizers.index(quantizer.split()[0]), priors.index((prior.split() or [""])[0])
        return *kinds, quantizer, prior, result["seed"]

    return sorted(results, key=get_key)


def group(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Groups results that differ only in their seed, by quantizer and prior."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["quantizer"], result["prior"]), []).append(result)
    return groups


def format_value(values: Sequence[float | None]) -> str:
    """Formats a metric of several seeds as its mean and half its range."""
    known = [x for x in values if x is not None]
    if not known:
        return "–"
    mean, half = statistics.mean(known), (max(known) - min(known)) / 2
    if all(isinstance(x, int) for x in known):
        return f"{mean:,.0f}"
    return f"{mean:.4g}" + (f" ± {half:.2g}" if half else "")


def format_table(
    names: Sequence[str],
    groups: Mapping[Any, list[dict[str, Any]]],
    columns: dict[str, str],
) -> list[str]:
    """Formats a Markdown table with one row per group, whose key holds the values of the columns
    `names`."""
    lines = [
        f"| {' | '.join([*names, *columns])} |",
        f"| {' | '.join(['---'] * len(names) + ['---:'] * len(columns))} |",
    ]
    for key, results in groups.items():
        values = [format_value([x.get(name) for x in results]) for name in columns.values()]
        lines.append(f"| {' | '.join([*key, *values])} |")
    return lines


def format_comparison(results: list[dict[str, Any]], title: str) -> str:
    """Formats the results of all runs as a Markdown page."""
    groups = group(results)
    tokenizers = {(q,): runs for (q, p), runs in groups.items() if not p}
    priors = {key: runs for key, runs in groups.items() if key[1]}
    protocol = max((result["protocol"] for result in results), key=lambda x: x["samples"])
    seeds = sorted({result["seed"] for result in results})
    lines = [
        f"# {title}", "",
        f"Evaluated on {protocol['images']} images of the {protocol['split']} split"
        + (f" and {protocol['samples']} samples" if protocol["samples"] else "")
        + f", with the features of {protocol['features']}. "
        + ("Values are means over the seeds ± half of their range. " if len(seeds) > 1 else "")
        + f"Trained and measured on: {'; '.join(dict.fromkeys(x['machine'] for x in results))}. "
        "Minutes of steps are those of all training steps, without validation and encoding.",
    ]  # fmt: skip
    if tokenizers:
        lines += ["", "## Tokenizers", ""]
        lines += format_table(["quantizer"], tokenizers, TOKENIZER_COLUMNS)
        lines += ["", "![Rate and distortion](rate.png)", ""]
        lines += ["![Reconstructions](reconstructions.png)", "", "![Usage of codes](usage.png)"]
    if priors:
        lines += ["", "## Priors", ""]
        lines += format_table(["quantizer", "prior"], priors, PRIOR_COLUMNS)
        lines += ["", "![Distance and speed](speed.png)", "", "![Samples](samples.png)"]
    lines += [
        "", "## Runs", "",
        "`taming-jax verify` checks these runs in the workdir. To train one again, run its command "
        "with a new `--workdir`; for a prior, run that of its quantizer first, with the same one.",
        "",
    ]  # fmt: skip
    lines += ["| folder | hash | command |", "| --- | --- | --- |"]
    lines += [f"| {x['folder']} | {x['hash']} | `{x['command']}` |" for x in results]
    return "\n".join(lines) + "\n"


def read_runs(file: Path) -> list[tuple[Path, str]]:
    """Returns the folders of the runs in a page, and their hashes. Raises UserError if the file
    holds no table of runs, or a damaged one."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); name a {TABLE}.") from error
    heading = "| folder | hash | command |"
    rows = lines[lines.index(heading) + 2 :] if heading in lines else []
    cells = [[cell.strip() for cell in row.split("|")[1:]] for row in rows if row]
    if not cells or min(map(len, cells)) < 3:
        raise UserError(
            f"{file} has no complete table of runs; name a {TABLE} of `taming-jax compare`."
        )
    return [(file.parent / row[0], row[1]) for row in cells]


def check_page(file: Path) -> None:
    """Raises RunFailed if a page is not what the results in its folder give, or if a prior was not
    trained on the tokenizer beside it."""
    page, results = file.read_text(encoding="utf-8"), read_results(file.parent)
    title = page.split("\n", 1)[0].removeprefix("# ")
    if not results or page != format_comparison(results, title):
        raise RunFailed(f"{file} is not what the results in its folder give.")
    generators = {
        (x["quantizer"], x["seed"]): x["protocol"]["generator"] for x in results if not x["prior"]
    }
    for result in results:
        if generators.get((result["quantizer"], result["seed"])) != result["protocol"]["generator"]:
            raise RunFailed(
                f"{result['folder']} was not trained on the tokenizer of the same seed in {file}."
            )


def write_page(workdir: Path, title: str) -> str:
    """Writes the page of all results in a workdir, and returns it."""
    page = format_comparison(read_results(workdir), title)
    atomic_write(workdir / TABLE, page.encode())
    return page


def draw_figures(workdir: Path) -> None:
    """Writes the figures of a page. The speeds of priors must have been measured."""
    from taming_jax import figures  # slow to import

    groups = group(read_results(workdir))
    tokenizers = {q: runs for (q, p), runs in groups.items() if not p}
    priors = {f"{p} ({q})": runs for (q, p), runs in groups.items() if p}

    def mean(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.mean(run[name] for run in runs)

    def draw_pictures(groups: dict[str, list[dict[str, Any]]], name: str, title: str) -> None:
        files = [np.load(workdir / runs[0]["folder"] / PICTURES) for runs in groups.values()]
        rows, names = [file["pictures"] for file in files], list(groups)
        if "originals" in files[0]:
            rows, names = [files[0]["originals"], *rows], ["original", *names]
        figure = figures.draw_grid(np.concatenate(rows), names, len(rows[0]), title)
        figures.save(figure, workdir / name)

    if tokenizers:
        points = {
            name: (mean(runs, "entropy_bits_per_image"), mean(runs, "psnr"))
            for name, runs in tokenizers.items()
        }
        figures.plot_points(
            points, workdir / "rate.png", "Rate and distortion",
            ("bits per image, entropy-coded by the codes' frequencies", "PSNR (dB)"),
        )  # fmt: skip
        curves = {name: runs[0]["usage_by_step"] for name, runs in tokenizers.items()}
        title = "Share of codes in use on the validation split"
        figures.plot_curves(curves, workdir / "usage.png", title, "share of codes")
        draw_pictures(
            tokenizers, "reconstructions.png", "Reconstructions of test images, first seed"
        )
    if priors:
        points = {
            name: (1 / mean(runs, "throughput"), mean(runs, "fd")) for name, runs in priors.items()
        }
        figures.plot_points(
            points, workdir / "speed.png", "Distance and speed of samples",
            ("seconds per image, 64 at once", "FD-VGG16"),
        )  # fmt: skip
        draw_pictures(priors, "samples.png", "Samples of up to ten classes, first seed")
