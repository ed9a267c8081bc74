"""Tests of the training loop with a stage that fits a parabola: when the loop validates, saves,
logs, draws figures, and stops."""

import gzip
import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taming_jax.config.load import load_config, override, read_config, write_config
from taming_jax.data.batches import ResidentFeed
from taming_jax.data.datasets import Split
from taming_jax.errors import Interrupted, RunFailed, UserError
from taming_jax.training import checkpoints, loop
from taming_jax.training.checkpoints import Store
from taming_jax.training.state import Metrics, Net, TrainState
from taming_jax.training.writers import DESTINATIONS, Writer, read_rows

SPLIT = Split(np.zeros((20, 1, 1, 1), np.uint8), np.zeros(20, np.int32))


class Parabola:
    """A stage whose state counts its steps. Its validation metric is best at step `best`."""

    name, best_metric, learned, dataset, frozen = "vqgan", "nll", (), None, {}
    steps_per_dispatch, figures = 1, ()

    def __init__(
        self, config, devices, restart=False, best=6, nearest=0, broken=(),
        on_step=lambda step: None,
    ):  # fmt: skip
        self.config, self.devices, self.nearest = config, devices, nearest
        self.best, self.broken, self.on_step = best, broken, on_step
        self.evaluated, self.drawn = [], []

    def build_feeds(self):
        return tuple(ResidentFeed(SPLIT, 4, 0, self.devices) for _ in range(2))

    def init(self, key):
        return TrainState(jnp.int32(0), {"generator": Net({"w": jnp.zeros(3)}, ())})

    def compile(self, state, training, validation):
        assert "place" in training[0].arrays and "weight" in validation.arrays

    def count_flops(self, step):
        return 3.0

    def train_step(self, state, batch):
        assert int(state.step) == batch.step
        self.on_step(batch.step)
        step = state.step + 1
        broken = int(step) in self.broken
        nll = jnp.where(broken, jnp.nan, step.astype(jnp.float32))
        skipped = state.skipped + broken
        metrics = {"loss": nll, "l1": nll, "generator_gradient": nll}
        metrics["skipped"] = skipped
        return state.replace(step=step, skipped=skipped), Metrics.pack(metrics)

    def eval_step(self, state, batch):
        return {
            "n": batch.arrays["weight"].sum(),
            "step": state.step * batch.arrays["weight"].sum(),
        }

    def summarize(self, sums):
        step = float(sums["step"] / sums["n"])
        self.evaluated.append(step)
        return {"nll": (step - self.best) ** 2}

    def compute_fd(self, state):
        return abs(int(state.step) - self.nearest)

    def draw_figures(self, state, folder, sums, rows):
        assert sums["n"] == 20 and rows[-1]["split"] == "validation"
        self.drawn.append(int(state.step))


def train(folder, restart=False, stage=None, **settings):
    """Trains a Parabola and returns the stage."""
    built = []

    def build(config, devices, restart=False):
        built.append(Parabola(config, devices, **(stage or {})))
        return built[0]

    overrides = {"workdir": str(folder), "devices": 1, "vqgan.batch_size": 4, "vqgan.steps": 10}
    overrides |= {f"vqgan.{name}": value for name, value in settings.items()}
    loop.train(build, load_config("mnist_tiny", overrides), restart)
    return built[0]


CADENCES = {"eval_every": 3, "checkpoint_every": 4, "log_every": 2, "draw_every": 5}


def test_the_loop_validates_saves_logs_and_draws_at_its_cadences(tmp_path):
    stage = train(tmp_path, **CADENCES)
    assert stage.evaluated == [3, 6, 9, 10]
    assert stage.drawn == [6, 10]
    # Step 6 is the best and step 10 the last. Step 9 neither improves nor is a multiple of 4.
    assert Store(tmp_path, "vqgan").steps() == [6, 8, 10]
    rows = read_rows(tmp_path / "metrics" / "vqgan.jsonl")
    train_rows = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train_rows] == [2, 3, 4, 6, 8, 9, 10]
    # Each row is the mean over the steps since the previous row.
    assert [row["l1"] for row in train_rows] == [1.5, 3, 4, 5.5, 7.5, 9, 10]
    assert train_rows[0]["epoch"] == pytest.approx(2 * 4 / 20)


