"""An exported Llama-like model as one GGUF file, by the gguf package.

    python examples/to_gguf.py --model trained --output trained.gguf

For families whose decoder layer is Llama's (llama, or mistral without a sliding window) with tokenizers of byte-level BPE.
Everything else: llama.cpp's convert_hf_to_gguf.py, which reads an exported directory as it is.
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

FAMILIES = ("llama", "mistral")


def permuted(weight, heads):
    """Rows of q and k in GGUF's order: the two halves of each head interleaved, as its rotary embedding takes them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_tokenizer(writer, directory, size):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    kind = json.loads((directory / "tokenizer.json").read_text())["model"]["type"]
    if kind != "BPE":
        sys.exit(f"error: {directory} has a {kind} tokenizer: use llama.cpp's convert_hf_to_gguf.py.")
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(size)])
    types = gguf.TokenType
    writer.add_token_types(
        [
            types.UNUSED if number not in names else types.CONTROL if number in special else types.NORMAL
            for number in range(size)
        ]
    )
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=size).add_to_gguf(writer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="exported directory")
    parser.add_argument("--output", required=True, type=Path, help="GGUF file")
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(options.model)
    if config.model_type not in FAMILIES or getattr(config, "sliding_window", None):
        sys.exit(f"error: {options.model} is a {config.model_type} model: use llama.cpp's convert_hf_to_gguf.py.")
    writer = gguf.GGUFWriter(options.output, "llama")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, options.model, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for file in sorted(options.model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dictionary)
                values = weights.get_tensor(name).float().numpy()
                turned = next((count for end, count in heads.items() if name.endswith(end)), None)
                writer.add_tensor(
                    names.get_name(name, try_suffixes=(".weight", ".bias")),
                    values if turned is None else permuted(values, turned),
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
