"""What keeps a kernel from being compiled is one kind of error, of one line."""

from __future__ import annotations

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
def test_no_compiler_and_half_a_library_are_one_error_of_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(source: str) -> None:
        raise error

    monkeypatch.setattr(CppCodeCache, "load", load)

    with pytest.raises(NotCompiledError) as raised:
        cpu_library.load("few_rows")

    assert str(raised.value) == "no C++ compiler"
