"""Served models against ``generate()`` of the same folder: `make test-vllm`, in an environment of its own."""

import gc
import os
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import coded_models
import mea.vllm
from mea.vllm.attention import PagedAttention, StepBuilder
from mea.vllm.cache import choose_blocks, held_blocks
from mea.vllm.checks import PackedModelConfig

NEW = 20
TIERS: dict[str, list[tuple[int, int, int]]] = {
    "predictive": [(8, 16, 32), (0, 16, 32)],
    "joint": [(16, 32, 48)],
}
TOLERANCE = 0.01  # of a logarithm of probability: sums in another order move it less, one token read wrongly more


@pytest.fixture(scope="module", autouse=True)
def plugin():
    mea.vllm.register()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    def make(kind: str = "llama", reading: str = "predictive", ordinary: bool = False) -> str:
        monkeypatch.setattr(coded_models, "FIRST", 4)
        monkeypatch.setattr(coded_models, "RECENT", 64)
        sizes = {"head_dim": 32, "max_position_embeddings": 2048}  # the smallest heads of vLLM on processors
        model = coded_models.coded(kind, reading, TIERS, ordinary, **sizes).float()
        with torch.no_grad():
            for layer in model.model.layers:  # random attention is nearly uniform: errors in it would not show
                attention = layer.self_attn
                (attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj).weight *= 6
                attention.o_proj.weight *= 6
        model.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.fixture
def engine():
    made = []

    def start(path: str, **options: Any) -> LLM:
        options = {"kv_cache_memory_bytes": 2**24, "max_model_len": 1024, **options}
        made.append(LLM(path, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, seed=0, **options))
        return made[-1]

    yield start
    made.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 99, (n,), generator=generator).tolist() for n in lengths]


def generated(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """Tokens and their logarithms of probability by ``generate()``."""
    found = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, len(prompt) :]
        logs = torch.stack(output.logits, 1)[0].log_softmax(-1)
        found.append((tokens.tolist(), logs.gather(1, tokens[:, None])[:, 0]))
    return found


def served(llm: LLM, prompts: list[list[int]]) -> tuple[list[tuple[list[int], torch.Tensor]], list[int]]:
    """The same from vLLM, and how many tokens of each prompt came from the prefix cache."""
    params = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    found = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        found.append((tokens, torch.tensor(logs)))
    return found, [output.num_cached_tokens for output in outputs]


