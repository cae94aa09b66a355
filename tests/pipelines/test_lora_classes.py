"""Classes that travel with adapters, and adapters that are refused: one line each, and nothing is changed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from lora_parts import FILE, WIDTH, add_adapter, close, latents, make_adapter, rows, save_adapter, state_of
from safetensors.torch import load_file, save_file
from tiny_pipelines import ID2LABEL, NUM_CLASSES, PipelineMaker, tiny_transformer

from repagen import ClassToImagePipeline, LightningDiTTransformer2DModel, SiTTransformer2DModel, UserError


class Named(PipelineMaker):
    def __call__(self, **overrides):
        return super().__call__(**{"id2label": ID2LABEL, **overrides})


SIT = Named(SiTTransformer2DModel)


def table(pipe: ClassToImagePipeline) -> torch.Tensor:
    return pipe.transformer.label_embedder.table.weight.detach().clone()


def state(pipe: ClassToImagePipeline) -> tuple:
    """Everything that loading an adapter may change."""
    tensors = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    return tensors, dict(pipe.config), dict(pipe.transformer.config), pipe.get_list_adapters(), pipe.adapter_classes


def assert_same(after: tuple, before: tuple) -> None:
    assert after[0].keys() == before[0].keys() and all(torch.equal(after[0][key], before[0][key]) for key in before[0])
    assert after[1:] == before[1:]


def reloaded(pipe: ClassToImagePipeline, folder: Path) -> ClassToImagePipeline:
    pipe.save_pretrained(folder)
    loaded = ClassToImagePipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


class TestClasses:
    def test_come_and_go_with_the_adapter(self, make_any_pipe, tmp_path):
        new = rows("axolotl", "okapi, forest giraffe")
        make_adapter(make_any_pipe, tmp_path, new)
        pipe = make_any_pipe(id2label=ID2LABEL)
        before, old = state(pipe), table(pipe)
        null_guided = latents(pipe)
        pipe.load_lora_weights(tmp_path, adapter_name="zoo")
        assert pipe.transformer.config.num_classes == NUM_CLASSES + 2
        assert torch.equal(
            table(pipe), torch.cat([old[:NUM_CLASSES], torch.stack([*new.values()]), old[NUM_CLASSES:]])
        )
        assert pipe.config["id2label"] == {**ID2LABEL, "4": "axolotl", "5": "okapi, forest giraffe"}
        assert pipe.adapter_classes == {"zoo": [4, 5]}
        assert torch.equal(latents(pipe, class_labels="Okapi"), latents(pipe, class_labels=5))
        # Without its LoRA layers the null class and the old ones are as they were.
        assert torch.equal(latents(pipe, attention_kwargs={"scale": 0}), null_guided)
        pipe.unload_lora_weights()
        assert_same(state(pipe), before)
        pipe.load_lora_weights(tmp_path, adapter_name="zoo")
        pipe.delete_adapters("zoo")
        assert_same(state(pipe), before)

    def test_rows_only(self, tmp_path):
        pipe = SIT()
        pipe.save_lora_weights(tmp_path, label_rows=rows("axolotl"))
        assert load_file(tmp_path / FILE).keys() == {"transformer.label_embedder.rows"}
        before = state(pipe)
        pipe.load_lora_weights(tmp_path, adapter_name="zoo")
        with_rows = latents(pipe, class_labels="axolotl")
        assert pipe.get_list_adapters() == {} and pipe.adapter_classes == {"zoo": [4]}
        with pytest.raises(UserError, match="already in use"):
            pipe.load_lora_weights(tmp_path, adapter_name="zoo")
        pipe.delete_adapters("zoo")
        assert_same(state(pipe), before)
        pipe.load_lora_weights(tmp_path)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert torch.equal(latents(reloaded(pipe, tmp_path / "x"), class_labels="axolotl"), with_rows)

    def test_rows_equal_a_model_that_has_them(self, tmp_path):
        new = rows("axolotl")
        pipe = SIT()
        pipe.save_lora_weights(tmp_path, label_rows=new)
        pipe.load_lora_weights(tmp_path)
        built = SIT()
        larger = tiny_transformer(num_classes=NUM_CLASSES + 1)
        weights = built.transformer.state_dict()
        key = "label_embedder.table.weight"
        weights[key] = torch.cat([weights[key][:-1], new["axolotl"][None], weights[key][-1:]])
        larger.load_state_dict(weights)
        built.transformer = larger
        for label in (0, 4):
            assert torch.equal(latents(pipe, class_labels=label), latents(built, class_labels=label))

    def test_several_adapters(self, tmp_path):
        make_adapter(SIT, tmp_path / "a", rows("ant", "bee", seed=1), seed=1)
        SIT().save_lora_weights(tmp_path / "b", label_rows=rows("cod", seed=2))
        make_adapter(SIT, tmp_path / "c", rows("doe", seed=3), seed=3)
        pipe = SIT()
        for name in "abc":
            pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        assert pipe.adapter_classes == {"a": [4, 5], "b": [6], "c": [7]}
        drawn = {name: latents(pipe, class_labels=name) for name in ("cod", "doe", "tabby")}
        pipe.set_adapters(["a", "c"])
        pipe.set_adapters("c")
        pipe.delete_adapters("a")
        assert pipe.adapter_classes == {"b": [4], "c": [5]} and pipe.transformer.config.num_classes == 6
        for name, expected in drawn.items():
            assert torch.equal(latents(pipe, class_labels=name), expected)
        with pytest.raises(UserError, match="'bee'"):
            latents(pipe, class_labels="bee")

    def test_fused_pipeline_stands_alone(self, make_any_pipe, tmp_path):
        make_adapter(make_any_pipe, tmp_path / "a", rows("axolotl"))
        pipe = make_any_pipe(id2label=ID2LABEL)
        pipe.load_lora_weights(tmp_path / "a", adapter_name="zoo")
        expected = {label: latents(pipe, class_labels=label) for label in ("axolotl", "forklift")}
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert pipe.adapter_classes == {}
        loaded = reloaded(pipe, tmp_path / "x")
        assert loaded.config["id2label"] == {**ID2LABEL, "4": "axolotl"}
        for label, images in expected.items():
            assert close(latents(loaded, class_labels=label), images)
        # They are the pipeline's own now: another adapter of that name takes only its own classes along.
        pipe.load_lora_weights(tmp_path / "a", adapter_name="zoo")
        assert pipe.adapter_classes == {"zoo": [5]}
        pipe.unload_lora_weights()
        assert pipe.config["id2label"] == {**ID2LABEL, "4": "axolotl"}

    def test_fusing_one_of_two_keeps_its_classes_only(self, tmp_path):
        for seed, name in enumerate(("a", "b")):
            make_adapter(SIT, tmp_path / name, rows(f"class {name}", seed=seed), seed=seed)
        pipe = SIT()
        pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
        pipe.load_lora_weights(tmp_path / "b", adapter_name="b")
        expected = latents(pipe, class_labels="class b")
        pipe.fuse_lora(adapter_names=["b"])
        pipe.delete_adapters("a")
        assert pipe.adapter_classes == {"b": [4]}
        pipe.unload_lora_weights()
        assert pipe.config["id2label"] == {**ID2LABEL, "4": "class b"}
        assert close(latents(pipe, class_labels="class b"), expected)

    def test_unfused_ones_leave(self, tmp_path):
        make_adapter(SIT, tmp_path / "a", rows("ant"))
        SIT().save_lora_weights(tmp_path / "b", label_rows=rows("bee"))
        pipe = SIT()
        before = state(pipe)
        for name in "ab":
            pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        pipe.fuse_lora()
        assert pipe.fused_loras == {"a", "b"}
        pipe.unfuse_lora()
        assert pipe.fused_loras == set()
        pipe.unload_lora_weights()
        after = state(pipe)
        assert after[1:] == before[1:] and all(close(after[0][key], before[0][key]) for key in before[0])

    def test_a_whole_name_outranks_synonyms(self, tmp_path):
        SIT().save_lora_weights(tmp_path, label_rows=rows("tabby cat", "golden retriever"))
        pipe = SIT()
        pipe.load_lora_weights(tmp_path)
        for name, label in (("tabby cat", 4), ("tabby", 0), ("tabby, tabby cat", 0)):
            assert torch.equal(latents(pipe, class_labels=name), latents(pipe, class_labels=label))
        with pytest.raises(UserError, match=r"names the classes \[1, 5\]"):
            latents(pipe, class_labels="golden retriever")

    def test_without_names_of_the_old_classes(self, tmp_path):
        make_adapter(SIT, tmp_path, rows("axolotl"))
        pipe = SIT(id2label=None)
        pipe.load_lora_weights(tmp_path)
        assert pipe.config["id2label"] == {"4": "axolotl"}
        assert torch.equal(latents(pipe, class_labels="axolotl"), latents(pipe, class_labels=4))
        pipe.unload_lora_weights()
        assert pipe.config["id2label"] is None

    def test_tensors_bring_classes_without_names(self, tmp_path):
        make_adapter(SIT, tmp_path, rows("axolotl"))
        pipe, named = SIT(), SIT()
        pipe.load_lora_weights(load_file(tmp_path / FILE))
        named.load_lora_weights(tmp_path)
        assert pipe.config["id2label"] == ID2LABEL
        assert torch.equal(latents(pipe, class_labels=4), latents(named, class_labels="axolotl"))

    def test_unconditional_models_get_classes(self, tmp_path):
        pipe = SIT(transformer=tiny_transformer(num_classes=0), id2label=None)
        before = latents(pipe, class_labels=None, guidance_scale=1)
        pipe.save_lora_weights(tmp_path, label_rows=rows("axolotl"))
        pipe.load_lora_weights(tmp_path)
        assert not close(latents(pipe, class_labels="axolotl", guidance_scale=1), before, 1e-3)
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe, class_labels=None, guidance_scale=1), before)

    def test_half_precision(self, tmp_path):
        make_adapter(SIT, tmp_path, rows("axolotl"))
        pipe = SIT()
        pipe.transformer.label_embedder.to(torch.bfloat16)
        pipe.load_lora_weights(tmp_path)
        assert table(pipe).dtype == torch.bfloat16

    def test_another_pipeline_around_the_transformer_knows_whose_they_are(self, tmp_path):
        make_adapter(SIT, tmp_path, rows("axolotl"))
        pipe = SIT()
        pipe.load_lora_weights(tmp_path)
        other = ClassToImagePipeline(**pipe.components, id2label=pipe.config["id2label"])
        other.unload_lora_weights()
        assert other.config["id2label"] == ID2LABEL and other.transformer.config.num_classes == NUM_CLASSES


class TestHotSwap:
    @pytest.mark.parametrize(
        ("first", "second"), [(["ant"], ["bee"]), (["ant"], ["bee", "cod"]), (["ant"], []), ([], ["bee"])]
    )
    def test_exchanges_the_classes(self, tmp_path, first, second):
        make_adapter(SIT, tmp_path / "0", rows(*first, seed=1), seed=1)
        make_adapter(SIT, tmp_path / "1", rows(*second, seed=2), seed=2)
        pipe, expected = SIT(), SIT()
        pipe.load_lora_weights(tmp_path / "0", adapter_name="x")
        pipe.load_lora_weights(tmp_path / "1", adapter_name="x", hotswap=True)
        expected.load_lora_weights(tmp_path / "1", adapter_name="x")
        assert pipe.config["id2label"] == expected.config["id2label"]
        assert pipe.adapter_classes == expected.adapter_classes
        for label in ("tabby", *second):
            assert close(latents(pipe, class_labels=label), latents(expected, class_labels=label))

    def test_as_many_classes_keep_their_ids_and_the_table_its_place(self, tmp_path):
        for seed, name in enumerate(("ant", "bee", "cod")):
            SIT().save_lora_weights(tmp_path / name, label_rows=rows(name, seed=seed))
        pipe = SIT()
        for name in ("ant", "bee"):
            pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        parameter = pipe.transformer.label_embedder.table.weight
        pipe.load_lora_weights(tmp_path / "cod", adapter_name="ant", hotswap=True)
        assert pipe.transformer.label_embedder.table.weight is parameter
        assert pipe.config["id2label"] == {**ID2LABEL, "4": "cod", "5": "bee"}
        assert torch.equal(parameter[4], rows("cod", seed=2)["cod"])

    def test_rows_are_not_swapped_for_layers(self, tmp_path):
        make_adapter(SIT, tmp_path / "layers")
        SIT().save_lora_weights(tmp_path / "rows", label_rows=rows("ant"))
        for first, second in (("layers", "rows"), ("rows", "layers")):
            pipe = SIT()
            pipe.load_lora_weights(tmp_path / first, adapter_name="x")
            before = state(pipe)
            with pytest.raises(UserError, match="unload it"):
                pipe.load_lora_weights(tmp_path / second, adapter_name="x", hotswap=True)
            assert_same(state(pipe), before)


def changed(folder: Path, change, metadata: dict | None = None) -> Path:
    """Write the adapter in a folder again, its tensors changed in place and its header as given."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata=metadata)
    return folder


