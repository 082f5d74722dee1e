"""GGUF of a Gemma 3 text model -> the folder Hugging Face would have published, in bf16.

usage: gguf_to_hf.py MODEL.gguf TOKENIZER_FOLDER OUT      (needs gguf and numpy)

Two things differ between the formats: GGUF stores norm weights as 1 + w, and lists a tensor's fastest dimension first.
Quantized blocks are widened to float32, then rounded to the nearest even bf16.
"""

import json
import pathlib
import shutil
import struct
import sys

import gguf
import numpy as np

OF_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
OF_MODEL = {"token_embd": "embed_tokens", "output_norm": "norm"}


def published_name(name):
    stem = name.removesuffix(".weight")
    if stem in OF_MODEL:
        return f"model.{OF_MODEL[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{OF_LAYER[part]}.weight"


def to_bf16(x):
    if not np.isfinite(x).all():
        raise ValueError("a weight is not finite")
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def read_tensors(reader):
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(extent) for extent in reversed(tensor.shape)])
        if tensor.name.endswith("norm.weight"):
            values = values - np.float32(1)
        tensors[published_name(tensor.name)] = to_bf16(values)
    return tensors


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        end = offset + tensors[name].nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for name in sorted(tensors):
            out.write(tensors[name].tobytes())


def config(field, vocab_size):
    layers, head_dim = field("block_count"), field("attention.key_length")
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "torch_dtype": "bfloat16",
        "vocab_size": vocab_size, "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"), "num_hidden_layers": layers,
        "num_attention_heads": field("attention.head_count"), "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": head_dim, "query_pre_attn_scalar": head_dim, "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6, "max_position_embeddings": field("context_length"),
        "rope_theta": field("rope.freq_base"), "rope_local_base_freq": 10000.0, "rope_scaling": None,
        "sliding_window": field("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }


def main():
    source, tokenizer, out = map(pathlib.Path, sys.argv[1:4])
    out.mkdir(parents=True)
    reader = gguf.GGUFReader(source)
    tensors = read_tensors(reader)
    write_safetensors(out / "model.safetensors", tensors)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    settings = config(lambda name: reader.fields[f"gemma3.{name}"].contents(), rows)
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    sampling = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0,
                "do_sample": True, "top_k": 64, "top_p": 0.95}
    (out / "generation_config.json").write_text(json.dumps(sampling, indent=2))
    shutil.copyfile(tokenizer / "tokenizer.json", out / "tokenizer.json")
    of_tokenizer = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    of_tokenizer["eos_token"] = "<eos>"  # this is the base model; the file is the tuned one's
    (out / "tokenizer_config.json").write_text(json.dumps(of_tokenizer, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
