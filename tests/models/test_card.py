"""Model cards."""

from mea.models.card import model_card


def test_names_in_a_card_stay_text() -> None:
    """Names of models and files come from elsewhere: they make no links, cells or lines."""
    card = model_card("[x](y) *m*\n# z", "A summary.", ("what", "now"), [("a|b", "<i>`c`")], "r.json", {})
    assert "\n# [x]\\(y) \\*m\\* # z\n" in card
    assert "\n| a\\|b | &lt;i>\\`c\\` |\n" in card
