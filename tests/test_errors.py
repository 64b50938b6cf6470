"""Offering what is near."""

from allmlp.errors import nearest


def test_nearest_offers_close_spellings_as_a_sentence() -> None:
    assert nearest("weight_decai", ["weight_decay", "lr"]) == " Did you mean 'weight_decay'?"
    assert nearest("gmlp_b", ["gmlp_a", "gmlp_c"]).count("gmlp_") == 2
    assert " or " in nearest("gmlp_b", ["gmlp_a", "gmlp_c"])


def test_nearest_says_nothing_where_nothing_is_close() -> None:
    assert nearest("zzz", ["weight_decay"]) == ""
