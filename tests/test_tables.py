"""Plain text tables."""

from allmlp.tables import table


def test_columns_line_up() -> None:
    assert table([("name", "n"), ("a", "10")], right=(1,)) == "name   n\na     10"


def test_no_rows_are_no_text() -> None:
    assert table([]) == ""
