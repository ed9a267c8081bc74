import dataclasses

from tests import settings_page


def test_the_settings_page_is_up_to_date():
    """If this fails, run `python -m tests.settings_page`."""
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.build_page()


def test_every_setting_has_a_help_text():
    for _, kind in settings_page.SECTIONS.values():
        for field in dataclasses.fields(kind):
            is_section = dataclasses.is_dataclass(field.default)
            text = settings_page.read_help_texts(kind)[field.name]
            assert text or is_section, f"{kind.__name__}.{field.name}"
