"""What README and docs show is what runs: every snippet is extracted and run, every command is checked to exist.

A snippet that no test here knows fails, so that none is left out in silence. Snippets use names such as ``model`` or
``path/to/model``; what stands for them is declared beside the test that runs them.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphs
import layers
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from graphs import all_reduce
from models import save, sharded
from ranks import RankPool
from torch import nn

import tpfuse
from tpfuse.parallel import ParallelConfig

pytestmark = pytest.mark.long  # not on every save

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
H = 32


@dataclass(frozen=True)
class Snippet:
    """One block of a page.

    Attributes:
        page: file name.
        line: of the block's first line, from 1.
        language: of a fenced block; empty for an indented one.
        heading: the heading above it.
        text: without fence and indentation.
    """

    page: str
    line: int
    language: str
    heading: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def name(self) -> str:
        """The page with the heading."""
        return f"{self.page} {self.heading}"


def snippets() -> list[Snippet]:
    found: list[Snippet] = []
    for path in PAGES:
        lines, heading, number = path.read_text().splitlines(), "", 0
        while number < len(lines):
            line = lines[number]
            if line.startswith("```"):
                end = next(n for n in range(number + 1, len(lines)) if lines[n].startswith("```"))
                found.append(Snippet(path.name, number + 2, line[3:], heading, "\n".join(lines[number + 1 : end])))
                number = end
            elif line.startswith("    ") and number and not lines[number - 1].strip():
                end = number
                while end < len(lines) and lines[end].startswith("    "):
                    end += 1
                text = textwrap.dedent("\n".join(lines[number:end]))
                found.append(Snippet(path.name, number + 1, "", heading, text))
                number = end - 1
            elif line.startswith("#"):
                heading = line.strip("#").strip().strip("`")
            number += 1
    return found


SNIPPETS = snippets()
PYTHON = [s for s in SNIPPETS if s.language == "python"]
REASONS = {str(reason) for reason in tpfuse.Reason}


def one(page: str, heading: str, position: int = 0) -> str:
    """The text of a Python snippet under a heading."""
    found = [s for s in PYTHON if (s.page, s.heading) == (page, heading)]
    assert len(found) > position, (
        f"{page} has no Python snippet {position} under {heading!r}; have {sorted({s.name for s in PYTHON})}"
    )
    return found[position].text


def stand_in(text: str, replaced: dict[str, str]) -> str:
    """The snippet with some of its text exchanged; what is exchanged has to be there."""
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    return text


def test_every_block_is_python_or_known_text():
    assert {s.language for s in SNIPPETS} <= {"python", "text", ""}
    assert len(PYTHON) > 40 and len(SNIPPETS) > len(PYTHON)


# -- on a rank of two -------------------------------------------------------------------------------------------------------


ENV = {"TPFUSE_INNER": "aot_eager", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def pool():
    # AOTAutograd alone compiles in a second what takes Inductor half a minute here. One rank runs: its sums are its own.
    with RankPool(2, env=ENV, alone=True) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    save("llama", path, num_hidden_layers=1)
    return path


def execute(rank, world_size, text, folder):
    """Run a snippet as a rank; returns (all-reduces, fused) of each graph."""
    torch._dynamo.reset()
    tpfuse.clear_reports()
    tokens = torch.arange(1, 7)[None]
    names = {
        "my_tensor_parallel_model": lambda: sharded(folder, world_size),
        "model": None
        if re.search(r"^model = (?!torch\.compile\(model)", text, re.MULTILINE)
        else sharded(folder, world_size),
        "tokens": tokens,
        "input_ids": tokens,
        "inputs": {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        "path": folder,
        "torch": torch,
        "tpfuse": tpfuse,
    }
    exec(compile(text, "snippet", "exec"), names)
    if not tpfuse.reports():
        with torch.inference_mode():
            names["model"](tokens)
    return [(len(r.sites), len(r.fused)) for r in tpfuse.reports()]


def printed_by(rank, world_size, text, folder):
    """What the snippet prints on a rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        execute(rank, world_size, text, folder)
    return out.getvalue()


