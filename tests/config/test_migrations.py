import numpy as np
import pytest

from taming_jax.config import migrations
from taming_jax.config.migrations import format_of, migrated
from taming_jax.errors import UserError


def test_content_goes_through_every_format_in_between(monkeypatch):
    monkeypatch.setattr(migrations, "FORMAT", 4)
    steps = {n: lambda content, n=n: [*content, n] for n in (1, 2, 3)}
    assert migrated([], 1, steps) == [1, 2, 3]
    assert migrated([], 3, steps) == [3]
    assert migrated([], 4, steps) == []


def test_each_format_has_its_way_to_the_next():
    older = set(range(1, migrations.FORMAT))
    assert set(migrations.SETTINGS) == set(migrations.ARRAYS) == older


def test_formats_that_cannot_be_read_are_refused(tmp_path):
    assert format_of({}, tmp_path) == 1 and format_of({"format": 2}, tmp_path) == 2
    newer = rf"{tmp_path} was written by a newer taming_jax \(format 9; this one reads up to"
    with pytest.raises(UserError, match=newer):
        format_of({"format": 9}, tmp_path)
    for number in (0, "2", True, None):
        with pytest.raises(UserError, match="which is none"):
            format_of({"format": number}, tmp_path)


def test_the_first_format_knew_of_no_skipped_steps():
    arrays = migrated({("step",): np.int32(7)}, 1, migrations.ARRAYS)
    assert arrays["step",] == 7
    assert arrays["skipped",] == 0 and arrays["skipped",].dtype == np.int32
    kept = migrated({("skipped",): np.int32(5)}, 1, migrations.ARRAYS)
    assert kept["skipped",] == 5


def test_remapped_codes_were_a_setting_before_format_5():
    config = {"seed": 1, "vqgan": {"channels": 8, "used_codes": []}}
    assert migrated(config, 4, migrations.SETTINGS) == {"seed": 1, "vqgan": {"channels": 8}}
    config["vqgan"]["used_codes"] = [3, 1]
    with pytest.raises(UserError, match="remapped codes"):
        migrated(config, 4, migrations.SETTINGS)


def test_settings_had_other_names_before_format_6():
    old = {
        "seed": 1, "data": {"squeeze": True, "bad_share": 0.2}, "vqgan": {"clip": None},
        "prior": {"clip": 1.0, "keep_codes": 0.9},
    }  # fmt: skip
    assert migrated(old, 5, migrations.SETTINGS) == {
        "seed": 1, "data": {"resize_mode": "squeeze", "max_corrupt_fraction": 0.2},
        "vqgan": {"grad_clip_norm": None}, "prior": {"grad_clip_norm": 1.0, "token_keep_prob": 0.9},
    }  # fmt: skip
