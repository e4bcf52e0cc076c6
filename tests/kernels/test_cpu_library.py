"""What keeps a kernel from being compiled is one kind of error, of one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._inductor.codecache import CppCodeCache

from vllm_redrafter.kernels import cpu_library
from vllm_redrafter.kernels.cpu_library import NotCompiledError


@pytest.mark.parametrize("name", ["few_rows", "cpu_tree_attention"])
def test_a_library_tells_how_wide_its_panels_are(name: str) -> None:
    assert cpu_library.load(name).panel_width() >= 8


@pytest.mark.parametrize(
    "error", [RuntimeError("no C++ compiler\nfound anywhere"), OSError("no C++ compiler\nits file is too short")]
)
def test_no_compiler_and_no_usable_library_are_one_error_of_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(source: str) -> None:
        raise error

    monkeypatch.setattr(CppCodeCache, "load", load)

    with pytest.raises(NotCompiledError) as raised:
        cpu_library.load("few_rows")

    assert str(raised.value) == "no C++ compiler"


def test_half_a_library_that_a_killed_compiler_left_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[str] = []
    load = CppCodeCache._load_library_inner

    def load_second(path: str, key: str) -> object:
        paths.append(path)
        if len(paths) == 1:
            raise OSError(f"{path}: file too short")
        return load(path, key)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CppCodeCache, "cache", {})
    monkeypatch.setattr(CppCodeCache, "_load_library_inner", load_second)

    assert cpu_library.load("few_rows").panel_width() >= 8
    assert len(set(paths)) == 2