def on_ranks(pool, folder, text):
    """Every graph of every rank fused all of its all-reduces."""
    for graphs_of_rank in pool.run(execute, text, folder):
        assert graphs_of_rank and all(found == fused > 0 for found, fused in graphs_of_rank), graphs_of_rank


SIZES = "tp_size=4, attn_dp_size=2, moe_dense_tp_size=2"  # four ranks; two are enough to run the lines


@pytest.mark.ranks
def test_readme(pool, folder):
    on_ranks(pool, folder, one("README.md", "tpfuse"))


@pytest.mark.ranks
def test_using_plain_model(pool, folder):
    text = one("using.md", "Compile any tensor-parallel model")
    text = stand_in(text, {'dist.init_process_group("nccl")': "assert dist.is_initialized()"})
    for printed in pool.run(printed_by, text, folder, timeout=240):
        assert "3 all-reduces, 3 fused, 0 kept" in printed


@pytest.mark.ranks
def test_using_hugging_face(pool, folder):
    text = one("using.md", "Hugging Face models")
    on_ranks(pool, folder, stand_in(text, {SIZES: "tp_size=2, moe_dense_tp_size=2", "path/to/model": folder}))


@pytest.mark.ranks
def test_using_transformers_sharding(pool, folder):
    on_ranks(pool, folder, one("using.md", "Hugging Face models", 1))


@pytest.mark.ranks
def test_troubleshooting_slow_decode(pool, folder):
    text = one("troubleshooting.md", "My decode is slow")
    for printed in pool.run(
        printed_by,
        stand_in(text, {"torch.cuda.synchronize()": "", "Activity.CUDA": "Activity.CPU", "=64": "=6"}),
        folder,
    ):
        assert re.fullmatch(r"\d+\.\d\d ms a token, the GPU is busy for 0\.00 ms of it\n", printed)


@pytest.mark.ranks
def test_using_options(pool, folder):
    on_ranks(pool, folder, one("using.md", "Options"))


@pytest.mark.ranks
def test_layouts_hugging_face(pool, folder):
    text = one("parallel-layouts.md", "Hugging Face models")
    on_ranks(pool, folder, stand_in(text, {SIZES: "tp_size=2, moe_dense_tp_size=2"}))


def run_page(rank, world_size, text):
    torch._dynamo.reset()
    tpfuse.clear_reports()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(text, "tutorial.py", "exec"), {})
    return out.getvalue()


def words(text: str) -> str:
    """Without what differs between two runs or widths: spaces, rules, numbers of graphs, and the column of source lines."""
    text = re.sub(r" (\S+\.py:\d+|source) *$", "", text, flags=re.MULTILINE)
    return " ".join(re.sub(r"graph-\d+", "graph", re.sub(r"[─-]{3,}", "", text)).split())


@pytest.mark.ranks
def test_the_tutorial_is_one_program_that_prints_what_it_shows(pool):
    text = "\n\n".join(s.text for s in PYTHON if s.page == "tutorial.md")
    shown = [s.text for s in SNIPPETS if (s.page, s.language) == ("tutorial.md", "text")]
    text = stand_in(text, {'dist.init_process_group("gloo")': "assert dist.is_initialized()"})
    printed = words(pool.run(run_page, text, timeout=240)[0])
    assert len(shown) == 4
    for block in shown:
        assert words(block) in printed


@pytest.mark.slow
@pytest.mark.ranks
def test_the_report_in_readme_is_what_the_example_prints():
    (shown,) = (s.text for s in SNIPPETS if (s.page, s.language) == ("README.md", "text"))
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "shared_dense_tp.py"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert words(shown) in words(done.stdout)


# -- in this process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def group():
    torch._dynamo.reset()
    tpfuse.clear_reports()
    graphs.start_fake_group(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tpfuse.FusionWarning)
        yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def test_layouts_values():
    """Each ``expression  # value`` holds."""
    names: dict[str, Any] = {}
    values = 0
    for line in one("parallel-layouts.md", "Sizes and groups").splitlines():
        code, _, value = line.partition("  # ")
        if value:
            assert eval(code, names) == ast.literal_eval(value), line
            values += 1
        else:
            exec(code, names)
    assert values == 4


