"""Compares runs of several processes with runs of one process, and tests the exchange and the
errors of several processes with two threads in one process."""

import dataclasses
import importlib.metadata
import json
import pickle
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from taming_jax.cli.arguments import Processes
from taming_jax.config.load import load_config
from taming_jax.data import datasets
from taming_jax.data.fingerprints import load_and_check
from taming_jax.errors import RunFailed, UserError
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices
from taming_jax.training import loop
from taming_jax.training.checkpoints import Store
from tests import commands, golden, small_runs
from tests.conftest import TINY

# All optional parts of a step, so that the tests compare every kind of state.
STAGE1 = [
    "train_vqgan.py", *TINY, 20, "--vqgan.discriminator-start", 0, "--vqgan.lecam-weight", 0.1,
    "--vqgan.diff-augment", "color", "translation", "--data.mirror",
]  # fmt: skip
STAGE2 = [
    "train_prior.py", "--config", "mnist_tiny", "--prior.batch-size", 8, "--prior.layers", 1,
    "--prior.width", 32, "--prior.dropout", 0.3, "--prior.label-dropout", 0.5,
    "--prior.token-keep-prob", 0.8, "--prior.augmented-versions", 2, "--prior.steps",
]  # fmt: skip


def start_two(*arguments, devices=2):
    """Starts a command in two processes with `devices` devices each."""
    address = f"127.0.0.1:{commands.find_free_port()}"
    flags = ("--distributed", "--coordinator-address", address, "--num-processes", 2)
    return [
        commands.start(*arguments, *flags, "--process-id", process, devices=devices)
        for process in range(2)
    ]


def run_two(*arguments, devices=2):
    """Runs a command in two processes to its end and returns the status, stdout, and stderr of each
    process."""
    processes = start_two(*arguments, devices=devices)
    outputs = [process.communicate(timeout=300) for process in processes]
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


def take_step(workdir, stage, out, count):
    """Returns the next step on `count` devices or, if `count` is "2x2", of two processes with two
    devices each."""
    command = ("tests/one_step.py", workdir, stage, out)
    if count == "2x2":
        results = run_two(*command)
    else:
        results = [commands.run(*command, "--devices", count, devices=count)]
    for status, _, err in results:
        assert status == 0, err
    return pickle.loads(out.read_bytes())


def assert_same_step(actual, expected, name):
    np.testing.assert_array_equal(actual["seen"], expected["seen"], err_msg=name)
    for part in ("step", "metrics", "gradients", "extra"):
        golden.assert_trees_close(actual[part], expected[part], f"{name} {part} ", 1e-5, 1e-6)


@pytest.fixture(scope="module")
def trained_workdir(tmp_path_factory):
    """The folder of a run with both stages."""
    workdir = tmp_path_factory.mktemp("hosts") / "run"
    for command in (STAGE1, [*STAGE2, 10]):
        status, _, err = commands.run(*command, "--workdir", workdir)
        assert status == 0, err
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_several_devices_and_processes_take_the_same_step_as_one_device(
    trained_workdir, tmp_path, stage
):
    expected = take_step(trained_workdir, stage, tmp_path / "1", 1)
    assert expected["step"] == (20 if stage == "vqgan" else 10)
    if stage == "vqgan":
        assert expected["metrics"]["adaptive_weight"] > 0
    for count in (8, "2x2"):
        actual = take_step(trained_workdir, stage, tmp_path / str(count), count)
        assert_same_step(actual, expected, str(count))


def wait_for_checkpoint(checkpoint, processes):
    """Waits until the processes have saved a checkpoint."""
    while not checkpoint.exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_train_like_one_and_a_signal_to_one_saves_both(tmp_path):
    """Checks that the first rows of the log equal those of one process, and that both processes
    save and stop at the same step."""
    settings = {"vqgan__steps": 3000, "vqgan__checkpoint_every": 10, "vqgan__eval_every": 3000}
    settings |= {"vqgan__log_every": 1} | small_runs.EVERYTHING
    with pytest.raises(small_runs.Killed):
        small_runs.train(tmp_path / "one", on_step=small_runs.kill_at(6), **settings)
    config = small_runs.make_config(tmp_path / "two", **settings)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    flags = ("--config", tmp_path / "config.json", "--workdir", tmp_path / "two")
    processes = start_two("train_vqgan.py", *flags, devices=1)
    wait_for_checkpoint(tmp_path / "two" / "checkpoints" / "vqgan" / "10", processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    saved = small_runs.list_saved_steps(tmp_path / "two")[-1]
    assert 10 < saved < 3000
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 143, err
        assert f"Stopped by SIGTERM after step {saved}, which is saved" in err
    rows, expected = (small_runs.read_rows(tmp_path / name) for name in ("two", "one"))
    assert [row["step"] for row in rows] == list(range(1, saved + 1))
    assert len(expected) >= 4
    small_runs.assert_rows_close(rows[: len(expected)], expected, 2e-3)


LONG = [
    "train_vqgan.py", *TINY, 2000, "--vqgan.checkpoint-every", 50, "--vqgan.log-every", 1,
    "--vqgan.eval-every", 2000, "--workdir",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_and_both_resume(tmp_path, lost):
    processes = start_two(*LONG, tmp_path, devices=1)
    wait_for_checkpoint(tmp_path / "checkpoints" / "vqgan" / "50", processes)
    start_time = time.monotonic()
    processes[lost].kill()
    _, err = processes[1 - lost].communicate(timeout=120)
    assert time.monotonic() - start_time < 120
    assert processes[1 - lost].returncode == -signal.SIGABRT, err  # by JAX
    processes[lost].communicate(timeout=60)
    saved = Store(tmp_path, "vqgan").steps()[-1]
    assert saved < 2000
    for status, _, err in run_two(*LONG, tmp_path, "--vqgan.steps", saved + 3, devices=1):
        assert status == 0, err
    rows = (tmp_path / "metrics" / "vqgan.jsonl").read_text().splitlines()
    training_steps = [row["step"] for row in map(json.loads, rows) if row["split"] == "train"]
    assert training_steps == list(range(1, saved + 4))


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all_at_the_same_step(tmp_path):
    processes = start_two(*LONG, tmp_path, devices=1)
    wait_for_checkpoint(tmp_path / "checkpoints" / "vqgan" / "50", processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    saved = Store(tmp_path, "vqgan").steps()[-1]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 143, err
        assert f"Stopped by SIGTERM after step {saved}, which is saved" in err


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(tmp_path):
    flags = (
        "train_vqgan.py", *TINY, 3, "--workdir", tmp_path / "run", "--distributed",
        "--coordinator-address", f"127.0.0.1:{commands.find_free_port()}", "--num-processes", 2,
    )  # fmt: skip
    processes = [
        commands.start(*flags, "--process-id", process, "--seed", 7 + process)
        for process in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.count("\n") == 1, err
        assert "process 1 differs from process 0: --seed is 8, not 7" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_coordinator_that_does_not_respond_is_reported(tmp_path):
    address = f"127.0.0.1:{commands.find_free_port()}"
    status, _, err = commands.run(
        "train_vqgan.py", *TINY, 3, "--workdir", tmp_path / "run", "--distributed",
        "--coordinator-address", address, "--num-processes", 2, "--process-id", 1,
        "--initialization-timeout", 2,
    )  # fmt: skip
    assert status == 2 and err.count("\n") == 1, err
    assert "cannot connect to the other processes ([Errno 111] Connection refused)" in err


def start_first_only(tmp_path, port):
    """Starts process 0 of two. The other process never starts."""
    return commands.start(
        "train_vqgan.py", *TINY, 3, "--workdir", tmp_path / "run", "--distributed",
        "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", 0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_port_in_use_is_reported_in_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        _, port = taken.getsockname()
        process = start_first_only(tmp_path, port)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert "error: cannot connect to the other processes" in err


# The following tests run in this process.


@pytest.fixture
def in_two_threads(monkeypatch):
    """Returns a function `call(function)` that calls `function(process)` in two threads, which
    simulate processes 0 and 1. It returns what each call returned or raised. Other threads see one
    process."""
    thread_state, contents = threading.local(), [b"", b""]
    barrier = threading.Barrier(2, timeout=60)

    def process_number():
        return getattr(thread_state, "process", None)

    def exchange(value):
        if process_number() is None:
            return [value]
        contents[thread_state.process] = pickle.dumps(value)
        barrier.wait()
        values = [pickle.loads(content) for content in contents]
        barrier.wait()
        return values

    monkeypatch.setattr(distributed, "process_count", lambda: 1 if process_number() is None else 2)
    monkeypatch.setattr(distributed, "is_primary", lambda: not process_number())
    monkeypatch.setattr(jax, "process_index", lambda: process_number() or 0)
    monkeypatch.setattr(distributed, "all_gather_objects", exchange)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda own: exchange(own)[0])

    def call(function):
        results = [None, None]

        def work(process):
            thread_state.process = process
            try:
                results[process] = function(process)
            except Exception as error:  # noqa: BLE001
                results[process] = error

        threads = [threading.Thread(target=work, args=(process,)) for process in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return call


def test_an_error_in_one_process_is_raised_in_all(in_two_threads):
    def second_fails(process):
        def function():
            if process == 1:
                raise UserError("no such folder")
            return "value"

        return distributed.run_on_all(function)

    first, second = in_two_threads(second_fails)
    assert isinstance(first, UserError) and str(first) == "process 1: no such folder"
    assert isinstance(second, UserError) and str(second) == "no such folder"

    assert in_two_threads(lambda process: distributed.run_on_all(lambda: process)) == [0, 1]


def test_only_the_primary_process_runs_a_function_and_all_get_its_result(
    in_two_threads, monkeypatch
):
    monkeypatch.setattr(distributed, "CHUNK", 100)  # so that the value is sent in several chunks
    array, callers = np.arange(1000), []

    def return_array(process):
        def function():
            callers.append(process)
            return array

        return distributed.run_on_primary(function)

    for result in in_two_threads(return_array):
        np.testing.assert_array_equal(result, array)
    assert callers == [0]

    def fail(process):
        def function():
            raise RunFailed("the disk is full")

        return distributed.run_on_primary(function)

    first, second = in_two_threads(fail)
    assert isinstance(first, RunFailed) and str(first) == "the disk is full"
    assert isinstance(second, RunFailed) and str(second) == "process 0: the disk is full"


def assert_both_refuse(errors, message):
    for error in errors:
        assert isinstance(error, UserError), error
        assert message in str(error)


def test_different_settings_packages_data_and_devices_are_refused(
    in_two_threads, monkeypatch, tmp_path
):
    configs = [load_config("mnist_tiny", {"seed": 7 + process}) for process in range(2)]
    assert_both_refuse(
        in_two_threads(lambda process: loop.check_processes(configs[process])),
        "process 1 differs from process 0: --seed is 8, not 7. Start all processes with the same",
    )
    configs_with_workdirs = [
        load_config("mnist_tiny", {"workdir": str(tmp_path / str(p))}) for p in range(2)
    ]
    assert in_two_threads(lambda process: loop.check_processes(configs_with_workdirs[process])) == [
        None,
        None,
    ]

    versions = threading.local()
    get_installed_version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: getattr(versions, name, None) or get_installed_version(name),
    )

    def with_other_jax(process):
        if process == 1:
            versions.jax = "0.0.1"
        loop.check_processes(configs[0])

    assert_both_refuse(
        in_two_threads(with_other_jax),
        f"process 1 differs from process 0: jax is 0.0.1, not {jax.__version__}. Start all",
    )
    monkeypatch.setattr(distributed, "PACKAGES", ("a package of a checkout", "numpy"))
    assert in_two_threads(lambda process: loop.check_processes(configs[0])) == [None, None]
    assert_both_refuse(
        in_two_threads(lambda process: Devices(1 + process)),
        "different numbers of devices (1, 2); set --devices",
    )

    splits = [datasets.load(load_config("mnist_tiny").data)] * 2
    assert in_two_threads(lambda process: load_and_check(lambda: splits[process])[0]) == splits
    splits[1] = splits[0]._replace(train=splits[0].validation)
    assert_both_refuse(
        in_two_threads(lambda process: load_and_check(lambda: splits[process])),
        "process 1 differs from process 0: there are 3000 training images, not 57000. Give all",
    )


def test_two_processes_map_batches_like_one(in_two_threads):
    """The last batch is padded."""
    arrays = {"a": np.random.default_rng(0).random((23, 5)).astype(np.float32)}
    devices = Devices(1)
    devices.axis_name = "devices"  # as if each of two processes had one device

    def sums(state, rows):
        return {"sum": rows["a"].sum(1) + state, "rows": rows["a"]}

    apply, state, sizes = devices.compile(sums), devices.replicate(np.float32(1)), []

    def compute(process):
        def compute_rows(rows):
            sizes.append(len(rows["a"]))
            return apply(state, devices.shard(rows))

        return devices.map_batches(compute_rows, arrays, 8)

    for result in in_two_threads(compute):
        np.testing.assert_array_equal(result["rows"], arrays["a"])
        np.testing.assert_allclose(result["sum"], arrays["a"].sum(1) + 1, rtol=1e-6)
    assert sizes == [4] * 6


def test_a_failure_to_connect_is_reported_in_one_sentence(monkeypatch):
    def initialize(*_, **__):
        raise RuntimeError("address already in use\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        UserError, match=r"cannot connect .* \(address already in use\)\. Start each"
    ):
        distributed.join(Processes(True, "here:0", 2, 0))


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (Processes(process_id=1), "need --distributed"),
        (Processes(True), "cannot connect to the other processes"),
        (Processes(True, num_processes=2), "cannot connect to the other processes"),
        (Processes(True, "node1:8476"), "cannot connect to the other processes"),
        (Processes(True, "node1", 2, 0), "cannot connect to the other processes"),
        (Processes(True, "node1", 2, 1), "cannot connect to the other processes"),
        (
            Processes(True, "node1:8476", 2, 2, initialization_timeout=0),
            "cannot connect to the other processes",
        ),
    ],
)
def test_invalid_process_flags_are_refused(processes, message):
    with pytest.raises(UserError, match=message):
        distributed.join(processes)


def test_under_mpirun_only_the_address_is_needed(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    distributed.join(Processes(True, "node1:8476"))
    assert calls == [("node1:8476", 4, 0)]
