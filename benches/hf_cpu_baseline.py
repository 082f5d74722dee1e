#!/usr/bin/env python3
"""Hugging Face transformers on the CPU, all cores: the peer our own figures are set against.

    hf_cpu_baseline.py MODEL_DIR [--prefill 256] [--new 64] [--dtype float32 bfloat16] [--json]

Prefill: one forward pass over N tokens that returns only the last position's logits. Decode: greedy, batch 1, with
a KV cache, after a 16-token prompt that is not timed. Medians of --repeats runs after a warm-up run.
"""
import argparse
import json
import os
import statistics
import time

import torch
import transformers

PROMPT = 16


def forward(model, ids, cache=None):
    # Logits of all positions would charge prefill with a vocabulary-wide product that nobody needs.
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def time_prefill(model, ids):
    start = time.perf_counter()
    forward(model, ids)
    return ids.shape[1] / (time.perf_counter() - start)


def time_decode(model, ids, new):
    o = forward(model, ids)
    start = time.perf_counter()
    for _ in range(new):
        o = forward(model, o.logits[:, -1].argmax(-1, keepdim=True), o.past_key_values)
    return new / (time.perf_counter() - start)


def median(run, repeats):
    run()
    return statistics.median(run() for _ in range(repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--prefill", type=int, default=256, metavar="N")
    parser.add_argument("--new", type=int, default=64, metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for dtype in args.dtype:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=getattr(torch, dtype)).eval()
        vocab = model.config.get_text_config().vocab_size
        # Any ids do: the time depends on their number only.
        ids = torch.randint(3, vocab, (1, max(args.prefill, PROMPT)))
        with torch.inference_mode():
            result = {
                "dtype": dtype, "threads": threads, "prefill_tokens": args.prefill, "new_tokens": args.new,
                "prefill_tok_s": round(median(lambda: time_prefill(model, ids[:, :args.prefill]), args.repeats), 2),
                "decode_tok_s": round(median(lambda: time_decode(model, ids[:, :PROMPT], args.new), args.repeats), 2),
                "attention": model.config._attn_implementation,
                "torch": torch.__version__, "transformers": transformers.__version__}
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            print(f"{dtype:9} {threads} threads: prefill of {args.prefill} {result['prefill_tok_s']:.1f} tok/s, "
                  f"decode {result['decode_tok_s']:.1f} tok/s", flush=True)
        del model  # two copies of a large model may not fit


if __name__ == "__main__":
    main()
