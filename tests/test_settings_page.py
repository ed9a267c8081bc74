from tests import settings_page


def test_the_page_of_all_settings_is_up_to_date():
    """If this fails, run `python -m tests.settings_page`."""
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()


def test_every_setting_is_explained():
    for _, kinds in settings_page.SECTIONS.values():
        for kind in kinds:
            for name, text in settings_page.field_texts(kind).items():
                assert text or name in ("data", "vqgan", "prior"), f"{kind.__name__}.{name}"
