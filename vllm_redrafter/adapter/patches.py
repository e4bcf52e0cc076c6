"""Every symbol of vLLM that we replace or lean on, in one place: what, why, and when it can go.

Four functions are wrapped; the wrappers give everybody who has not asked for `redrafter` the original. The rest of the
adapter subclasses vLLM's classes; what those subclasses override or read is listed as contracts (for model runner V2 in
`v2.contracts`), and checked before an engine starts. Two seams are open only inside our own worker: `worker` puts our
runner in the place of vLLM's while it builds one, and `target_matrices` sees the target's matrices while they load, and
puts its products before those of `_C::onednn_mm`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_redrafter.adapter.contract import Contract
from vllm_redrafter.adapter.v2 import contracts, support

PROPOSER_PATH = "vllm_redrafter.adapter.proposer.ReDrafterProposer"
"""The model of our method inside vLLM: V1 loads it as a `custom_class`, V2 builds its own speculator."""


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


def _wrap_create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        requested = self.speculative_config
        if not isinstance(requested, dict) or requested.get("method") != "redrafter":
            return original(self, target_model_config, target_parallel_config)
        from vllm_redrafter.adapter.config import translate

        self.speculative_config = translate(self, target_model_config, target_parallel_config)
        try:
            return original(self, target_model_config, target_parallel_config)
        finally:
            # the same arguments may make another engine
            self.speculative_config = requested

    return create_speculative_config


def _wrap_maybe_override_with_speculators(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def maybe_override_with_speculators(model: str, *args: Any, **kwargs: Any) -> Any:
        resolved = original(model, *args, **kwargs)
        target, _, request = resolved
        # vLLM puts the model itself in here where it has found a drafter in its place
        if isinstance(request, dict) and request.get("method") == "redrafter" and request.get("model") == model:
            from vllm_redrafter.adapter.config import check_verifier

            check_verifier(model, target, kwargs.get("revision"))
        return resolved

    return maybe_override_with_speculators


def _wrap_validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_spec_decode(self: Any, speculative_config: Any) -> Any:
        # our acceptance draws from the target's own sampler, so min_p and logit_bias mean what they always mean
        if is_redrafter(speculative_config):
            return None
        return original(self, speculative_config)

    return validate_spec_decode


def _wrap_init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_speculator(vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_redrafter(vllm_config.speculative_config):
            return original(vllm_config, device, *args, **kwargs)
        from vllm_redrafter.adapter.v2.speculator import TreeSpeculator

        return TreeSpeculator(vllm_config, device)

    return init_speculator


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
    Contract(_RUNNER, "GPUModelRunner._get_eagle3_aux_layers_from_config", ()),
    Contract(_RUNNER, "GPUModelRunner._dummy_run", ("num_tokens",)),
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
    return speculative_config is not None and speculative_config.model == PROPOSER_PATH


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

    The last check is of what our classes import from vLLM: otherwise a name that has moved would be found out by a
    worker, long after the engine's start.
    """
    if support.uses_v2():
        return [*map(_check, V2_CONTRACTS), _check_import("vllm_redrafter.adapter.v2.speculator")]
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
    except ImportError:
        return None
    for part in filter(None, qualified_name.split(".")):
        found = getattr(found, part, None)
    return found
