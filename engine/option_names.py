"""What an unknown option may have meant: another server's name for one of ours, or a slip of the keyboard.

The names are those of vLLM, SGLang, llama.cpp, TGI and Ollama, as of 2026. Standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

# Another server's name -> the option here. What has the same name here needs no entry.
RENAMED = {
    # model
    "model_path": "model",
    "model_id": "model",
    "model_tag": "model",
    "hf_model": "model",
    "model_name": "served_model_name",
    "alias": "served_model_name",
    "torch_dtype": "dtype",
    "max_seq_len": "max_model_len",
    "max_seq_length": "max_model_len",
    "max_sequence_length": "max_model_len",
    "max_total_tokens": "max_model_len",
    "max_context_len": "max_model_len",
    "context_length": "max_model_len",
    "n_ctx": "max_model_len",
    "num_ctx": "max_model_len",
    "ctx_size": "max_model_len",
    "lora_modules": "adapters",
    "lora_paths": "adapters",
    "max_loaded_loras": "max_adapters",
    # cache
    "block_size": "chunk_size",
    "page_size": "chunk_size",
    "num_gpu_blocks_override": "num_gpu_blocks",
    "num_cpu_blocks_override": "num_cpu_blocks",
    "kv_cache_memory_gib": "gpu_memory_gib",
    "mem_fraction_static": "gpu_memory_utilization",
    "cuda_memory_fraction": "gpu_memory_utilization",
    "swap_space": "kv_offloading_size",
    "hicache_size": "kv_offloading_size",
    "cache_ram": "kv_offloading_size",
    "radix_eviction_policy": "eviction_policy",
    "hicache_write_policy": "write_through",
    "enable_write_through": "write_through",
    # scheduling
    "max_running_requests": "max_num_seqs",
    "max_concurrent_requests": "max_num_seqs",
    "max_batch_size": "max_num_seqs",
    "batch_size": "max_num_seqs",
    "n_parallel": "max_num_seqs",
    "num_parallel": "max_num_seqs",
    "chunked_prefill_size": "max_num_batched_tokens",
    "max_prefill_tokens": "max_num_batched_tokens",
    "max_batch_prefill_tokens": "max_num_batched_tokens",
    "max_batch_total_tokens": "max_num_batched_tokens",
    "n_batch": "max_num_batched_tokens",
    "max_queued_requests": "max_num_queued_reqs",
    "max_queue_size": "max_num_queued_reqs",
    "max_waiting_requests": "max_num_queued_reqs",
    "speculative_config": "speculative",
    # execution and parallel
    "threads": "num_threads",
    "n_threads": "num_threads",
    "num_thread": "num_threads",
    "attn_backend": "attention_backend",
    "disable_cuda_graph": "enforce_eager",
    "disable_cuda_graphs": "enforce_eager",
    "torch_compile": "compile_layers",
    "enable_torch_compile": "compile_layers",
    "tp": "tensor_parallel_size",
    "tp_size": "tensor_parallel_size",
    "num_shard": "tensor_parallel_size",
    # the Serve application
    "dp": "num_replicas",
    "dp_size": "num_replicas",
    "data_parallel_size": "num_replicas",
    "timeout": "request_timeout_s",
    "request_timeout": "request_timeout_s",
}

# Another server's name -> why there is no such option here, and what to do.
ABSENT = {
    "kv_cache_memory_bytes": "give the GPU tier a size in GiB with gpu_memory_gib",
    "max_num_partial_prefills": "prompts are always computed in pieces; see prefill_batch_tokens",
    "enable_chunked_prefill": "prompts are always computed in pieces of at most max_num_batched_tokens; leave it out",
    "enable_prefix_caching": "prefixes are always cached in mode pensieve, never in mode stateless; set mode",
    "disable_radix_cache": "for an engine that keeps nothing between requests, set mode to stateless",
    "prefix_caching_hash_algo": "chunks always have cryptographic keys; leave it out",
    "cpu_offload_gb": "weights are not offloaded; for KV in host memory, set kv_offloading_size",
    "n_gpu_layers": "a model is on one device as a whole; set device",
    "gpu_layers": "a model is on one device as a whole; set device",
    "num_gpu": "a model is on one device as a whole; set device, and num_gpus of the Serve application",
    "pipeline_parallel_size": "there is no pipeline parallelism; set tensor_parallel_size",
    "pp_size": "there is no pipeline parallelism; set tensor_parallel_size",
    "enable_expert_parallel": "experts are sharded with tensor_parallel_size; leave it out",
    "kv_cache_dtype": "the GPU tier has the dtype of the model; set dtype, or kv_cold_dtype for the other tiers",
    "cache_type_k": "the GPU tier has the dtype of the model; set dtype, or kv_cold_dtype for the other tiers",
    "cache_type_v": "the GPU tier has the dtype of the model; set dtype, or kv_cold_dtype for the other tiers",
    "preemption_mode": "a preempted request's chunks stay in the cache and are loaded or recomputed, whichever is cheaper",
    "num_scheduler_steps": "the next step is scheduled while one runs; see async_scheduling",
    "disable_overlap_schedule": "set async_scheduling to false",
    "tokenizer": "the tokenizer is read from the model's folder; put it there",
    "chat_template": "the template is read from the model's folder; put it there as chat_template.jinja",
    "download_dir": "Hugging Face's cache is used; set HF_HOME in the environment",
    "trust_remote_code": "code of a checkpoint is never run; use a model that transformers has",
    "revision": "download the revision into a folder, and give that as the model",
    "seed": "sampling is seeded for each request; give seed in the request",
    "enable_lora": "adapters are served if `adapters` or `adapter_folder` is set; leave it out",
    "max_loras": "a step may have all loaded adapters; set max_adapters",
    "max_cpu_loras": "adapters are kept where the model is; set max_adapters",
    "fully_sharded_loras": "adapters are sharded as the layers that they are added to; leave it out",
    "speculative_model": "models that draft are not supported; set speculative to {method: ngram, num_tokens: 8}",
    "keep_alive": "the model stays loaded as long as the server runs; leave it out",
    "swap_copies": "a GPU's copy engines copy the blocks, and nothing else does; leave it out",
    "host": "give it in the Serve config file, under http_options",
    "port": "give it in the Serve config file, under http_options",
    "api_key": "set PENSIEVE_API_KEY in the environment, or name a tenants_file",
}


def unknown_option(name: str, known: Iterable[str], spell: Callable[[str], str] = repr, otherwise: str = "") -> str:
    """The remedy for an option that does not exist.

    name: as it was given; dashes stand for underscores.
    known: the options that would be right in its place.
    spell: how an option of that place is written, such as with dashes.
    otherwise: what to say if no known name is near; empty for a list of the known ones.
    """
    known = sorted(known)
    plain = name.lstrip("-").replace("-", "_").lower()
    bare = plain.removeprefix("no_") if plain not in known else plain
    if RENAMED.get(bare) in known:
        return f"it is called {spell(RENAMED[bare])} here"
    if bare in ABSENT:
        return ABSENT[bare]
    near = difflib.get_close_matches(plain, known, n=1)
    return f"did you mean {spell(near[0])}?" if near else otherwise or f"known are {', '.join(known)}"
