import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.runtime.tokenizer import Tokenizer
from engine.storage.artifacts import ArtifactError, read_manifest, write_manifest
from pipelines.baseline import ask_checkpoint
from pipelines.evaluate import evaluate
from pipelines.evaluation.kept import read_baseline
from pipelines.evaluation.texts import document_items
from tests.pipelines.chain import Chain, tiny_rows
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint
from tests.shared_data import shared

RECIPES = [("fp16", "kv16"), ("fp16", "kv8"), ("w4a16", "kv16"), ("w4a16", "kv8")]
GATES = {"perplexity_ratio_max": 1.5, "kl_mean_max": 0.5, "kl_p99_max": 20.0, "top1_agreement_min": 0.0}
FLIPS = {"answer_flips_max": 0.5}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return _chain(tmp_path_factory.mktemp("evaluate"), questions=8, **FLIPS)


def _chain(folder: Path, *, questions: int, replace: dict[str, torch.Tensor] | None = None, **gates: float) -> Chain:
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", replace=replace)
    (folder / "text.txt").write_text(TEXT)
    words = TEXT.split()
    rows = [{"prompt": " ".join(words[i : i + 3]), "answer": words[i + 3]} for i in range(questions)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = folder / "questions.jsonl" if questions else None
    tiny = tiny_rows(checkpoint, folder / "text.txt", RECIPES, questions=asked, gates=GATES | gates)
    return Chain(folder / "root", tiny, project=folder)


def _predicate(chain: Chain, weights: str, kv: str) -> dict[str, Any]:
    folder = chain.evaluation(f"tiny-c-{weights}-1-{kv}", "e")
    return json.loads((folder / "statement.json").read_text())["predicate"]


def test_statement_is_about_the_artifact_and_holds_every_part(chain: Chain) -> None:
    folder = chain.evaluation("tiny-c-fp16-1-kv8", "e")
    artifact = read_manifest(chain.artifact("tiny-c-fp16-1-kv8")).id
    statement, goldens = ((folder / name).read_bytes() for name in ("statement.json", "goldens.json"))
    content = json.loads(statement)
    assert content["_type"] == "https://in-toto.io/Statement/v1"
    assert content["subject"] == [{"name": artifact, "digest": {"sha256": artifact}}]
    predicate = content["predicate"]
    assert predicate["goldens"] == {"sha256": hashlib.sha256(goldens).hexdigest()}
    assert json.loads(goldens)["artifact"] == artifact
    assert json.loads(goldens)["device_class"] == predicate["device_class"] == predicate["toolchain"]["device"]
    assert predicate["items"]["num_questions"] == 8
    assert predicate["items"]["num_tokens"] > 20 * 23
    assert len(predicate["gates"]) == 5
    assert all(gate["why"] and gate["low"] is not None for gate in predicate["gates"])
    assert str(chain.root) not in statement.decode() + goldens.decode()


def test_fp16_of_an_fp16_checkpoint_is_the_baseline_exactly(chain: Chain) -> None:
    metrics = _predicate(chain, "fp16", "kv16")["metrics"]
    assert metrics["perplexity_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0, "num_units": 28}
    assert metrics["kl_mean"]["value"] == metrics["kl_p99"]["value"] == 0.0
    assert metrics["top1_agreement"]["value"] == 1.0
    assert metrics["answer_flips"]["value"] == 0.0


def test_every_rung_is_measured_through_its_own_weights_and_cache(chain: Chain) -> None:
    predicates = {recipe: _predicate(chain, *recipe) for recipe in RECIPES}
    kl = {recipe: predicate["metrics"]["kl_mean"]["value"] for recipe, predicate in predicates.items()}
    assert 0 == kl["fp16", "kv16"] < kl["fp16", "kv8"] < kl["w4a16", "kv16"]
    assert len(set(kl.values())) == 4
    tokens = {recipe: predicate["sizes"]["kv_bytes_per_token"] for recipe, predicate in predicates.items()}
    assert tokens["fp16", "kv16"] == 2 * tokens["fp16", "kv8"] == 2 * 2 * 2 * 16 * 2
    sizes = {recipe: predicate["sizes"]["artifact_bytes"] for recipe, predicate in predicates.items()}
    assert sizes["w4a16", "kv16"] < sizes["fp16", "kv16"]


def test_a_failing_gate_is_an_outcome(tmp_path: Path) -> None:
    chain = _chain(tmp_path, questions=0, kl_mean_max=1e-9)
    predicate = _predicate(chain, "w4a16", "kv16")
    failed = [gate["metric"] for gate in predicate["gates"] if gate["verdict"] == "fail"]
    assert (predicate["verdict"], failed) == ("fail", ["kl_mean"])
    assert predicate["answers"] is None


def test_a_gate_on_answers_needs_questions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A gate on answers needs an evaluation set with questions"):
        _predicate(_chain(tmp_path, questions=0, **FLIPS), "fp16", "kv16")


def test_a_model_that_says_nan_fails_with_a_statement(tmp_path: Path) -> None:
    chain = _chain(tmp_path, questions=2)
    folder = chain.artifact("tiny-c-fp16-1-kv16")
    broken = next(folder.rglob("norm.weight"))
    content = torch.full((broken.stat().st_size // 2,), math.nan, dtype=torch.float16)
    _forge(folder, broken, content.numpy().tobytes())
    predicate = _predicate(chain, "fp16", "kv16")
    assert predicate["verdict"] == "fail"
    assert predicate["metrics"]["perplexity"]["value"] is None
    (gate,) = (gate for gate in predicate["gates"] if gate["metric"] == "kl_mean")
    assert (gate["verdict"], gate["why"]) == ("fail", "the metric is not a finite number")


def test_a_damaged_artifact_is_not_evaluated(tmp_path: Path) -> None:
    chain = _chain(tmp_path, questions=0)
    broken = next(chain.artifact("tiny-c-fp16-1-kv16").rglob("norm.weight"))
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ArtifactError, match=r"norm\.weight has changed"):
        chain.evaluation("tiny-c-fp16-1-kv16", "e")
    assert not (chain.root / "build/evaluate/tiny-c-fp16-1-kv16").exists()


def test_two_clean_builds_state_the_same_bytes(chain: Chain, tmp_path: Path) -> None:
    other = _chain(tmp_path, questions=8, **FLIPS)
    for name in ("statement.json", "goldens.json"):
        one, two = (c.evaluation("tiny-c-w4a16-1-kv8", "e") / name for c in (chain, other))
        assert one.read_bytes() == two.read_bytes(), name


def test_scores_take_about_390_bytes_a_token(chain: Chain) -> None:
    tensors = load_file(chain.baseline("tiny-e") / "scores.safetensors")
    kept = sum(tensors[name].nbytes for name in ("losses", "logprobs", "ids", "rest")) / len(tensors["losses"])
    assert kept == 392


def test_what_was_calibrated_on_and_is_asked_again_is_counted_and_said(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chain calibrates on the beginning of the text that it evaluates on, which says one sentence over and over."""
    assert _predicate(chain, "fp16", "kv16")["calibration"] is None
    seen = _predicate(chain, "w4a16", "kv16")["calibration"]
    assert seen["blocks"] == read_manifest(chain.artifact("tiny-c-w4a16-1-kv16")).calibration["blocks"]
    assert seen["run"] == 13 and seen["num_items"] == 28 and seen["seen_items"] >= 20
    assert 0.6 < seen["seen_tokens"] / seen["num_tokens"] <= 1
    other = _chain(tmp_path, questions=0)
    capsys.readouterr()
    other.evaluation("tiny-c-fp16-1-kv8", "e")
    said = capsys.readouterr().err
    assert "scored tokens, and most of 20 of 20 items, stand in the calibration text too, in runs of 13 tokens" in said


def test_another_calibration_than_the_artifact_names_is_refused(chain: Chain, tmp_path: Path) -> None:
    folder = chain.artifact("tiny-c-w4a16-1-kv16")
    save_file({"tokens": torch.zeros(4, 16, dtype=torch.int32)}, tmp_path / "blocks.safetensors")
    baseline, asked = read_baseline(chain.baseline("tiny-e")), chain.slices["evaluate/tiny-c-w4a16-1-kv16"]
    with pytest.raises(ValueError, match="is not the calibration that the artifact names: run `dvc repro` again"):
        evaluate(folder, baseline, asked, calibration=tmp_path)


def _forge(folder: Path, path: Path, content: bytes) -> None:
    """Replace a file and its entry in the manifest, as a wrong stage would have written both."""
    manifest = read_manifest(folder)
    path.unlink()
    path.write_bytes(content)
    write_manifest(
        folder,
        recipe=manifest.recipe,
        sources=manifest.sources,
        calibration=manifest.calibration,
        chat_template=manifest.chat_template,
        tp=manifest.tp,
    )


def test_an_int8_cache_costs_stories15m_almost_nothing(tmp_path: Path) -> None:
    checkpoint = shared("data/models/stories15M-llama")
    stories = shared("data/text/tinystories_train_head_2MiB.txt").read_text().split("<|endoftext|>")
    text = tmp_path / "calibration.txt"
    text.write_text("\n<|endoftext|>\n".join(stories[100:130]))
    (row,) = tiny_rows(checkpoint, text, [("fp16", "kv8")])
    row.config.calibration.sequence_length = 256
    chain = Chain(tmp_path / "root", [row], project=tmp_path)
    tokenizer = Tokenizer(checkpoint)
    items = document_items(stories[:5], tokenizer, length=256, max_tokens=10_000)
    baseline = ask_checkpoint(checkpoint, tokenizer, items, [], answer_tokens=1)
    artifact, calibration = chain.artifact("tiny-c-fp16-1-kv8"), chain.root / "build/calibrate/tiny-c"
    asked = chain.slices["evaluate/tiny-c-fp16-1-kv8"]
    statement, _ = evaluate(artifact, baseline, asked, calibration=calibration)
    seen = statement["predicate"]["calibration"]
    assert (seen["seen_tokens"], seen["num_items"]) == (0, 5)
    metrics = statement["predicate"]["metrics"]
    cost = metrics["perplexity"]["value"] - metrics["perplexity_base"]["value"]
    assert metrics["kl_mean"]["value"] > 1e-5, "the cache is not int8"
    assert abs(cost) < 0.006
