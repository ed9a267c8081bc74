import dataclasses

from taming_jax.config.schema import PriorConfig, StageConfig
from taming_jax.training.cadences import Cadences


def test_the_defaults_follow_from_the_length_of_the_run_and_of_an_epoch():
    # An epoch of 7 steps, one of 200, and one of 2,000.
    short = StageConfig(steps=2000, batch_size=32)
    assert Cadences.choose(short, 200) == Cadences(100, None, 100, 2, 200)
    long = StageConfig(epochs=100, batch_size=32)
    assert Cadences.choose(long, 6400) == Cadences(400, None, 1000, 20, 2000)
    assert Cadences.choose(long, 64_000) == Cadences(4000, None, 10_000, 200, 20_000)
    few_epochs = StageConfig(epochs=5, batch_size=32)
    assert Cadences.choose(few_epochs, 64_000) == Cadences(2000, None, 2000, 10, 2000)


def test_settings_replace_the_defaults():
    settings = StageConfig(steps=10, eval_every=3, fd_every=6, checkpoint_every=4, draw_every=5)
    assert Cadences.choose(settings, 200) == Cadences(3, 6, 4, 1, 5)


def test_by_default_a_row_of_the_log_follows_a_call_of_several_steps():
    settings = PriorConfig(steps=2500, batch_size=64, steps_per_dispatch=4)
    assert Cadences.choose(settings, 6400).log == 4
    assert Cadences.choose(dataclasses.replace(settings, steps=9999), 6400).log == 12
    assert Cadences.choose(dataclasses.replace(settings, log_every=6), 6400).log == 6