def test_the_op(group):
    text = one("op.md", "The op's contract")
    x, residual, weight = torch.randn(3, H), torch.randn(3, H), torch.rand(H)
    names = {"x": x, "residual": residual, "weight": weight, "group": group, "tpfuse": tpfuse}
    exec(text, names)
    assert names["normed"].shape == names["residual"].shape == (3, H)
    both = {**names, "attention": x, "mlp": torch.ones(3, H), "residual": residual}
    exec(one("op.md", "Two sums that meet in one norm"), both)
    assert torch.equal(both["residual"], residual + (x + 1))  # a fake group, whose sums are this rank's parts
    exec(one("op.md", "LayerNorm"), {**names, "norm_bias": torch.rand(H)})
    exec(one("op.md", "Quantized output"), names)
    assert names["quantized"].dtype == torch.float8_e4m3fn and names["scales"].shape == (3, 1)
    partial = {**names, "x": torch.randn(6, H), "reduce_rows_add_rms_norm": tpfuse.ops.reduce_rows_add_rms_norm}
    exec(one("op.md", "Rows with destinations"), partial)
    assert partial["normed"].shape == (3, H)
    own = {"residual": residual, "norm_bias": torch.rand(H)}
    own["reduce_rows_add_layer_norm"] = tpfuse.ops.reduce_rows_add_layer_norm
    exec(one("op.md", "Rows with destinations", 1), partial := partial | own)
    assert partial["normed"].shape == partial["residual"].shape == (3, H)
    op = tpfuse.ops.reduce_rows_add_rms_norm_gather
    partial |= {"reduce_rows_add_rms_norm_gather": op, "x": torch.randn(12, H), "residual": torch.randn(3, H)}
    exec(one("op.md", "The gather behind the norm"), partial)
    assert (partial["normed"].shape, partial["residual"].shape) == ((12, H), (3, H))
    block, across = dist.new_group([0, 1]), dist.new_group([0, 2])
    given = {"x": torch.randn(3, H), "largest": 5, "block_group": block, "gather_group": across}
    given["all_reduce_add_rms_norm_gather"] = tpfuse.ops.all_reduce_add_rms_norm_gather
    exec(one("op.md", "The gather behind the norm", 1), partial | given)
    exec(one("op.md", "Several streams, several groups"), names)
    exec(one("op.md", "When a peer dies"), names)


def test_engines(group, capsys):
    """The steps of an engine's life in the order of the page."""
    names = {"partial": torch.randn(3, H), "residual": torch.randn(3, H), "weight": torch.rand(H)}
    names |= {"attn_tp_group": group, "group": group, "dist": dist}
    exec(one("engines.md", "The op in a layer"), names)
    assert names["hidden"].shape == (3, H)
    exec(one("engines.md", "Your own buffers"), names)
    names["norm"] = nn.RMSNorm(H).requires_grad_(False)
    exec(one("engines.md", "With the norm module that you have"), names)
    exec(one("engines.md", "Start-up"), names)
    assert "library no CUDA device" in capsys.readouterr().out or torch.cuda.is_available()
    exec(one("engines.md", "After each step"), names)
    exec(one("engines.md", "Shutdown"), names)
    assert not dist.is_initialized()


def test_vllm(tmp_path, monkeypatch, capsys):
    from tpfuse.engines import vllm_compat

    monkeypatch.setattr(vllm_compat, "cache_root", lambda: tmp_path)  # no vLLM is installed here
    exec(one("vllm.md", "See what it did"), {})
    assert "no worker has reported yet" in capsys.readouterr().out


def test_undo_on_the_page_of_sglang():
    names: dict[str, Any] = {}
    exec(one("sglang.md", "Undo"), names)
    assert names["sglang"].active() == []


def test_the_schema_on_the_page_of_engines():
    (shown,) = (s.text for s in SNIPPETS if (s.page, s.language) == ("engines.md", "text"))
    schema = str(torch.ops.tpfuse.all_reduce_add_rms_norm.default._schema).removeprefix("tpfuse::")
    assert " ".join(shown.split()) == schema


