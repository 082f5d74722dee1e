#!/usr/bin/env python3
"""Golden data for the tests, computed by Hugging Face transformers (float32, eager attention).

    make.py tiny OUT [CASE...]   write random-weight checkpoints and their goldens to OUT/CASE/
    make.py check [--exact]      regenerate every case and compare it with tiny/
    make.py real MODEL_DIR OUT   goldens of Gemma 3 270M for the prompts of gemma3_270m/golden.json

See README.md for the layout of the files. Configurations and weights are reproducible to the byte under the versions
in requirements.txt; the goldens' last bits also depend on the CPU, whose kernels decide the order of sums.
"""
import argparse
import filecmp
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
VERSIONS = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
            "safetensors": safetensors.__version__, "numpy": np.__version__}

MIN_MARGIN = 0.004  # top-1 over top-2 at every greedy step: some 100 times the float32 noise
SEARCH_STEPS = 32   # greedy steps over which a seed must keep that margin
CPU_NOISE = 1e-4    # float32 goldens of two CPUs differ by less (5e-5 seen), and tests allow 1e-3
HIDDEN_PROMPT = 3   # nine tokens, one more than the sliding window: the prompt with hidden states

# ---------------------------------------------------------------------------------------------- cases

SHARED = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "initializer_range": 0.02, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "use_cache": True,
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA1 = SHARED | {
    "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh",
    "num_hidden_layers": 3, "num_key_value_heads": 1, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# Hidden size 96: its square root is no bfloat16 number, so a rounded embedding scale shows.
GEMMA2 = SHARED | {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 96, "num_hidden_layers": 4, "num_key_value_heads": 2, "rope_theta": 10000.0,
    "query_pre_attn_scalar": 20, "sliding_window": 8, "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 10.0, "tie_word_embeddings": True,
}
# Seven layers: the sixth is the global one, and a local one follows it. No tie_word_embeddings: the published
# configurations leave it out, and the default is true.
GEMMA3 = SHARED | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 96,
    "num_hidden_layers": 7, "num_key_value_heads": 1, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "rope_scaling": None, "query_pre_attn_scalar": 20, "sliding_window": 8, "sliding_window_pattern": 6,
    "attn_logit_softcapping": None, "final_logit_softcapping": None,
}


