from taming_jax.config.load import load_config
from taming_jax.parallel.devices import Devices
from taming_jax.training import stage
from taming_jax.training.prior import PriorStage
from taming_jax.training.vqgan import VQGANStage


def test_auto_becomes_the_dtype_of_the_run_or_that_which_suits_the_devices(
    monkeypatch, vqgan_workdir
):
    """The run has been trained in float32, and the devices would prefer bfloat16."""
    monkeypatch.setattr(stage, "resolve_dtype", lambda x: "bfloat16" if x == "auto" else x)
    overrides = {"dtype": "auto", "workdir": str(vqgan_workdir)}
    config = load_config(vqgan_workdir / "config.json", overrides)
    for build, restart, expected in (
        (VQGANStage, False, "float32"),
        (VQGANStage, True, "bfloat16"),
        (PriorStage, False, "float32"),
        (PriorStage, True, "float32"),
    ):
        built = build(config, Devices(1), restart)
        assert built.config.dtype == expected
    assert stage.select_dtype(config, None).dtype == "bfloat16"
    assert stage.select_dtype(config, config).dtype == "bfloat16", "an imported run"
    explicit = load_config("mnist_tiny", {"dtype": "bfloat16"})
    assert stage.select_dtype(explicit, load_config("mnist_tiny")).dtype == "bfloat16"
