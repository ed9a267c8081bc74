from tests import settings_page


def test_the_settings_page_is_up_to_date():
    """If this fails, run `python -m tests.settings_page`."""
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.build_page()


def test_every_setting_has_a_help_text():
    for _, kinds in settings_page.SECTIONS.values():
        for kind in kinds:
            for name, text in settings_page.read_help_texts(kind).items():
                assert text or name in ("data", "vqgan", "prior"), f"{kind.__name__}.{name}"
