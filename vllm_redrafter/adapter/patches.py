"""Every symbol of vLLM that we replace or lean on, in one place: what, why, and when it can go.

Four functions are wrapped; the wrappers give everybody who has not asked for `redrafter` the original. The rest of the
adapter subclasses vLLM's classes; what those subclasses override or read is listed as contracts (for model runner V2 in
`v2.contracts`), and checked before an engine starts. Two seams are open only inside our own worker: `worker` puts our
runner in the place of vLLM's while it builds one, and `target_matrices` sees the target's matrices while they load, and
puts its products before those of `_C::onednn_mm`. Under V2 with an automatic budget vLLM's own option `scheduler_cls`
names a scheduler of ours (`v2.automatic`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

from vllm_redrafter.adapter.contract import Contract
from vllm_redrafter.adapter.v2 import contracts, support

PROPOSER_PATH = "vllm_redrafter.adapter.proposer.ReDrafterProposer"
"""The model of our method inside vLLM: V1 loads it as a `custom_class`, V2 builds its own speculator."""

_REQUEST = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
"""What `EngineArgs` hold of a request: vLLM adds the flags to the config."""


class Patch(NamedTuple):
    """A function of vLLM that is wrapped."""

    module: str
    owner: str  # a class, or empty for a function of the module
    name: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    why: str
    remove_when: str


class ContractCheck(NamedTuple):
    """Outcome of one contract."""

    name: str
    ok: bool
    reason: str


# A wrapper takes whatever it is called with and hands it on untouched: another vLLM's functions may differ, and who has
# not asked for us must not notice. What it reads for us stands where `CONTRACTS` say, or the start is refused.


def _wrap_create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        requested = {name: getattr(self, name, None) for name in _REQUEST}
        if not _asks_for_us(requested["speculative_config"]) and requested["spec_method"] != "redrafter":
            return original(self, *args, **kwargs)
        from vllm_redrafter.adapter.config import translate

        target = _argument(args, kwargs, 0, "target_model_config")
        parallel = _argument(args, kwargs, 1, "target_parallel_config")
        translated = dict.fromkeys(_REQUEST) | {"speculative_config": translate(self, target, parallel)}
        try:
            vars(self).update(translated)
            return original(self, *args, **kwargs)
        finally:
            # the same arguments may make another engine
            vars(self).update(requested)

    return create_speculative_config


def _wrap_maybe_override_with_speculators(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def maybe_override_with_speculators(*args: Any, **kwargs: Any) -> Any:
        resolved = original(*args, **kwargs)
        request = resolved[2] if isinstance(resolved, tuple) and len(resolved) > 2 else None
        if _asks_for_us(request):
            from vllm_redrafter.adapter.config import check_verifier, check_vllm

            # here too: a vLLM that has renamed the function above would answer with a list of its own methods
            check_vllm()
            # vLLM puts the model itself in here where it has found a drafter in its place
            model = _argument(args, kwargs, 0, "model")
            if request.get("model") == model:
                check_verifier(model, resolved[0], _argument(args, kwargs, 3, "revision"))
        return resolved

    return maybe_override_with_speculators


def _wrap_validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_spec_decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        # our acceptance draws from the target's own sampler, so min_p and logit_bias mean what they always mean
        if is_redrafter(_argument(args, kwargs, 0, "speculative_config")):
            return None
        return original(self, *args, **kwargs)

    return validate_spec_decode


def _wrap_init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_speculator(*args: Any, **kwargs: Any) -> Any:
        vllm_config = _argument(args, kwargs, 0, "vllm_config")
        if not is_redrafter(getattr(vllm_config, "speculative_config", None)):
            return original(*args, **kwargs)
        from vllm_redrafter.adapter.v2.speculator import TreeSpeculator

        return TreeSpeculator(vllm_config, _argument(args, kwargs, 1, "device"))

    return init_speculator


def _asks_for_us(request: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(request, dict) and request.get("method") == "redrafter"


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """Return one argument of a call, `self` not counted, or None where the call has none there."""
    return args[position] if position < len(args) else kwargs.get(name)


PATCHES = (
    Patch(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "create_speculative_config",
        _wrap_create_speculative_config,
        why='turns {"method": "redrafter"} into methods that vLLM has, and arranges for our worker: method names are a '
        "closed list",
        remove_when="vLLM has a registry of proposers (vllm-project/vllm#36219)",
    ),
    Patch(
        "vllm.engine.arg_utils",
        "",
        "maybe_override_with_speculators",
        _wrap_maybe_override_with_speculators,
        why="says in one sentence when a drafter given as the model does not lead to its target: vLLM goes on with "
        "what it names, and reports a model that cannot be found",
        remove_when="vLLM checks the verifier that a speculators config names",
    ),
    Patch(
        "vllm.sampling_params",
        "SamplingParams",
        "_validate_spec_decode",
        _wrap_validate_spec_decode,
        why="lets min_p and logit_bias through: vLLM refuses them for every kind of speculation",
        remove_when="vLLM asks the proposer which sampling parameters it honours",
    ),
    Patch(
        "vllm.v1.worker.gpu.spec_decode",
        "",
        "init_speculator",
        _wrap_init_speculator,
        why="builds our speculator under model runner V2: the function is a closed list of methods",
        remove_when="vLLM has a registry of proposers (vllm-project/vllm#36219)",
    ),
)

_RUNNER = "vllm.v1.worker.gpu_model_runner"
CONTRACTS = (
    Contract(
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        ("target_model_config", "target_parallel_config"),
    ),
    Contract(
        "vllm.engine.arg_utils",
        "maybe_override_with_speculators",
        ("model", "tokenizer", "trust_remote_code", "revision", "vllm_speculative_config"),
    ),
    Contract("vllm.sampling_params", "SamplingParams._validate_spec_decode", ("speculative_config",)),
    Contract("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", ()),
    Contract(_RUNNER, "GPUModelRunner.execute_model", ("scheduler_output", "intermediate_tensors")),
    Contract(_RUNNER, "GPUModelRunner.sample_tokens", ("grammar_output",)),
    Contract(_RUNNER, "GPUModelRunner._get_eagle3_aux_layers_from_config", ()),
    Contract(_RUNNER, "GPUModelRunner._dummy_run", ("num_tokens",)),
    Contract(_RUNNER, "GPUModelRunner._update_states", ("scheduler_output",)),
    Contract(_RUNNER, "GPUModelRunner._prepare_inputs", ("scheduler_output", "num_scheduled_tokens")),
    Contract(_RUNNER, "GPUModelRunner._calc_spec_decode_metadata", ("num_draft_tokens", "cu_num_scheduled_tokens")),
    Contract(_RUNNER, "GPUModelRunner._sample", ("logits", "spec_decode_metadata")),
    Contract(
        _RUNNER,
        "GPUModelRunner._bookkeeping_sync",
        ("scheduler_output", "sampler_output", "logits", "hidden_states", "num_scheduled_tokens"),
    ),
    Contract(_RUNNER, "GPUModelRunner._input_fits_in_drafter", ("common_attn_metadata",)),
    Contract(_RUNNER, "GPUModelRunner._build_attention_metadata", ("num_tokens", "num_reqs", "max_query_len")),
    Contract(
        _RUNNER,
        "GPUModelRunner.propose_draft_token_ids",
        (
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
    ),
    Contract("vllm.model_executor.models.interfaces", "SupportsEagle3.set_aux_hidden_state_layers", ("layers",)),
    Contract("vllm.v1.worker.cpu_worker", "CPUModelRunner", ("vllm_config", "device")),
    Contract("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", ()),
    Contract("vllm.v1.worker.cpu_worker", "CPUWorker.compile_or_warm_up_model", ()),
    Contract(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.forward",
        ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    Contract(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    Contract(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata"),
    ),
    Contract(
        "vllm._custom_ops",
        "cpu_attn_reshape_and_cache",
        ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
    ),
    Contract(
        "vllm._custom_ops",
        "cpu_attention_with_kv_cache",
        ("query", "key_cache", "value_cache", "output", "query_start_loc", "seq_lens"),
    ),
    Contract("vllm._custom_ops", "create_onednn_mm", ("weight", "primitive_cache_size")),
    Contract("vllm._custom_ops", "onednn_mm", ("dnnl_handler", "x", "bias")),
    Contract("vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path")),
    Contract("vllm.v1.sample.sampler", "Sampler.forward", ("logits", "sampling_metadata")),
    Contract("vllm.v1.sample.sampler", "Sampler.greedy_sample", ("logits",)),
    Contract(
        "vllm.v1.sample.thinking_budget_state",
        "ThinkingBudgetStateHolder.apply_to_logits",
        ("logits", "predict_bonus_token", "spec_token_ids"),
    ),
    Contract("vllm.v1.sample.rejection_sampler", "RejectionSampler.parse_output", ("output_token_ids", "vocab_size")),
)

V2_CONTRACTS = (*CONTRACTS[:3], *contracts.CONTRACTS)
"""Those of the patches for both runners, and what the adapter for V2 counts on."""


def is_redrafter(speculative_config: Any) -> bool:
    """Return whether a `SpeculativeConfig` of vLLM is one of ours."""
    return getattr(speculative_config, "model", None) == PROPOSER_PATH


def install() -> None:
    """Wrap the functions of `PATCHES`, once; a function that is not there is left out, and `check_contracts` tells."""
    for patch in PATCHES:
        owner = _find(patch.module, patch.owner)
        original = getattr(owner, patch.name, None)
        if original is None or hasattr(original, "_redrafter_patch"):
            continue
        wrapped = patch.wrap(original)
        wrapped._redrafter_patch = patch  # type: ignore[attr-defined]
        setattr(owner, patch.name, wrapped)
        _rebind(patch.name, original, wrapped)


def _rebind(name: str, original: Callable[..., Any], wrapped: Callable[..., Any]) -> None:
    """Replace a function also where modules of vLLM that are loaded already have imported it by name."""
    for module in [module for path, module in sys.modules.items() if path.startswith("vllm.")]:
        # not getattr: some modules import what they are asked for
        if vars(module).get(name) is original:
            setattr(module, name, wrapped)


def check_contracts() -> list[ContractCheck]:
    """Return for every function that we count on whether this vLLM still has it as we know it.

    The last checks are of what our classes import from vLLM: otherwise a name that has moved would be found out by a
    worker, long after the engine's start.
    """
    if support.uses_v2():
        modules = ("vllm_redrafter.adapter.v2.speculator", "vllm_redrafter.adapter.v2.scheduler")
        return [*map(_check, V2_CONTRACTS), *map(_check_import, modules)]
    return [*map(_check, CONTRACTS), _check_import("vllm_redrafter.adapter.worker")]


def _check(contract: Contract) -> ContractCheck:
    name = f"{contract.module}.{contract.qualified_name}"
    function = _find(contract.module, contract.qualified_name)
    if function is None:
        return ContractCheck(name, False, "not there")
    found = tuple(parameter for parameter in inspect.signature(function).parameters if parameter != "self")
    expected = contract.parameters
    if found[: len(expected)] != expected:
        reason = f"takes ({', '.join(found)}), but ({', '.join(expected)}, ...) is what we know"
        return ContractCheck(name, False, reason)
    return ContractCheck(name, True, "as known")


def _check_import(module: str) -> ContractCheck:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return ContractCheck(module, False, str(error))
    return ContractCheck(module, True, "as known")


def _find(module: str, qualified_name: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
    except Exception:  # noqa: BLE001 - a start that does not need the module goes on, one that does meets the error itself
        return None
    for part in filter(None, qualified_name.split(".")):
        found = getattr(found, part, None)
    return found
