"""clusters.json and clusters.png by hand."""

import json

import numpy as np
import pytest

from tests.test_data import refused
from tools.cluster_report import Args, cluster_report, main
from utils import write_jsonl

SCORES = np.array([0.1, 0.9, -0.5, 0.7, 0.8, 0.3, -2.0])
CLUSTERS = np.array([0, 0, 0, 1, 0, 1, 5])
EMBEDDINGS = np.array([[0.0], [1], [2], [9], [1.4], [8], [5]])  # cluster 0: 0, 1, 2, 1.4, mean 1.1
KEPT, CONTROL = [1, 4, 3, 5, 6], [0, 2, 3, 5, 6]
ROWS = [{"prompt": f"p{i}", "task": "a" if i < 4 else "b"} for i in range(7)]


def check(report):
    first = report["clusters"][0]
    assert (first["cluster"], first["size"]) == (0, 4)
    assert (first["score_min"], first["score_max"], first["kept_score_min"]) == (-0.5, 0.9, 0.8)
    assert (first["dominant_task"], first["dominant_share"]) == ("a", 0.75)
    assert first["typical_prompts"] == ["p1", "p4", "p2"]
    assert [c["size"] for c in report["clusters"]] == [4, 2, 1]
    assert (report["pairs"], report["kept"]) == (7, 5)
    # (0.9 + 0.8 + 0.7 + 0.3 - 2) / 5 = 0.14 and (0.1 - 0.5 + 0.7 + 0.3 - 2) / 5 = -0.28
    assert report["selected"]["mean_score"] == pytest.approx(0.14)
    assert report["random_control"]["mean_gold"] == pytest.approx(-2.8)
    assert report["selected"]["share_of_tasks"] == pytest.approx({"a": 0.4, "b": 0.6})


def test_report_by_hand():
    measures = {"score": SCORES, "gold": SCORES * 10}
    check(cluster_report(ROWS, measures, CLUSTERS, EMBEDDINGS, KEPT, CONTROL))


def write(folder, rows):
    write_jsonl(folder / "responses.jsonl", rows)
    planes = np.hstack([EMBEDDINGS, EMBEDDINGS[::-1]]).astype(np.float32)
    found = {"clusters": CLUSTERS, "embeddings": planes, "kept": KEPT, "control": CONTROL}
    np.savez(folder / "clusters.npz", criterion="length", **found)


def test_the_command_reads_a_folder_of_select_rehearsal(tmp_path):
    of = {"score": SCORES, "gold": 10 * SCORES, "length": np.arange(7)}
    rows = [r | {k: v[i].item() for k, v in of.items()} for i, r in enumerate(ROWS)]
    write(tmp_path, rows)
    main(Args(str(tmp_path)))
    report = json.loads((tmp_path / "clusters.json").read_text())
    assert report["criterion"] == "length" and {"versions", "commit", "machine"} <= report.keys()
    assert list(report["selected"]) == ["mean_score", "mean_length", "mean_gold", "share_of_tasks"]
    assert report["selected"]["mean_length"] == 19 / 5
    report["clusters"][0]["typical_prompts"] = ["p1", "p4", "p2"]  # of the plane: another order
    check(report)
    assert (tmp_path / "clusters.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_another_folder_stays(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [row | {"score": 1.0} for row in ROWS])
    out = str(tmp_path / "out")
    main(Args(str(tmp_path / "one"), out))
    main(Args(str(tmp_path / "one"), out))
    with refused("clusters.json: the result of another --folder is there", "give another --output_dir"):
        main(Args(str(tmp_path / "two"), out))


def test_what_is_no_such_folder_is_named(tmp_path):
    with refused(tmp_path, "select_rehearsal.py"):
        main(Args(str(tmp_path)))
    write(tmp_path, [row | {"score": 1.0} for row in ROWS[:6]])
    with refused(tmp_path, "6 responses and 7 clusters"):
        main(Args(str(tmp_path)))
