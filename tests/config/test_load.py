import dataclasses
import json

import pytest

from taming_jax.config.load import (
    diff_configs,
    list_presets,
    load_config,
    replace_section,
    write_config,
)
from taming_jax.config.migrations import FORMAT
from taming_jax.config.quantizers import GumbelConfig
from taming_jax.config.schema import Config
from taming_jax.config.serialization import to_dict
from taming_jax.config.validation import warn_about_attention
from taming_jax.errors import UserError


def test_a_written_config_can_be_read_again(tmp_path):
    for name in list_presets():
        config = load_config(name)
        assert config.config == name
        write_config(config, tmp_path / "config.json")
        assert load_config(str(tmp_path / "config.json")) == config


def test_a_config_json_has_a_format_number_and_one_without_it_is_read_as_the_first(tmp_path):
    file = tmp_path / "config.json"
    write_config(load_config("mnist_tiny"), file)
    values = json.loads(file.read_text())
    assert values.pop("format") == FORMAT
    file.write_text(json.dumps(values))
    assert load_config(str(file)) == load_config("mnist_tiny")


def test_an_integer_is_accepted_for_a_float_setting(tmp_path):
    values = to_dict(load_config("mnist"))
    values["vqgan"]["discriminator_weight"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    weight = load_config(str(tmp_path / "config.json")).vqgan.discriminator_weight
    assert weight == 1.0 and type(weight) is float


def test_settings_are_overridden_by_name():
    assert load_config("mnist", {"vqgan.steps": 3, "seed": 4}).vqgan.steps == 3
    for name in ("vqgan.step", "vqgn.steps", "seed.steps"):
        with pytest.raises(UserError, match=name):
            load_config("mnist", {name: 1})
    with pytest.raises(UserError, match="vqgan.steps"):
        load_config("mnist", {"vqgan.steps": "many"})


def test_steps_replace_epochs():
    settings = load_config("mnist").vqgan
    assert settings.total_steps(57_000) == 200 * 57_000 // 256 + 1
    assert dataclasses.replace(settings, steps=3).total_steps(57_000) == 3


def test_differences_list_the_settings_that_affect_training_and_omit_the_others():
    base = load_config("mnist")
    assert diff_configs(base, base, ("seed", "vqgan")) == []
    other = load_config(
        "mnist",
        {
            "vqgan.codebook_size": 32, "vqgan.steps": 9, "devices": 2, "seed": 1, "prior.layers": 2,
            "vqgan.micro_batches": 2, "prior.micro_batches": 2, "vqgan.skipped_in_a_row": 2,
        },
    )  # fmt: skip
    assert diff_configs(other, base, ("seed", "vqgan", "devices")) == [
        "--seed is 1, not 0",
        "--vqgan.micro-batches is 2, not 1",
        "--vqgan.codebook-size is 32, not 64",
    ]
    assert diff_configs(other, base, ("prior",)) == ["--prior.layers is 2, not 6"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vqgan.batch_size": 0}, "--vqgan.batch-size is 0"),
        ({"prior.steps": 0}, "--prior.steps is 0"),
        ({"prior.micro_batches": 0}, "--prior.micro-batches is 0"),
        ({"data.image_size": 30}, "--data.image-size 30 .* multiple of 4"),
        ({"data.image_size": 0}, "--data.image-size is 0"),
        (
            {"data.image_size": 8, "vqgan.discriminator_layers": 1},
            "--data.image-size 8 is too small for VGG16",
        ),
        ({"data.channels": 2}, "--data.channels is 2"),
        ({"vqgan.multipliers": ()}, "--vqgan.multipliers"),
        ({"vqgan.discriminator_start": 1.5}, "--vqgan.discriminator-start is 1.5"),
        ({"vqgan.discriminator_start_step": -1}, "--vqgan.discriminator-start-step is -1"),
        ({"vqgan.ema_decay": -1.0}, "--vqgan.ema-decay"),
        ({"vqgan.codebook_size": 0}, "--vqgan.codebook-size"),
        ({"devices": 0}, "--devices is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"data.split_seed": 2**32}, "--data.split-seed is"),
        (
            {"vqgan.discriminator_layers": 4},
            "--vqgan.discriminator-layers 4 is too many for images",
        ),
        ({"vqgan.decoder_blocks": -1}, "--vqgan.decoder-blocks"),
        ({"vqgan.learning_rate": -1.0}, "--vqgan.learning-rate"),
        ({"vqgan.grad_clip_norm": 0.0}, "--vqgan.grad-clip-norm"),
        ({"vqgan.betas": (1.0, 2.0)}, "--vqgan.betas"),
        ({"vqgan.lecam_weight": float("nan")}, "--vqgan.lecam-weight"),
        ({"prior.heads": 3}, "--prior.width 256 does not fit --prior.heads 3"),
        ({"prior.positions": "rotary", "prior.heads": 128}, "use a multiple of 512"),
        ({"vqgan.epsilon": 0.0}, "--vqgan.epsilon is 0.0"),
        ({"vqgan.warmup_steps": -1}, "--vqgan.warmup-steps is -1"),
        ({"prior.skipped_in_a_row": -1}, "--prior.skipped-in-a-row is -1"),
        ({"prior.augmented_versions": 0}, "--prior.augmented-versions is 0"),
        ({"prior.temperature": -0.5}, "temperature is -0.5"),
        ({"prior.top_k": 65}, "top-k is 65; it must be from 1 to 64"),
        ({"prior.top_p": 0.0}, "top-p is 0.0"),
        ({"prior.guidance_scale": float("nan")}, "guidance scale is nan"),
        ({"prior.warmup_steps": 9}, "--prior.warmup-steps requires --prior.schedule cosine"),
        (
            {"prior.label_dropout": 0.0, "prior.guidance_scale": 2.0},
            "guidance scale of 2.0 needs a prior trained with --prior.label-dropout",
        ),
        ({"vqgan": {"steps": 1}}, "'vqgan' is a group"),
    ],
)
def test_invalid_settings_are_refused_by_name(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("mnist", overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ('{"sed": 1}', "no setting 'sed'"),
        ('{"vqgan": {"steps": "three"}}', "'vqgan.steps' cannot be 'three'"),
        ('{"vqgan": {"vq": {"l2_normalise": 1}}}', "'vqgan.vq.l2_normalise' cannot be 1"),
        ('{"dtype": "float16"}', "'dtype' cannot be 'float16'"),
        ('{"format": 99, "new": 1}', "newer taming_jax .format 99; this one reads up to"),
        ('{"format": "two"}', "has the format 'two', which is not a valid"),
    ],
)
def test_a_damaged_config_json_is_reported(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / "config.json"))


