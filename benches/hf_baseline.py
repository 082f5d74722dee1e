#!/usr/bin/env python3
"""Hugging Face transformers on the workloads of `gemma-cuda bench`, for the same table: one JSON object a line, or text.

    hf_baseline.py --random gemma-7b [--workload seed tutorial] [--mode eager static] [--max-new N] [--json]
    hf_baseline.py --model DIR ...

Modes, both greedy through model.generate() in bfloat16:
  eager   the default: a cache that grows
  static  cache_implementation="static", with which generate() compiles the decode step (on a GPU)

Prompts are the same ids, filled up on the left with an attention mask. `mixed` runs as batches of 64 in the order of the
requests, each until its longest has ended: what one does without continuous batching. Tokens/s counts only what each
request asked for, and bytes and FLOPs what must be read and computed for that, without the filling.

Each workload warms up first: `eager` with few new tokens, `static` with a whole run, so that all is compiled. Then it is
timed --repeat times; the fastest counts. --max-new cuts every request down; nothing is extrapolated, the lengths printed
are those that ran. This file needs torch and transformers and nothing else of the repository.
"""
import argparse
import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, GemmaConfig, StoppingCriteria, StoppingCriteriaList

AT_ONCE = 64
WARM_UP_TOKENS = 8
SHAPES = {  # what differs from GemmaConfig's defaults, which are the 7B model's
    "gemma-2b": {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
                 "num_key_value_heads": 1},
    "gemma-7b": {},
}


def spread(i, of, low, high):
    """Evenly from low to high, in an order that mixes them; as workload.rs has it."""
    return low + i * 37 % of * (high - low) // max(of - 1, 1)


WORKLOADS = {  # (prompt, new) of each request
    "seed": [(spread(i, 64, 1, 128), 896) for i in range(64)],
    "tutorial": [(spread(i, 64, 1, 20), 492) for i in range(64)],
    "single": [(128, 512)],
    "mixed": [(spread(i, 256, 16, 512), spread(i * 5 + 11, 256, 16, 512)) for i in range(256)],
    "prefill": [(4096, 1)] * 8,
}


def prompt(request, length, vocab):
    ids = min(max(vocab, 4), 10_003) - 3
    return [(request * 7919 + t * 104_729) % ids + 3 for t in range(length)]


def requests_of(workload, most_new):
    return [(length, min(new, most_new)) for length, new in WORKLOADS[workload]]


class Progress(StoppingCriteria):
    """Stops nothing; tells the person at the terminal how far a batch has come."""

    def __init__(self, name, batch, device):
        self.name, self.shown, self.tokens = name, time.monotonic(), 0
        self.go_on = torch.zeros(batch, dtype=torch.bool, device=device)

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens += 1
        if time.monotonic() - self.shown > 1 and sys.stderr.isatty():
            self.shown = time.monotonic()
            print(f"\r{self.name}: {self.tokens} new tokens", end="\x1b[K", file=sys.stderr, flush=True)
        return self.go_on


def load(args, device):
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    else:
        torch.manual_seed(1)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(GemmaConfig(**SHAPES[args.random]), dtype=torch.bfloat16)
    model.eval()
    model.generation_config.eos_token_id = None  # nothing but the number of tokens ends a generation
    model.generation_config.pad_token_id = 0
    return model


