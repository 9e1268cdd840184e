"""The tools as a user starts them: evaluation, pictures, doctor, and the rehearsal of the GPU check."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, TIMEOUT, environment, train

from tools.findings import Findings


@pytest.fixture(scope="module")
def checkpoint(shards, tmp_path_factory) -> Path:
    """A tiny LUT training: encoder, decoder, heads and a moving average."""
    run = train(
        tmp_path_factory.mktemp("tools") / "run", f"data.train={shards}/train", "run.steps=2",
        "objective.head_hidden=32", recipe="vit_ti_lut_demo",
    )  # fmt: skip
    return run.newest_checkpoint()


def tool(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(cwd), timeout=TIMEOUT)


def test_evaluate_writes_both_scores(checkpoint, shards, tmp_path):
    run, out = checkpoint.parents[1], tmp_path / "new" / "scores.json"
    done = tool("evaluate.py", run, "--data", shards, "--json", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ((scored, scores),) = json.loads(out.read_text()).items()
    assert scored == str(checkpoint)
    assert 0 <= scores["knn"] <= 100 and 0 <= scores["probe"] <= 100
    assert f"k-NN {scores['knn']:.2f} %" in done.stdout


def test_evaluate_refuses_unlabelled_data_before_any_feature(checkpoint, shards, tmp_path, monkeypatch):
    """In this process, because no shards of ours lack labels; a data set may (`Dataset.label`)."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # entry scripts change it
    from engine.evaluation import scores
    from shards import dataset
    from tools.evaluate import evaluate

    opened = dataset.open_dataset(shards / "train")
    unlabelled = replace(opened, label=np.where(np.arange(len(opened)) < 3, -1, opened.label))
    monkeypatch.setattr(dataset, "open_dataset", lambda folder: unlabelled if folder.name == "val" else opened)
    monkeypatch.setattr(scores, "score_checkpoint", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match=r"data has no labels: 3 of 80 samples in val/"):
        evaluate([checkpoint], tmp_path, None)


@pytest.mark.parametrize(
    ("analysis", "images", "names"),
    [("morphs", 3, ("LUT", "views and reconstructions")), ("views", 0, ("--images=0",))],
)
def test_analyze_refuses_what_does_not_fit(analysis, images, names, checkpoint, shards, tmp_path):
    done = tool("analyze.py", analysis, checkpoint, "--data", shards / "val", "--images", images, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for name in names:
        assert name in done.stderr


@pytest.mark.parametrize(("analysis", "rows"), [("views", 4), ("reconstructions", 3)])
def test_pictures_have_a_row_for_each_kind(analysis, rows, checkpoint, shards, tmp_path):
    out = tmp_path / "picture.png"
    done = tool("analyze.py", analysis, checkpoint, "--data", shards / "val", "--out", out, "--images", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (5 * 34 * 3, rows * 34 * 3)  # 32 px and margins, three times as large


def test_something_else_than_a_checkpoint_is_named(shards, tmp_path):
    done = tool("evaluate.py", tmp_path, "--data", shards, cwd=tmp_path)
    assert done.returncode == 2 and "no complete checkpoint" in done.stderr and "Traceback" not in done.stderr


def test_the_doctor_looks_at_everything(shards, tmp_path):
    done = tool("doctor.py", "--data", shards / "train", cwd=tmp_path)
    for subject in ("python", "torch", "dali", "gpu", "decoding", "deepspeed", "shared mem", "disk", "80 samples"):
        assert subject in done.stdout, subject
    assert done.returncode == ("BAD" in done.stdout)


def test_the_doctor_names_missing_data_and_what_helps(tmp_path):
    done = tool("doctor.py", "--data", tmp_path / "[red]nothing", cwd=tmp_path)
    lines = done.stdout.splitlines()
    (number,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["BAD", "data"])
    assert "[red]nothing" in lines[number], "a folder's name is no markup"
    assert lines[number + 1].strip().startswith("->") and "make_shards" in lines[number + 1]
    assert done.returncode == 1 and "not ready" in done.stdout and "lambda" not in done.stdout


def test_findings_outlive_a_failing_part(tmp_path, capsys):
    out, cleaned = tmp_path / "new" / "check.json", []
    findings = Findings(out, {"card": "none"}, clean=lambda: cleaned.append(True))
    with findings.told("a check"):
        findings.attempt("first", lambda: findings.add("before", 1.0))
        assert not findings.attempt("second", lambda: [findings.add("kept", 2.0), print("a loss"), 1 / 0])
        assert findings.attempt("third", lambda: findings.add("[red]after", 3.0))
    rows = {row["check"]: (row["value"], row["ok"]) for row in json.loads(out.read_text())["rows"]}
    failed = ("ZeroDivisionError: division by zero", False)
    assert rows == {"before": ("1", True), "kept": ("2", True), "second": failed, "[red]after": ("3", True)}
    log, shown = (tmp_path / "new" / "check.log").read_text(), capsys.readouterr().out
    assert "a loss" in log and "Traceback" in log and "Traceback" not in shown and "[red]after" in shown
    assert len(cleaned) == 3 and not findings.passed()


def test_findings_are_written_when_the_check_is_interrupted(tmp_path, capsys):
    findings = Findings(tmp_path / "check.json", {}, clean=lambda: None)
    with pytest.raises(KeyboardInterrupt), findings.told("a check"):
        findings.add("before", 1.0)
        raise KeyboardInterrupt
    assert [row["check"] for row in json.loads((tmp_path / "check.json").read_text())["rows"]] == ["before"]
    assert "before" in capsys.readouterr().out and (tmp_path / "check.log").is_file()


@pytest.mark.long
def test_the_gpu_check_can_be_rehearsed(tmp_path):
    done = tool("gpu_check.py", "--device", "cpu", "--small", "--out", tmp_path / "check.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert all(row["ok"] for row in rows) and len(rows) >= 25


@pytest.mark.long
def test_the_demo_makes_every_row_and_picture(tmp_path):
    done = tool("demo.py", "--out", tmp_path / "demo", "--steps", 12, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    rows = {"random", "random_beit", "pixels", "mae", "lut", "dtm", "dtm_no_morphing", "dtm_untrained_teacher"}
    assert summary.keys() == rows and all({"knn", "probe"} <= row.keys() for row in summary.values())
    for picture in ("views_lut.png", "masks_dtm.png", "reconstructions_mae.png", "morphs_dtm.png"):
        assert Image.open(tmp_path / "demo" / picture).width > 100
    (tmp_path / "other").mkdir()
    (tmp_path / "other/images").mkdir()
    refused = tool("demo.py", "--out", tmp_path / "other", cwd=tmp_path)
    assert refused.returncode != 0 and (tmp_path / "other/images").is_dir()