def test_an_unknown_preset_gets_the_nearest_name_suggested():
    with pytest.raises(UserError, match="did you mean 'mnist_tiny'"):
        load_config("mnist_tny")
    with pytest.raises(UserError, match="cannot be read"):
        load_config("runs/none/config.json")


def test_attention_resolutions_that_no_level_has_give_a_warning(capsys):
    warn_about_attention(load_config("mnist", {"vqgan.attention_resolutions": (16, 14)}))
    warning = capsys.readouterr().out
    assert warning.startswith("Warning: --vqgan.attention-resolutions 16 has no effect")
    assert "28, 14, 7 pixels high" in warning
    for name in list_presets():
        warn_about_attention(load_config(name))
    assert not capsys.readouterr().out


def test_attention_resolutions_that_no_level_has_are_not_compared():
    """Therefore, runs of older presets and of presets at another size can resume."""
    old = load_config("mnist", {"vqgan.attention_resolutions": (16,)})
    assert diff_configs(load_config("mnist"), old, ("vqgan",)) == []
    other = load_config("mnist", {"vqgan.attention_resolutions": (16, 7)})
    assert diff_configs(other, old, ("vqgan",)) == ["--vqgan.attention-resolutions is 7, not empty"]


def test_a_new_run_does_not_take_the_discriminator_start_from_a_config_json(tmp_path):
    config = load_config("mnist_tiny", {"vqgan.discriminator_start_step": 2})
    write_config(config, tmp_path / "config.json")
    loaded = load_config(tmp_path / "config.json", {"vqgan.steps": 100, "vqgan.batch_size": 8})
    assert loaded.vqgan.discriminator_start_step is None and loaded.vqgan.start_step(9) == 25


def test_the_mnist_preset_has_the_settings_of_the_reference_project():
    config = load_config("mnist")
    vqgan = config.vqgan
    assert (config.data.image_size, config.data.channels, vqgan.channels) == (28, 1, 32)
    assert (vqgan.multipliers, vqgan.blocks, vqgan.codebook_size) == ((1, 2, 2), 2, 64)
    assert (vqgan.code_dim, vqgan.vq.commitment, vqgan.betas) == (64, 1.0, (0.5, 0.9))
    assert (vqgan.learning_rate, vqgan.discriminator_learning_rate) == (4e-4, 1e-4)
    assert (vqgan.batch_size, vqgan.epochs) == (256, 200)
    assert (vqgan.discriminator_filters, vqgan.discriminator_layers) == (32, 2)
    assert vqgan.discriminator_start * vqgan.epochs == 20
    assert vqgan.discriminator_weight == 1.0 and not vqgan.adaptive_weight
    assert vqgan.perceptual_weight == 1.0
    assert load_config("mnist_tiny").vqgan.perceptual_weight == 0.0
    assert isinstance(config, Config)


def test_a_tilde_in_a_path_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    names = ("workdir", "data.path", "data.cache", "vqgan.init_from", "prior.init_from")
    config = load_config("mnist", dict.fromkeys(names, "~/x"))
    assert config.workdir == config.data.path == config.data.cache == "/home/someone/x"
    assert config.vqgan.init_from == config.prior.init_from == "/home/someone/x"
    assert load_config("mnist").workdir is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"vqgan.quantizer": "gumbl"}, r"no quantizer 'gumbl' \(did you mean 'gumbel'\?\); set"),
        ({"vqgan.quantizer": "zzz"}, r"no quantizer 'zzz'; set --vqgan.quantizer to one of vq, "),
        (
            {"vqgan.gumbel.kl_weight": 1.0},
            "--vqgan.gumbel.kl-weight is a setting of the quantizer gumbel, but "
            "--vqgan.quantizer is vq. Leave it out",
        ),
        (
            {"vqgan.quantizer": "gumbel", "vqgan.gumbel.temperature": (1.0, 0.0)},
            "--vqgan.gumbel.temperature must be two numbers above 0",
        ),
    ],
)
def test_wrong_settings_of_quantizers_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("mnist_tiny", overrides)


def test_settings_of_quantizers_that_are_not_used_are_not_compared():
    config = load_config("mnist_tiny")
    other = replace_section(config, "vqgan", gumbel=GumbelConfig(kl_weight=1.0))
    assert diff_configs(config, other, ("vqgan",)) == []
    configs = [replace_section(c, "vqgan", quantizer="gumbel") for c in (config, other)]
    (phrase,) = diff_configs(*configs, ("vqgan",))
    assert phrase == "--vqgan.gumbel.kl-weight is 0.0005, not 1.0"
