"""A report reads the same in a terminal, without rich, and in a notebook."""

from __future__ import annotations

import builtins
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from browser.sample import report
from tpfuse.passes.report import GraphReport

from tpfuse.inspect import estimate, table, words


@pytest.fixture
def without_rich(monkeypatch):
    real = builtins.__import__

    def blocked(name, *arguments, **named):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", blocked)


def test_sites_that_differ_only_in_their_layer_share_a_row():
    made = report(layers=80)
    shown = table.rows(made)
    assert sum(len(row.sites) for row in shown) == len(made.sites) == 161
    assert len(shown) < 10
    assert [row.cells()[1] for row in shown if row.fused] == ["-", "0,2-79", "0,2-78"]
    assert len(table.rows(made, each=True)) == 161


def test_the_table_says_what_was_kept_why_and_what_to_do(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    shown = table.text(report())
    assert "9 all-reduces, 6 fused, 3 kept" in shown
    assert "kept: mean-dim" in shown
    assert "matched up to square; the mean is over dim 1, expected the last" in " ".join(shown.split())
    assert "Normalize over the hidden dimension" in shown
    assert "note: use_kernels=True hides 2 norms" in shown
    assert "saves an estimated 6 launches and 768.0 KiB" in shown
    assert "\x1b" not in shown


def awkward():
    """Many layers that are no range, ranks that are none, the longest reasons and file names, a module for a source."""
    made = report()
    kept = replace(made.sites[-1], reason="scale-not-constant", group=tuple(range(0, 32, 2)))
    long = replace(kept, source="transformers/models/deepseek_v3/modeling_deepseek_v3.py:1312")
    made.sites += [replace(long, layer=n) for n in range(1, 60, 2)]
    made.sites += [replace(kept, layer=n, source=f"model.layers.{n}.mlp") for n in range(60)]
    return made


@pytest.mark.parametrize("made", [report(), awkward()], ids=["usual", "awkward"])
def test_a_narrow_terminal_breaks_no_number(made, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = table.text(made).splitlines()
    assert max(map(len, shown)) <= 80
    pieces = set(re.findall(r"[\w.*:-]+", "\n".join(shown)))
    for row in table.rows(made):
        assert set(re.findall(r"[\w.*:-]+", " ".join(row.cells()))) <= pieces
    assert "modeling_sample.py:176" in pieces


def test_the_module_of_a_site_stands_for_all_its_layers(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (row,) = [row for row in table.rows(awkward()) if row.sites[0].source.startswith("model.layers")]
    assert len(row.sites) == 60 and row.cells()[-1] == "model.layers.*.mlp"
    assert "all_reduce + add at model.layers.*.mlp" in table.text(awkward())


def test_a_wide_terminal_has_one_line_a_row(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    head, _, first, *_ = table.layout([row.cells() for row in table.rows(report())], 120)
    assert head.split() == list(table.COLUMNS)
    assert first.endswith("modeling_sample.py:390")


def test_it_prints_without_rich(without_rich):
    shown = table.text(report())
    assert shown == table.plain(report())
    assert "kept: group-mismatch" in shown


@pytest.mark.parametrize(
    ("world", "counts", "said"),
    [
        (1, (0, 0), "there is one rank"),
        (2, (0, 0), "the model is not cut over the ranks"),
        (2, (0, 3), "but 3 all-gathers"),
        (2, (4, 4), "but 4 reduce-scatters and 4 all-gathers"),
    ],
)
def test_a_report_without_an_all_reduce_says_why_that_may_be(world, counts, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    empty = GraphReport("graph-0", 0, world, [], reduce_scatters=counts[0], all_gathers=counts[1])
    head, why = table.plain(empty).splitlines()
    assert table.text(empty).splitlines() == [head, why]
    assert head == f"{empty.summary()}, rank 0 of {world}"
    assert why.startswith("no all-reduce") and said in why


def test_the_notebook_form_is_closed_and_escaped_html():
    made = report()
    made.sites[3] = replace(made.sites[3], detail="<script>alert(1)</script>")

    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    shown = table.html(made)
    checker = Balance()
    checker.feed(shown)
    assert checker.open == []
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


def test_a_symbolic_row_count_gives_an_estimate_per_row():
    made = report(layers=1, rows="s0")
    saved = estimate.saving(made.sites[0])
    assert (saved.launches, saved.bytes, saved.bytes_per_row) == (1, None, 2 * 4096 * 2)
    assert estimate.saving(made.sites[0], rows=32).bytes == 32 * 2 * 4096 * 2
    gathered = replace(made.sites[0], pattern="reduce_scatter+add+rms_norm+all_gather")
    assert (estimate.saving(gathered, rows=32).bytes, estimate.saving(gathered).launches) == (32 * 4 * 4096 * 2, 2)
    absorbed = replace(gathered, flavour=None)
    assert (estimate.saving(absorbed, rows=32).bytes, estimate.saving(absorbed).launches) == (32 * 2 * 4096 * 2, 1)
    assert estimate.saving(made.sites[0], rows=32, path="library") == estimate.NOTHING
    assert "16.0 KiB a row" in table.in_all(saved)


def test_over_more_ranks_than_the_kernels_take_nothing_is_saved(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    made = report()
    made.sites = [replace(site, group=tuple(range(16))) for site in made.sites if site.fused]
    assert all(estimate.saving(site, rows=32) == estimate.NOTHING for site in made.sites)
    shown = table.plain(made)
    assert "library all-reduce and one kernel, for their group has more than 8 ranks" in shown
    assert "saves an estimated" not in shown


def test_short_forms():
    assert words.ranks([0, 1, 2, 3]) == "0-3"
    assert words.ranks([0, 2, 4]) == "0,2,4"
    assert words.ranks([]) == "unknown"
    assert words.layers([3, 0, 1, None]) == "0-1,3"
    assert words.layers([None]) == "-"
    assert [estimate.in_units(n) for n in (None, 12, 2048, 3 << 20, 5 << 30)] == [
        "unknown", "12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB",
    ]  # fmt: skip


def test_a_reason_of_a_newer_version_still_prints():
    made = report(layers=1)
    made.sites[0] = replace(made.sites[0], fused=False, reason="from-the-future", replaced_by=None)
    assert "from-the-future (1)" in table.plain(made)


def test_the_page_shows_the_note_of_a_lowered_site_beside_how_it_runs():
    from tpfuse.inspect import page

    site = next(s for s in report().sites if s.fused)
    empty = page._EMPTY
    plain, noted = (
        page._site(replace(site, lowered=True, note=note), empty)["detail"] for note in ("", "left outside")
    )
    assert plain.startswith("runs as: ") and noted == f"{plain}; left outside"
