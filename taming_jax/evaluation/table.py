"""Reports for the eye: one, or two beside each other."""

from collections.abc import Iterator
from typing import Any

SUBJECT = ("run", "config", "vqgan_step", "prior_step", "generator", "reference_file")
"""What of a protocol says whose figures they are; all else must be equal to compare two."""
KINDS = ("reconstruction", "samples")
NOT_SHOWN = ("code_counts", "per_class")


def figures_of(report: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """The single figures of a report: whose, which, and what. Distances have their features'
    name."""
    named = {"fd": report["features"], "kd": report["features"].replace("FD", "KD")}
    if report["features"] == "FID":
        named["kd"] = "KID"
    for kind in KINDS:
        for name, value in (report[kind] or {}).items():
            if name in NOT_SHOWN:
                continue
            for short, long in named.items():
                if name == short or name.startswith(f"{short}_"):
                    name = name.replace(short, long, 1)
            yield kind, name, value


def shown(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def table(report: dict[str, Any]) -> str:
    """One report: its figures, and under which protocol they hold."""
    protocol = report["protocol"]
    lines, last = [], ""
    for kind, name, value in figures_of(report):
        if kind != last:
            of = protocol["images" if kind == "reconstruction" else "samples"]
            whose = f"{of} images of the {protocol['split']} split" if kind == KINDS[0] else f"{of}"
            lines.append(f"{kind} ({whose})")
            last = kind
        lines.append(f"  {name:<30}{shown(value):>10}")
    if report["samples"] is None and protocol.get("prior_step") is None:
        lines.append("samples: the run has no prior yet; train one with train_prior.py.")
    for found in report.get("sweep", []):
        lines.append(
            f"  guidance {found['guidance_scale']!s:<20}{report['features']:>14} "
            f"{shown(found['fd'])}  precision {found.get('precision', float('nan')):.3f}  "
            f"recall {found.get('recall', float('nan')):.3f}"
        )
    lines.append("protocol")
    lines += [f"  {name:<16}{value}" for name, value in protocol.items() if value is not None]
    lines += [f"Warning: {each}" for each in report["warnings"]]
    return "\n".join(lines)


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Why two reports cannot be compared, a phrase a setting."""
    one, other = left["protocol"], right["protocol"]
    found = []
    for name in dict.fromkeys([*one, *other]):
        if name not in SUBJECT and one.get(name) != other.get(name):
            found.append(f"{name} is {one.get(name)} and {other.get(name)}")
    if left.get("schema") != right.get("schema"):
        found.append(f"the schema is {left.get('schema')} and {right.get('schema')}")
    return found


def compared(left: dict[str, Any], right: dict[str, Any]) -> str:
    """Two reports in two columns."""
    columns = [{(kind, name): x for kind, name, x in figures_of(each)} for each in (left, right)]
    lines = [f"{'':<32}{'A':>12}{'B':>12}"]
    for key in dict.fromkeys([*columns[0], *columns[1]]):
        values = [shown(column[key]) if key in column else "-" for column in columns]
        lines.append(f"{key[0][:6]:<8}{key[1]:<24}{values[0]:>12}{values[1]:>12}")
    for letter, report in zip("AB", (left, right), strict=True):
        subject = {name: report["protocol"].get(name) for name in SUBJECT}
        said = ", ".join(f"{name} {value}" for name, value in subject.items() if value is not None)
        lines.append(f"{letter}: {said}")
    return "\n".join(lines)
