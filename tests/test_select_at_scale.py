"""Selection from shards on disk: what select_rehearsal.py would keep, whatever the shards, in
bounded memory."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest

import large.select_at_scale as scale
from select_rehearsal import criterion_keys, embed, load_encoder, select
from large.select_at_scale import Args, Shards, cluster_blocks, main
from utils import InputError, write_json, write_jsonl

ROWS, CENTRES = 600, 4


def a_world(folder, cuts=(600,), dtype=np.float32):
    """Rows with measures that tie now and then, and embeddings in four groups, cut into shards."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, CENTRES, ROWS)
    points = (np.eye(CENTRES, 8)[truth] * 5 + rng.normal(0, 0.2, (ROWS, 8))).astype(dtype)
    rows = [
        {
            "prompt": f"p{i}",
            "response": f"y{i}",
            "score": float(rng.integers(0, 40)) / 4,
            "task": f"t{truth[i]}",
        }
        | {"entropy": float(rng.integers(0, 9)), "length": int(rng.integers(1, 30))}
        for i in range(ROWS)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "shards").mkdir()
    for number, part in enumerate(np.split(points, np.cumsum(cuts)[:-1])):
        np.save(folder / "shards" / f"{number:03}.npy", part)
    return rows, truth


def run(folder, **flags):
    flags = {
        "embeddings": str(folder / "shards"),
        "num_clusters": CENTRES,
        "top_k": 7,
        "rows_at_once": 100,
    } | flags
    name = flags.pop("dataset_name", str(folder / "rows.jsonl"))
    main(Args(dataset_name=name, output_dir=str(folder / "out"), **flags))
    kept = [json.loads(line) for line in (folder / "out" / "rehearsal.jsonl").read_text().splitlines()]
    return kept, json.loads((folder / "out" / "clusters.json").read_text())


KEYS = {
    "advantage": lambda row: -row["score"],
    "low_advantage": lambda row: row["score"],
    "entropy": lambda row: row["entropy"],
    "length": lambda row: row["length"],
}


@pytest.mark.parametrize("criterion", KEYS)
def test_top_k_of_each_cluster_by_brute_force(criterion, tmp_path):
    rows, truth = a_world(tmp_path, (150, 1, 449), np.float16)
    kept, report = run(tmp_path, criterion=criterion)
    best = []
    for group in range(CENTRES):
        members = [row for row, t in zip(rows, truth, strict=True) if t == group]
        best += sorted(members, key=KEYS[criterion])[:7]  # a stable sort: ties in the rows' order
    assert {row["prompt"] for row in kept} == {row["prompt"] for row in best} and len(kept) == 7 * CENTRES
    assert len({(row["task"], row["cluster"]) for row in kept}) == CENTRES  # the groups were found
    assert sorted(report["sizes"]) == sorted(np.bincount(truth).tolist()) and report["pairs"] == ROWS
    mean = np.mean([row["score"] for row in best])
    assert report["selected"]["mean_score"] == pytest.approx(mean) != report["random_control"]["mean_score"]


@pytest.mark.parametrize("criterion", ["advantage", "combined", "random", "entropy"])
def test_the_rows_and_their_order_are_those_of_select_rehearsal(criterion, tmp_path):
    rows, _ = a_world(tmp_path)
    kept, _ = run(tmp_path, criterion=criterion)
    clusters = cluster_blocks(Shards(tmp_path / "shards", ""), CENTRES, 1, 100, 1)
    measures = {key: np.array([row[key] for row in rows]) for key in ("score", "entropy")}
    keys = criterion_keys(criterion, clusters, measures, np.random.default_rng(1))
    chosen = select(keys, clusters, 7)
    shuffled = np.random.default_rng(1).permutation(chosen).tolist()
    assert kept == [rows[i] | {"cluster": int(clusters[i])} for i in shuffled]


