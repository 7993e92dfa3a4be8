"""Every variable is known by name, a misspelled one is told, and a value that cannot be read fails the doctor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_cli import tpfuse_process
from tpfuse.ops import settings

from tpfuse import options
from tpfuse.inspect import doctor

ROOT = Path(__file__).parent.parent
ENTRY = '[{"architecture": "sm_90", "world": 2, "one_shot_bytes": %s, "two_shot_bytes": 64, "launch_bytes": 64, "measured": ""}]'


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("TPFUSE_PDL", "bogus", "off, end, early"),
        ("TPFUSE_ALGORITHM", "ring", "auto, one_shot, two_shot, library"),
        ("TPFUSE_WATCHDOG_SECONDS", "soon", "a number of at least 0.001"),
        ("TPFUSE_WATCHDOG_SECONDS", "inf", "at most 1e+09"),
        ("TPFUSE_WATCHDOG_SECONDS", "1e11", "at most 1e+09"),
        ("TPFUSE_CONCURRENT_PLANES", "0", "a whole number of at least 1"),
        ("TPFUSE_BATCH_INVARIANT", "perhaps", "true and false"),
        ("TPFUSE_TABLE", "/nonexistent.json", "tpfuse bench --tune"),
        ("TPFUSE_FUEL", "-1", "0 or more"),
        ("TPFUSE_AGREEMENT_SECONDS", "nan", "a number of at least 0.001"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_with_what_is_valid(name, value, valid, monkeypatch):
    monkeypatch.setenv(name, value)
    (sentence,) = settings.invalid()
    assert name in sentence and value in sentence and valid in sentence


@pytest.mark.long
def test_the_doctor_fails_for_an_invalid_value():
    result = tpfuse_process("doctor", env={"TPFUSE_PDL": "bogus"})
    assert result.returncode == 1
    assert "TPFUSE_PDL='bogus' is not valid; valid values are off, end, early" in " ".join(result.stdout.split())


def test_the_doctor_fails_for_values_that_contradict_each_other(monkeypatch):
    """Each of them is valid alone: the first call of a group is where they were refused."""
    monkeypatch.setenv("TPFUSE_BATCH_INVARIANT", "true")
    monkeypatch.setenv("TPFUSE_ALGORITHM", "library")
    (found,) = doctor.variables()
    assert found.status == doctor.FAIL and "TPFUSE_ALGORITHM='library' is not valid with batch_invariant" in found.fix


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "not a list of entries"),
        ("[5]", "not a list of entries"),
        ("\xff", "TPFUSE_TABLE"),
        ('[{"architecture": "sm_90"}]', "entry 0 has fields"),
        (ENTRY % '"64"', "one_shot_bytes of entry 0 is '64'; expected a whole number"),
        (ENTRY % "true", "one_shot_bytes of entry 0 is True; expected a whole number"),
    ],
)
def test_a_table_that_is_none_is_told_with_the_file(text, said, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    file.write_bytes(text.encode("latin-1"))
    monkeypatch.setenv("TPFUSE_TABLE", str(file))
    (sentence,) = settings.invalid()
    assert f"TPFUSE_TABLE={file}" in sentence and said in sentence


def test_a_table_that_is_one_is_taken(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    file.write_text(ENTRY % "64")
    monkeypatch.setenv("TPFUSE_TABLE", str(file))
    assert settings.invalid() == []
    assert settings.REGISTRY["TPFUSE_TABLE"].value()[0].one_shot_bytes == 64


def test_every_option_has_its_variable_with_its_own_default():
    for name in options.READERS:
        assert settings.REGISTRY[options.twin(name)].meaning
    for name in options.MEANINGS:
        assert settings.REGISTRY[options.twin(name)].value({}) == getattr(options.parse(None, {}), name)


@pytest.mark.long
def test_a_misspelled_variable_warns_at_import_and_fails_the_doctor():
    result = tpfuse_process("doctor", env={"TPFUSE_POLCY": "all"})
    assert (
        "TPFUSE_POLCY is not a variable of tpfuse, so it does nothing. Did you mean 'TPFUSE_POLICY'?" in result.stderr
    )
    assert result.returncode == 1
    assert "TPFUSE_POLICY" in result.stdout


def test_a_value_that_is_not_valid_warns_at_import_where_nothing_reads_it(monkeypatch):
    monkeypatch.setenv("TPFUSE_ALGORITHM", "ring")
    with pytest.warns(RuntimeWarning, match="TPFUSE_ALGORITHM='ring' is not valid; valid values are auto"):
        settings.warn_about_mistakes()


def test_known_variables_say_nothing():
    given = dict.fromkeys(settings.REGISTRY, "") | {"TPFUSE_TEST_SEED": "1", "PATH": ""}
    assert settings.unknown(given) == settings.invalid(given) == []
    (sentence,) = settings.unknown({"TPFUSE_BENCH_BULD": "/tmp"})
    assert "Did you mean 'TPFUSE_BENCH_BUILD'?" in sentence


def test_the_sources_read_no_variable_that_is_not_registered():
    read = set()
    for folder in ("tpfuse", "ops", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= set(re.findall(r"TPFUSE_[A-Z_]+[A-Z]\b(?!_)", path.read_text()))
    assert {name for name in read if not name.startswith(settings.OURS)} <= set(settings.REGISTRY)


def test_the_docs_list_every_variable_of_the_op_and_none_that_does_not_exist():
    text = "".join(path.read_text() for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
    named = set(re.findall(r"TPFUSE_[A-Z_]+[A-Z]", text))
    assert {name for name in named if not name.startswith(settings.OURS)} <= set(settings.REGISTRY)
    table = set(re.findall(r"^[|] (TPFUSE_[A-Z_]+) [|]", (ROOT / "docs" / "op.md").read_text(), re.MULTILINE))
    twins = {f"TPFUSE_{n}" for n in ("INNER", "POLICY", "NUMERICS", "DUMP", "VERIFY", "FUEL", "MODE", "LOWER")}
    assert table == set(settings.REGISTRY) - twins