def called(text: str, names: dict[str, Any], *inputs: torch.Tensor) -> list[tpfuse.GraphReport]:
    """Run a snippet that compiles without calling, call everything that it compiled, and return the reports."""
    made: list[Any] = []
    plain = torch.compile
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "compile", lambda *a, **k: made.append(plain(*a, **k)) or made[-1])
        exec(text, names)
        for function in made:
            torch._dynamo.reset()
            function(*inputs)
    assert made
    return tpfuse.reports()


def test_inductor_options(group, monkeypatch):
    monkeypatch.setenv("TPFUSE_POLICY", "all")
    names = {"torch": torch, "model": Block()}
    found = called(one("inner-compilers.md", "Inductor"), names, *inputs())
    assert [(r.inner, len(r.fused)) for r in found] == [("inductor", 1)] * 3


def test_tensorrt_needs_its_extra(group):
    text = one("inner-compilers.md", "TensorRT")
    if importlib.util.find_spec("torch_tensorrt") is not None:
        pytest.skip("torch-tensorrt is installed")
    with pytest.raises(Exception, match=r"tpfuse\[tensorrt\]"):
        called(text, {"torch": torch, "model": Block()}, *inputs())


def test_export(group, tmp_path, monkeypatch):
    """The two AOTInductor lines compile C++ for a minute; tests/test_export.py runs them."""
    monkeypatch.chdir(tmp_path)
    text = one("inner-compilers.md", "Without torch.compile")
    packaged: list[Any] = []
    for name, stand in (
        ("aoti_compile_and_package", lambda program, package_path: packaged.append(package_path)),
        ("aoti_load_package", lambda path: lambda *args: packaged.append(path)),
    ):
        assert hasattr(torch._inductor, name)
        monkeypatch.setattr(torch._inductor, name, stand)
    names: dict[str, Any] = {"torch": torch, "model": layers.Decoder(1), "args": (layers.tokens(),)}
    with torch.no_grad():
        exec(text, names)
    assert len(names["report"].fused) == 2
    assert packaged == ["rank0.pt2", "rank0.pt2"] and (tmp_path / "fused.pt2").exists()


def test_reports_are_printed(group, capsys):
    with torch.no_grad():
        torch.compile(Block(), backend="tpfuse", options=ALL)(*inputs())
    exec(one("troubleshooting.md", "Why was this all-reduce not fused?"), {})
    assert "1 all-reduces, 1 fused" in capsys.readouterr().out


# -- each reason's example is refused for that reason, and what is called fused fuses -------------------------------------

ALL = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}


class Block(nn.Module):
    """A product, its reduction, the residual sum and a norm."""

    def __init__(self, dropout: float = 0.0, group: Any = None) -> None:
        super().__init__()
        self.proj, self.dropout, self.group = nn.Linear(H, H, bias=False), nn.Dropout(dropout), group
        self.weight, self.eps = nn.Parameter(torch.rand(H)), 1e-6

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = self.proj(x)
        dist.all_reduce(y, group=self.group)
        h = residual + self.dropout(y)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, H, dtype=dtype), torch.randn(2, 3, H, dtype=dtype)


def norm(h: torch.Tensor) -> torch.Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def alternatives(text: str) -> list[tuple[str, list[str]]]:
    """(what a line says of itself, its program): each line that says refused or fused, behind those that say nothing."""
    before: list[str] = []
    found = []
    for line in text.splitlines():
        said = re.search(r"#.*\b(refused|fused|fuses)\b", line)
        if said:
            found.append((said[1], [*before, line]))
        else:
            before.append(line)
    return found or [("refused", before)]


NAMES: dict[str, Any] = {
    "torch": torch, "dist": dist, "F": nn.functional, "all_reduce": all_reduce, "norm": norm, "world_size": 4, "scale": 2.0,
    "experts": lambda t: torch.stack([t * 2, t * 3]),
    "hidden": H, "heads": 4, "eps": 1e-6, "o_proj": lambda t: t * 2, "down_proj": lambda t: t * 2, "embed": lambda t: t * 2,
}  # fmt: skip


