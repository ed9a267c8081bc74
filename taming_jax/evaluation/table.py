"""Reads reports, and formats one of them, or two side by side, as text tables."""

import json
from pathlib import Path
from typing import Any

from taming_jax.errors import UserError

REPORT = "evaluation.json"  # the file of a report in the run's folder

SUBJECT = ("run", "config", "vqgan_step", "prior_step", "generator", "hash", "reference_file")
"""The protocol's entries that identify the run. Two reports can be compared only if all other
entries are equal."""


def collect_metrics(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Returns the scalar metrics of a report by kind ("reconstruction" or "samples") and name.
    Distances are named after their features."""
    fd = report["features"]
    kd = "KID" if fd == "FID" else fd.replace("FD", "KD")
    names = {"fd": fd, "kd": kd, "kd_deviation": f"{kd}_deviation"}
    return {
        (kind, names.get(name, name)): value
        for kind in ("reconstruction", "samples")
        for name, value in (report[kind] or {}).items()
        if isinstance(value, int | float)
    }


def format_number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def format_report(report: dict[str, Any]) -> str:
    """Formats a report: its metrics, and the protocol that they were measured with."""
    protocol = report["protocol"]
    headings = {
        "reconstruction": f"{protocol['images']} images of the {protocol['split']} split",
        "samples": str(protocol["samples"]),
    }
    lines, previous = [], ""
    for (kind, name), value in collect_metrics(report).items():
        if kind != previous:
            lines.append(f"{kind} ({headings[kind]})")
            previous = kind
        lines.append(f"  {name:<30}{format_number(value):>10}")
    if report["samples"] is None and protocol.get("prior_step") is None:
        lines.append("samples: the run has no prior yet; train one with train_prior.py.")
    lines.append("protocol")
    lines += [f"  {name:<16}{value}" for name, value in protocol.items() if value is not None]
    lines += [f"Warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def find_differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Returns the reasons why two reports cannot be compared, one phrase per setting."""
    a, b = left["protocol"], right["protocol"]
    phrases = [
        f"{name} is {a.get(name)} and {b.get(name)}"
        for name in a | b
        if name not in SUBJECT and a.get(name) != b.get(name)
    ]
    if left.get("schema") != right.get("schema"):
        phrases.append(f"the schema is {left.get('schema')} and {right.get('schema')}")
    return phrases


def format_comparison(left: dict[str, Any], right: dict[str, Any]) -> str:
    """Formats two reports in two columns."""
    a, b = collect_metrics(left), collect_metrics(right)
    lines = [f"{'':<32}{'A':>12}{'B':>12}"]
    for key in a | b:
        values = [format_number(column[key]) if key in column else "-" for column in (a, b)]
        lines.append(f"{key[0][:6]:<8}{key[1]:<24}{values[0]:>12}{values[1]:>12}")
    for letter, report in zip("AB", (left, right), strict=True):
        subject = {name: report["protocol"].get(name) for name in SUBJECT}
        settings = [f"{name} {value}" for name, value in subject.items() if value is not None]
        lines.append(f"{letter}: {', '.join(settings)}")
    return "\n".join(lines)


def read_report(file: Path) -> dict[str, Any]:
    """Reads a report. Raises UserError if the file is missing or is not a report."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        if not {"features", "reconstruction", "samples", "protocol"} <= set(contents):
            raise ValueError("keys are missing")
        return contents
    except FileNotFoundError:
        raise UserError(f"there is no file {file}; name a report.") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} is not a report written by `taming-jax evaluate` ({error})."
        ) from error
