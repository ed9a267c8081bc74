"""Readers of traces and of compiled programs: the longest kernels, and the copies in loops."""

import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from taming_jax.cli.report.timing import Entry


def read_trace(file: Path) -> list[dict[str, Any]]:
    """Returns the events of a `.trace.json.gz` file that jax.profiler wrote."""
    with gzip.open(file) as stream:
        return json.load(stream)["traceEvents"]


def select_kernels(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the events of the kernels: those in the streams of GPUs. Without a GPU, returns the
    operations that XLA's CPU code names."""
    events = list(events)
    names: dict[Any, str] = {}
    for event in events:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            names[event["pid"], event.get("tid")] = event["args"]["name"]
    complete = [event for event in events if event.get("ph") == "X"]
    # A device's other threads repeat its kernels, grouped by operation and by program.
    kernels = [
        event
        for event in complete
        if names.get((event["pid"], None), "").startswith("/device:")
        and names.get((event["pid"], event.get("tid")), "").startswith("Stream")
    ]
    return kernels or [event for event in complete if "hlo_op" in event.get("args", {})]


def measure_busy(kernels: Iterable[dict[str, Any]]) -> float:
    """Returns the time in which at least one kernel ran, in microseconds."""
    busy, end = 0.0, -math.inf
    for event in sorted(kernels, key=lambda event: event["ts"]):
        stop = event["ts"] + event["dur"]
        busy += max(stop - max(event["ts"], end), 0.0)
        end = max(end, stop)
    return busy


def summarize_trace(events: Iterable[dict[str, Any]], steps: int, longest: int = 25) -> list[Entry]:
    """Returns the kernels of a trace of `steps` steps that took the most time in total. The first
    entry sums up all kernels: `busy` is the share of the time in which at least one of them ran."""
    kernels = select_kernels(events)
    if not kernels:
        return []
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in kernels:
        groups[event["name"]].append(event)
    total = sum(event["dur"] for event in kernels)
    wall = max(e["ts"] + e["dur"] for e in kernels) - min(e["ts"] for e in kernels)

    def describe(group: list[dict[str, Any]]) -> dict[str, Any]:
        microseconds = sum(event["dur"] for event in group)
        return {
            "milliseconds_per_step": microseconds / 1e3 / steps, "share": microseconds / total,
            "calls_per_step": len(group) / steps,
        }  # fmt: skip

    summary: Entry = (
        f"all {len(groups)} kernels",
        describe(kernels) | {"busy": measure_busy(kernels) / wall},
    )
    order = sorted(groups, key=lambda name: -sum(event["dur"] for event in groups[name]))
    entries = [summary]
    for name in order[:longest]:
        # The operations that use the kernel most, as a hint where it comes from.
        times: dict[str, float] = defaultdict(float)
        for event in groups[name]:
            times[event.get("args", {}).get("hlo_op", "")] += event["dur"]
        operations = sorted(times, key=lambda operation: -times[operation])
        more = f" and {len(operations) - 2} more" if len(operations) > 2 else ""
        values = describe(groups[name]) | {"operations": ", ".join(operations[:2]) + more}
        entries.append((name[:100], values))
    return entries


def count_copies_in_loops(hlo: str, is_counted: Callable[[int], bool]) -> int:
    """Returns the number of copies in the bodies of the loops of a compiled program, given as text.
    Counts the copies whose number of elements `is_counted` accepts."""
    computations: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            body = computations[header[1]] = []
        elif line.startswith("  "):
            body.append(line)

    def find_names(lines: Iterable[str], attributes: str) -> set[str]:
        """Returns the computations that instructions name in `calls=%a` or `calls={%a, %b}`."""
        pattern = re.compile(rf"\b(?:{attributes})=(?:\{{([^}}]*)\}}|(%?[\w.-]+))")
        matches = [match for line in lines for match in pattern.findall(line)]
        return {
            name.strip(" %") for several, one in matches for name in (several or one).split(",")
        }

    every_line = [line for lines in computations.values() for line in lines]
    reached, pending = set(), find_names(every_line, "body")
    while pending:
        name = pending.pop()
        if name in computations and name not in reached:
            reached.add(name)
            pending |= find_names(
                computations[name], "body|calls|to_apply|branch_computations|called_computations"
            )
    pattern = re.compile(r"= \(?\w+\[([\d,]*)\].* copy(?:-start)?\(")
    shapes = [
        match[1]
        for name in reached
        for line in computations[name]
        if (match := pattern.search(line))
    ]
    return sum(is_counted(math.prod(int(n) for n in shape.split(",") if n)) for shape in shapes)
