"""The tables of measured figures in the documentation are what the result files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import run_python

pytestmark = pytest.mark.long  # not on every save

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def scripts_of_the_benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_tables_of_the_pages_are_made_from_the_result_files() -> None:
    import result_tables

    shown = []
    for path in PAGES:
        page = path.read_text()
        shown += [match["name"] for match in result_tables.MARK.finditer(page)]
        assert result_tables.renewed(page) == page, (
            f"run: python benchmarks/result_tables.py --write {path.relative_to(ROOT)}"
        )
    assert sorted(shown) == sorted(["highlights", *(p.stem for p in result_tables.RESULTS.glob("*.json"))])


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("docs/results/kernel-two-h100.md", "h100-nvlink-w2 "),
        ("docs/results/stages.md", "h200-shared-stages "),
        ("docs/results/models.md", "e2e "),
        ("README.md", "highlights "),
    ],
)
def test_a_changed_figure_is_noticed(page: str, name: str) -> None:
    import result_tables

    text = (ROOT / page).read_text()
    start = text.index(f"<!-- results: {name}")
    figure = re.search(r"\| (\d+\.\d+) ", text[start:])
    assert figure, name
    place = start + figure.start(1)
    assert result_tables.renewed(text[:place] + "9" + text[place:]) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the script would run")
def test_stages_of_a_call_need_a_gpu_and_say_so() -> None:
    done = run_python(ROOT / "benchmarks" / "stages.py")
    assert done.returncode == 2
    assert "no GPU is visible" in done.stderr


def test_stages_are_printed_in_microseconds_with_the_floor_beside_the_kernel() -> None:
    import json

    import stages

    stored = json.loads((ROOT / "benchmarks" / "results" / "h200-shared-stages.json").read_text())["stages"]
    said = stages.text(stored[:2]).splitlines()
    assert len(said) == 3 and said[2].split()[-1] == "-" and "floor" in said[2]
    assert all(stage in said[0] for stage in stages.STAGES)
    assert f"{stored[0]['ns']['call'] / 1000:.2f}" in said[1]


def test_a_contender_has_one_colour_in_all_panels_of_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plotting needs matplotlib: pip install tpfuse[bench]")
    from matplotlib.axes import Axes

    from tpfuse.measure import tables

    drawn: dict[str, set[str]] = {}
    plain = Axes.plot

    def plot(axis: Axes, *args: object, **options: object) -> object:
        drawn.setdefault(str(options["label"]), set()).add(str(options["color"]))
        return plain(axis, *args, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    tables.plot(tables.load(ROOT / "benchmarks" / "results" / "h200-shared.json"), tmp_path / "plot.svg")
    assert set(drawn) == {"tpfuse", "floor", "symm one-shot", "symm two-shot", "flashinfer pdl"}
    assert all(len(colors) == 1 for colors in drawn.values()) and len(set(map(min, drawn.values()))) == 5
    assert "symm two-shot" in (tmp_path / "plot.svg").read_text()  # words, not outlines