def program(lines: list[str]) -> Callable[..., Any]:
    """A function of x, residual, weight, a and b: these lines, and the reduction and the norm where they leave them out."""
    text = "\n".join(lines)
    body = ["routed, shared, statistics, tokens, gate = x * 3, x * 5, x * 7, x, torch.sigmoid(x[..., :1])"]
    if not re.search(r"all_reduce\((?!y)", text):
        body.append("y = x * 2" if "all_reduce(y" in text else "y = all_reduce(x * 2)")
    if re.search(r"\bh\b", text) and "h = " not in text:
        body.append("h = residual + y")
    *rest, last = lines
    is_value = isinstance(ast.parse(last.removeprefix("return ")).body[0], ast.Expr) and not re.match(
        r"return |dist\.|y\.mul_", last
    )
    body += [*rest, f"return {last}" if is_value else last]
    if "h = " not in text and not body[-1].startswith("return"):
        body.append("h = norm(residual + y)")
    if not body[-1].startswith("return"):
        body.append("return h, largest" if "largest" in text else "return h")
    names = dict(NAMES)
    exec(f"def f(self, x, residual, weight, a, b):\n{textwrap.indent(chr(10).join(body), '    ')}\n", names)
    return names["f"]


class Holder(nn.Module):
    """``self`` of the examples that have one."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f
        self.register_buffer("embed_scale", torch.tensor(8.0))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.f(self, *args)


def verdicts(lines: list[str], *tensors: torch.Tensor) -> list[str | None]:
    """The reason of every all-reduce, None where it fused."""
    torch._dynamo.reset()
    tpfuse.clear_reports()
    with torch.no_grad():
        torch.compile(Holder(program(lines)), backend="tpfuse", options=ALL)(*tensors)
    return [site.reason for report in tpfuse.reports() for site in report.sites]


LINES = [
    "reduce-op", "dtype", "returned", "extra-reader", "rows-move", "rows-summed", "sum-of-reductions", "add-chain",
    "residual-shape", "residual-derived", "collective-order", "layout", "scale-not-constant", "residual-streams",
    "norm-statistics", "unknown-norm",
    "layer-norm", "eps-outside-root", "mean-dim", "partial-width", "weight-inside-mean",
]  # fmt: skip


@pytest.mark.parametrize("reason", LINES)
def test_lines_of_a_reason(reason, group):
    x, residual = inputs()
    if reason in ("dtype", "scale-not-constant"):
        x = x.bfloat16()
    for said, lines in alternatives(one("troubleshooting.md", reason)):
        found = verdicts(lines, x, residual, torch.rand(H), torch.randn(2, 3, H), torch.randn(2, 3, H))
        expected = {"refused": {reason}, "fused": {None}, "fuses": {reason, None}}[said]
        assert expected <= set(found), (lines, found)


def compiled_reasons(model: nn.Module, text: str, *tensors: torch.Tensor, **names: Any) -> list[str | None]:
    """The reasons of all sites of what one statement compiles."""
    torch._dynamo.reset()
    tpfuse.clear_reports()
    found = called(text, {**NAMES, "model": model, **names}, *tensors)
    return [site.reason for report in found for site in report.sites]


def test_lines_of_group_size(group):
    x, residual = inputs()
    first, second = one("troubleshooting.md", "group-size").splitlines()
    names = {**NAMES}
    exec(first, names)
    NAMES["alone"] = names["alone"]
    assert verdicts([second], x, residual, *[torch.rand(H)] * 3) == ["group-size"]


def test_lines_of_unknown_group(group):
    first, second, third = one("troubleshooting.md", "unknown-group").splitlines()
    names = {**NAMES, "x": None}
    exec(first, names)
    pair = names["group"].group_name
    exec(second, names)
    model = Holder(lambda self, x: norm(x + all_reduce(x, group=pair)))
    names |= {"model": model, "x": torch.randn(2, H)}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPFUSE_INNER", "aot_eager")
        try:
            exec(third, names)
        except Exception as error:
            # The reduction itself cannot run over a group that is gone; what counts is what the report says of it.
            assert "tpfuse" not in str(error).split("raised:")[-1] or tpfuse.reports()
    assert [s.reason for r in tpfuse.reports() for s in r.sites] == ["unknown-group"]


def test_lines_of_training(group, monkeypatch):
    monkeypatch.setenv("TPFUSE_INNER", "aot_eager")
    monkeypatch.setenv("TPFUSE_POLICY", "all")
    text = one("troubleshooting.md", "training").replace("(x)", "(*x)")
    exec(text.splitlines()[0], {"torch": torch, "model": Block(), "x": inputs()})
    torch._dynamo.reset()
    exec("\n".join(text.splitlines()[1:]), {"torch": torch, "model": Block(), "x": inputs()})
    assert [s.reason for r in tpfuse.reports() for s in r.sites] == ["training", None]


@torch.no_grad()
def test_lines_of_no_norm(group, monkeypatch):
    monkeypatch.setenv("TPFUSE_INNER", "aot_eager")
    monkeypatch.setenv("TPFUSE_POLICY", "all")
    text = one("troubleshooting.md", "no-norm").splitlines()
    found = []
    for lines in (text[:2], text[2:]):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        model = layers.Decoder(2)
        exec("\n".join(lines), {"model": model})
        model(layers.tokens())
        found.append([s.reason for r in tpfuse.reports() for s in r.sites])
    assert "no-norm" in found[0] and set(found[1]) == {None}, found


@torch.no_grad()
def test_lines_of_dropout(group, monkeypatch):
    monkeypatch.setenv("TPFUSE_INNER", "aot_eager")
    monkeypatch.setenv("TPFUSE_POLICY", "all")
    found = [
        compiled_reasons(Block(0.5), line, *inputs()) for line in one("troubleshooting.md", "dropout").splitlines()
    ]
    assert found == [["dropout"], [None]]


MODULES = ["weight-shape", "eps-not-constant"]


@pytest.mark.parametrize("reason", MODULES)
@torch.no_grad()
def test_lines_of_a_module(reason, group):
    for said, (line,) in alternatives(one("troubleshooting.md", reason).replace("hidden", str(H))):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        block = Block()
        if reason == "eps-not-constant":
            del block.eps
        exec(line, {"self": block, "torch": torch, "nn": nn})
        torch.compile(block, backend="tpfuse", options=ALL)(*inputs())
        assert [s.reason for r in tpfuse.reports() for s in r.sites] == [reason if said == "refused" else None]


@torch.no_grad()
def test_lines_of_unknown_flavour(group, monkeypatch):
    monkeypatch.setenv("TPFUSE_INNER", "aot_eager")
    monkeypatch.setenv("TPFUSE_POLICY", "all")
    mean, relaxed = one("troubleshooting.md", "unknown-flavour").splitlines()
    lines = ["h = residual + all_reduce(x)", mean, "return (h.float() * torch.rsqrt(mean + 1e-6)).to(h.dtype)"]
    names = dict(NAMES)
    exec(f"def f(self, x, residual):\n{textwrap.indent(chr(10).join(lines), '    ')}\n", names)
    model = Holder(names["f"])
    half = inputs(torch.bfloat16)
    assert compiled_reasons(model, 'torch.compile(model, backend="tpfuse")', *half) == ["unknown-flavour"]
    assert compiled_reasons(model, relaxed, *half) == [None]


@torch.no_grad()
def test_lines_of_dynamic_width(group):
    for said, (line,) in alternatives(one("troubleshooting.md", "dynamic-width")):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        x, residual = inputs()
        for tensor in (x, residual):
            exec(line, {"torch": torch, "x": tensor})
        torch.compile(lambda x, r: norm(r + all_reduce(x)), backend="tpfuse", options=ALL)(x, residual)
        assert [s.reason for r in tpfuse.reports() for s in r.sites] == ["dynamic-width" if said == "refused" else None]


def test_lines_of_group_mismatch():
    apart, shared = (
        eval(line, {"ParallelConfig": ParallelConfig})
        for line in one("troubleshooting.md", "group-mismatch").splitlines()
    )
    assert (apart.group_of("attn_tp", 0), apart.group_of("dense_tp", 0)) == (list(range(4)), list(range(8)))
    assert shared.group_of("attn_tp", 0) == shared.group_of("dense_tp", 0) == list(range(4))


OPTIONS = {"policy": {"POLICY": "strict"}, "fuel": {"POLICY": "all"}, "internal": {"POLICY": "all"}}


@pytest.mark.parametrize("reason", OPTIONS)
@torch.no_grad()
def test_lines_of_options(reason, group, monkeypatch):
    monkeypatch.setenv("TPFUSE_INNER", "aot_eager")
    for name, value in OPTIONS[reason].items():
        monkeypatch.setenv(f"TPFUSE_{name}", value)
    assert compiled_reasons(Block(), one("troubleshooting.md", reason), *inputs()) == [None]


def test_lines_of_split_all_reduce():
    begin, *lines = one("troubleshooting.md", "split-all-reduce").splitlines()
    graphs.start_fake_group(2)
    rows = {"reduce_scatter_tensor": funcol.reduce_scatter_tensor, "all_gather_tensor": funcol.all_gather_tensor}
    found = []
    for line in lines:
        first = "" if "all_reduce(y)" in line else begin
        names = {**NAMES, **rows, "group": dist.group.WORLD}
        exec(f"def f(y, residual, own_rows_of_residual):\n    {first}\n    {line}\n    return h", names)
        torch._dynamo.reset()
        tpfuse.clear_reports()
        with torch.no_grad():
            torch.compile(names["f"], backend="tpfuse", options=ALL)(*(torch.randn(n, H) for n in (4, 4, 2)))
        found.append([site.reason for report in tpfuse.reports() for site in report.sites])
    dist.destroy_process_group()
    assert found == [["split-all-reduce"], [None], [None]]


def test_lines_of_mutation(group):
    """A graph of torch.compile has no in-place writes, so the refused line is traced as it is written."""
    x, residual = inputs()
    for said, lines in alternatives(one("troubleshooting.md", "mutation")):
        f = program(lines)
        weight = torch.rand(H)
        traced = graphs.trace_as_written(lambda *tensors, f=f: f(None, *tensors), (x, residual, weight, x, x))
        report = graphs.fused_copy(traced)[1]
        assert [s.reason for s in report.sites] == ["mutation" if said == "refused" else None], lines


def test_lines_of_ranks_that_disagree():
    """A fake group has no other ranks to disagree with: this is what each rank decides by itself."""
    begin, first, own = one("troubleshooting.md", "ranks-disagree").splitlines()
    c10d = torch.ops._c10d_functional
    decided: dict[str, list[str | None]] = {first: [], own: []}
    for rank in range(2):
        graphs.start_fake_group(2, rank)

        def gather(x: torch.Tensor) -> torch.Tensor:
            return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, dist.group.WORLD.group_name))

        for line in decided:
            names = {**NAMES, "rank": rank, "all_gather": gather, "mlp": torch.sigmoid}
            exec(f"def f(x, residual):\n    {begin}\n    {line}\n    return norm(h)", names)
            torch._dynamo.reset()
            tpfuse.clear_reports()
            with torch.no_grad():
                torch.compile(names["f"], backend="tpfuse", options=ALL)(torch.randn(3, H), torch.randn(3, H))
            decided[line] += [site.reason for report in tpfuse.reports() for site in report.sites]
    dist.destroy_process_group()
    assert decided == {first: [None, "rows-move"], own: [None, None]}


def test_no_snippet_is_left_out():
    """Every Python snippet is taken by a call of :func:`one` in this file."""
    taken = {("troubleshooting.md", reason, 0) for reason in (*LINES, *MODULES, *OPTIONS)}
    for node in ast.walk(ast.parse(Path(__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "one":
            arguments = [a.value for a in node.args if isinstance(a, ast.Constant)]
            taken.add((*arguments, 0)[:3])  # without a position it is the first
    seen: Counter[tuple[str, str]] = Counter()
    left = []
    for snippet in PYTHON:
        key = (snippet.page, snippet.heading)
        if snippet.page == "tutorial.md":  # all of it is run as one program
            continue
        if (*key, seen[key]) not in taken:
            left.append(str(snippet))
        seen[key] += 1
    assert not left, f"add a test here that runs the Python snippets of {', '.join(left)}"


# -- commands -----------------------------------------------------------------------------------------------------------

COMMANDS = ("make", "pip", "python", "pytest", "source", "tpfuse", "torchrun")
# The user's own scripts and folders in commands, and blocks that show output or formulas.
THEIRS = {"serve.py", "check.py", "tutorial.py"}
TEXT = ("mean-dim (1)", "DIR/rank-0", "graph-0:", "tensorrt: 6", "s * g", "phase =")


def commands() -> list[tuple[str, str]]:
    """(where, command) of indented blocks and of inline code that starts with one of :data:`COMMANDS`."""
    found = []
    for snippet in SNIPPETS:
        if snippet.language:
            continue
        for offset, line in enumerate(re.sub(r"\\\n *", "", snippet.text).splitlines()):
            if line.strip() and not snippet.text.startswith(TEXT):
                found += [(f"{snippet.page}:{snippet.line + offset}", part) for part in line.split("  #")[0].split(";")]
    for path in PAGES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for code in re.findall(r"`([^`]+)`", line):
                words = [w for w in code.split() if not re.match(r"^[A-Z_]+=", w)]
                if len(words) > 1 and words[0] in COMMANDS:
                    found.append((f"{path.name}:{number}", code))
    return found


@pytest.mark.parametrize(("where", "command"), commands(), ids=lambda value: value)
def test_commands_exist(where, command):
    words = [w for w in shlex.split(command) if not re.match(r"^[A-Z_]+=", w)]
    assert words and words[0] in COMMANDS, f"{where}: {command!r} is no known command"
    CHECKS[words[0]](words[1:])


def check_make(targets: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", text, re.MULTILINE), f"no target {target}"


def check_pip(words: list[str]) -> None:
    action, what = words
    extras = re.fullmatch(r"(\.|tpfuse)(?:\[([a-z,]+)\])?", what)
    assert action == "install" and extras, words
    text = (ROOT / "pyproject.toml").read_text()
    for extra in (extras[2] or "").split(",") if extras[2] else []:
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), f"no extra {extra}"


def check_python(words: list[str]) -> None:
    script, *options = words
    if script in THEIRS:
        return
    path = ROOT / script
    assert path.is_file(), f"no file {script}"
    source = path.read_text() + "".join(p.read_text() for p in path.parent.glob("arguments.py"))
    for option in options:
        assert not option.startswith("-") or f'"{option}"' in source, f"{script} has no option {option}"


def check_pytest(words: list[str]) -> None:
    assert (ROOT / words[0]).is_dir()
    assert words[1:] in ([], ["-m", "gpu"])


def check_source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]  # what `make setup` makes


def check_tpfuse(words: list[str]) -> None:
    """The command parses what is shown; nothing of it runs."""
    typer = pytest.importorskip("typer")
    from tpfuse.inspect.commands import app

    command = typer.main.get_command(app)
    if words == ["--version"]:
        return
    name, *rest = words
    assert name in command.commands, f"no command tpfuse {name}"
    if len(rest) > 1 or not any(
        p.required for p in command.commands[name].params
    ):  # a name alone refers to the command
        command.commands[name].make_context(name, rest)


def check_torchrun(words: list[str]) -> None:
    if "..." in words or THEIRS & set(words):
        return
    if "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1])
        return
    assert any((ROOT / w).is_file() for w in words if w.endswith(".py"))


CHECKS = {
    "make": check_make, "pip": check_pip, "python": check_python, "pytest": check_pytest,
    "source": check_source, "tpfuse": check_tpfuse, "torchrun": check_torchrun,
}  # fmt: skip


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_lead_to_files_and_headings():
    for path in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            if target.startswith("http"):
                continue
            file = (path.parent / target) if target else path
            assert file.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(file), (
                f"{path.name}: {target}#{anchor}; have {sorted(anchors(file))}"
            )


def test_every_page_is_linked_from_readme_or_from_a_page_that_is():
    found, left = {ROOT / "README.md"}, [ROOT / "README.md"]
    while left:
        path = left.pop()
        for target in re.findall(r"\]\(([^)#]+\.md)", path.read_text()):
            file = (path.parent / target).resolve()
            if not target.startswith("http") and file not in found:
                found.add(file)
                left.append(file)
    assert set(PAGES) <= found, sorted(str(p) for p in set(PAGES) - found)
