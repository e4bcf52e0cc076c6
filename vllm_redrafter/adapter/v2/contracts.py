"""What the adapter overrides and calls of vLLM's model runner V2."""

from __future__ import annotations

from vllm_redrafter.adapter.contract import Contract

_V2 = "vllm.v1.worker.gpu"
CONTRACTS = (
    Contract(f"{_V2}.spec_decode", "init_speculator", ("vllm_config", "device")),
    Contract(f"{_V2}.model_states", "resolve_model_state_cls", ("vllm_config", "model")),
    Contract(f"{_V2}.model_states.default", "DefaultModelState.prepare_inputs", ("input_batch", "req_states")),
    Contract(f"{_V2}.model_states.default", "DefaultModelState.prepare_dummy_inputs", ("num_reqs", "num_tokens")),
    Contract(
        f"{_V2}.model_states.default",
        "DefaultModelState.prepare_attn",
        ("input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups", "kv_cache_config"),
    ),
    Contract(f"{_V2}.model_states.default", "DefaultModelState.add_request", ("req_index", "new_req_data")),
    Contract(f"{_V2}.model_states.default", "DefaultModelState.apply_staged_writes", ()),
    Contract(f"{_V2}.model_states.interface", "ModelState.custom_sampler", ("sampler",)),
    Contract(f"{_V2}.model_states.interface", "ModelState.get_additional_cg_support", ()),
    Contract(f"{_V2}.model_states.interface", "ModelState.initialize_kv_cache", ("kv_cache_config", "block_tables")),
    Contract(f"{_V2}.model_states.interface", "ModelState.postprocess_state", ("idx_mapping", "num_sampled")),
    Contract(
        f"{_V2}.spec_decode.speculator",
        "DraftModelSpeculator.load_draft_model",
        ("target_model", "target_attn_layer_names"),
    ),
    Contract(f"{_V2}.spec_decode.speculator", "DraftModelSpeculator.set_attn", ("model_state", "kv_cache_config")),
    Contract(
        f"{_V2}.spec_decode.speculator",
        "BaseSpeculator.propose",
        (
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
            "temperature",
            "seeds",
        ),
    ),
    Contract(f"{_V2}.spec_decode.speculator", "BaseSpeculator.init_cudagraph_manager", ("cudagraph_mode",)),
    Contract(f"{_V2}.spec_decode.speculator", "BaseSpeculator.capture", ()),
    Contract(f"{_V2}.cudagraph_utils", "CudaGraphManager.capture", ("create_forward_fn", "progress_bar_desc")),
    Contract(
        f"{_V2}.cudagraph_utils",
        "CudaGraphManager.dispatch",
        ("num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"),
    ),
    Contract(f"{_V2}.cudagraph_utils", "CudaGraphManager.run_fullgraph", ("desc",)),
    Contract(
        f"{_V2}.sample.sampler",
        "Sampler.sample",
        (
            "logits",
            "expanded_idx_mapping",
            "idx_mapping",
            "idx_mapping_np",
            "pos",
            "input_ids",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "return_logprobs",
        ),
    ),
    Contract(f"{_V2}.sample.sampler", "Sampler.get_logprobs_dims", ("idx_mapping_np",)),
    Contract(
        f"{_V2}.sample.logprob",
        "compute_topk_scores",
        (
            "logits",
            "num_logprobs",
            "sampled_token_ids",
            "cu_num_logits",
            "logprob_token_ids_state",
            "expanded_idx_mapping",
            "max_per_req_token_ids",
            "logits_mode",
        ),
    ),
    Contract(f"{_V2}.spec_decode.rejection_sampler", "get_max_chunk_logits", ("vocab_size",)),
    Contract(f"{_V2}.sample.penalties", "use_penalty", ("sampling_params",)),
    Contract(
        f"{_V2}.input_batch",
        "get_num_sampled_and_rejected",
        ("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
    ),
    Contract(
        "vllm.v1.spec_decode.dynamic.utils",
        "validate_and_normalize_dynamic_sd_schedule",
        ("num_speculative_tokens_per_batch_size",),
    ),
    Contract("vllm.config.scheduler", "SchedulerConfig.get_scheduler_cls", ()),
    Contract(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("scheduler_output", "model_runner_output"),
    ),
    Contract("vllm.model_executor.models.interfaces", "SupportsEagle3.set_aux_hidden_state_layers", ("layers",)),
    Contract("vllm.distributed", "tensor_model_parallel_all_gather", ("input_", "dim")),
    Contract("vllm.v1.attention.backend", "AttentionImpl.forward", ("layer", "query", "key", "value", "kv_cache")),
)
