"""The model card that is written beside compressed weights."""

from typing import Any


def model_card(record: dict[str, Any]) -> str:
    """Markdown from the record of a compression: what was done, what was measured, how to use the result."""
    config, results = record["config"], record["results"]
    before, after = results["cache_bytes_per_token_before"], results["cache_bytes_per_token"]
    share = config.get("calibration_copy_fraction")
    lines = [
        "---",
        "library_name: transformers",
        "tags: [mea, kv-cache-compression]",
        "---",
        "",
        f"# {config['model']} with {after / before:.0%} of its KV cache",
        "",
        f"Compressed with mea {record['versions'].get('mea', '')}: method `{config['method']}`, calibrated on "
        f"{config['calibration_tokens']:,} tokens of `{config['calibration_text']}`"
        f"{f', parts of them read again in {share:.0%} of the windows' if share else ''}, no training.",
        "",
        "| measured | original | compressed |",
        "|---|---|---|",
        f"| cache bytes per token ({config['dtype']}) | {before:,.0f} | {after:,.0f} |",
    ]
    if "perplexity" in results:
        lines.append(
            f"| perplexity, WikiText-2 raw test, first {config['measured_tokens']:,} tokens | "
            f"{results['perplexity_before']:.2f} | {results['perplexity']:.2f} "
            f"({results['perplexity_ratio']:.3f} ± {results['perplexity_ratio_error']:.3f} times) |"
        )
    lines += [
        f"| largest relative logit error at full rank, fp32 | | {results['self_check']['full_rank']:.1e} |",
        f"| largest relative error of cached decoding in a layer, fp32 | | {results['self_check']['cached']:.1e} |",
        "",
        "The licence of the original model holds for this one.",
        "",
        "```python",
        "import mea  # or trust_remote_code=True below",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
        "`compression.json` holds the record: ranks per layer, losses per layer, machine and versions.",
        "",
    ]
    return "\n".join(lines)
