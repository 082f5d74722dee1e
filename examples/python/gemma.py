#!/usr/bin/env python3
"""Gemma from Python through the C API: ctypes over the shared library, safetensors and tokenizers from PyPI.

    pip install -r requirements.txt
    GEMMA_CUDA_LIBRARY=PREFIX/lib/libgemma_cuda.so python3 gemma.py MODEL_FOLDER "The capital of France is"

Generates greedily until the model ends the text or --max-new-tokens is reached, and prints the text as it comes.
"""
import argparse
import ctypes
import json
import os
import pathlib
import sys
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

import safetensors
import tokenizers

ABI = 1
DTYPES = {"F32": 0, "BF16": 1, "F16": 2, "F8_E4M3": 3}
SAMPLE = 1
Log = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p)


class Options(ctypes.Structure):
    _fields_ = [("size", c_uint32), ("compute", c_uint32), ("weights", c_uint32), ("page_size", c_uint32),
                ("pages", c_uint32), ("max_batch_tokens", c_uint32), ("max_sequences", c_uint32),
                ("max_logit_rows", c_uint32), ("threads", c_uint32), ("graphs", c_uint32), ("prefix_cache", c_uint32),
                ("device", c_char_p), ("log", Log), ("log_user", c_void_p)]


class Item(ctypes.Structure):
    _fields_ = [("sequence", c_uint32), ("tokens", c_uint32), ("flags", c_uint32)]


class Token(ctypes.Structure):
    _fields_ = [("token", c_uint32), ("logprob", c_float), ("top", c_void_p), ("top_count", c_size_t)]


class Output(ctypes.Structure):
    _fields_ = [("size", c_uint32), ("sequence", c_uint32), ("sampled", POINTER(Token)), ("scored", POINTER(Token)),
                ("scored_count", c_size_t), ("logits", POINTER(c_float)), ("logit_count", c_size_t),
                ("hidden", POINTER(c_float)), ("hidden_count", c_size_t), ("failure", c_char_p)]


class Statistics(ctypes.Structure):
    _fields_ = [("size", c_uint32), ("reserved", c_uint32)] + [
        (name, c_uint64) for name in ("steps", "captured_steps", "tokens", "bytes_read", "flops", "memory", "peak_memory")
    ] + [(name, c_double) for name in ("load_seconds", "launch_seconds", "collect_seconds")]


def open_library(path):
    library = ctypes.CDLL(path)
    library.gemma_cuda_last_error.restype = c_char_p
    library.gemma_cuda_last_error.argtypes = [c_void_p]
    library.gemma_cuda_engine_device.restype = c_char_p
    library.gemma_cuda_engine_device.argtypes = [c_void_p]
    if library.gemma_cuda_abi() != ABI:
        raise RuntimeError(f"{path} has ABI {library.gemma_cuda_abi()}, this program is for {ABI}")
    return library


class Engine:
    """A model on a device. What the library refuses is a RuntimeError with its sentence."""

    def __init__(self, library, config, device="auto", pages=64):
        self.library, self.engine, model = library, c_void_p(), c_void_p()
        self.call("model_parse", c_char_p(config), c_size_t(len(config)), byref(model))
        try:
            options = Options()
            library.gemma_cuda_options_init(byref(options))
            options.device, options.pages = device.encode(), pages
            self.call("engine_create", model, byref(options), byref(self.engine))
        finally:
            library.gemma_cuda_model_free(model)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.library.gemma_cuda_engine_destroy(self.engine)
        self.engine = c_void_p()

    def call(self, name, *arguments):
        if getattr(self.library, "gemma_cuda_" + name)(*arguments) != 0:
            raise RuntimeError(self.library.gemma_cuda_last_error(self.engine).decode())

    def device(self):
        return self.library.gemma_cuda_engine_device(self.engine).decode()

    def load(self, folder):
        """Every tensor of the folder's safetensors files, as the file has it."""
        for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
            for name, tensor in safetensors.deserialize(path.read_bytes()):
                data, shape = bytes(tensor["data"]), (c_uint64 * len(tensor["shape"]))(*tensor["shape"])
                self.call("load_tensor", self.engine, name.encode(), c_uint32(DTYPES[tensor["dtype"]]), shape,
                          c_uint32(len(shape)), data, c_size_t(len(data)))
        self.call("finish_loading", self.engine)

    def generate(self, prompt, most):
        """The tokens that follow, one by one."""
        sequence, ids = c_uint32(), (c_uint32 * len(prompt))(*prompt)
        self.call("add_sequence", self.engine, ids, c_size_t(len(prompt)), c_size_t(len(prompt)), None, c_uint32(1),
                  byref(sequence))
        try:
            known, cached = c_uint32(), c_uint32()
            self.call("sequence_state", self.engine, sequence, byref(known), byref(cached))
            feed = known.value - cached.value
            for _ in range(most):
                item, output = Item(sequence.value, feed, SAMPLE), Output()
                self.call("step", self.engine, byref(item), c_size_t(1))
                self.library.gemma_cuda_output_init(byref(output))
                self.call("get_output", self.engine, c_size_t(0), byref(output))
                if not output.sampled:
                    raise RuntimeError((output.failure or b"nothing was sampled").decode())
                yield output.sampled[0].token
                feed = 1
        finally:
            self.call("remove_sequence", self.engine, sequence)

    def statistics(self):
        statistics = Statistics()
        self.library.gemma_cuda_statistics_init(byref(statistics))
        self.call("get_statistics", self.engine, byref(statistics))
        return statistics


def end_tokens(folder):
    path = pathlib.Path(folder) / "generation_config.json"
    ids = json.loads(path.read_text()).get("eos_token_id", []) if path.exists() else []
    return set(ids if isinstance(ids, list) else [ids])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Gemma checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=24, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, reference or cuda:N")
    parser.add_argument("--library", default=os.environ.get("GEMMA_CUDA_LIBRARY", "libgemma_cuda.so"), metavar="FILE")
    args = parser.parse_args()

    folder = pathlib.Path(args.model)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt, stops = tokenizer.encode(args.prompt).ids, end_tokens(folder)
    with Engine(open_library(args.library), (folder / "config.json").read_bytes(), args.device) as engine:
        engine.load(folder)
        ids, written = [], ""
        for token in engine.generate(prompt, args.max_new_tokens):
            if token in stops:
                break
            ids.append(token)
            text = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)):]
            if not text.endswith("\ufffd"):  # half a character
                print(text[len(written):], end="", flush=True)
                written = text
        print()
        statistics = engine.statistics()
        print(f"{engine.device()}: {len(ids)} tokens, loaded in {statistics.load_seconds:.2f} s, "
              f"{statistics.launch_seconds + statistics.collect_seconds:.2f} s in {statistics.steps} steps",
              file=sys.stderr)


if __name__ == "__main__":
    main()