def test_the_best_checkpoint_has_the_smallest_distance_if_fd_every_is_set(tmp_path):
    """The loop computes the distance at steps 4, 8, and 10. Steps 3, 6, and 9 have no distance, so
    they cannot be the best."""
    stage = train(tmp_path, stage={"nearest": 5}, fd_every=4, **CADENCES)
    assert stage.evaluated == [3, 4, 6, 8, 9, 10]
    rows = read_rows(tmp_path / "metrics" / "vqgan.jsonl")
    distances = {row["step"]: row.get("fd_vgg16") for row in rows if row["split"] == "validation"}
    assert distances == {3: None, 4: 1, 6: None, 8: 3, 9: None, 10: 5}
    store = Store(tmp_path, "vqgan")
    assert store.steps() == [4, 8, 10] and store.best() == (4, 1)


def test_short_epochs_are_not_validated_and_saved_one_by_one(tmp_path):
    """An epoch has 5 steps."""
    defaults = {"eval_every": None, "checkpoint_every": None, "draw_every": None}
    stage = train(tmp_path, stage={"best": 220}, steps=None, epochs=64, **defaults)
    assert stage.evaluated == [100, 200, 300, 320] and stage.drawn == [100, 200, 300, 320]
    assert Store(tmp_path, "vqgan").steps() == [200, 300, 320]


def test_the_clock_adds_checkpoints_but_neither_validations_nor_rows(tmp_path, monkeypatch):
    settings = CADENCES | {"checkpoint_every": 10, "eval_every": 6}
    train(tmp_path / "fast", **settings)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    stage = train(tmp_path / "slow", **settings)
    saved, rows = [], []
    for name in ("fast", "slow"):
        saved.append(Store(tmp_path / name, "vqgan").steps())
        rows.append(read_rows(tmp_path / name / "metrics" / "vqgan.jsonl"))
    # A checkpoint is due after every step, but only even steps are logged.
    assert saved == [[6, 10], [6, 8, 10]] and rows[0] == rows[1] and stage.evaluated == [6, 10]