def compare(found: list[Any], expected: list[Any]) -> None:
    for (tokens, logs), (right, exact) in zip(found, expected, strict=True):
        assert tokens == right
        assert (logs - exact).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "reading", "ordinary"),
    [("llama", "predictive", False), ("llama", "joint", False), ("qwen3", "predictive", True)],
)
def test_unequal_prompts_in_chunks_and_from_the_prefix_cache(folder, engine, kind, reading, ordinary):
    path = folder(kind, reading, ordinary)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    prompts = texts(3, 40, 64, 67, 150, 400)
    prompts.append(prompts[-1][:300] + prompts[1])  # shares the first part of another
    expected = generated(model, prompts)
    if kind == "llama":  # one exact token less shows
        for layer in model.model.layers:
            layer.self_attn.exact = (4, 63)
        tokens, logs = generated(model, prompts[5:6])[0]
        assert tokens != expected[5][0] or (logs - expected[5][1]).abs().max() > 2 * TOLERANCE
    llm = engine(path, max_num_batched_tokens=100)
    first, _ = served(llm, prompts)
    compare(first, expected)
    again, cached = served(llm, prompts)
    compare(again, expected)
    assert cached[0] == 0
    assert all(count > len(prompt) // 2 for count, prompt in zip(cached[2:], prompts[2:], strict=True))


@pytest.mark.parametrize("reading", ["predictive", "joint"])
def test_new_tokens_of_several_requests_are_read_together(folder, engine, monkeypatch, reading):
    """As on a GPU, by the kernels' definition; prompts are read in chunks while others decode."""
    path = folder("llama", reading)
    prompts, sizes, read = texts(3, 67, 150, 400), [], PagedAttention.read_rows
    expected = generated(AutoModelForCausalLM.from_pretrained(path).eval(), prompts)
    monkeypatch.setattr(StepBuilder, "together", staticmethod(lambda _: True))
    monkeypatch.setattr(PagedAttention, "read_rows", lambda *args: sizes.append(len(args[1])) or read(*args))
    compare(served(engine(path, max_num_batched_tokens=100), prompts)[0], expected)
    assert sizes.count(len(prompts)) > 10


def test_preempted_requests_and_a_full_pool(folder, engine):
    path = folder()
    llm = engine(path, kv_cache_memory_bytes=550_000, max_model_len=400, max_num_batched_tokens=128, max_num_seqs=8)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt, counts = scheduler._preempt_request, []
    scheduler._preempt_request = lambda *args, **kwargs: (counts.append(1), preempt(*args, **kwargs))
    choose = random.Random(0)
    (shared,) = texts(300)
    prompts = [shared[: choose.choice((0, 60, 250))] + tail for tail in texts(*[60] * 6)]
    expected = generated(AutoModelForCausalLM.from_pretrained(path).eval(), prompts)
    for _ in range(2):
        compare(served(llm, prompts)[0], expected)
    pool = scheduler.kv_cache_manager.block_pool
    assert counts, "nothing was preempted: give the test less memory"
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # but for the null block


def test_the_log_counts_packed_bytes(folder, engine):
    memory, length = 2**22, 1024
    llm = engine(folder(), kv_cache_memory_bytes=memory, max_model_len=length)
    config = llm.llm_engine.vllm_config
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    codes, exact = (group.kv_cache_spec for group in groups)
    request = codes.max_memory_usage_bytes(config) + exact.max_memory_usage_bytes(config)
    assert config.cache_config.kv_cache_size_tokens * request / length == pytest.approx(memory, rel=0.02)
    stored = 3 * (8 + 8 + 8 + 8 + 8 + 4 * 5)  # of three layers: codes of 8, 4 and 2 bits, then 4 bytes for a group
    assert stored <= codes.page_size_bytes / codes.block_size < 1.1 * stored


def test_blocks_take_the_least_memory():
    for code_bytes, exact_bytes in ((4_700, 23_040), (5_000, 23_040), (300, 9_216)):
        blocks = choose_blocks(code_bytes, exact_bytes, 4, 64, 8192, 1)
        assert blocks.page >= max(blocks.codes * code_bytes, blocks.exact * exact_bytes)
        # The exact tokens alone and all codes alone, without any padding.
        least = 8192 * code_bytes + 68 * exact_bytes
        most = blocks.page * (-(-8192 // blocks.codes) + held_blocks(blocks, 4, 64, 1))
        assert most < 1.35 * least


GOOD: dict[str, Any] = {
    "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1},
    "cache_config": {"cache_dtype": "auto", "user_specified_block_size": False, "block_size": 16},
    "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
}


@pytest.mark.parametrize(
    ("model", "setting", "named"),
    [
        ({}, {"parallel_config": {"tensor_parallel_size": 2}}, "tensor_parallel_size=2"),
        ({}, {"parallel_config": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size=2"),
        ({}, {"cache_config": {"cache_dtype": "fp8"}}, "kv_cache_dtype='fp8'"),
        ({}, {"cache_config": {"user_specified_block_size": True}}, "block_size=16"),
        ({}, {"speculative_config": {}}, "speculative"),
        ({}, {"kv_transfer_config": {}}, "connector"),
        ({}, {"lora_config": {}}, "LoRA"),
        ({}, {"scheduler_config": {"disable_hybrid_kv_cache_manager": True}}, "hybrid KV cache manager"),
        ({"cache_code": None}, {}, "latents"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, {}, "sliding window"),
        ({"head_norm_eps": 1e-5}, {}, "norm of each head"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "'dynamic'"),
    ],
)
def test_refused_by_name(folder, model, setting, named):
    config = AutoConfig.from_pretrained(folder())
    for name, value in model.items():
        setattr(config, name, value)
    parts: dict[str, Any] = {"speculative_config": None, "kv_transfer_config": None, "lora_config": None}
    parts |= {name: SimpleNamespace(**values) for name, values in GOOD.items()}
    for name, values in setting.items():
        parts[name] = SimpleNamespace(**{**GOOD.get(name, {}), **values})
    with pytest.raises(ValueError, match=f"mea cannot serve this: .*{named}.*[;,]"):
        PackedModelConfig.verify_and_update_config(
            SimpleNamespace(model_config=SimpleNamespace(hf_config=config), **parts)
        )


def test_refused_by_the_engine_before_it_loads(folder):
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8'"):
        LLM(folder(), kv_cache_dtype="fp8", skip_tokenizer_init=True)


def test_without_the_plugin_the_model_says_what_to_install(folder):
    code = f"from vllm import LLM; LLM({folder()!r}, skip_tokenizer_init=True, trust_remote_code=True)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "VLLM_PLUGINS": ""}, capture_output=True, text=True
    )
    assert run.returncode
    assert "pip install 'mea[vllm]'" in run.stderr
