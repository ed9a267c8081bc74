"""Reports as text: one, or two beside each other."""

from typing import Any

SUBJECT = ("run", "config", "vqgan_step", "prior_step", "generator", "reference_file")
"""The settings of a protocol that say what was measured; two reports can be compared only where
all others are equal."""


def numbers(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """The single numbers of a report by kind ("reconstruction" or "samples") and name. Distances
    are named after their features."""
    fd = report["features"]
    kd = "KID" if fd == "FID" else fd.replace("FD", "KD")
    names = {"fd": fd, "kd": kd, "kd_deviation": f"{kd}_deviation"}
    return {
        (kind, names.get(name, name)): value
        for kind in ("reconstruction", "samples")
        for name, value in (report[kind] or {}).items()
        if isinstance(value, int | float)
    }


def shown(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def table(report: dict[str, Any]) -> str:
    """A report: its numbers, and the protocol that they hold under."""
    protocol = report["protocol"]
    headings = {
        "reconstruction": f"{protocol['images']} images of the {protocol['split']} split",
        "samples": str(protocol["samples"]),
    }
    lines, last = [], ""
    for (kind, name), value in numbers(report).items():
        if kind != last:
            lines.append(f"{kind} ({headings[kind]})")
            last = kind
        lines.append(f"  {name:<30}{shown(value):>10}")
    if report["samples"] is None and protocol.get("prior_step") is None:
        lines.append("samples: the run has no prior yet; train one with train_prior.py.")
    lines.append("protocol")
    lines += [f"  {name:<16}{value}" for name, value in protocol.items() if value is not None]
    lines += [f"Warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Why two reports cannot be compared, one phrase for each setting."""
    one, other = left["protocol"], right["protocol"]
    phrases = [
        f"{name} is {one.get(name)} and {other.get(name)}"
        for name in one | other
        if name not in SUBJECT and one.get(name) != other.get(name)
    ]
    if left.get("schema") != right.get("schema"):
        phrases.append(f"the schema is {left.get('schema')} and {right.get('schema')}")
    return phrases


def compared(left: dict[str, Any], right: dict[str, Any]) -> str:
    """Two reports in two columns."""
    a, b = numbers(left), numbers(right)
    lines = [f"{'':<32}{'A':>12}{'B':>12}"]
    for key in a | b:
        values = [shown(column[key]) if key in column else "-" for column in (a, b)]
        lines.append(f"{key[0][:6]:<8}{key[1]:<24}{values[0]:>12}{values[1]:>12}")
    for letter, report in zip("AB", (left, right), strict=True):
        subject = {name: report["protocol"].get(name) for name in SUBJECT}
        settings = [f"{name} {value}" for name, value in subject.items() if value is not None]
        lines.append(f"{letter}: {', '.join(settings)}")
    return "\n".join(lines)