def test_the_run_trains_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The checkpoint of step 4 is written after step 6 and holds the state of step 4."""
    may_write, write = threading.Event(), checkpoints.write_checkpoint

    def wait_and_write(path, arrays, metadata):
        assert may_write.wait(60)
        write(path, arrays, metadata)

    def on_step(step):
        if step == 6:
            may_write.set()

    monkeypatch.setattr(checkpoints, "write_checkpoint", wait_and_write)
    train(tmp_path, stage={"on_step": on_step}, eval_every=7, checkpoint_every=4, steps=7)
    store = Store(tmp_path, "vqgan")
    assert store.steps() == [4, 7] and store.read(4).arrays[("step",)] == 4


def test_checkpoints_record_the_environment(tmp_path):
    train(tmp_path, **CADENCES)
    file = tmp_path / "checkpoints" / "vqgan" / "10" / "about" / "metadata"
    environment = json.loads(file.read_text())["environment"]
    assert (environment["devices"], environment["processes"]) == (1, 1)
    assert environment["cores"] >= 1 and environment["versions"]["jax"] == jax.__version__


def test_a_resume_remembers_the_best_step_and_a_restart_forgets_it(tmp_path, capsys):
    settings = CADENCES | {"checkpoint_every": 5}
    train(tmp_path, stage={"best": 3}, **settings)
    train(tmp_path, stage={"best": 3}, **settings | {"steps": 16})
    steps = Store(tmp_path, "vqgan").steps()
    assert steps == [3, 15, 16]
    train(tmp_path, stage={"best": 3}, **settings | {"steps": 16})
    assert "already trained to step 16" in capsys.readouterr().out
    restarted = train(tmp_path, restart=True, stage={"best": 9}, **settings)
    assert restarted.evaluated == [3, 6, 9, 10]
    store = Store(tmp_path, "vqgan")
    assert store.steps() == [9, 10] and store.best() == (9, 0)
    assert max(row["step"] for row in read_rows(tmp_path / "metrics" / "vqgan.jsonl")) == 10


def test_non_finite_steps_are_skipped_and_counted(tmp_path, capsys):
    # The windows are 1-2, 3, 4, 5-6, 7-8, 9, and 10. Windows 3, 4, and 7-8 are skipped entirely.
    settings = CADENCES | {"skipped_in_a_row": 2}
    train(tmp_path, stage={"broken": (3, 4, 7, 8)}, **settings)
    lines = capsys.readouterr().out.splitlines()
    messages = [line for line in lines if "skipped" in line]
    assert messages == [
        "Step 3 was skipped: non-finite values in l1, loss, generator_gradient.",
        "Step 4 was skipped: non-finite values in l1, loss, generator_gradient.",
        "Step 7 was skipped, and 1 more up to step 8: non-finite values in l1, loss, "
        "generator_gradient.",
        f"Done: 10 steps, 4 of them skipped. The figures are in {tmp_path}/figures.",
    ]
    rows = [r for r in read_rows(tmp_path / "metrics" / "vqgan.jsonl") if r["split"] == "train"]
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2, 4, 4, 4]
    assert [row.get("l1") for row in rows] == [1.5, None, None, 5.5, None, 9, 10]
    assert rows[1].keys() == {"step", "epoch", "split", "skipped"}


def test_a_logged_row_is_the_mean_over_the_steps_that_were_not_skipped(tmp_path):
    train(tmp_path, stage={"broken": (1, 5)}, log_every=5, eval_every=10, checkpoint_every=10)
    rows = [r for r in read_rows(tmp_path / "metrics" / "vqgan.jsonl") if r["split"] == "train"]
    assert [row["l1"] for row in rows] == [3, 8]  # the means of steps 2 to 4 and of steps 6 to 10
    assert [row["skipped"] for row in rows] == [2, 2]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    settings = {"skipped_in_a_row": 2, "log_every": 5, "eval_every": 5, "checkpoint_every": 5}
    train(tmp_path / "never", stage={"broken": (1, 2, 4, 5, 7, 8)}, **settings)
    # The end of a window does not reset the count, but a finite step does.
    message = r"at step 7, after 2 skipped steps in a row: l1, loss, generator_gradient; "
    with pytest.raises(RunFailed, match=message + "the last good checkpoint is .*/vqgan/5"):
        train(tmp_path, stage={"broken": (3, 5, 6, 7)}, **settings)


def test_a_resumed_run_continues_the_count_of_skipped_steps(tmp_path, capsys):
    def build(config, devices, restart=False):
        return Parabola(config, devices, broken=(2, 8))

    for steps in (5, 10):
        overrides = {"workdir": str(tmp_path), "devices": 1, "vqgan.batch_size": 4}
        loop.train(build, load_config("mnist_tiny", overrides | {"vqgan.steps": steps}))
    assert "Done: 10 steps, 2 of them skipped." in capsys.readouterr().out
    assert read_rows(tmp_path / "metrics" / "vqgan.jsonl")[-2]["skipped"] == 2


def test_a_non_finite_metric_that_is_not_a_loss_is_left_out_of_the_log(tmp_path):
    class StageWithPerplexity(Parabola):
        def train_step(self, state, batch):
            state, metrics = super().train_step(state, batch)
            step = int(state.step)
            perplexity = np.float32(np.nan if step in (3, 5) else step)
            return state, Metrics.pack(metrics.unpack()[0] | {"perplexity": perplexity})

    overrides = {f"vqgan.{name}": value for name, value in CADENCES.items()}
    overrides |= {"vqgan.skipped_in_a_row": 0, "vqgan.steps": 10, "vqgan.batch_size": 4}
    overrides |= {"workdir": str(tmp_path), "devices": 1}
    loop.train(StageWithPerplexity, load_config("mnist_tiny", overrides))
    rows = [r for r in read_rows(tmp_path / "metrics" / "vqgan.jsonl") if r["split"] == "train"]
    # The windows are 1-2, 3, 4, 5-6, 7-8, 9 and 10.
    assert [row.get("perplexity") for row in rows] == [1.5, None, 4, 6, 7.5, 9, 10]
    assert [row["l1"] for row in rows] == [1.5, 3, 4, 5.5, 7.5, 9, 10] and rows[-1]["skipped"] == 0


def test_a_non_finite_loss_stops_the_run_before_it_is_saved(tmp_path):
    settings = CADENCES | {"skipped_in_a_row": 0}
    with pytest.raises(
        RunFailed, match=r"non-finite values at step 8: l1, loss, generator_gradient"
    ) as e:
        train(tmp_path, stage={"broken": (8,)}, **settings)
    assert str(tmp_path / "checkpoints" / "vqgan" / "6") in str(e.value)
    assert "--vqgan.grad-clip-norm" in str(e.value)
    assert max(Store(tmp_path, "vqgan").steps()) == 6


def test_a_signal_before_a_validation_does_not_change_the_run(tmp_path):
    def on_step(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 6"):
        train(tmp_path / "stopped", stage={"on_step": on_step}, **CADENCES)
    assert train(tmp_path / "stopped", **CADENCES).drawn == [10]
    assert train(tmp_path / "uninterrupted", **CADENCES).drawn == [6, 10], (
        "the stopped run skipped the figures of step 6"
    )
    stores = [Store(tmp_path / name, "vqgan") for name in ("stopped", "uninterrupted")]
    assert stores[0].steps() == stores[1].steps() and stores[0].best() == stores[1].best() == (6, 0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_current_step(tmp_path, signum):
    def on_step(step):
        if step == 6:
            os.kill(os.getpid(), signum)

    previous_handler = signal.getsignal(signum)
    with pytest.raises(Interrupted) as e:
        train(tmp_path, stage={"on_step": on_step}, **CADENCES)
    assert e.value.signum == signum and "after step 7" in str(e.value)
    assert max(Store(tmp_path, "vqgan").steps()) == 7
    assert signal.getsignal(signum) is previous_handler
    stage = train(tmp_path, **CADENCES)
    assert stage.evaluated == [9, 10]


def test_a_signal_before_the_first_step_changes_no_file(tmp_path):
    train(tmp_path, **CADENCES)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def build(config, devices, restart=False):
        os.kill(os.getpid(), signal.SIGINT)
        return Parabola(config, devices)

    overrides = {"workdir": str(tmp_path), "devices": 1, "vqgan.batch_size": 4, "vqgan.steps": 20}
    with pytest.raises(KeyboardInterrupt):  # raised by Python's own handler
        loop.train(build, load_config("mnist_tiny", overrides))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_after_a_signal_in_the_last_step_the_run_is_saved_before_figures_are_drawn(
    tmp_path, monkeypatch
):
    store = Store(tmp_path, "vqgan")
    saved_when_drawing = []

    def draw(*_):
        deadline = time.monotonic() + 30
        while 10 not in store.steps() and time.monotonic() < deadline:
            time.sleep(0.02)
        saved_when_drawing.append(store.steps())

    monkeypatch.setattr(Parabola, "draw_figures", draw)
    train(
        tmp_path,
        stage={"on_step": lambda step: step == 9 and os.kill(os.getpid(), signal.SIGTERM)},
        **CADENCES | {"draw_every": 10},
    )
    assert len(saved_when_drawing) == 1 and saved_when_drawing[0][-1] == 10


def test_a_folder_allows_one_run_at_a_time_but_other_folders_are_independent(tmp_path):
    def on_step(step):
        if step == 3:
            with pytest.raises(UserError, match=f"process {os.getpid()} .* is training in"):
                train(tmp_path / "one", **CADENCES)
            train(tmp_path / "another", **CADENCES)

    for _ in range(2):  # the second time, the run is already trained
        train(tmp_path / "one", stage={"on_step": on_step}, **CADENCES)
    for name in ("one", "another"):
        assert Store(tmp_path / name, "vqgan").steps() == [6, 8, 10]
        assert not (tmp_path / name / ".lock").exists()


def test_running_out_of_memory_is_reported_in_one_sentence(tmp_path):
    def on_step(step):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with pytest.raises(
        RunFailed, match=r"a step of 4 images does not fit .*; lower --vqgan.batch-size"
    ):
        train(tmp_path, stage={"on_step": on_step})


def test_the_output_is_plain_lines_without_a_terminal(tmp_path, capsys):
    train(tmp_path, **CADENCES)
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"in {tmp_path}: 20 images, 4 per step, steps 1 to 10, on 1 cpu device in float32."
        in lines[0]
    )
    assert "step 3/10  validation  nll 9" in lines
    assert lines[-1] == f"Done: 10 steps. The figures are in {tmp_path}/figures."
    assert not any("\r" in line for line in lines)


def test_the_speed_of_steps_is_logged_in_a_separate_file(tmp_path):
    train(tmp_path, **CADENCES)
    rows = read_rows(tmp_path / "metrics" / "vqgan_speed.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9, 10]
    for row in rows:
        assert row["flops_per_second"] == pytest.approx(3 * row["steps_per_second"], rel=1e-3)
        assert 0 <= row["waiting"] <= 1 and row["memory_peak_bytes"] > 2**20
        assert "utilisation" not in row  # the peak FLOP/s of a CPU are unknown


@pytest.mark.slow
def test_steps_can_be_traced(tmp_path, capsys):
    train(tmp_path, profile=(3, 4), **CADENCES)
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "step"}
    assert steps == {"3", "4"}
    assert f"The trace of steps 3 to 4 is in {tmp_path / 'profile'}" in capsys.readouterr().out


def test_an_incomplete_last_line_of_the_log_is_ignored(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "l')
    assert read_rows(file) == [{"step": 1}]


def test_tensorboard_receives_the_logged_rows(tmp_path):
    train(tmp_path, **CADENCES)
    (events,) = (tmp_path / "tensorboard" / "vqgan").iterdir()
    content = events.read_bytes()
    assert b"train/l1" in content and b"validation/nll" in content


def test_the_config_keeps_the_settings_of_the_other_stage(tmp_path):
    """Resumes stage 1 in a folder whose prior has its own settings."""
    file = tmp_path / "config.json"
    train(tmp_path, steps=2)
    assert read_config(file).prior == load_config("mnist_tiny").prior
    write_config(override(read_config(file), {"prior.layers": 2, "prior.steps": 7}), file)
    train(tmp_path, steps=4)
    written = read_config(file)
    assert (written.prior.layers, written.prior.steps, written.vqgan.steps) == (2, 7, 4)
    train(tmp_path, restart=True, steps=4)
    assert read_config(file).prior == load_config("mnist_tiny").prior


def test_other_settings_are_refused_and_a_restart_with_them_keeps_the_users_files(tmp_path):
    train(tmp_path, steps=2)
    (tmp_path / "figures" / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other_settings = {"steps": 2, "codebook_size": 64}
    with pytest.raises(UserError, match="--vqgan.codebook-size is 64, not 128"):
        train(tmp_path, **other_settings)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    train(tmp_path, restart=True, **other_settings)
    assert (tmp_path / "figures" / "notes.txt").read_text() == "mine"
    assert read_config(tmp_path / "config.json").vqgan.codebook_size == 64


def test_a_run_cannot_resume_with_other_data(tmp_path):
    def identity(images):
        return {"images": {"training": images}, "means": {}, "class_names": ["a"]}

    def train_on(images, steps):
        overrides = {"workdir": str(tmp_path), "devices": 1, "vqgan.batch_size": 4}
        stage = type("Stage", (Parabola,), {"dataset": identity(images)})
        loop.train(stage, load_config("mnist_tiny", overrides | {"vqgan.steps": steps}))

    train_on(42, 2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="other data: there are 41 training images, not 42"):
        train_on(41, 4)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    train_on(42, 4)


def test_the_written_config_combines_the_given_stage_with_the_other_stage_in_the_folder(tmp_path):
    """The trained stage gets the given settings, and the other stage keeps those in the folder. If
    stage 1 restarts and there is no prior, both stages get the given settings."""
    stored_config = load_config("mnist_tiny", {"vqgan.steps": 3, "prior.steps": 4})
    write_config(stored_config, tmp_path / "config.json")
    overrides = {"vqgan.steps": 5, "prior.steps": 6, "workdir": str(tmp_path)}
    given_config = load_config("mnist_tiny", overrides)

    def steps(stage, restart):
        config = loop.keep_other_stage(given_config, stage, restart)
        return config.vqgan.steps, config.prior.steps

    assert steps("vqgan", False) == (5, 4) and steps("vqgan", True) == (5, 6)
    assert steps("prior", False) == steps("prior", True) == (3, 6)
    store = Store(tmp_path, "prior")
    store.save(1, {"step": np.int32(1)}, stored_config, None)
    store.require(1)
    assert steps("vqgan", True) == (5, 4)


def test_a_run_whose_preset_has_changed_resumes_with_its_own_config(tmp_path):
    train(tmp_path, steps=2, learning_rate=1e-3)
    with pytest.raises(
        UserError, match=f"--config {tmp_path / 'config.json'} --workdir {tmp_path}"
    ):
        train(tmp_path, steps=4)
    overrides = {"vqgan.steps": 4, "workdir": str(tmp_path)}
    loop.train(Parabola, load_config(tmp_path / "config.json", overrides))
    assert Store(tmp_path, "vqgan").steps()[-1] == 4


def test_a_full_disk_is_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    def raise_no_space(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no space left")

    monkeypatch.setattr("taming_jax.training.checkpoints.write_checkpoint", raise_no_space)
    with pytest.raises(
        RunFailed,
        match=r"step 10 could not be written .*RESOURCE_EXHAUSTED.*there is no earlier one",
    ):
        train(tmp_path, **CADENCES)
    # Step 9 counts as the best so far, because the better checkpoint could not be saved.
    output_lines = capsys.readouterr().out.splitlines()
    failed_steps = [
        line.split()[4] for line in output_lines if "tries to write the next one" in line
    ]
    assert failed_steps == ["3", "4", "6", "8", "9", "10"]


def test_a_run_continues_if_its_figures_cannot_be_written(tmp_path, capsys, monkeypatch):
    def raise_no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Parabola, "draw_figures", raise_no_space)
    train(tmp_path, **CADENCES)
    assert capsys.readouterr().out.count("figures cannot be written ([Errno 28]") == 1
    assert max(Store(tmp_path, "vqgan").steps()) == 10


def test_a_run_that_was_killed_while_drawing_its_last_figures_draws_them_when_resumed(
    tmp_path, monkeypatch
):
    def raise_error(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Parabola, "draw_figures", raise_error)
        train(tmp_path, **CADENCES | {"draw_every": 10})
    assert train(tmp_path, **CADENCES | {"draw_every": 10}).drawn == [10]


@pytest.mark.parametrize("line", ["\xff", "7", '{"l1": 1}'])
def test_a_damaged_line_of_the_log_does_not_prevent_a_resume(tmp_path, line):
    train(tmp_path, **CADENCES)
    file = tmp_path / "metrics" / "vqgan.jsonl"
    file.write_bytes(file.read_bytes() + line.encode("latin-1") + b"\n")
    assert train(tmp_path, **CADENCES | {"steps": 12}).evaluated == [12]
    assert read_rows(file)[-1]["step"] == 12


def test_a_destination_that_refuses_is_noticed_before_a_restart_deletes_anything(
    tmp_path, monkeypatch
):
    train(tmp_path, **CADENCES)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    class Refusing(Writer):
        def open(self, is_new):
            assert is_new
            raise UserError("wandb: No API key configured.")

    monkeypatch.setitem(DESTINATIONS, "tensorboard", lambda config, stage: Refusing())
    with pytest.raises(UserError, match="No API key"):
        train(tmp_path, restart=True, **CADENCES)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
