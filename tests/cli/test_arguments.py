import dataclasses
import sys
from pathlib import Path

import pytest

from taming_jax.cli.arguments import (
    DataFlags,
    Processes,
    Training,
    collect_data_settings,
    parse,
    parse_training,
)
from taming_jax.config.load import load_config, write_config
from taming_jax.config.schema import DataConfig


def parse_arguments(arguments, stage="vqgan"):
    return parse_training(Training, arguments, stage)


def test_config_accepts_the_path_of_a_written_config(tmp_path):
    config = load_config("birds")
    write_config(config, tmp_path / "config.json")
    parsed = parse_arguments(["--config", str(tmp_path / "config.json")])
    assert parsed == Training(config, False, Processes())


def test_the_command_line_overrides_the_preset():
    arguments = "--config mnist --seed 7 --restart --workdir w --dtype bfloat16 --vqgan.steps 3"
    arguments += " --vqgan.batch-size 8 --vqgan.multipliers 1 2 --prior.eval-every 5"
    arguments += " --vqgan.discriminator-start 0.5 --data.path p --data.image-size 32"
    parsed = parse_arguments(arguments.split())
    assert parsed.restart and parsed.processes == Processes()
    base = load_config("mnist")
    expected = dataclasses.replace(
        base, seed=7, workdir="w", dtype="bfloat16",
        data=dataclasses.replace(base.data, path=str(Path("p").absolute()), image_size=32),
        vqgan=dataclasses.replace(
            base.vqgan, steps=3, batch_size=8, multipliers=(1, 2), discriminator_start=0.5
        ),
        prior=dataclasses.replace(base.prior, eval_every=5),
    )  # fmt: skip
    assert parsed.config == expected


@pytest.mark.parametrize(
    "arguments",
    ["--config mnist --help", "--help", "--config mnst -h", "--config --help", "-h --workdir"],
)
def test_the_help_of_stage_2_needs_no_stage_1(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        parse_arguments(arguments.split(), "prior")
    assert exit.value.code == 0 and "--prior.layers" in capsys.readouterr().out


def test_the_help_of_stage_2_shows_the_settings_of_its_run(tmp_path, capsys):
    config = load_config("mnist_tiny", {"vqgan.codebook_size": 77})
    write_config(config, tmp_path / "config.json")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", "mnist_tiny", "--workdir", str(tmp_path), "-h"], "prior")
    assert "77" in capsys.readouterr().out


def test_the_settings_of_a_dataset_are_flags(monkeypatch):
    """Flags that are not given are None, so that several processes can compare all of them."""
    flags = "--data.path x --data.workers 2 --data.resize-mode crop --data.test-share 0.5"
    monkeypatch.setattr(sys, "argv", ["encode.py", *flags.split()])
    parsed = parse(DataOnly, None)
    assert collect_data_settings(parsed.data) == {
        "path": "x", "workers": 2, "resize_mode": "crop", "test_share": 0.5,
    }  # fmt: skip
    fixed = {"image_size", "channels", "random_crop", "mirror"}
    names = {field.name for field in dataclasses.fields(DataConfig)} - fixed
    assert vars(parsed.data).keys() == names
    monkeypatch.setattr(sys, "argv", ["encode.py"])
    assert collect_data_settings(parse(DataOnly, None).data) == {}


@dataclasses.dataclass(frozen=True)
class DataOnly:
    data: DataFlags = dataclasses.field(default_factory=DataFlags)


def test_the_process_flags_are_not_part_of_the_config():
    flags = "--distributed --coordinator-address node1:8476 --num-processes 2 --process-id 1"
    parsed = parse_arguments(["--config", "mnist", *flags.split()])
    assert parsed.config == load_config("mnist")
    assert parsed.processes == Processes(True, "node1:8476", 2, 1)
    assert parse_arguments(["--config", "mnist", "--distributed"]).processes == Processes(True)