@dataclass
class Case:
    name: str
    index: int              # fixes the seeds (1000 + 100 * index onwards) and the prompts (77 + index)
    config: dict
    stored: torch.dtype
    steps: int = SEARCH_STEPS   # greedy tokens stored
    shards: int = 1
    nested: bool = False    # the text half of a multimodal checkpoint


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# An index once given away stays so (3 is retired): changing it changes the weights.
CASES = {c.name: c for c in [
    Case("gemma1-mqa", 0, GEMMA1, F32),
    Case("gemma1-mha", 1, GEMMA1 | {"num_key_value_heads": 4, "hidden_size": 96}, BF16),
    Case("gemma1-gqa-f16", 2, GEMMA1 | {"num_key_value_heads": 2}, F16, steps=8),
    # The first Gemma 1 configurations say "gelu" and mean the tanh form all the same.
    Case("gemma1-legacy-gelu", 4, GEMMA1 | {"hidden_act": "gelu", "hidden_activation": None}, BF16),
    Case("gemma1-sharded", 5, GEMMA1, BF16, steps=8, shards=2),
    Case("gemma2-gqa", 6, GEMMA2, BF16),
    Case("gemma2-hd256", 7, GEMMA2 | {
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, F32),
    Case("gemma3-mqa", 8, GEMMA3, BF16),
    Case("gemma3-gqa-ropescale", 9, GEMMA3 | {
        "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}, BF16, steps=8),
    Case("gemma3-nested", 10, GEMMA3, BF16, steps=8, nested=True),
    Case("gemma2-untied", 11, GEMMA2 | {"tie_word_embeddings": False}, BF16, steps=8),
]}

# Keys a nested text_config omits as the published multimodal ones do: a reader must know the defaults.
NESTED_DEFAULTS = {"attention_bias", "attention_dropout", "attn_logit_softcapping", "final_logit_softcapping",
                   "hidden_activation", "initializer_range", "rms_norm_eps", "rope_local_base_freq", "rope_scaling",
                   "rope_theta", "sliding_window_pattern", "use_cache",
                   "architectures", "bos_token_id", "eos_token_id", "pad_token_id"}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False}


def prompts(case):
    """Ragged: a lone <bos>, up to 40 tokens (five windows), one without <bos>, one of equal tokens."""
    rng = np.random.default_rng(77 + case.index)
    draw = lambda n: [int(x) for x in rng.integers(3, case.config["vocab_size"], n)]
    out = [[2]] + [[2] + draw(n - 1) for n in (2, 5, 9, 17, 40)]
    return out + [draw(6), [2] + [7] * 11]


# ---------------------------------------------------------------------------------------------- models

FAMILIES = {"gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
            "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
            "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)}


def build(config, weights=None):
    config_class, model_class = FAMILIES[config["model_type"]]
    keys = {k: v for k, v in config.items() if k != "architectures"}
    if config["model_type"] == "gemma":
        del keys["hidden_activation"]  # transformers 5 reads only hidden_act here
    hf_config = config_class.from_dict(json.loads(json.dumps(keys)))
    hf_config._attn_implementation = "eager"
    model = model_class(hf_config).float().eval()
    if weights is not None:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = config.get("tie_word_embeddings", True)
        assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set()), (missing, unexpected)
        model.tie_weights()
    return model


def randomise(model, seed):
    """Weights under which every part counts: peaked attention, logits of about +-10, norms far from one, and
    layers that outweigh the embedding (else a tied model merely repeats its last token)."""
    rng = torch.Generator().manual_seed(seed)
    params = sorted(model.named_parameters())
    sandwich = any("pre_feedforward" in name for name, _ in params)  # Gemma 2 and 3 also norm each block's output
    for name, p in params:
        noise = torch.randn(p.shape, generator=rng)
        if name.endswith("norm.weight"):  # used as 1 + w
            on_output = "post_feedforward" in name or (sandwich and "post_attention" in name)
            p.copy_((2.5 if on_output else 0.2) + 0.35 * noise)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            p.copy_(0.2 * noise)
        else:
            gain = 3.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.4
            p.copy_(gain * noise / p.shape[1] ** 0.5)


def stored_weights(model, case):
    tied = case.config.get("tie_word_embeddings", True)
    return {k: v.to(case.stored).contiguous() for k, v in model.state_dict().items()
            if not (tied and k == "lm_head.weight")}


def upcast(weights):
    return {k: v.float() for k, v in weights.items()}


def logits(model, ids):
    """Logits after each token of one sequence, without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def greedy(model, ids, steps):
    """`steps` greedy tokens through the cache; EOS does not stop it."""
    out, fed, cache = [], ids, None
    while len(out) < steps:
        o = model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
        out.append(int(o.logits[0, -1].argmax()))
        fed, cache = out[-1:], o.past_key_values
    return out


def top2_margin(rows):
    top = rows.topk(2, -1).values
    return float((top[:, 0] - top[:, 1]).min())


def find_seed(case):
    """The first seed whose greedy choices all stand clear of rounding, and the weights as stored."""
    base = 1000 + 100 * case.index
    for seed in range(base, base + 100):
        model = build(case.config)
        randomise(model, seed)
        weights = stored_weights(model, case)
        model = build(case.config, upcast(weights))
        if all(top2_margin(logits(model, ids + greedy(model, ids, SEARCH_STEPS)[:-1])[len(ids) - 1:]) > MIN_MARGIN
               for ids in prompts(case)):
            return seed, weights
    raise SystemExit(f"{case.name}: no seed keeps a margin of {MIN_MARGIN}")


# ---------------------------------------------------------------------------------------------- files

def write_json(path, value, indent=2):
    path.write_text(json.dumps(value, indent=indent, default=str))


def write_tensors(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private


def hub_config(case):
    """The configuration as the published repositories spell it (transformers 4)."""
    extra = {"torch_dtype": str(case.stored).removeprefix("torch."), "transformers_version": "4.57.0"}
    config = dict(case.config)
    if case.nested:
        text = {k: v for k, v in sorted(config.items()) if k not in NESTED_DEFAULTS}
        config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
                  "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 511, "boi_token_index": 510,
                  "eoi_token_index": 509, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return dict(sorted((config | extra).items()))


def write_weights(folder, weights, case):
    if case.nested:
        rng = torch.Generator().manual_seed(case.index)
        weights = {f"language_model.{k}": v for k, v in weights.items()} | {
            "multi_modal_projector.mm_input_projection_weight":
                torch.randn(VISION["hidden_size"], case.config["hidden_size"], generator=rng).to(case.stored),
            "vision_tower.vision_model.post_layernorm.weight":
                torch.randn(VISION["hidden_size"], generator=rng).to(case.stored)}
    if case.shards == 1:
        return write_tensors(folder / "model.safetensors", weights)
    # Cut by bytes, hence inside a layer, as published shards are.
    total, seen = sum(v.nbytes for v in weights.values()), 0
    parts, weight_map = [{} for _ in range(case.shards)], {}
    for name in sorted(weights):
        part = min(case.shards - 1, seen * case.shards // total)
        seen += weights[name].nbytes
        parts[part][name] = weights[name]
        weight_map[name] = f"model-{part + 1:05}-of-{case.shards:05}.safetensors"
    for i, part in enumerate(parts, 1):
        write_tensors(folder / f"model-{i:05}-of-{case.shards:05}.safetensors", part)
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": weight_map})


def load_folder(folder, case):
    cls = (transformers.Gemma3ForConditionalGeneration if case.nested
           else FAMILIES[case.config["model_type"]][1])
    return cls.from_pretrained(folder, dtype=F32, attn_implementation="eager").eval()


def mistakes(config, weights):
    """Name -> a model with one plausible mistake."""
    def changed(**keys):
        return lambda: build(config | keys, weights)

    def patched(edit):
        def make():
            model = build(config, weights)
            edit(model)
            return model
        return make

    def activation(f):
        def edit(model):
            for layer in model.model.layers:
                layer.mlp.act_fn = f
        return patched(edit)

    def scale(f):
        return patched(lambda m: m.model.embed_tokens.embed_scale.copy_(f(m.model.embed_tokens.embed_scale)))

    plain_norm = {k: v - 1 if k.endswith("norm.weight") else v for k, v in weights.items()}
    out = {
        "rope_theta x2": changed(rope_theta=2 * config["rope_theta"]),
        "rms_norm_eps 1e-5": changed(rms_norm_eps=1e-5),
        "norm weight used as w, not 1+w": lambda: build(config, plain_norm),
        "exact (erf) GELU": activation(torch.nn.GELU()),
        "SiLU": activation(torch.nn.SiLU()),
        "no embedding scale": scale(torch.ones_like),
        "embedding scale rounded to bf16": scale(lambda s: s.bfloat16().float()),
    }
    if config.get("query_pre_attn_scalar", config["head_dim"]) != config["head_dim"]:
        out["query_pre_attn_scalar = head_dim"] = changed(query_pre_attn_scalar=config["head_dim"])
    if window := config.get("sliding_window"):
        swap = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
        kinds = [swap[k] for k in build(config, weights).config.layer_types]
        out |= {"sliding window off": changed(sliding_window=4096),
                "sliding window +1": changed(sliding_window=window + 1),
                "sliding window -1": changed(sliding_window=window - 1),
                "layer kinds swapped": changed(layer_types=kinds)}
    if config.get("attn_logit_softcapping"):
        out["no attention softcap"] = changed(attn_logit_softcapping=None)
    if config.get("final_logit_softcapping"):
        out["no final softcap"] = changed(final_logit_softcapping=None)
    if "rope_local_base_freq" in config:
        out["local rope theta = global"] = changed(rope_local_base_freq=config["rope_theta"])
    if config["model_type"] == "gemma3_text" and config["rope_scaling"]:
        out["no rope scaling"] = changed(rope_scaling=None)
    if "lm_head.weight" in weights:
        embedding = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
        out["lm_head ignored, embedding used"] = lambda: build(config, embedding)
    return out


def make_tiny(case, folder):
    folder.mkdir(parents=True, exist_ok=True)
    seed, stored = find_seed(case)
    write_json(folder / "config.json", hub_config(case))
    write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}, None)
    write_weights(folder, stored, case)

    weights = upcast(stored)
    model = build(case.config, weights)
    loaded = load_folder(folder, case)  # the ordinary way in must lead to the same model
    config5 = loaded.config.to_dict() | {"dtype": str(case.stored).removeprefix("torch.")}
    config5.pop("_name_or_path", None)
    write_json(folder / "config.transformers5.json", config5)

    tensors, records, sequences = {}, [], []
    for i, ids in enumerate(prompts(case)):
        new = greedy(model, ids, case.steps)
        sequence = ids + new[:-1]
        rows = logits(model, sequence).contiguous()
        chosen = rows[len(ids) - 1:]
        assert torch.isfinite(rows).all()
        assert torch.equal(logits(loaded, sequence), rows), f"{case.name}: from_pretrained differs"
        assert chosen.argmax(-1).tolist() == new, f"{case.name}: greedy with and without cache differ"
        tensors |= {f"p{i}.ids": torch.tensor(ids), f"p{i}.greedy": torch.tensor(new), f"p{i}.logits": rows}
        records.append({"ids": ids, "greedy": new, "min_top2_margin": top2_margin(chosen)})
        sequences.append((sequence, rows))
    states = model(input_ids=torch.tensor([prompts(case)[HIDDEN_PROMPT]]), output_hidden_states=True).hidden_states
    tensors |= {f"p{HIDDEN_PROMPT}.hidden.{i}": h[0].contiguous() for i, h in enumerate(states)}
    write_tensors(folder / "golden.safetensors", tensors)

    def moved(other):
        return max(float((logits(other, s).double() - rows.double()).abs().max()) for s, rows in sequences)

    noise = {"float64": moved(build(case.config, weights).double()),
             "bfloat16": moved(build(case.config, weights).bfloat16())}
    costs = {name: moved(make()) for name, make in mistakes(case.config, weights).items()}
    write_json(folder / "golden.json", {
        "name": case.name, "versions": VERSIONS, "seed": seed, "stored_dtype": str(case.stored),
        "rounding_noise_max_abs": noise, "mistakes_max_abs": costs, "prompts": records}, 1)
    margin = min(r["min_top2_margin"] for r in records)
    print(f"{case.name:22} seed {seed}, margin {margin:.4f}, noise {noise['float64']:.1e}", flush=True)


def difference(made, kept):
    """None where two golden.safetensors differ in more than float values, else their largest difference."""
    a, b = load_file(made), load_file(kept)
    if {k: (v.shape, v.dtype) for k, v in a.items()} != {k: (v.shape, v.dtype) for k, v in b.items()}:
        return None
    if not all(torch.equal(a[k], b[k]) for k in a if not a[k].is_floating_point()):
        return None
    return max(float((a[k] - b[k]).abs().max()) for k in a if a[k].is_floating_point())


def check(exact):
    """Byte for byte, save that golden.safetensors may be off by CPU_NOISE unless `exact`.
    golden.json is left out: it records the Python version, and its tables are for people."""
    identical, failed = 0, 0
    with tempfile.TemporaryDirectory() as tmp:
        for case in CASES.values():
            made, kept = Path(tmp, case.name), HERE / "tiny" / case.name
            make_tiny(case, made)
            for name in sorted({p.name for d in (made, kept) if d.is_dir() for p in d.iterdir()} - {"golden.json"}):
                a, b = made / name, kept / name
                both = a.exists() and b.exists()
                if both and filecmp.cmp(a, b, shallow=False):
                    identical += 1
                    continue
                off = difference(a, b) if both and name == "golden.safetensors" else None
                tolerated = not exact and off is not None and off < CPU_NOISE
                failed += not tolerated
                print(f"{'tolerated' if tolerated else 'FAILED'}: {case.name}/{name}: "
                      + (f"floats off by {off:.1e}" if off is not None else "differs" if both else "on one side only"))
    print(f"{identical} files byte-identical, {failed} failed")
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------- Gemma 3 270M

def make_real(model_dir, out):
    """Same layout as gemma3_270m/. Compares with it too, but only reports: the last bits depend on the CPU."""
    out.mkdir(parents=True, exist_ok=True)
    reference = json.loads((HERE / "gemma3_270m/golden.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=F32, attn_implementation="eager").eval()
    records = []
    for ref in reference["cases"]:
        name, ids = ref["name"], ref["input_ids"]
        new = greedy(model, ids, len(ref["greedy_ids"]))
        rows = logits(model, ids + new[:-1])[len(ids) - 1:]
        assert rows.argmax(-1).tolist() == new, f"{name}: greedy with and without cache differ"
        o = model(input_ids=torch.tensor([ids]), output_hidden_states=name == "capital", use_cache=False)
        last = o.logits[0, -1].contiguous()
        write_tensors(out / f"{name}.logits.safetensors", {"last_logits": last})
        if o.hidden_states:
            write_tensors(out / f"{name}.hidden.safetensors",
                          {f"hidden.{i:02}": h[0].contiguous() for i, h in enumerate(o.hidden_states)})
        top, norm = last.topk(20), float(last.logsumexp(-1))
        records.append({
            "name": name, "prompt": ref["prompt"], "input_ids": ids, "greedy_ids": new, "logsumexp": norm,
            "top20": [{"id": i, "logit": v, "logprob": v - norm}
                      for i, v in zip(top.indices.tolist(), top.values.tolist())],
            "step_top2_logits": rows.topk(2, -1).values.tolist(), "min_top2_margin": top2_margin(rows)})
        kept = load_file(HERE / f"gemma3_270m/{name}.logits.safetensors")["last_logits"]
        print(f"{name:26} logits off by {float((last - kept).abs().max()):.1e}, greedy ids "
              f"{'equal' if new == ref['greedy_ids'] else 'differ'}", flush=True)
    write_json(out / "golden.json", {"versions": VERSIONS, "dtype": "float32", "attn": "eager", "cases": records}, 1)
    write_json(out / "chat_cases.json", chat_cases(model_dir), 1)


def chat_cases(model_dir):
    """What the checkpoint's own chat template makes of conversations, as text and as token ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    user, model = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))
    conversations = [
        [user("Name three rivers. ")],
        [{"role": "system", "content": "Answer in one word."}, user(" What is the capital of France?"), model("Paris"),
         user("And of \u65e5\u672c?")],
        [user("<start_of_turn>\n\n  {{ x }}\t"), model(""), user("caf\u00e9 \U0001f980")],
    ]
    cases = []
    for messages in conversations:
        for prompt in (True, False):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            cases.append({"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids})
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tiny = commands.add_parser("tiny")
    tiny.add_argument("out", type=Path)
    tiny.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    checking = commands.add_parser("check")
    checking.add_argument("--exact", action="store_true", help="tolerate no float noise: for the CPU that made tiny/")
    real = commands.add_parser("real")
    real.add_argument("model_dir", type=Path, help="what scripts/fetch-model makes")
    real.add_argument("out", type=Path)
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    # The nested case lacks most of its vision tower on purpose.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.command == "real":
        return make_real(args.model_dir, args.out)
    torch.set_num_threads(1)  # the order of sums, hence the bytes, must not depend on the number of cores
    torch.use_deterministic_algorithms(True)
    if args.command == "check":
        return check(args.exact)
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    for name in args.cases or CASES:
        make_tiny(CASES[name], args.out / name)


if __name__ == "__main__":
    sys.exit(main())
