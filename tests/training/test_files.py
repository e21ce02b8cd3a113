"""States in files."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import config, one_sentence, random_ids, random_weights, same_bits

import refimpl
from refimpl import TrainingConfig
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.names import aliases
from refimpl.errors import Error, Invalid, Missing, Unreadable, Unsupported
from refimpl.numerics.recipes import RECIPES
from refimpl.training import State, files, start, step
from refimpl.training.rules import DEEPSEEK_V3 as RULES

CFG = config(num_nextn_predict_layers=1)
TRAINING = TrainingConfig(warmup_steps=3, learning_rate=0.02, ema_decay=0.9, balance_loss_weight=0.01)
CHOICES = refimpl.Choices(mtp_concat="hidden_first", balance_counts="selected")


def begun(precision: Any = "float64", training: TrainingConfig = TRAINING) -> State:
    return start(CFG, random_weights(CFG, 0), training, CHOICES, precision)


def after(state: State, first: int, last: int) -> State:
    for number in range(first, last):
        ids = random_ids(CFG, (2, 5), number)
        state, _ = step(state, [{"input_ids": ids, "labels": ids}])
    return state


def same(a: State, b: State) -> None:
    for kind in ("weights", "first", "second", "average"):
        same_bits(getattr(a, kind), getattr(b, kind))
    for field in ("config", "training", "choices", "precision", "powers", "steps", "tokens"):
        assert getattr(a, field) == getattr(b, field), field


CHANGED = RECIPES["v3-fp8"].set(["*.dy.tile=128x128", "carrier=float32"])


@pytest.mark.parametrize(
    "precision", ["exact", "float64", "float32", "bf16", "v3-fp8", "v3-fp8@float32", CHANGED], ids=str
)
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(precision: Any, tmp_path: Path) -> None:
    through = after(begun(precision), 0, 4)
    halfway = after(begun(precision), 0, 2)
    files.save(halfway, tmp_path, {"seed": 5})
    read, run = files.load(tmp_path)
    same(read, halfway)
    assert run == {"seed": 5}
    same(after(read, 2, 4), through)


def test_a_recipe_is_written_row_by_row_and_read_back(tmp_path: Path) -> None:
    files.save(begun(CHANGED), tmp_path)
    written = json.loads((tmp_path / "state.json").read_text())
    assert written["precision"] == "v3-fp8"
    assert {row["site"]: row["tile"] for row in written["recipe"]["rules"]}["*.dy"] == "128x128"
    read = files.load(tmp_path)[0]
    assert (read.ar.recipe, read.ar.recipe.carrier) == (CHANGED, "float32")
    del written["recipe"]  # as it was written before there were rows
    (tmp_path / "state.json").write_text(json.dumps(written | {"precision": "v3-fp8@float32"}))
    assert files.load(tmp_path)[0].ar.recipe == replace(RECIPES["v3-fp8"], carrier="float32")


def test_without_an_average_there_is_none(tmp_path: Path) -> None:
    state = begun(training=replace(TRAINING, ema_decay=0.0))
    files.save(state, tmp_path)
    assert files.load(tmp_path)[0].average == {}


def test_the_folder_has_one_state_after_many(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".state-1-00000000.safetensors.0badcafe.tmp").write_text("left by a killed writer")
    state = begun()
    for number in range(3):
        files.save(replace(state, steps=number), tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in found if not name.startswith("state-2-")] == ["notes.txt", "state.json"]
    assert files.load(tmp_path)[0].steps == 2


@pytest.mark.parametrize("stage", ["tensors", "json"])
def test_a_write_that_fails_leaves_the_state_before(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = begun()
    files.save(state, tmp_path)

    def full(*_: Any) -> None:
        raise Unreadable("the disk is full.")

    if stage == "tensors":
        monkeypatch.setattr(safetensors, "write", full)
    else:
        monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(Unreadable):
        files.save(replace(state, steps=9), tmp_path)
    same(files.load(tmp_path)[0], state)


class TestErrors:
    def saved(self, folder: Path) -> tuple[Path, Path]:
        files.save(begun(), folder)
        return folder / files.STATE, next(folder.glob("*.safetensors"))

    def changed(self, folder: Path, **fields: Any) -> None:
        path, _ = self.saved(folder)
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def refused(self, folder: Path, kind: type[Error], *fragments: str) -> None:
        with pytest.raises(kind) as caught:
            files.load(folder)
        one_sentence(caught, *fragments)

    def test_no_state(self, tmp_path: Path) -> None:
        self.refused(tmp_path, Missing, "state.json is missing")

    def test_another_version(self, tmp_path: Path) -> None:
        self.changed(tmp_path, version=2)
        self.refused(tmp_path, Unsupported, "version 2", "must be 1")

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        _, tensors = self.saved(tmp_path)
        tensors.write_bytes(tensors.read_bytes()[:-8])
        self.refused(tmp_path, Unreadable, "by its header it must have")

    def test_truncated_json(self, tmp_path: Path) -> None:
        path, _ = self.saved(tmp_path)
        path.write_text(path.read_text()[:-40])
        self.refused(tmp_path, Unreadable, "is not JSON")

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        _, tensors = self.saved(tmp_path)
        tensors.unlink()
        self.refused(tmp_path, Unreadable, tensors.name, "cannot be read")

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        _, path = self.saved(tmp_path)
        held = dict(safetensors.open_file(path))
        name = "second/model.layers.1.mlp.gate.weight"
        safetensors.write(path, {n: x for n, x in held.items() if n != name})
        self.refused(tmp_path, Missing, name, "must be there")

    def test_a_tensor_too_many(self, tmp_path: Path) -> None:
        _, path = self.saved(tmp_path)
        safetensors.write(path, {**safetensors.open_file(path), "third/lm_head.weight": np.zeros(3)})
        self.refused(tmp_path, Invalid, "third/lm_head.weight")

    @pytest.mark.parametrize("value", [np.zeros((2, 2)), np.zeros((29, 12), np.float32)])
    def test_a_tensor_of_another_shape_or_type(self, value: np.ndarray, tmp_path: Path) -> None:
        _, path = self.saved(tmp_path)
        safetensors.write(path, {**safetensors.open_file(path), "first/lm_head.weight": value})
        self.refused(tmp_path, Invalid, "first/lm_head.weight", "F64 (29, 12)")

    def test_a_number_that_is_not_finite(self, tmp_path: Path) -> None:
        _, path = self.saved(tmp_path)
        bad = np.zeros((29, 12))
        bad[3, 1] = np.nan
        safetensors.write(path, {**safetensors.open_file(path), "weight/lm_head.weight": bad})
        self.refused(tmp_path, Invalid, "weight/lm_head.weight", "(3, 1)")

    @pytest.mark.parametrize(
        ("fields", "fragment"),
        [
            ({"tensors": "../../etc/passwd"}, "must name a state's file"),
            ({"tensors": 3}, "must name a state's file"),
            ({"steps": -1}, "steps"),
            ({"tokens": "many"}, "tokens"),
            ({"powers": [0.5]}, "powers"),
            ({"powers": [0.5, 1.5]}, "power"),
            ({"precision": 7}, "precision"),
            ({"precision": "float16"}, "float16"),
            ({"recipe": []}, "recipe"),
            ({"recipe": {"name": "float64", "carrier": "exact", "rules": []}}, "no rule for site"),
            ({"recipe": RECIPES["bf16"].to_dict()}, 'recipe is named "bf16"'),
            ({"training": []}, "training"),
            ({"config": {}}, "model_type"),
            ({"choices": {"mtp_concat": "both"}}, "mtp_concat"),
        ],
        ids=str,
    )
    def test_fields_that_are_not_what_they_must_be(
        self, fields: dict[str, Any], fragment: str, tmp_path: Path
    ) -> None:
        self.changed(tmp_path, **fields)
        with pytest.raises(Error) as caught:
            files.load(tmp_path)
        one_sentence(caught, fragment)

    def test_a_missing_field(self, tmp_path: Path) -> None:
        path, _ = self.saved(tmp_path)
        given = json.loads(path.read_text())
        del given["powers"]
        path.write_text(json.dumps(given))
        self.refused(tmp_path, Missing, "powers")

    def test_rules_of_one_s_own_cannot_be_saved(self, tmp_path: Path) -> None:
        state = replace(begun(), rules=replace(RULES))
        with pytest.raises(Invalid) as caught:
            files.save(state, tmp_path)
        one_sentence(caught, "rules")

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(Unreadable) as caught:
            files.save(begun(), tmp_path / "file" / "folder")
        one_sentence(caught, "cannot be made")


class TestExport:
    def test_the_model_loads_what_is_exported(self, tmp_path: Path) -> None:
        state = after(begun("float32"), 0, 2)
        files.export(state, tmp_path / "out")
        model = refimpl.load(tmp_path / "out", "float32", CHOICES, TRAINING)
        ids = random_ids(CFG, (2, 5), 9)
        one, two = (m.forward(ids, labels=ids) for m in (model, state.model))
        assert one.loss == two.loss
        stored = safetensors.open_file(tmp_path / "out" / "model.safetensors")
        assert {stored.dtype(name) for name in stored} == {"F32"}
        assert set(aliases(CFG)) <= set(stored)

    def test_what_float32_would_lose_is_stored_in_float64(self, tmp_path: Path) -> None:
        state = after(begun("exact"), 0, 1)
        files.export(state, tmp_path / "out")
        model = refimpl.load(tmp_path / "out")
        same_bits({n: model.weights[n].astype(np.float64) for n in state.weights}, dict(state.weights))

    def test_the_average_can_be_exported(self, tmp_path: Path) -> None:
        state = after(begun("float32"), 0, 2)
        files.export(state, tmp_path / "out", average=True)
        model = refimpl.load(tmp_path / "out")
        same_bits({n: model.weights[n] for n in state.average}, dict(state.average))

    def test_a_folder_that_exists_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Invalid) as caught:
            files.export(begun(), tmp_path)
        one_sentence(caught, "new folder")

    @pytest.mark.crosscheck
    def test_transformers_loads_it_and_gives_the_loss(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch", reason="torch is not installed")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        cfg = config(hidden_size=16, moe_intermediate_size=8)  # torch's grouped products want multiples of 4
        state = after(start(cfg, random_weights(cfg, 0), TRAINING, precision="float32"), 0, 1)
        files.export(state, tmp_path / "out")
        ids = random_ids(cfg, (2, 5), 9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
            )
            loss = theirs(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
        assert loss == pytest.approx(state.model.forward(ids, labels=ids).losses["main"], rel=2e-4)
