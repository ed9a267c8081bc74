"""The settings of a protocol as flags."""

import dataclasses
import sys

import pytest

from taming_jax.cli.arguments import parse
from taming_jax.cli.evaluate import Evaluate
from taming_jax.errors import UserError
from taming_jax.evaluation.protocol import Protocol


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    return parse(Evaluate, None)


def test_flags_have_the_protocols_defaults(monkeypatch):
    settings = parsed(monkeypatch)
    for field in dataclasses.fields(Protocol):
        assert getattr(settings, field.name) == field.default


def test_a_guidance_scale_is_one_number_or_two(monkeypatch):
    assert parsed(monkeypatch, "--guidance-scale", "1.5").guidance_scale == 1.5
    assert parsed(monkeypatch, "--guidance-scale", "1", "3").guidance_scale == (1.0, 3.0)
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--guidance-scale", "1", "2", "3")


def test_flags_are_checked_as_the_protocol_is(monkeypatch):
    with pytest.raises(UserError, match="kept is 1; it must be 2 or more"):
        parsed(monkeypatch, "--kept", "1")