def run_batch(model, name, first, batch, mode):
    """Generates for requests `first`, `first` + 1, ...; returns each one's new tokens."""
    vocab, device = model.config.get_text_config().vocab_size, model.device
    width, new = max(length for length, _ in batch), max(new for _, new in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (length, _) in enumerate(batch):
        ids[row, width - length:] = torch.tensor(prompt(first + row, length, vocab))
        mask[row, width - length:] = 1
    out = model.generate(
        ids.to(device), attention_mask=mask.to(device), max_new_tokens=new, do_sample=False,
        cache_implementation="static" if mode == "static" else None,
        stopping_criteria=StoppingCriteriaList([Progress(name, len(batch), device)]))
    if out.shape != (len(batch), width + new):
        raise SystemExit(f"error: {name}: generate() returned {list(out.shape)}, not {[len(batch), width + new]}")
    rows = out[:, width:].tolist()
    return [row[:new] for row, (_, new) in zip(rows, batch)]


def run(model, workload, requests, mode):
    tokens = []
    batches = [requests[i:i + AT_ONCE] for i in range(0, len(requests), AT_ONCE)]
    synchronize(model.device)
    start = time.perf_counter()
    for i, batch in enumerate(batches):
        tokens += run_batch(model, f"hf {mode}, {workload}, batch {i + 1} of {len(batches)}", i * AT_ONCE, batch, mode)
    synchronize(model.device)
    return time.perf_counter() - start, tokens


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def least_work(config, requests):
    """Passes, bytes and FLOPs: matrices once a pass, keys and values of what each new token sees, 2 a weight and row."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layers = config.num_hidden_layers * config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    lm_head = config.hidden_size * config.vocab_size
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [config.sliding_window if kind == "sliding_attention" else 1 << 30 for kind in kinds]
    passes = sum(max(new for _, new in requests[i:i + AT_ONCE]) for i in range(0, len(requests), AT_ONCE))
    seen = 0  # tokens, over all layers and passes
    for window in set(windows):
        own = sum(length if length < window else min(length, window + length - 1) for length, _ in requests)
        own += sum(min(length + i, window) for length, new in requests for i in range(1, new))
        seen += own * windows.count(window)
    fed = sum(length + new - 1 for length, new in requests)
    flops = 2 * (layers * fed + lm_head * sum(new for _, new in requests))
    return passes, passes * (layers + lm_head) * 2 + seen * 2 * kv * 2, flops


def copy_bandwidth(device):
    """Bytes read and written in a second by a copy within the device's memory."""
    count = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target, best = torch.zeros_like(source), 0.0
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        synchronize(device)
        best = max(best, 4 * 2 * count / (time.perf_counter() - start))
    return best


def fnv(tokens):
    value = 0xCBF29CE484222325
    for token in (token for row in tokens for token in row):
        value = (value ^ token) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def measure(model, name, workload, mode, args, copy):
    requests = requests_of(workload, args.max_new)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    run(model, workload + ", warming up", requests if mode == "static" else requests_of(workload, WARM_UP_TOKENS), mode)
    seconds, tokens = min((run(model, workload, requests, mode) for _ in range(args.repeat)), key=lambda r: r[0])
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    steps, read, flops = least_work(model.config.get_text_config(), requests)
    prompts, new = sum(length for length, _ in requests), sum(new for _, new in requests)
    return {
        "workload": workload, "configuration": f"hf {mode}",
        "device": torch.cuda.get_device_name(model.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "model": name, "padded": True, "graphs": mode == "static" and cuda,
        "requests": len(requests), "prompt_tokens": prompts, "new_tokens": new, "seconds": seconds,
        "tokens_per_second": (prompts if workload == "prefill" else new) / seconds, "steps": steps,
        "gb_per_second": read / seconds / 1e9, "copy_gb_per_second": copy / 1e9, "share_of_copy": read / seconds / copy,
        "tflops": flops / seconds / 1e12,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(model.device) if cuda else None,
        "tokens_hash": fnv(tokens), "cut_to_new_tokens": args.max_new if args.max_new < 1 << 30 else None,
        "attention": model.config._attn_implementation, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def line(row):
    peak = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f} GiB"
    return (f"{row['workload']:>8} {row['configuration']:>15} {row['requests']:>8} {row['prompt_tokens']:>7} "
            f"{row['new_tokens']:>7} {row['seconds']:>9.3f} {row['tokens_per_second']:>9.1f} {row['gb_per_second']:>7.1f} "
            f"{100 * row['share_of_copy']:>6.1f}% {row['tflops']:>8.2f} {peak:>9}  {row['tokens_hash']}")


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--random", choices=sorted(SHAPES), metavar="SHAPE",
                        help="random weights in the shape of " + " or ".join(sorted(SHAPES)) + ", made on the device")
    source.add_argument("--model", metavar="DIR", help="folder of a checkpoint")
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="NAME",
                        help=", ".join(WORKLOADS) + " (default: all)")
    parser.add_argument("--mode", nargs="+", choices=["eager", "static"], default=["eager", "static"], metavar="MODE",
                        help="eager, static (default: both)")
    parser.add_argument("--repeat", type=positive, default=1, metavar="N", help="timed runs (default: 1)")
    parser.add_argument("--max-new", type=positive, default=1 << 30, metavar="N",
                        help="cut every request down to N new tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="DEVICE",
                        help="cuda, cuda:N or cpu (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args()


def main():
    args = arguments()
    device = torch.device(args.device)
    transformers.utils.logging.set_verbosity_error()
    copy = copy_bandwidth(device)
    model, name = load(args, device), args.random or args.model
    if not args.json:
        cut = "" if args.max_new == 1 << 30 else f"; cut to {args.max_new} new tokens a request"
        print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; copies reach "
              f"{copy / 1e9:.0f} GB/s{cut}\n{'workload':>8} {'configuration':>15} {'requests':>8} {'prompt':>7} {'new':>7} "
              f"{'seconds':>9} {'tokens/s':>9} {'GB/s':>7} {'of copy':>7} {'TFLOP/s':>8} {'peak':>9}  tokens", flush=True)
    for mode in args.mode:
        for workload in args.workload:
            row = measure(model, name, workload, mode, args, copy)
            print(json.dumps(row) if args.json else line(row), flush=True)


if __name__ == "__main__":
    main()
