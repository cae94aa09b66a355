"""Text encoders: equal to transformers called directly, one prompt at a time, whatever the batch; frozen; refused."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders.tiny_text_encoders import FAMILIES, PROMPTS, save_tiny, tiny_model, tiny_tokenizer

from repagen.encoders.text import TextEncoder
from repagen.encoders.text_families import TEXT_FAMILIES
from repagen.errors import UserError

SEES_PADDING = ("siglip", "siglip2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text")
    return {family: save_tiny(root / family, family) for family in FAMILIES}


def states_of(model: Any, family: str, ids: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """What a transformers model makes of one prompt alone: its last state, then the outputs of its blocks."""
    row = list(ids)
    if family in SEES_PADDING:  # as they were trained: filled up to the position table, without a mask
        row += [0] * (16 - len(row))
    with torch.no_grad():
        output = model(input_ids=torch.tensor([row]), output_hidden_states=True)
    return tuple(state[0, : len(ids)] for state in (output.last_hidden_state, *output.hidden_states[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_transformers(family: str, folders: dict[str, Path]) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer(family)
    readings = {layer: TextEncoder.from_encoder(folders[family], hidden_layer=layer) for layer in (-1, -2, 0)}
    length = readings[-1].max_length
    assert length == {"clip": 20, "siglip": 16, "siglip2": 16, "t5": 256, "mt5": 256, "umt5": 256}.get(family, 128)
    for prompt in PROMPTS[:1] if family not in ("gemma2", "qwen3", "t5") else (PROMPTS[0], PROMPTS[3]):
        text = prompt.lower() if family in SEES_PADDING else prompt
        ids = tokenizer(text).input_ids
        expected = states_of(model, family, ids)
        for layer, state in {-1: expected[0], -2: expected[2], 0: expected[1]}.items():
            embeddings, mask = readings[layer].encode([prompt])
            assert (embeddings.shape, embeddings.dtype) == ((1, length, 32), torch.float32)
            assert mask.tolist() == [[index < len(ids) for index in range(length)]]
            torch.testing.assert_close(embeddings[0, : len(ids)], state, atol=1e-5, rtol=1e-5)
            assert not embeddings[0, len(ids) :].any()


@pytest.mark.parametrize("family", ["clip", "qwen3"])
def test_a_layer_has_one_reading_and_one_identity(family: str, folders: dict[str, Path]) -> None:
    """The last block is read after the final norm, by its index too."""
    for index in range(3):
        from_start, from_end = (TextEncoder.from_encoder(folders[family], hidden_layer=n) for n in (index, index - 3))
        assert torch.equal(from_start.encode(PROMPTS[:1]).embeddings, from_end.encode(PROMPTS[:1]).embeddings)
        assert from_start.describe() == from_end.describe()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_depends_on_no_other_prompt(family: str, folders: dict[str, Path]) -> None:
    encoder = TextEncoder.from_encoder(folders[family])
    together = encoder.encode(PROMPTS)
    assert together.mask.any(dim=1).all()  # the empty prompt too, so that it is none that was left out
    for index, prompt in enumerate(PROMPTS):
        alone = encoder.encode(prompt)
        torch.testing.assert_close(alone.embeddings[0], together.embeddings[index], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.mask[0], together.mask[index])
    again = encoder.encode(PROMPTS)
    assert torch.equal(again.embeddings, together.embeddings)
    assert not torch.equal(together.embeddings[0], together.embeddings[3])


@pytest.mark.parametrize("family", ["t5", "gemma3", "siglip"])
def test_a_row_depends_on_no_padding(family: str, folders: dict[str, Path]) -> None:
    short, long = (TextEncoder.from_encoder(folders[family], max_length=length) for length in (8, 16))
    few, many = short.encode(PROMPTS[:2]), long.encode(PROMPTS[:2])
    assert few.embeddings.shape == (2, 8, 32)
    torch.testing.assert_close(few.embeddings, many.embeddings[:, :8], atol=1e-5, rtol=1e-5)
    assert not many.mask[:, 8:].any()


def test_no_prompts_make_no_rows(folders: dict[str, Path]) -> None:
    embeddings, mask = TextEncoder.from_encoder(folders["t5"]).encode([])
    assert (embeddings.shape, mask.shape) == ((0, 256, 32), (0, 256))


def test_a_long_prompt_loses_its_end_and_that_is_said_once(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a red cube on the left " * 100
    encoder, tokenizer = TextEncoder.from_encoder(folders["clip"]), tiny_tokenizer("clip")
    with caplog.at_level(logging.WARNING):
        embeddings, mask = encoder.encode([PROMPTS[0], prompt])
        encoder.encode([prompt])
    count = len(tokenizer(prompt).input_ids)
    assert [f"one has {count}: its last {count - 20} are lost" in message for message in caplog.messages] == [True]
    assert mask.sum(dim=1).tolist() == [7, 20]
    kept = tokenizer(prompt, truncation=True, max_length=20).input_ids
    assert kept[-1] == tokenizer.eos_token_id  # the end of text stays
    torch.testing.assert_close(embeddings[1], states_of(tiny_model("clip"), "clip", kept)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["clip", "t5", "qwen3"])  # with a token at the end, and without
def test_what_a_prompt_loses_is_named(folders: dict[str, Path], caplog: pytest.LogCaptureFixture, family: str) -> None:
    prompt = "a red cube on the left of a blue ball, under a small green tree and beside the house"
    tokenizer = tiny_tokenizer(family)
    length = min(len(tokenizer(prompt).input_ids) - 5, 20)
    with caplog.at_level(logging.WARNING):
        TextEncoder.from_encoder(folders[family], max_length=length).encode([PROMPTS[0], prompt])
    (message,) = caplog.messages
    end, more = re.search(r"are lost \(('.*')( \.\.\.)?\); said once", message).groups()  # type: ignore[union-attr]
    kept = tokenizer(prompt, truncation=True, max_length=length).input_ids
    words = tokenizer.decode(kept, skip_special_tokens=True) + ast.literal_eval(end)
    assert prompt.replace(" ", "").startswith(words.replace(" ", ""))
    assert (len(words) < len(prompt)) == bool(more)


def test_siglip_reads_lower_case_and_others_as_it_is(folders: dict[str, Path]) -> None:
    pair = ["A Red CUBE", "a red cube"]
    for family, same in {"siglip": True, "siglip2": True, "qwen3": False, "t5": False}.items():
        embeddings, mask = TextEncoder.from_encoder(folders[family]).encode(pair)
        assert torch.equal(mask[0], mask[1]) == same
        assert torch.equal(embeddings[0], embeddings[1]) == same


def test_a_prompt_without_tokens_is_one_of_padding(folders: dict[str, Path]) -> None:
    embeddings, mask = TextEncoder.from_encoder(folders["qwen3"]).encode([""])
    assert mask.sum() == 1
    expected = states_of(tiny_model("qwen3"), "qwen3", [tiny_tokenizer("qwen3").pad_token_id])[0]
    torch.testing.assert_close(embeddings[0, :1], expected, atol=1e-5, rtol=1e-5)


def test_a_template_stands_around_the_prompt(folders: dict[str, Path]) -> None:
    plain = TextEncoder.from_encoder(folders["qwen3"])
    framed = TextEncoder.from_encoder(folders["qwen3"], template="<bos>user: {prompt}<eos>")
    embeddings = framed.encode(["a {red} cube"]).embeddings
    assert torch.equal(embeddings, plain.encode(["<bos>user: a {red} cube<eos>"]).embeddings)
    assert framed.describe() != plain.describe()


def test_it_is_frozen(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.5}))
    encoder = TextEncoder.from_encoder(folder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    first, second = encoder.encode(PROMPTS), encoder.encode(PROMPTS)
    assert not first.embeddings.requires_grad and torch.equal(first.embeddings, second.embeddings)


def test_several_follow_each_other_along_the_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    narrow = transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2, vocab_size=320, pad_token_id=0, eos_token_id=2
        )
    )
    narrow.save_pretrained(tmp_path)
    tiny_tokenizer("t5").save_pretrained(tmp_path)
    both = TextEncoder.from_encoder([folders["clip"], tmp_path], hidden_layer=[-2, -1], max_length=[None, 40])
    clip = TextEncoder.from_encoder(folders["clip"], hidden_layer=-2).encode(PROMPTS)
    t5 = TextEncoder.from_encoder(tmp_path, max_length=40).encode(PROMPTS)
    embeddings, mask = both.encode(PROMPTS)
    assert (both.embed_dim, both.max_length) == (32, 60) == (embeddings.shape[2], embeddings.shape[1])
    assert torch.equal(embeddings[:, :20], clip.embeddings)
    assert torch.equal(embeddings[:, 20:, :24], t5.embeddings) and not embeddings[:, 20:, 24:].any()
    assert torch.equal(mask, torch.cat([clip.mask, t5.mask], dim=1))
    assert [one["hidden_layer"] for one in both.describe()] == [-2, -1]
    with pytest.raises(UserError, match="hidden_layer has 3 values for 2 encoders; give one or 2"):
        TextEncoder.from_encoder([folders["clip"], tmp_path], hidden_layer=[-1, -1, -1])


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "t5"])
def test_bfloat16_weights_give_float32_embeddings(family: str, folders: dict[str, Path]) -> None:
    exact = TextEncoder.from_encoder(folders[family]).encode(PROMPTS).embeddings
    loaded = TextEncoder.from_encoder(folders[family], dtype=torch.bfloat16)
    cast = TextEncoder.from_encoder(folders[family]).to(torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16} == {loaded.dtype}
    rounded = loaded.encode(PROMPTS).embeddings
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    # Rotary frequencies stay exact, so that a model that was cast is one that was loaded so.
    frequencies = {value.dtype for name, value in cast.named_buffers() if "inv_freq" in name}
    assert frequencies == (set() if family == "t5" else {torch.float32})
    assert torch.equal(cast.encode(PROMPTS).embeddings, rounded)


def full_checkpoint(family: str) -> tuple[Any, Any]:
    """A model with more than the text encoder, as published; and its part that reads text."""
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "vocab_size": 330, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {**text, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    decoder = {**text, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
    if family == "clip":
        two: Any = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
        return two, two.text_model
    if family == "siglip":
        text |= {"max_position_embeddings": 16, "projection_size": 32}
        two = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        return two, two.text_model
    if family == "t5":
        t5 = transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=320)
        )
        return t5, t5.encoder
    if family == "gemma3":
        config = transformers.Gemma3Config(
            text_config={**decoder, "model_type": "gemma3_text"},
            vision_config={**vision, "model_type": "siglip_vision_model"},
            image_token_index=322, boi_token_index=323, eoi_token_index=324, mm_tokens_per_image=4,
        )  # fmt: skip
        seeing = transformers.Gemma3ForConditionalGeneration(config)
        return seeing, seeing.model.language_model
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**decoder))
    return model, model.model


@pytest.mark.parametrize("family", ["clip", "siglip", "t5", "gemma3", "qwen3"])
def test_a_whole_model_gives_its_text_encoder(family: str, tmp_path: Path) -> None:
    model, reader = full_checkpoint(family)
    if family == "siglip":  # whose shapes have files in float16; rotary frequencies would not survive this
        model.half()
    model.eval().save_pretrained(tmp_path, max_shard_size="30KB")
    model.float()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tiny_tokenizer(family).save_pretrained(tmp_path)
    ids = tiny_tokenizer(family)("a cube").input_ids
    embeddings = TextEncoder.from_encoder(tmp_path).encode(["a cube"]).embeddings
    expected = states_of(reader, family, ids)[0]
    torch.testing.assert_close(embeddings[0, : len(ids)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "old"),
    [("qwen3", {"rope_theta": 50.0, "rope_scaling": None}), ("gemma3", {"rope_local_base_freq": 50.0})],
)
def test_keys_of_older_configs_are_read(family: str, old: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    model = tiny_model(family)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**content, **old}))
    read = type(model).from_pretrained(tmp_path)
    ids = tiny_tokenizer(family)(PROMPTS[2]).input_ids
    expected = states_of(read, family, ids)[0]
    assert not torch.allclose(expected, states_of(model, family, ids)[0], atol=1e-3)
    embeddings = TextEncoder.from_encoder(tmp_path).encode(PROMPTS[2]).embeddings
    torch.testing.assert_close(embeddings[0, : len(ids)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_layer": 3}, r"hidden_layer 3 must be -1 \(.*\) or a block's index in \[-3, 3\)"),
        ({"max_length": 21}, "max_length 21 must be a whole number of at least 1 and at most 20, the positions"),
        ({"max_length": 0}, "max_length 0 must be a whole number of at least 1"),
        ({"template": "no place"}, r"template 'no place' must hold \{prompt\} once"),
    ],
)
def test_readings_that_do_not_fit_are_refused(options: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        TextEncoder.from_encoder(folders["clip"], **options)


def test_prompts_that_are_no_texts_are_refused(folders: dict[str, Path]) -> None:
    encoder = TextEncoder.from_encoder(folders["clip"])
    with pytest.raises(UserError, match="prompts must be texts, got int at 1"):
        encoder.encode(["a", 5])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"^prompt 1: character 26 is '.ud800', which is half"):
        encoder.encode(["a", "half a pair of surrogates \ud800"])
    with pytest.raises(UserError, match="prompts must be texts, got NoneType"):
        encoder.encode(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="text encoder: 5 given; give a folder or a Hub id"):
        TextEncoder.from_encoder(5)  # type: ignore[arg-type]


def test_other_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer \(tokenizer.json, .*of text encoder"):
        TextEncoder.from_encoder(tmp_path)
    larger = tiny_tokenizer("qwen3")
    larger.add_tokens(["cube"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"gives the id 320, its network has 320 tokens; the tokenizer belongs to"):
        TextEncoder.from_encoder(tmp_path).encode(["a cube"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer of text encoder .* cannot be read"):
        TextEncoder.from_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match=r"model_type 'bert' is no supported text encoder; supported: clip, .*umt5"):
        TextEncoder.from_encoder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        TextEncoder.from_encoder(tmp_path / "absent")


def test_no_code_beside_a_tokenizer_is_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "text", "qwen3")
    marker = tmp_path / "it ran"
    (folder / "tokenization_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}
        (folder / name).write_text(json.dumps({**content, "tokenizer_class": "Own"}))
    read = TextEncoder.from_encoder(folder).encode(PROMPTS)
    assert not marker.exists()
    assert torch.equal(read.embeddings, TextEncoder.from_encoder(folders["qwen3"]).encode(PROMPTS).embeddings)


def test_the_guide_lists_the_families() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "text_encoders.md").read_text(encoding="utf-8")
    for row in TEXT_FAMILIES.values():
        inside = "yes" if row.redistributable else "no"
        assert f"| `{row.name}` | `{row.default_id}` | {row.licence} | {inside} | {row.max_length} |" in guide
