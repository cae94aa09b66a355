"""One tiny text encoder of every family: random weights and a tokenizer of a few merges, in transformers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = (
    "a red cube on the left of a blue ball",
    "two small green rings and one large yellow star on white",
    "ein roter Würfel, красный куб, 赤い立方体 🟥",
)
PROMPTS = ("a red cube", "", "two SMALL green rings and one large yellow star, on white", "赤い 🟥 куб")

_CLIP = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2}
_DECODER = {**_CLIP, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPTextModel", {**_CLIP, "max_position_embeddings": 20}),
    "siglip": ("SiglipTextModel", {**_CLIP, "max_position_embeddings": 16, "projection_size": 32}),
    "siglip2": ("Siglip2TextModel", {**_CLIP, "max_position_embeddings": 16, "projection_size": 32}),
    "t5": ("T5EncoderModel", _T5),
    "mt5": ("MT5EncoderModel", {**_T5, "tie_word_embeddings": True}),
    "umt5": ("UMT5EncoderModel", _T5),
    "gemma2": ("Gemma2Model", {**_DECODER, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3TextModel", {**_DECODER, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "qwen3": ("Qwen3Model", _DECODER),
}
FAMILIES = tuple(_CONFIGS)
# How each family's tokenizer frames a prompt: tokens before and after it.
_FRAMES: dict[str, tuple[list[str], list[str]]] = {
    "clip": (["<bos>"], ["<eos>"]),
    **dict.fromkeys(("siglip", "siglip2", "t5", "mt5", "umt5"), ([], ["<eos>"])),
    **dict.fromkeys(("gemma2", "gemma3"), (["<bos>"], [])),
    "qwen3": ([], []),
}


def tiny_tokenizer(family: str) -> Any:
    """A byte-level BPE tokenizer, so that any text has tokens, framed as the family does it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if family == "clip":
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    before, after = _FRAMES[family]
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )
    # CLIP fills up with its last token, as the official one does.
    padding = "<eos>" if family == "clip" else "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def tiny_model(family: str, seed: int = 0) -> Any:
    """A network of transformers with random weights."""
    import transformers

    name, values = _CONFIGS[family]
    model_class = getattr(transformers, name)
    ids = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = model_class.config_class(**ids, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def save_tiny(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a tiny text encoder as transformers does; => its folder."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder
