"""Tests of the settings of a protocol as flags."""

import dataclasses
import sys

import pytest

from taming_jax.cli.arguments import parse
from taming_jax.cli.evaluate import Evaluate
from taming_jax.errors import UserError
from taming_jax.evaluation.protocol import Protocol


def parse_flags(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    return parse(Evaluate, None)


def test_flags_have_the_defaults_of_the_protocol(monkeypatch):
    settings = parse_flags(monkeypatch)
    for field in dataclasses.fields(Protocol):
        assert getattr(settings, field.name) == field.default


def test_a_guidance_scale_is_one_number_or_two(monkeypatch):
    for flags, expected in ((["1.5"], 1.5), (["1", "3"], (1.0, 3.0)), ([], None)):
        settings = parse_flags(monkeypatch, *(["--guidance-scale", *flags] if flags else []))
        assert settings.sampling["guidance_scale"] == expected
    assert Protocol(guidance_scale=0.0).sampling["guidance_scale"] == 0


def test_flags_are_validated_like_the_protocol(monkeypatch):
    with pytest.raises(UserError, match="kept is 1; it must be 2 or more"):
        parse_flags(monkeypatch, "--kept", "1")
