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
    assert parse_flags(monkeypatch, "--guidance-scale", "1.5").guidance_scale == 1.5
    assert parse_flags(monkeypatch, "--guidance-scale", "1", "3").guidance_scale == (1.0, 3.0)
    with pytest.raises(SystemExit):
        parse_flags(monkeypatch, "--guidance-scale", "1", "2", "3")


def test_flags_are_validated_like_the_protocol(monkeypatch):
    with pytest.raises(UserError, match="kept is 1; it must be 2 or more"):
        parse_flags(monkeypatch, "--kept", "1")
