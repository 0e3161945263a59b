"""What the README shows of the commands is what they print."""

from __future__ import annotations

from scripts.readme_tour import BLOCK, PAGE, TOUR, fresh


def test_the_tour_is_what_the_commands_print() -> None:
    page = PAGE.read_text(encoding="utf-8")
    (tour,) = TOUR.findall(page)
    assert len(BLOCK.findall(tour)) >= 4
    assert fresh(page) == page, "run `python scripts/readme_tour.py`"