def test_shards_and_compression_change_nothing(tmp_path):
    results = []
    for number, cuts in enumerate([(600,), (1, 599), (100,) * 6, (37, 263, 300)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        a_world(folder, cuts)
        plain = folder / "rows.jsonl"
        packed = folder / "rows.jsonl.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        results.append(run(folder, dataset_name=str(packed if number % 2 else plain))[0])
    assert all(result == results[0] for result in results)


def test_blocks_are_the_rows_in_order(tmp_path):
    a_world(tmp_path, (37, 263, 300))
    shards = Shards(tmp_path / "shards", "--embeddings")
    whole = np.concatenate([np.load(path) for path in shards.paths])
    blocks = list(shards.blocks(64))
    assert [len(block) for block in blocks] == [64] * 9 + [24] and (np.concatenate(blocks) == whole).all()
    picked = np.array([0, 36, 37, 299, 300, 599])
    assert (shards.rows(picked) == whole[picked]).all()


def test_memory_grows_with_a_block_and_not_with_the_embeddings(tmp_path):
    """Of 16,000 rows x 256 the matrix has 16 MB in float32, a block of 500 half a MB, the sample
    1 MB."""
    rng = np.random.default_rng(0)
    (tmp_path / "shards").mkdir()
    for number in range(4):
        np.save(tmp_path / "shards" / f"{number}.npy", rng.normal(size=(4000, 256)).astype(np.float16))
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "y" * 50, "score": 0.0}] * 16_000)
    tracemalloc.start()
    run(tmp_path, rows_at_once=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000 * 256 * 4 / 2, peak


def test_prompts_are_embedded_once_and_a_stopped_run_goes_on(tmp_path, policy_folder, monkeypatch):
    rows, _ = a_world(tmp_path)
    seen = []

    def counted(encoder, texts, batch_size):
        seen.append(len(texts))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return embed(encoder, texts, batch_size)

    monkeypatch.setattr(scale, "embed", counted)
    flags = {"embeddings": None, "embedding_model": policy_folder, "rows_at_once": 250}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **flags)
    assert seen == [250, 250, 100]
    kept, _ = run(tmp_path, **flags)
    assert seen == [250, 250, 100, 100] and len(kept) == 7 * CENTRES
    shards = Shards(tmp_path / "out" / "embeddings", "")
    expected = embed(load_encoder(policy_folder, "auto"), [row["prompt"] for row in rows], 64)
    assert np.concatenate(list(shards.blocks(100))) == pytest.approx(expected, abs=2e-3)  # float16
    (tmp_path / "out" / "clusters.json").unlink()  # as a stopped run has none
    with pytest.raises(InputError, match="holds embeddings of other rows or flags"):
        run(tmp_path, **flags | {"rows_at_once": 200})
    # the same rows in another place are the same rows, and others in the same place are not
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    run(tmp_path, **flags | {"dataset_name": str(tmp_path / "moved.jsonl")})
    assert len(seen) == 4
    (tmp_path / "out" / "clusters.json").unlink()
    write_jsonl(tmp_path / "moved.jsonl", [*rows[:-1], rows[0]])
    with pytest.raises(InputError, match="holds embeddings of other rows or flags"):
        run(tmp_path, **flags | {"dataset_name": str(tmp_path / "moved.jsonl")})


def test_a_run_killed_before_its_first_shard_starts_again(tmp_path, policy_folder):
    a_world(tmp_path)
    (tmp_path / "out" / "embeddings").mkdir(parents=True)
    kept, _ = run(tmp_path, embeddings=None, embedding_model=policy_folder)
    assert len(kept) == 7 * CENTRES


def test_messages_are_embedded_as_the_plain_text(tmp_path, policy_folder):
    rows, _ = a_world(tmp_path)
    rows[1::2] = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows[::2]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    run(tmp_path, embeddings=None, embedding_model=policy_folder)
    found = np.concatenate(list(Shards(tmp_path / "out" / "embeddings", "").blocks(100)))
    assert (found[::2] == found[1::2]).all()


def test_a_blank_line_is_no_row(tmp_path):
    rows, _ = a_world(tmp_path)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write("\n \n")
    assert run(tmp_path)[1]["pairs"] == len(rows)