LORA_KEY = "transformer.blocks.0.attn.to_q.lora_A.weight"
NAMES = {"class_names": '["axolotl"]'}


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda t: t.update({LORA_KEY: torch.ones(4, WIDTH + 1)}), "does not fit this SiT"),
            (lambda t: t.update({LORA_KEY: torch.ones(3, WIDTH)}), "does not fit this SiT"),
            (lambda t: t.update({LORA_KEY.replace("blocks.0", "blocks.7"): t.pop(LORA_KEY)}), "does not fit this SiT"),
            (lambda t: t.pop(LORA_KEY), "does not fit this SiT"),
            (lambda t: t.update({LORA_KEY.replace("lora_A", "lora_C"): torch.ones(1)}), "does not fit this SiT"),
            (lambda t: t.update({"unet.x.lora_A.weight": torch.ones(1)}), "'unet.x.lora_A.weight'.*another pipeline"),
            (lambda t: t.update({"transformer.proj_out.weight": torch.ones(1)}), "neither of a LoRA layer"),
            (lambda t: t.update({"transformer.label_embedder.rows": torch.ones(1, WIDTH + 1)}), "have width 17"),
            (lambda t: t.update({"transformer.label_embedder.rows": torch.ones(2, WIDTH)}), "must be 2 names"),
            (
                lambda t: t.update({"transformer.label_embedder.rows": torch.ones(WIDTH)}),
                r"must be \(classes, width\)",
            ),
            (lambda t: t.update({"transformer.label_embedder.rows": torch.ones(1, WIDTH).int()}), "int32"),
            (lambda t: t["transformer.label_embedder.rows"].fill_(torch.nan), "rows has values that are not finite"),
            (
                lambda t: t.update({"transformer.x.lora_A.weight": torch.tensor(torch.inf)}),
                "lora_A.weight.*not finite",
            ),
            (lambda t: t.clear(), "no tensor"),
        ],
    )
    def test_tensors(self, tmp_path, change, reason):
        changed(make_adapter(SIT, tmp_path, rows("axolotl")), change, NAMES)
        self.assert_refused(tmp_path, reason)

    def test_an_empty_name(self, tmp_path):
        make_adapter(SIT, tmp_path, rows("axolotl"))
        with pytest.raises(UserError, match="adapter_name '' is no name"):
            SIT().load_lora_weights(tmp_path, adapter_name="")

    @pytest.mark.parametrize(
        ("metadata", "reason"),
        [
            ({}, "has no class_names"),
            ({"class_names": "[1"}, "class_names is not JSON"),
            ({"class_names": '{"a": 1}'}, "must be a JSON list"),
            ({"class_names": "[7]"}, "must be 1 names"),
            ({"class_names": '[" "]'}, "must be 1 names"),
            ({**NAMES, "lora_adapter_metadata": "[]"}, "must be a JSON dict"),
            ({**NAMES, "lora_adapter_metadata": '{"transformer.foo": 1}'}, "transformer.foo is no field"),
            (
                {**NAMES, "lora_adapter_metadata": '{"transformer.r": 1000000000}'},
                "rank 1000000000; the largest.* is 4",
            ),
            (
                {**NAMES, "lora_adapter_metadata": '{"transformer.rank_pattern": {"to_q": 99}}'},
                "rank 99; the largest.* is 4",
            ),
            (
                {**NAMES, "lora_adapter_metadata": '{"transformer.rank_pattern": 99}'},
                "rank_pattern must hold plain names",
            ),
            (
                {**NAMES, "lora_adapter_metadata": '{"transformer.rank_pattern": {"(a+)+b": 2}}'},
                "rank_pattern must hold plain names",
            ),
            (
                {**NAMES, "lora_adapter_metadata": '{"transformer.target_modules": "(.*)*to_q"}'},
                "target_modules must hold plain names",
            ),
            (
                {**NAMES, "lora_adapter_metadata": '{"transformer.exclude_modules": ["(a|a)*"]}'},
                "exclude_modules must hold plain names",
            ),
            ({**NAMES, "lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'}, "lora_alpha must be finite"),
            (
                {**NAMES, "lora_adapter_metadata": '{"transformer.alpha_pattern": {"to_q": Infinity}}'},
                "alpha_pattern must be finite",
            ),
            (
                {**NAMES, "lora_adapter_metadata": '{"transformer.megatron_config": {"a": 1}}'},
                "megatron_config.*refused",
            ),
            ({**NAMES, "lora_adapter_metadata": '{"transformer.init_lora_weights": "pissa"}'}, "pissa.*refused"),
        ],
    )
    def test_metadata(self, tmp_path, metadata, reason):
        changed(make_adapter(SIT, tmp_path, rows("axolotl")), lambda _: None, metadata)
        self.assert_refused(tmp_path, reason)

    def test_class_names_differ(self, tmp_path):
        folder = make_adapter(SIT, tmp_path, rows("axolotl", "okapi"))
        changed(folder, lambda _: None, {"class_names": '["axolotl", "axolotl"]'})
        self.assert_refused(folder, "must differ")

    def test_a_link_out_of_the_folder(self, tmp_path):
        folder = make_adapter(SIT, tmp_path / "a")
        (folder / FILE).rename(tmp_path / FILE)
        (folder / FILE).symlink_to(tmp_path / FILE)
        self.assert_refused(folder, "a link to.*outside the folder")

    def test_megatron_module_is_never_imported(self, tmp_path, monkeypatch):
        (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')")
        monkeypatch.syspath_prepend(tmp_path)
        config = {"transformer.megatron_config": {"x": 1}, "transformer.megatron_core": "evil_module"}
        changed(make_adapter(SIT, tmp_path / "a"), lambda _: None, {"lora_adapter_metadata": json.dumps(config)})
        self.assert_refused(tmp_path / "a", "refused")

    @pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "[:12]])
    def test_broken_files(self, tmp_path, content):
        (tmp_path / FILE).write_bytes(content)
        self.assert_refused(tmp_path, "the file is damaged")

    def test_truncated_file(self, tmp_path):
        path = make_adapter(SIT, tmp_path) / FILE
        path.write_bytes(path.read_bytes()[:-10])
        self.assert_refused(tmp_path, "the file is damaged")

    @pytest.mark.parametrize("name", ["adapter.pt", "adapter"])
    def test_other_formats_are_never_opened(self, tmp_path, name):
        torch.save({LORA_KEY: torch.ones(4, WIDTH)}, tmp_path / name)
        self.assert_refused(tmp_path / name, "ask its author for safetensors")
        self.assert_refused(tmp_path, "ask its author for safetensors", weight_name=name)
        self.assert_refused(tmp_path, "no adapter file pytorch_lora_weights.safetensors")

    @pytest.mark.parametrize("holds", ["code in the archive", "code in a bare pickle"])
    def test_code_in_a_bin_never_runs(self, tmp_path, holds):
        trap = Trap(tmp_path / "ran")
        path = tmp_path / "pytorch_lora_weights.bin"
        if holds == "code in the archive":
            torch.save({LORA_KEY: torch.ones(4, WIDTH), "x": trap}, path)
        else:
            path.write_bytes(pickle.dumps({LORA_KEY: trap}))
        self.assert_refused(path, "holds code, not only tensors|no archive of tensors")
        self.assert_refused(tmp_path, "holds code, not only tensors|no archive of tensors", weight_name=path.name)
        with pytest.raises(UserError, match=r"holds code|no archive"):
            ClassToImagePipeline.lora_state_dict(path)
        assert not trap.proof.exists()
        pickle.loads(pickle.dumps(trap))
        assert trap.proof.exists()  # the trap works

    @pytest.mark.parametrize(
        "content",
        [
            [torch.ones(1)],
            {"a": 1},
            {"a": {"b": torch.ones(1)}},
            {1: torch.ones(1)},
            {LORA_KEY: torch.ones(1).to("meta")},
        ],
    )
    def test_a_bin_of_more_than_named_tensors(self, tmp_path, content):
        torch.save(content, tmp_path / "x.bin")
        self.assert_refused(tmp_path / "x.bin", "more than dense tensors and their names")

    def test_missing_files(self, tmp_path):
        (tmp_path / "other.safetensors").touch()
        self.assert_refused(tmp_path, "files there: other.safetensors; give weight_name")
        self.assert_refused(tmp_path / "x" / "y", "neither a folder on this machine nor a Hub id")

    def test_adapter_of_another_generator(self, tmp_path):
        make_adapter(Named(LightningDiTTransformer2DModel), tmp_path, target_modules=["ff.linear_in"])
        self.assert_refused(tmp_path, "does not fit this SiT")

    def test_name_in_use(self, tmp_path):
        make_adapter(SIT, tmp_path, rows("axolotl"))
        pipe = SIT()
        pipe.load_lora_weights(tmp_path, adapter_name="x")
        before = state(pipe)
        with pytest.raises(ValueError, match="Adapter name x already in use in the model - please select a new"):
            pipe.load_lora_weights(tmp_path, adapter_name="x")
        assert_same(state(pipe), before)

    def test_second_adapter_that_does_not_fit(self, tmp_path):
        make_adapter(SIT, tmp_path / "a", rows("axolotl"))
        changed(make_adapter(SIT, tmp_path / "b"), lambda t: t.update({LORA_KEY: torch.ones(4, 3)}))
        pipe = SIT()
        pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
        before = state(pipe)
        for options in ({"adapter_name": "b"}, {"adapter_name": "a", "hotswap": True}):
            with pytest.raises(UserError, match="does not fit this SiT"):
                pipe.load_lora_weights(tmp_path / "b", **options)
        assert_same(state(pipe), before)

    def test_guidance_transformer_must_have_as_many_classes(self, tmp_path):
        make_adapter(SIT, tmp_path / "rows", rows("axolotl"))
        make_adapter(SIT, tmp_path / "layers")
        pipe = SIT(guidance_transformer=SIT.weaker())
        before = state(pipe)
        with pytest.raises(UserError, match=r"5 classes and the guidance_transformer has 4"):
            pipe.load_lora_weights(tmp_path / "rows")
        assert_same(state(pipe), before)
        pipe.load_lora_weights(tmp_path / "layers")
        pipe.unload_lora_weights()
        pipe.guidance_transformer = None
        pipe.load_lora_weights(tmp_path / "rows")

    def test_rows_of_different_widths_are_not_saved(self, tmp_path):
        with pytest.raises(UserError, match="one vector per class"):
            SIT().save_lora_weights(tmp_path, label_rows={"a": torch.ones(3), "b": torch.ones(4)})

    def assert_refused(self, source, reason, **options) -> None:
        pipe = SIT()
        before = state(pipe)
        with pytest.raises(UserError, match=reason) as error:
            pipe.load_lora_weights(source, adapter_name="x", **options)
        assert "\n" not in str(error.value)
        assert_same(state(pipe), before)
        assert not any(name.endswith(".base_layer") for name, _ in pipe.transformer.named_modules())


def test_state_of_a_saved_adapter_is_that_of_the_loaded_one(tmp_path):
    pipe = SIT()
    add_adapter(pipe)
    save_adapter(pipe, tmp_path / "a", label_rows=rows("axolotl"))
    again = SIT()
    again.load_lora_weights(tmp_path / "a", adapter_name="x")
    save_adapter(again, tmp_path / "b", name="x", label_rows={"axolotl": table(again)[4]})
    assert state_of(again, "x").keys() == state_of(pipe).keys()
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
