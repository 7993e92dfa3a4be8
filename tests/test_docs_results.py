"""The tables of measured figures in the documentation are what the result files say."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_the_tables_of_the_measuring_page_are_made_from_the_result_files() -> None:
    import result_tables

    page = (ROOT / "docs" / "measuring.md").read_text()
    assert len(result_tables.MARK.findall(page)) == len(list((ROOT / "benchmarks" / "results").glob("*.json")))
    assert result_tables.renewed(page) == page, "run: python benchmarks/result_tables.py --write docs/measuring.md"


def test_a_changed_figure_is_noticed() -> None:
    import result_tables

    page = (ROOT / "docs" / "measuring.md").read_text()
    changed = page.replace("| 3.18 |", "| 2.18 |", 1)
    assert changed != page
    assert result_tables.renewed(changed) == page