def test_only_clusters_of_an_earlier_selection_are_written_anew(tmp_path):
    rows, _ = a_world(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [*rows[:4], rows[4] | {"cluster": "mine"}, *rows[5:]])
    with pytest.raises(InputError, match=r"rows\.jsonl, line 5: field 'cluster' is written by .*; rename yours"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()
    ours = {"ended": True, "length": 3, "cluster": 9}  # as select_rehearsal.py writes them
    write_jsonl(tmp_path / "rows.jsonl", [row | ours for row in rows[:-1]] + [rows[-1] | {"cluster": None}])
    assert {row["cluster"] for row in run(tmp_path)[0]} == {*range(CENTRES)}


def test_a_finished_selection_is_not_written_over(tmp_path, monkeypatch):
    """And that is said before any row is read."""
    a_world(tmp_path)
    kept, _ = run(tmp_path)
    assert run(tmp_path)[0] == kept  # the same command may
    monkeypatch.setattr(scale, "read_measures", None)
    with pytest.raises(InputError, match=r"clusters\.json: the result of another --top_k is there; give another"):
        run(tmp_path, top_k=3)
    (tmp_path / "out" / "clusters.npz").touch()
    with pytest.raises(InputError, match=r"out: holds a selection of select_rehearsal\.py; take another"):
        run(tmp_path)
    assert len((tmp_path / "out" / "rehearsal.jsonl").read_text().splitlines()) == len(kept)


def spoil(folder, line, **changes):
    rows = [json.loads(text) for text in (folder / "rows.jsonl").read_text().splitlines()]
    rows[line - 1] = {key: value for key, value in (rows[line - 1] | changes).items() if value is not None}
    write_jsonl(folder / "rows.jsonl", rows)


def half_an_emoji(folder):
    row = {"prompt": "p", "response": "fox \ud83d", "score": 1.0}
    with open(folder / "rows.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (lambda f: spoil(f, 3, score=None), {}, "line 3: field 'score' is missing"),
        (
            lambda f: spoil(f, 4, score=float("nan")),
            {},
            "line 4: field 'score' must be a finite number",
        ),
        (
            lambda f: spoil(f, 5, entropy="low"),
            {"criterion": "combined"},
            "line 5: field 'entropy' must be",
        ),
        (lambda f: spoil(f, 600, prompt=""), {}, "line 600: field 'prompt' is empty"),
        (lambda f: (f / "rows.jsonl").open("a").write("{\n"), {}, "line 601: not JSON"),
        (lambda f: (f / "rows.jsonl").open("a").write("9" * 5000 + "\n"), {}, "line 601: not JSON"),
        (lambda f: (f / "rows.jsonl").open("a").write("[" * 10**5 + "\n"), {}, "line 601: not JSON"),
        (lambda f: spoil(f, 6, score=10**400), {}, "line 6: field 'score' must be a finite number"),
        (lambda f: spoil(f, 7, prompt=[{"role": "user"}]), {}, "line 7: field 'prompt' is empty, or"),
        (lambda f: spoil(f, 8, prompt=[1]), {}, "line 8: field 'prompt' is empty, or"),
        (half_an_emoji, {}, "line 601: field 'response' holds half a surrogate pair"),
        (lambda f: None, {"rows_at_once": 3}, "--rows_at_once 3: a mini-batch needs a row for each"),
        (
            lambda f: (f / "rows.jsonl").open("a").write("3\n"),
            {},
            "line 601: expected a JSON object",
        ),
        (lambda f: (f / "rows.jsonl").unlink(), {}, "cannot be read"),
        (
            lambda f: np.save(f / "shards/1.npy", np.zeros((3, 8), np.float32)),
            {},
            "603 rows, .* has 600",
        ),
        (
            lambda f: np.save(f / "shards/1.npy", np.zeros((3, 9), np.float32)),
            {},
            "different dimensions",
        ),
        (lambda f: np.save(f / "shards/1.npy", np.zeros(3)), {}, "expected \\(rows, dim\\)"),
        (
            lambda f: np.save(f / "shards/000.npy", np.full((600, 8), np.inf, np.float32)),
            {},
            "not finite",
        ),
        (lambda f: (f / "shards/000.npy").unlink(), {}, "holds no .npy files"),
        (lambda f: write_json(f / "shards/000.npy", 1), {}, "no array"),
        (lambda f: None, {"num_clusters": 601}, "has 600 rows alone"),
        (lambda f: None, {"top_k": 0}, "must be positive"),
    ],
)
def test_refusals(change, flags, words, tmp_path):
    a_world(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=words):
        run(tmp_path, **flags)
