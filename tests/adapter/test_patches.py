from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from vllm_redrafter.adapter import config, patches
from vllm_redrafter.adapter.patches import (
    CONTRACTS,
    PATCHES,
    PROPOSER_PATH,
    V2_CONTRACTS,
    Contract,
    ContractCheck,
    Patch,
)
from vllm_redrafter.core.checkpoint import save_drafter
from vllm_redrafter.core.config import ReDrafterConfig
from vllm_redrafter.core.drafter import ReDrafter


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in the place of vLLM's, so that nothing real is wrapped."""
    module = ModuleType("fake_upstream")

    class Owner:
        calls: list[tuple[Any, ...]] = []  # noqa: RUF012

        def method(self, first: Any, second: Any = 2) -> str:
            """Upstream's own words."""
            self.calls.append((self, first, second))
            return "original"

    module.Owner = Owner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_upstream", module)
    return module


@pytest.fixture
def fitting_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the engine use the runner that the installed vLLM is served with: the newest is with V2 alone."""
    first, end = config.TESTED_VLLM
    if not first <= config._vllm_version() < end:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")


def wrapped(name: str, original: Any) -> Any:
    [patch] = [patch for patch in PATCHES if patch.name == name]
    return patch.wrap(original)


class Recorder:
    """A function of vLLM's that remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.result = object()

    def method(self) -> Any:
        def original(*args: Any) -> Any:
            self.calls.append(args)
            return self.result

        return original


# contracts


def test_the_installed_vllm_is_as_we_know_it() -> None:
    checks = patches.check_contracts()

    assert [check for check in checks if not check.ok] == []
    assert len(checks) == len(CONTRACTS) + 1
    assert {check.reason for check in checks} == {"as known"}


def test_the_installed_vllm_is_as_we_know_it_under_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")

    checks = patches.check_contracts()

    assert [check for check in checks if not check.ok] == []
    assert len(checks) == len(V2_CONTRACTS) + 2


def test_everything_that_is_wrapped_has_a_contract_and_a_reason() -> None:
    names = {(contract.module, contract.qualified_name) for contract in (*CONTRACTS, *V2_CONTRACTS)}

    for patch in PATCHES:
        assert (patch.module, f"{patch.owner}.{patch.name}".lstrip(".")) in names
        assert patch.why
        assert patch.remove_when


def test_every_method_that_our_classes_override_has_a_contract() -> None:
    from vllm_redrafter.adapter.attention import TreeAttentionImpl
    from vllm_redrafter.adapter.runner import TreeModelRunner
    from vllm_redrafter.adapter.v2.model_state import TreeModelState
    from vllm_redrafter.adapter.v2.scheduler import AsyncTreeScheduler, TreeScheduler
    from vllm_redrafter.adapter.v2.speculator import TreeSpeculator
    from vllm_redrafter.adapter.worker import ReDrafterCPUWorker

    known = {contract.qualified_name.split(".")[-1] for contract in (*CONTRACTS, *V2_CONTRACTS)}
    schedulers = (TreeScheduler, AsyncTreeScheduler)
    for ours in (TreeAttentionImpl, TreeModelRunner, ReDrafterCPUWorker, TreeModelState, TreeSpeculator, *schedulers):
        by_us = {cls for cls in ours.__mro__ if cls.__module__.startswith("vllm_redrafter")}
        functions = {name for cls in by_us for name, member in vars(cls).items() if inspect.isfunction(member)}
        theirs = set().union(*(vars(cls) for cls in set(ours.__mro__) - by_us))
        overridden = functions & theirs - {"__init__"}
        assert overridden
        assert overridden <= known, overridden - known


