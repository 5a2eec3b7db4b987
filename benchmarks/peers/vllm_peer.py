"""vLLM as a peer: runs in a virtual environment of its own, takes one JSON line a run and answers with one.

`python vllm_peer.py '{"model": …, "dtype": …, "adapters": {name: folder}, "ngram": false, "prefix_caching": true}'`;
then on standard input `{"prompts": [[ids]], "adapters": [name or null], "tokens": n, "to_end": bool}` →
`{"seconds": s, "tokens": n, "answers": [[ids]]}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    """Serve runs until standard input ends."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever vLLM prints is no reply
    options: dict[str, Any] = {"model": spec["model"], "dtype": spec["dtype"], "max_model_len": 2048, "seed": 0}
    options |= {"enable_prefix_caching": spec["prefix_caching"], "max_num_seqs": 64}
    if spec["prefix_caching"]:
        # 128 is its default on processors; 32 hits more and is no slower. With 16 it does not start.
        options["block_size"] = 32
    if spec["adapters"]:
        options |= {"enable_lora": True, "max_loras": len(spec["adapters"]), "max_lora_rank": 16}
    if spec.get("ngram"):
        options["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2,
        }  # fmt: skip
    llm = LLM(**options)
    loras = {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(spec["adapters"].items())}
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        run = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=run["tokens"], ignore_eos=not run["to_end"])
        began = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in run["prompts"]],
            params,
            use_tqdm=False,
            lora_request=[loras[name] if name else None for name in run["adapters"]] if loras else None,
        )
        seconds = time.perf_counter() - began
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        reply = {"seconds": seconds, "tokens": sum(map(len, answers)), "answers": answers}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
