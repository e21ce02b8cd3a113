"""`refimpl train`: the corpus, the loop, its files, and the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import one_sentence, same_bits

from refimpl import cli
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.training import TrainingConfig
from refimpl.errors import Error, Invalid
from refimpl.training import curve, files
from refimpl.training.corpus import BEGIN, END, Corpus
from refimpl.training.run import SHORT, SMALL, Plan, begin, train

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "sequence_length": 12,
}
SETS = [f"--set={name}={value}" for name, value in TINY.items()]
WORDS = b"the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(WORDS)
    return path


def command(text: Path, out: Path, *more: str) -> int:
    return cli.main(["train", str(text), "--out", str(out), "--batch", "2", *SETS, *more])


class TestCorpus:
    def test_ids_are_bytes_between_a_beginning_and_an_end(self, tmp_path: Path) -> None:
        path = tmp_path / "text"
        path.write_bytes(b"\x00a\xff")
        assert Corpus.read(path, 4).ids.tolist() == [BEGIN, 0, 97, 255, END]

    def test_targets_are_the_next_ids_and_every_place_can_be_drawn(self, text: Path) -> None:
        corpus = Corpus.read(text, 6)
        ids, targets = corpus.batch(0, 0, 5, 6)
        assert ids.shape == targets.shape == (5, 6)
        assert (ids[:, 1:] == targets[:, :-1]).all()
        short = Corpus(corpus.ids[:9], "")
        seen = {tuple(row) for step in range(40) for row in short.batch(0, step, 2, 6)[0].tolist()}
        assert seen == {tuple(short.ids[i : i + 6].tolist()) for i in range(3)}

    def test_a_batch_depends_on_seed_and_step_alone(self, text: Path) -> None:
        corpus = Corpus.read(text, 6)
        one, same, later, other = (corpus.batch(*at, 4, 6)[0] for at in ((1, 2), (1, 2), (1, 3), (2, 2)))
        assert (one == same).all()
        assert (one != later).any()
        assert (one != other).any()

    def test_a_text_shorter_than_one_sequence(self, tmp_path: Path) -> None:
        path = tmp_path / "text"
        path.write_bytes(b"abcd")
        assert len(Corpus.read(path, 5).ids) == 6
        with pytest.raises(Invalid) as caught:
            Corpus.read(path, 6)
        one_sentence(caught, "6 tokens", "need 7")


class TestCommand:
    def test_it_trains_and_writes_what_it_was_asked_for(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        assert command(text, out, "--steps", "4", "--every", "3", "--export", str(tmp_path / "weights")) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("step 4, 96 tokens: loss ")
        assert "MTP" in printed.out
        assert printed.err == ""  # no bar where there is no terminal
        rows = curve.read(out / "curve.csv")
        assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
        state, run = files.load(out)
        assert (state.steps, state.tokens) == (4, 96)
        assert run["seed"] == 0
        for layer in (1, 2):
            shares = [float(rows[-1][f"load.{layer}.{i}"]) for i in range(16)]
            assert np.mean(shares) == pytest.approx(1.0, rel=1e-3)
        assert (tmp_path / "weights" / "config.json").exists()

    @pytest.mark.parametrize("precision", ["float32", "exact", "v3-fp8 --recipe-set=*.dy.tile=128x128"])
    def test_stopped_and_resumed_is_not_stopped(self, precision: str, text: Path, tmp_path: Path) -> None:
        more = (
            "--precision",
            *precision.split(),
            "--microbatches",
            "2",
            "--every",
            "2",
            "--set=ema_decay=0.9",
        )
        assert command(text, tmp_path / "one", "--steps", "5", *more) == 0
        assert command(text, tmp_path / "two", "--steps", "3", *more) == 0
        assert command(text, tmp_path / "two", "--steps", "5", "--resume", *more) == 0
        one, two = (files.load(tmp_path / name)[0] for name in ("one", "two"))
        for kind in ("weights", "first", "second", "average"):
            same_bits(getattr(one, kind), getattr(two, kind))
        a, b = (curve.read(tmp_path / name / "curve.csv") for name in ("one", "two"))
        timed = "tokens_per_second"
        assert [{k: v for k, v in r.items() if k != timed} for r in a] == [
            {k: v for k, v in r.items() if k != timed} for r in b
        ]

    def test_a_picture_is_drawn(self, text: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        target = tmp_path / "curve.png"
        assert command(text, tmp_path / "out", "--steps", "3", "--plot", str(target)) == 0
        assert target.read_bytes().startswith(b"\x89PNG")

    def test_a_picture_without_matplotlib_is_refused_before_the_first_step(
        self, text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert command(text, tmp_path / "out", "--plot", "curve.png") == 2
        self.refused(capsys, "matplotlib is not installed")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("more", "fragments"),
        [
            (["--set=hidden_size=32"], ["hidden_size is 16", "has 32"]),
            (["--set=weight_decay=0.2"], ["weight_decay is 0.1", "has 0.2"]),
            (["--seed", "3"], ["seed is 0", "has 3"]),
            (["--choices", "report"], ["choice"]),
            (["--precision", "float64"], ['precision is "float32"']),
            (["--microbatches", "2"], ["microbatches is 1", "has 2"]),
            (["--steps", "1"], ["has 2 steps", "--steps is 1"]),
        ],
        ids=str,
    )
    def test_a_resume_of_another_run(
        self, more: list[str], fragments: list[str], text: Path, tmp_path: Path, capsys: Any
    ) -> None:
        assert command(text, tmp_path / "out", "--steps", "2") == 0
        capsys.readouterr()
        assert command(text, tmp_path / "out", "--resume", "--steps", "3", *more) == 2
        self.refused(capsys, *fragments)

    def test_a_recipe_and_its_fast_form_train_and_say_which_they_are(
        self, text: Path, tmp_path: Path, capsys: Any
    ) -> None:
        for name, carrier in (("v3-fp8", "exact"), ("v3-fp8@float32", "float32")):
            assert command(text, tmp_path / carrier, "--steps", "2", "--precision", name) == 0
            recipe = files.load(tmp_path / carrier)[0].ar.recipe
            assert (recipe.name, recipe.carrier) == ("v3-fp8", carrier)
        assert "step 2" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("more", "fragments"),
        [
            (["--precision", "v3-fp8"], ["recipe v3-fp8, carrier is", "float32"]),
            (["--precision", "v3.1-ue8m0@float32"], ['precision is "v3-fp8"', "v3.1-ue8m0"]),
            (["--precision", "float32"], ['precision is "v3-fp8"', 'has "float32"']),
            (
                ["--precision", "v3-fp8@float32", "--recipe-set", "*.dy.format=e5m2"],
                ["recipe v3-fp8, row", '*.dy.format is "e4m3"', 'has "e5m2"'],
            ),
            (
                ["--precision", "v3-fp8@float32", "--recipe-set", "*.fprop.accumulator=promote_fp32"],
                ['*.fprop.accumulator is "deepgemm"', 'has "promote_fp32"'],
            ),
        ],
        ids=str,
    )
    def test_a_resume_under_another_recipe(
        self, more: list[str], fragments: list[str], text: Path, tmp_path: Path, capsys: Any
    ) -> None:
        own = ("--precision", "v3-fp8@float32")
        assert command(text, tmp_path / "out", "--steps", "1", *own) == 0
        capsys.readouterr()
        assert command(text, tmp_path / "out", "--resume", "--steps", "2", *more) == 2
        self.refused(capsys, *fragments)
        assert command(text, tmp_path / "out", "--resume", "--steps", "2", *own) == 0

    def test_a_resume_with_another_text(self, text: Path, tmp_path: Path, capsys: Any) -> None:
        assert command(text, tmp_path / "out", "--steps", "1") == 0
        text.write_bytes(WORDS + b"!")
        assert command(text, tmp_path / "out", "--resume") == 2
        self.refused(capsys, "text_sha256")

    @pytest.mark.parametrize(
        ("more", "fragments"),
        [
            (["--resume"], ["state.json is missing"]),
            (["--set=hidden_sise=3"], ["hidden_sise", "must be a field"]),
            (["--set", "hidden_size"], ["NAME=VALUE"]),
            (["--set=hidden_size=1.5"], ["hidden_size", "1.5"]),
            (["--set=vocab_size=200"], ["vocab_size is 200", "need 258"]),
            (["--set=sequence_length=5000"], ["max_position_embeddings"]),
            (["--set=sequence_length=4000"], ["tokens", "need 4001"]),
            (["--precision", "float8"], ["float8"]),
            (["--precision", "v3-fp8@float16"], ["v3-fp8@float16"]),
            (["--recipe-set", "*.dy.format=e5m2"], ["--precision is float32"]),
            (["--precision", "v3-fp8", "--recipe-set", "*.dz.format=e5m2"], ["*.dz"]),
            (["--precision", "v3-fp8", "--recipe-set", "norm.in.keep=recomputed"], ["norm.in.keep"]),
            (["--microbatches", "3"], ["microbatches are 3", "only 2 sequences"]),
            (["--config", "nowhere.json"], ["nowhere.json"]),
        ],
        ids=str,
    )
    def test_what_cannot_be_trained(
        self, more: list[str], fragments: list[str], text: Path, tmp_path: Path, capsys: Any
    ) -> None:
        assert command(text, tmp_path / "out", "--steps", "1", *more) == 2
        self.refused(capsys, *fragments)

    def test_a_new_run_keeps_its_hands_off_an_old_one(self, text: Path, tmp_path: Path, capsys: Any) -> None:
        assert command(text, tmp_path / "out", "--steps", "1") == 0
        assert command(text, tmp_path / "out", "--steps", "1") == 2
        self.refused(capsys, "has a checkpoint")

    def test_a_loss_that_is_not_finite(self, text: Path, tmp_path: Path, capsys: Any) -> None:
        more = ("--set=learning_rate=1e38", "--set=warmup_steps=0", "--steps", "9")
        assert command(text, tmp_path / "out", *more) == 2
        self.refused(capsys, "step 2", "finite")

    def refused(self, capsys: Any, *fragments: str) -> None:
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert error.startswith("refimpl: ")
        assert error.endswith(".")
        for fragment in fragments:
            assert fragment in error, error


class TestCurve:
    def test_rows_after_the_checkpoint_and_a_torn_one_are_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "curve.csv"
        path.write_text("step,loss\n1,3\n2,2\n3,1\n4,0.")
        kept = curve.Curve(path, 2)
        kept.add({"step": "3", "loss": "1.5"})
        kept.close()
        assert path.read_text() == "step,loss\n1,3\n2,2\n3,1.5\n"

    def test_a_curve_of_another_run(self, tmp_path: Path) -> None:
        path = tmp_path / "curve.csv"
        path.write_text("step,loss\n1,3\n")
        kept = curve.Curve(path, 1)
        with pytest.raises(Error) as caught:
            kept.add({"step": "2", "main": "3"})
        kept.close()
        one_sentence(caught, "curve.csv", "another run")

    def test_what_is_no_curve(self, tmp_path: Path) -> None:
        path = tmp_path / "curve.csv"
        path.write_text("a,b\n1,2\n")
        with pytest.raises(Error) as caught:
            curve.Curve(path, 1)
        one_sentence(caught, "curve.csv")


def test_the_default_is_a_v3_in_small(text: Path, tmp_path: Path) -> None:
    model, training = ModelConfig.from_dict(dict(SMALL)), TrainingConfig.from_dict(dict(SHORT))
    plan = Plan(text, model, training, Choices(), "float32", 0, 1)
    state, corpus = begin(plan, tmp_path / "out", False)
    assert (model.n_routed_experts, model.groups, model.num_nextn_predict_layers) == (16, 4, 1)
    steps = train(plan, state, corpus, 2, 1, tmp_path / "out", tmp_path / "curve.csv")
    reports = [report for _, report, _ in steps]
    assert [report.tokens for report in reports] == [1024, 1024]
    assert reports[0].losses["main"] == pytest.approx(np.log(258), rel=0.02)


def test_killed_at_any_moment_it_loses_at_most_the_steps_since_the_last_checkpoint(
    text: Path, tmp_path: Path
) -> None:
    """A real process and SIGKILL, at moments that a seed draws; then the run is finished, and is the one
    that was never killed."""
    out, every, steps = tmp_path / "out", 2, 50
    base = ["train", str(text), "--out", str(out), "--batch", "1", "--every", str(every), *SETS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    moments = np.random.default_rng(0).uniform(0.0, 0.3, 3)
    killed = 0
    for moment in moments:
        resume = ["--resume"] if (out / files.STATE).exists() else []
        more = ["--steps", str(steps), *resume]
        before = files.load(out)[0].steps if resume else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "refimpl", *base, *more],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started = time.monotonic()
        while process.poll() is None and time.monotonic() < started + 60:  # until it has written something
            if (out / files.STATE).exists() and files.load(out)[0].steps > before:
                break
            time.sleep(0.001)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        state, _ = files.load(out)
        rows = curve.read(out / "curve.csv")
        assert state.steps > before
        assert state.steps % every == 0
        assert state.steps <= int(rows[-1]["step"]) <= state.steps + every
        assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert killed
    assert cli.main([*base, "--steps", str(steps), "--resume"]) == 0
    through = [*base[:3], str(tmp_path / "through"), *base[4:]]
    assert cli.main([*through, "--steps", str(steps)]) == 0
    one, two = files.load(out)[0], files.load(tmp_path / "through")[0]
    same_bits(one.weights, two.weights)
    assert len(curve.read(out / "curve.csv")) == steps