def test_a_changed_signature_is_reported_with_what_was_found(
    upstream: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    contracts = (
        Contract("fake_upstream", "Owner.method", ("first",)),
        Contract("fake_upstream", "Owner.method", ("second", "first")),
        Contract("fake_upstream", "Owner.gone", ()),
        Contract("no_such_module.at_all", "function", ()),
    )
    monkeypatch.setattr(patches, "CONTRACTS", contracts)

    assert patches.check_contracts()[:-1] == [
        ContractCheck("fake_upstream.Owner.method", True, "as known"),
        ContractCheck(
            "fake_upstream.Owner.method", False, "takes (first, second), but (second, first, ...) is what we know"
        ),
        ContractCheck("fake_upstream.Owner.gone", False, "not there"),
        ContractCheck("no_such_module.at_all.function", False, "not there"),
    ]


def test_a_name_that_vllm_has_moved_is_reported_before_a_worker_imports_it(
    upstream: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_adapter.py").write_text("from fake_upstream import gone")
    monkeypatch.syspath_prepend(tmp_path)

    check = patches._check_import("fake_adapter")

    assert (check.name, check.ok) == ("fake_adapter", False)
    assert check.reason.startswith("cannot import name 'gone' from 'fake_upstream'")


def test_wrapping_hides_no_signature_from_the_contracts() -> None:
    for patch in PATCHES:
        original = getattr(patches._find(patch.module, patch.owner), patch.name)
        assert inspect.signature(patch.wrap(original)) == inspect.signature(original)


# installing


def forwarding(original: Any) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ("wrapped", original(self, *args, **kwargs))

    return method


def test_installing_twice_wraps_once(upstream: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PATCHES", (Patch("fake_upstream", "Owner", "method", forwarding, "", ""),))

    patches.install()
    once = upstream.Owner.method
    patches.install()

    assert upstream.Owner.method is once
    assert upstream.Owner().method(1) == ("wrapped", "original")


def test_a_function_that_vllm_has_imported_by_name_before_is_wrapped_there_too(
    upstream: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    importer, namesake = ModuleType("vllm.fake_importer"), ModuleType("vllm.fake_namesake")
    original = lambda first: "original"  # noqa: E731
    upstream.function = importer.function = original  # type: ignore[attr-defined]
    namesake.function = lambda first: "another"  # type: ignore[attr-defined]
    for module in (importer, namesake):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    wrap = lambda wrapped: lambda first: ("wrapped", wrapped(first))  # noqa: E731
    monkeypatch.setattr(patches, "PATCHES", (Patch("fake_upstream", "", "function", wrap, "", ""),))

    patches.install()

    assert importer.function(1) == upstream.function(1) == ("wrapped", "original")
    assert namesake.function(1) == "another"


def test_what_is_not_there_is_left_out_and_the_rest_is_installed(
    upstream: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [("fake_upstream", "Owner", "gone"), ("fake_upstream", "Gone", "method"), ("no_such_module", "A", "b")]
    chosen = [Patch(*place, forwarding, "", "") for place in (*missing, ("fake_upstream", "Owner", "method"))]
    monkeypatch.setattr(patches, "PATCHES", tuple(chosen))

    patches.install()

    assert not hasattr(upstream.Owner, "gone")
    assert upstream.Owner().method(1) == ("wrapped", "original")


# the wrappers


@pytest.mark.parametrize(
    "arguments",
    [
        SimpleNamespace(speculative_config=None, spec_method=None),
        SimpleNamespace(speculative_config={}, spec_method=None),
        SimpleNamespace(speculative_config={"method": "ngram", "num_speculative_tokens": 4}, spec_method=None),
        SimpleNamespace(speculative_config={"model": "some/drafter"}, spec_method=None),
        SimpleNamespace(speculative_config={"num_speculative_tokens": 4}, spec_method="ngram"),
    ],
    ids=["no speculation", "empty", "ngram", "no method", "method by flag"],
)
def test_who_does_not_ask_for_us_gets_the_original_with_the_same_arguments_and_result(
    arguments: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "translate", lambda *args: pytest.fail("translated"))
    recorder = Recorder()
    before = dict(arguments.speculative_config or {})
    target, parallel = object(), object()

    result = wrapped("create_speculative_config", recorder.method())(arguments, target, parallel)

    assert result is recorder.result
    assert [tuple(map(id, call)) for call in recorder.calls] == [(id(arguments), id(target), id(parallel))]
    assert (arguments.speculative_config or {}) == before


@pytest.mark.parametrize("name", [patch.name for patch in PATCHES])
@pytest.mark.parametrize(
    ("args", "keywords", "result"),
    [
        (tuple("abcdefgh"), {}, object()),
        (("a",), {"of_tomorrow": "b"}, None),
        (("a", "b", "c"), {}, ("target", "tokenizer", None, "of tomorrow")),
        (("a", "b", "c"), {}, ("target", "tokenizer")),
    ],
    ids=["more arguments", "an unknown keyword", "a longer result", "a shorter result"],
)
def test_functions_that_differ_in_another_vllm_are_called_as_vllm_calls_them(
    name: str, args: tuple[str, ...], keywords: dict[str, str], result: Any
) -> None:
    calls = []

    def original(*args: Any, **keywords: Any) -> Any:
        calls.append((args, keywords))
        return result

    assert wrapped(name, original)(*args, **keywords) is result
    assert calls == [(args, keywords)]


def test_who_asks_for_us_on_another_vllm_is_told_which_ones_we_are_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def original(self: Any, target_model_config: Any, enable_chunked_prefill: bool, disable_log_stats: bool) -> None:
        pytest.fail("called")

    monkeypatch.setattr(config, "_vllm_version", lambda: Version("0.10.0"))
    arguments = SimpleNamespace(speculative_config={"method": "redrafter"})

    with pytest.raises(ValueError, match=r"^vLLM 0\.10\.0 is outside the range that vllm-redrafter is made for"):
        wrapped("create_speculative_config", original)(arguments, object(), True, disable_log_stats=False)


def test_who_asks_for_us_gets_the_original_with_a_config_that_vllm_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    requested, translated = {"method": "redrafter"}, {"method": "custom_class"}
    arguments = SimpleNamespace(speculative_config=requested)
    seen = []

    def translate(*args: Any) -> dict[str, str]:
        seen.append(args)
        return translated

    def original(self: Any, target_model_config: Any, target_parallel_config: Any) -> str:
        seen.append((self, target_model_config, target_parallel_config))
        assert arguments.speculative_config is translated
        return "result"

    monkeypatch.setattr(config, "translate", translate)
    target, parallel = object(), object()

    create = wrapped("create_speculative_config", original)
    result = create(arguments, target_model_config=target, target_parallel_config=parallel)

    assert result == "result"
    assert seen == [(arguments, target, parallel)] * 2
    assert arguments.speculative_config is requested, "the same arguments may make another engine"


def test_who_asks_for_us_by_vllms_flags_gets_the_original_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"speculative_config": None, "spec_method": "redrafter", "spec_model": "a/drafter", "spec_tokens": 8}
    arguments = SimpleNamespace(**flags)
    seen = []
    monkeypatch.setattr(config, "translate", lambda engine_args, *_: seen.append(dict(vars(engine_args))) or "ours")

    wrapped("create_speculative_config", lambda self, *_: seen.append(dict(vars(self))))(arguments, object(), object())

    cleared = {"speculative_config": "ours", "spec_method": None, "spec_model": None, "spec_tokens": None}
    assert seen == [flags, cleared]
    assert vars(arguments) == flags, "the same arguments may make another engine"


def test_a_refusal_reaches_the_user_before_vllm_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def translate(*args: Any) -> None:
        raise ValueError("one sentence")

    monkeypatch.setattr(config, "translate", translate)
    recorder = Recorder()
    arguments = SimpleNamespace(speculative_config={"method": "redrafter"})

    with pytest.raises(ValueError, match=r"^one sentence$"):
        wrapped("create_speculative_config", recorder.method())(arguments, object(), object())

    assert recorder.calls == []
    assert arguments.speculative_config == {"method": "redrafter"}


@pytest.mark.parametrize(
    "request_",
    [
        None,
        {"method": "eagle3", "model": "some/drafter"},
        {"method": "redrafter", "model": "some/other", "num_speculative_tokens": 4},
        {"model": "some/drafter"},
    ],
    ids=["no drafter", "another method", "a target with our drafter", "no method"],
)
@pytest.mark.usefixtures("fitting_runner")
def test_a_model_that_is_no_drafter_of_ours_is_resolved_as_always(
    request_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "check_verifier", lambda *args: pytest.fail("checked"))
    recorder = Recorder()
    recorder.result = ("target", "tokenizer", request_)  # type: ignore[assignment]

    resolve = wrapped("maybe_override_with_speculators", recorder.method())

    assert resolve("some/drafter", "tokenizer", False) is recorder.result
    assert recorder.calls == [("some/drafter", "tokenizer", False)]


@pytest.mark.usefixtures("fitting_runner")
def test_a_drafter_of_ours_given_as_the_model_has_its_target_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(config, "check_verifier", lambda *args: seen.append(args))
    result = ("org/target", "org/target", {"method": "redrafter", "model": "some/drafter"})

    resolve = wrapped("maybe_override_with_speculators", lambda *args, **keywords: result)

    assert resolve(model="some/drafter", tokenizer=None, revision="v2") is result
    assert resolve("some/drafter", None, False, "v2") is result
    assert seen == [("some/drafter", "org/target", "v2")] * 2


@pytest.mark.usefixtures("fitting_runner")
def test_vllm_finds_target_and_method_in_a_drafter_that_was_saved(tmp_path: Path) -> None:
    from vllm.engine import arg_utils

    drafter = ReDrafter(ReDrafterConfig(hidden_size=4, vocab_size=12, num_speculative_tokens=6, verifier="org/target"))
    save_drafter(drafter, tmp_path)
    resolve = wrapped("maybe_override_with_speculators", arg_utils.maybe_override_with_speculators)

    target, tokenizer, request = resolve(
        model=str(tmp_path), tokenizer=None, trust_remote_code=False, vllm_speculative_config={"beam_width": 2}
    )

    assert (target, tokenizer) == ("org/target", "org/target")
    assert request == {"method": "redrafter", "model": str(tmp_path), "num_speculative_tokens": 6, "beam_width": 2}


def test_sampling_parameters_are_validated_as_always_unless_the_drafter_is_ours() -> None:
    recorder = Recorder()
    validate = wrapped("_validate_spec_decode", recorder.method())
    parameters, ngram = object(), SimpleNamespace(model="ngram")

    assert validate(parameters, ngram) is recorder.result
    assert validate(parameters, None) is recorder.result
    assert validate(parameters, SimpleNamespace(model=PROPOSER_PATH)) is None
    assert recorder.calls == [(parameters, ngram), (parameters, None)]


def test_vllm_refuses_min_p_with_other_drafters_and_takes_it_with_ours() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    # wrapped already where the plugin is installed: the wrapper does not care
    validate = wrapped("_validate_spec_decode", SamplingParams._validate_spec_decode)
    for parameters in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={3: 1.0})):
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
            validate(parameters, SimpleNamespace(model="ngram"))
        validate(parameters, SimpleNamespace(model=PROPOSER_PATH))
        validate(parameters, None)


def test_other_methods_get_vllms_own_speculator() -> None:
    recorder = Recorder()
    init = wrapped("init_speculator", recorder.method())
    theirs = SimpleNamespace(speculative_config=SimpleNamespace(model="ngram_gpu"))

    assert init(theirs, "device", "states") is recorder.result
    assert recorder.calls == [(theirs, "device", "states")]


def test_the_path_of_the_proposer_leads_to_a_class_that_vllm_can_build() -> None:
    module, name = PROPOSER_PATH.rsplit(".", 1)

    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters

    assert list(parameters) == ["vllm_config"]
