"""The house: what imports what, what an import costs, and what is left when a part is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kx_kernels as kx
from kx_kernels._core import dispatch, native
from kx_kernels._core.spec import all_specs

PACKAGE = Path(kx.__file__).parent
ROOT = PACKAGE.parent

# What a file of an operator may import from its own folder: the layers below it, never a sibling backend.
BELOW = {
    "reference": {"state", "presets"},
    "state": set(),
    "presets": set(),
    "_problem": set(),
    "tables": set(),
    "_native": {"_problem", "presets"},
    "_triton": {"_problem", "_triton_kernel", "presets"},
    "_triton_kernel": set(),
    "_torch": {"_problem", "presets"},
    "_backends": {"_problem", "_native", "_triton", "_torch", "reference", "state", "presets"},
    "_autograd": {"_problem", "_backends"},
    "api": {"_problem", "_backends", "_autograd", "state", "presets"},
    "spec": {"_problem", "_triton", "api", "reference", "state", "tables", "presets"},  # of Triton: sizes of its tiles
    "__init__": set(),
}


def imports(file: Path) -> Iterator[str]:
    """The absolute name of every module that a file of the package imports, wherever in the file."""
    package = ["kx_kernels", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def operator_files() -> list[Path]:
    return sorted((PACKAGE / "ops").glob("*/*.py"))


@pytest.mark.parametrize("file", operator_files(), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_layers_import_downwards(file: Path) -> None:
    own = f"kx_kernels.ops.{file.parent.name}."
    for name in imports(file):
        if name.startswith(own):
            assert name.removeprefix(own).split(".")[0] in BELOW[file.stem], f"{file.name} imports {name}"
        elif name.startswith("kx_kernels") and not name.startswith("kx_kernels._core"):
            # A definition may use another one, a public function another one, and names those of another.
            assert file.stem == name.split(".")[3], f"{file.name} imports {name}"
            assert file.stem in ("reference", "api", "presets"), f"{file.name} imports {name}"


def test_shared_code_knows_no_operator() -> None:
    for file in (PACKAGE / "_core").glob("*.py"):
        assert not [n for n in imports(file) if n.startswith("kx_kernels.ops.")], file
    for folder in ("nn", "compat"):
        for file in (PACKAGE / folder).glob("*.py"):
            for name in imports(file):
                if name.startswith("kx_kernels.ops."):
                    assert name.split(".")[3] in ("api", "state", "tables"), file
                elif name.startswith("kx_kernels."):
                    assert name.startswith(("kx_kernels.nn", "kx_kernels.compat", "kx_kernels._core.checks.")), file


def test_every_operator_has_a_spec_and_is_public() -> None:
    folders = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "__init__.py").exists())
    assert [spec.name for spec in all_specs()] == folders
    for spec in all_specs():
        assert getattr(kx, spec.name) is spec.function


def test_kernels_include_no_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 5
    for source in sources:
        text = source.read_text()
        assert "torch/" not in text, source
        assert "pybind11/" not in text or source.name == "bindings.cpp", source


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light() -> None:
    """Nothing but the package itself on top of torch: no triton, no extension, no GPU."""
    heavy = run(
        "import sys, torch; before = set(sys.modules); import kx_kernels\n"
        "print([m for m in set(sys.modules) - before if not m.startswith('kx_kernels')])\n"
        "print([m for m in sys.modules if m.startswith('kx_kernels._C')])\n"
        "print(torch.cuda.is_initialized())"
    )
    extra, extension, gpu = heavy.splitlines()
    assert [m for m in ast.literal_eval(extra) if not m.startswith("torch")] == []
    assert (extension, gpu) == ("[]", "False")


def test_main_tells_what_is_here() -> None:
    report = run("import runpy; runpy.run_module('kx_kernels', run_name='__main__')")
    for word in (
        kx.__version__,
        torch.__version__,
        "rope on cpu",
        "serves this call",
        "cannot: the tensors are on cpu",
    ):
        assert word in report


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda name="_C": None)
    q, (cos, sin) = torch.randn(1, 4, 2, 8), kx.rope_tables(4, 8)
    table = kx.explain(kx.rope, q, None, cos, sin)
    assert "cpu        cannot: the C++ extension is not built" in table
    with pytest.raises(kx.UnsupportedError, match="no compiler was found"):
        kx.rope(q, None, cos, sin, backend="cpu")


def test_without_triton() -> None:
    table = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kx_kernels as kx\n"
        "q, (cos, sin) = torch.randn(1, 4, 2, 8), kx.rope_tables(4, 8)\n"
        "kx.rope(q, None, cos, sin)\n"
        "print(kx.explain(kx.rope, q, None, cos, sin))"
    )
    assert "triton     cannot: triton is not installed" in table


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.requested(None) == dispatch.requested("auto") == "auto"
    with kx.backend("reference"):
        assert dispatch.requested(None) == "reference"
        assert dispatch.requested("cpu") == "cpu"
        with kx.backend("auto"):
            assert dispatch.requested(None) == "auto"
    with pytest.raises(ValueError, match="'mps'; expected one of 'auto'"), kx.backend("mps"):
        pass
    assert dispatch.requested(None) == "auto"
    failing = subprocess.run(
        [sys.executable, "-c", "import kx_kernels"], env={"KX_BACKEND": "tpu"}, capture_output=True, text=True, cwd=ROOT
    )
    assert "KX_BACKEND is 'tpu'" in failing.stderr
