import numpy as np
import pytest

from taming_jax.config import migrations
from taming_jax.config.migrations import migrate, read_format
from taming_jax.errors import UserError


def test_content_is_migrated_through_every_format_in_between(monkeypatch):
    monkeypatch.setattr(migrations, "FORMAT", 4)
    steps = {n: lambda content, n=n: [*content, n] for n in (1, 2, 3)}
    assert migrate([], 1, steps) == [1, 2, 3]
    assert migrate([], 3, steps) == [3]
    assert migrate([], 4, steps) == []


def test_every_older_format_has_a_migration():
    older = set(range(1, migrations.FORMAT))
    assert set(migrations.SETTINGS_MIGRATIONS) == set(migrations.ARRAY_MIGRATIONS) == older


def test_newer_and_invalid_formats_are_refused(tmp_path):
    assert read_format({}, tmp_path) == 1 and read_format({"format": 2}, tmp_path) == 2
    message = rf"{tmp_path} was written by a newer taming_jax \(format 10; this one reads up to"
    with pytest.raises(UserError, match=message):
        read_format({"format": 10}, tmp_path)
    for number in (0, "2", True, None):
        with pytest.raises(UserError, match="not a valid format number"):
            read_format({"format": number}, tmp_path)


def test_the_first_format_has_no_count_of_skipped_steps():
    arrays = migrate({("step",): np.int32(7)}, 1, migrations.ARRAY_MIGRATIONS)
    assert arrays["step",] == 7
    assert arrays["skipped",] == 0 and arrays["skipped",].dtype == np.int32
    migrated = migrate({("skipped",): np.int32(5)}, 1, migrations.ARRAY_MIGRATIONS)
    assert migrated["skipped",] == 5


def test_remapped_codes_are_a_setting_before_format_5():
    config = {"seed": 1, "vqgan": {"channels": 8, "used_codes": []}}
    assert migrate(config, 4, migrations.SETTINGS_MIGRATIONS) == {
        "seed": 1,
        "vqgan": {"channels": 8},
    }
    config["vqgan"]["used_codes"] = [3, 1]
    with pytest.raises(UserError, match="remapped codes"):
        migrate(config, 4, migrations.SETTINGS_MIGRATIONS)


def test_settings_have_other_names_before_format_6():
    old = {
        "seed": 1, "data": {"squeeze": True, "bad_share": 0.2}, "vqgan": {"clip": None},
        "prior": {"clip": 1.0, "keep_codes": 0.9},
    }  # fmt: skip
    assert migrate(old, 5, migrations.SETTINGS_MIGRATIONS) == {
        "seed": 1, "data": {"resize_mode": "squeeze", "max_corrupt_fraction": 0.2},
        "vqgan": {"grad_clip_norm": None},
        "prior": {"grad_clip_norm": 1.0, "token_keep_prob": 0.9, "attention_dropout": 0.1},
    }  # fmt: skip


def test_attention_had_the_dropout_of_the_other_layers_before_format_7():
    migrated = migrate({"prior": {"dropout": 0.3}}, 6, migrations.SETTINGS_MIGRATIONS)
    assert migrated == {"prior": {"dropout": 0.3, "attention_dropout": 0.3}}


def test_settings_of_quantizers_are_in_one_section_before_format_9():
    old = {"vqgan": {
        "channels": 8, "commitment": 1.0, "legacy_commitment": True, "l2_normalise": True,
        "quantizer": "nearest", "gumbel_temperature": [1.0, 0.5], "kl_weight": 1e-3,
    }}  # fmt: skip
    assert migrate(old, 8, migrations.SETTINGS_MIGRATIONS) == {"vqgan": {
        "channels": 8, "quantizer": "vq",
        "vq": {"commitment": 1.0, "legacy_commitment": True, "l2_normalise": True},
        "gumbel": {"temperature": [1.0, 0.5], "kl_weight": 1e-3},
    }}  # fmt: skip
    assert migrate({"vqgan": {"quantizer": "gumbel"}}, 8, migrations.SETTINGS_MIGRATIONS) == {
        "vqgan": {"quantizer": "gumbel"}
    }
