"""The tools as a user starts them: evaluation, pictures, doctor, and the rehearsal of the GPU check."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from runs import ROOT, TIMEOUT, environment, train


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
    done = tool("evaluate.py", checkpoint, "--data", shards, "--json", tmp_path / "scores.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (scores,) = json.loads((tmp_path / "scores.json").read_text()).values()
    assert 0 <= scores["knn"] <= 100 and 0 <= scores["probe"] <= 100
    assert f"k-NN {scores['knn']:.2f} %" in done.stdout


@pytest.mark.parametrize(("analysis", "rows"), [("views", 4), ("reconstructions", 3)])
def test_pictures_have_a_row_for_each_kind(analysis, rows, checkpoint, shards, tmp_path):
    out = tmp_path / "picture.png"
    done = tool(
        "analyze.py", analysis, checkpoint, "--data", shards / "val", "--out", out, "--images", 5, cwd=tmp_path
    )
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


def test_the_doctor_names_missing_data(tmp_path):
    done = tool("doctor.py", "--data", tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == 1 and "BAD" in done.stdout and "not ready" in done.stdout


@pytest.mark.long
def test_the_gpu_check_can_be_rehearsed(tmp_path):
    done = tool("gpu_check.py", "--device", "cpu", "--small", "--out", tmp_path / "check.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert all(row["ok"] for row in rows) and len(rows) >= 15


@pytest.mark.long
def test_the_demo_makes_every_row_and_picture(tmp_path):
    done = tool("demo.py", "--out", tmp_path / "demo", "--steps", 12, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    rows = {"random", "pixels", "mae", "lut", "dtm", "dtm_no_morphing", "dtm_untrained_teacher"}
    assert summary.keys() == rows and all({"knn", "probe"} <= row.keys() for row in summary.values())
    for picture in ("views_lut.png", "masks_dtm.png", "reconstructions_mae.png", "morphs_dtm.png"):
        assert Image.open(tmp_path / "demo" / picture).width > 100
    (tmp_path / "other").mkdir()
    (tmp_path / "other/images").mkdir()
    refused = tool("demo.py", "--out", tmp_path / "other", cwd=tmp_path)
    assert refused.returncode != 0 and (tmp_path / "other/images").is_dir()
