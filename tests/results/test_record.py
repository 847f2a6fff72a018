import csv
import errno
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metatpt.results import COLUMNS, Record, check_unused, export, make_rows, recover, start_session
from metatpt.results.record import record_file
from metatpt.results.runs import read_run
from metatpt.types import Adaptation, Batch


def make_samples(indices, n_classes, labels, averaged=True, scale=3.0):
    """Rows whose every figure follows from the sample's index."""
    logits = [torch.randn(3, n_classes, generator=torch.Generator().manual_seed(int(i))) * scale for i in indices]
    log_probs = torch.stack(logits).log_softmax(-1)
    n = len(indices)
    batch = Batch(
        image=torch.zeros(n, 3, 2, 2),
        canvas=torch.zeros(n, 3, 4, 4, dtype=torch.uint8),
        aspect=torch.ones(n),
        label=torch.tensor(labels),
        index=torch.tensor(indices),
        path=[f'pictures/{i}, \'a "b".png' for i in indices],
        error=["broken, badly" if i % 11 == 10 else None for i in indices],
    )
    adapted = log_probs[:, 0].clone()
    adapted[[k for k, i in enumerate(indices) if i % 13 == 12]] = math.nan
    adaptation = Adaptation(
        adapted,
        log_probs[:, 1],
        log_probs[:, 2] if averaged else None,
        diagnostics={"spread": -(log_probs[:, 1].exp() * log_probs[:, 1]).sum(1)},
    )
    return make_rows(batch, adaptation, [f"class {c}" for c in range(n_classes)])


def write_run(folder, parts, n_classes, labels=None, **options):
    """A run of one record per part; each part is the indices that its rank had."""
    folder.mkdir(exist_ok=True)
    for rank, indices in enumerate(parts):
        record = Record(folder, rank)
        for first in range(0, len(indices), 3):
            some = indices[first : first + 3]
            known = [i % n_classes for i in some] if labels is None else [labels[i] for i in some]
            record.append(make_samples(some, n_classes, known, **options))
        record.note(n_total=100, n_classes=n_classes)
        record.close()
    return export(folder, len(parts))


def read_csv(folder):
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def reference(rows, n_classes):
    """metrics.json from predictions.csv, by plain loops; the bootstrap is checked in test_metrics."""
    known = [row for row in rows if row["label_index"] and row["prediction_index"]]
    result = {"n": len(rows), "n_labelled": len(known)}
    result["n_skipped"] = len([row for row in rows if row["status"] == "skipped"])
    for prefix in ("", "zero_shot_", "averaged_"):
        some = [row for row in known if row[prefix + "prediction_index"]]
        if not some:
            continue
        right = top5 = loss = 0.0
        bins = [[] for _ in range(15)]
        for row in some:
            hit = row[prefix + "prediction_index"] == row["label_index"]
            confidence = float(row[prefix + "probability"])
            right += hit
            top5 += int(row[prefix + "label_rank"]) <= 5
            loss -= math.log(float(row[prefix + "label_probability"]))
            bins[min(int(confidence * 15), 14)].append((hit, confidence))
        result[prefix + "accuracy"] = right / len(some)
        if n_classes >= 5:
            result[prefix + "accuracy_top5"] = top5 / len(some)
        result[prefix + "nll"] = loss / len(some)
        error = 0.0
        for content in bins:
            if content:
                share = sum(hit for hit, _ in content) / len(content)
                confidence = sum(value for _, value in content) / len(content)
                error += len(content) / len(some) * abs(share - confidence)
        result[prefix + "ece"] = error
    if known:
        result["gain"] = result["accuracy"] - result["zero_shot_accuracy"]
    return result


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("n_classes", [1, 2, 4, 5, 40])
@pytest.mark.parametrize("labelled", ["all", "half", "none"])
def test_every_figure_follows_from_the_csv(tmp_path, n_classes, labelled, averaged):
    kept = {"all": 2, "half": 1, "none": 0}[labelled]
    labels = [i % n_classes if i % 2 < kept else -1 for i in range(60)]
    # At this scale many float32 confidences are exactly 1.
    write_run(tmp_path, [list(range(60))], n_classes, labels, averaged=averaged, scale=12.0)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = reference(read_csv(tmp_path), n_classes)
    assert set(metrics) - {"gain_low", "gain_high", "n_total"} == set(expected)
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-12, abs=1e-15), key
    assert metrics["n_total"] == 100
    assert ("gain_low" in metrics) == (labelled != "none")


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 1, 2, 3], [4, 5, 6]],
        [[0, 2, 4, 6], [1, 3, 5]],
        [[6, 4, 2, 0, 1, 3, 5], []],
        [[], [0, 1, 2, 3, 4, 5, 6]],
        [[0, 3, 6], [1, 4, 0], [2, 5, 1]],  # as Lightning's sampler pads: 0 and 1 come twice
    ],
)
def test_shards_merge_into_what_one_process_writes(tmp_path, parts):
    one = write_run(tmp_path / "one", [list(range(7))], 6)
    many = write_run(tmp_path / "many", parts, 6)
    assert many == one
    for name in ("predictions.csv", "metrics.json"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert [row["index"] for row in read_csv(tmp_path / "many")] == list("0123456")


def test_csv_holds_the_same_float64_and_text(tmp_path):
    write_run(tmp_path, [list(range(20))], 6)
    rows = read_csv(tmp_path)
    assert list(rows[0]) == [*COLUMNS, "spread"]
    expected = make_samples(list(range(20)), 6, [i % 6 for i in range(20)])
    for row, cells in zip(rows, expected, strict=True):
        for name, cell in cells.items():
            read = row[name] or None
            assert read == cell if isinstance(cell, str | None) else float(read) == cell, name
    assert rows[10]["reason"] == "broken, badly"
    assert rows[12]["status"] == "kept_zero_shot"


def test_outcome_counts_and_lists_what_was_left_out(tmp_path):
    outcome = write_run(tmp_path, [list(range(0, 160, 2)), list(range(1, 160, 2))], 6)
    assert outcome.metrics["n_skipped"] == 14
    assert len(outcome.skipped) == 10  # the rest is in the file
    assert outcome.skipped[0] == ('pictures/10, \'a "b".png', "broken, badly")
    assert outcome.n_kept_zero_shot == 11  # 12, 25, ...: 12 of them, one of which could not be read either


def test_diagnostics_of_only_some_rows_get_a_column(tmp_path):
    plain = make_samples([0], 6, [0])
    plain[0].pop("spread")
    record = Record(tmp_path)
    record.append(plain)
    record.append(make_samples([1], 6, [1]))
    record.close()
    export(tmp_path)
    first, second = read_csv(tmp_path)
    assert first["spread"] == ""
    assert float(second["spread"]) > 0


def test_speed_and_memory_are_those_of_the_slowest_and_largest_rank(tmp_path):
    for rank, (indices, seconds, memory) in enumerate([([0, 1, 10], 2.0, 300.0), ([2, 3], 4.0, 200.0)]):
        record = Record(tmp_path, rank)
        record.append(make_samples(indices, 6, [0] * len(indices)))
        record.note(session=1, seconds=seconds, n_predicted=2, peak_memory_mb=memory, n_classes=6)
        record.close()
    metrics = export(tmp_path, 2).metrics
    assert metrics["images_per_second"] == pytest.approx(4 / 4.0)  # 10 was not predicted
    assert metrics["peak_memory_mb"] == 300.0
    assert metrics["n_total"] == 5  # nobody said more


def test_two_pictures_of_one_index_are_an_error(tmp_path):
    record = Record(tmp_path)
    record.append(make_samples([3, 4], 6, [0, 0]))
    with pytest.raises(ValueError, match=r"came twice.*\[5, 4\]"):
        record.append(make_samples([5, 4], 6, [0, 0]))
    record.close()
    assert [row["index"] for row in (export(tmp_path), read_csv(tmp_path))[1]] == ["3", "4"]

    other = Record(tmp_path, 1)
    rows = make_samples([4], 6, [0])
    other.append([rows[0] | {"path": "another.png"}])
    other.close()
    with pytest.raises(ValueError, match=r"index 4: .*another\.png"):
        export(tmp_path, 2)


def test_lost_record_of_a_rank_is_an_error(tmp_path):
    write_run(tmp_path, [[0, 1]], 6)
    with pytest.raises(FileNotFoundError, match=r"lacks record-rank1\.sqlite.*share"):
        export(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match="Process 1 does not find"):
        Record(tmp_path / "elsewhere", 1)


@pytest.mark.parametrize("name", ["predictions.csv", "metrics.json", "config.yaml", "record-rank3.sqlite", "views"])
def test_folder_that_holds_a_run_is_refused(tmp_path, name):
    check_unused(tmp_path / "new")
    (tmp_path / "notes.txt").touch()
    check_unused(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match=rf"{tmp_path.name}.*{name}.*--run"):
        check_unused(tmp_path)
    if name == "config.yaml":
        check_unused(tmp_path, config=False)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_unused(tmp_path / "file")


def test_two_runs_do_not_write_one_record(tmp_path):
    first = Record(tmp_path)
    with pytest.raises(OSError, match=r"record-rank0\.sqlite is in use: a run"):
        Record(tmp_path)
    first.close()


def test_committed_rows_survive_a_kill(tmp_path):
    code = f"""
import os, signal
from metatpt.results import COLUMNS, Record
record = Record({str(tmp_path)!r})
for index in range(5):
    record.append([dict.fromkeys(COLUMNS) | {{"index": index, "path": "p", "status": "ok"}}])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    connection = sqlite3.connect(record_file(tmp_path, 0))
    assert [index for (index,) in connection.execute('SELECT "index" FROM rows ORDER BY 1')] == [0, 1, 2, 3, 4]
    connection.close()


def test_export_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    write_run(tmp_path, [[0, 1]], 6)
    before = (tmp_path / "metrics.json").read_bytes()
    monkeypatch.setattr("metatpt.results.record.summarize", lambda *_, **__: {"n_skipped": 0, "n": object()})
    with pytest.raises(TypeError):
        export(tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_kill_leaves_can_be_added_to(tmp_path):
    """Rows of two killed ranks are taken up, with their log; skipped ones are tried again."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_record import Record, make_samples
records = [Record({str(tmp_path)!r}, rank) for rank in range(2)]
for record, indices in zip(records, [[0, 2, 10], [1, 3]]):
    record.note(n_total=100, n_classes=6, session=1, seconds=9.0, n_predicted=3)
    record.append(make_samples(indices, 6, [i % 6 for i in indices]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*-wal"))) == 2
    expected = make_samples([0, 1, 2, 3], 6, [0, 1, 2, 3])
    assert read_run(tmp_path).rows[:4] == [row | {"milliseconds": None} for row in expected]
    assert not read_run(tmp_path).complete

    progress = recover(tmp_path)
    assert progress.done == {row["index"]: (row["path"], row["label_index"]) for row in expected}  # 10 was skipped
    assert progress.n_labelled == 4
    assert progress.n_right == sum(row["prediction_index"] == row["label_index"] for row in expected)
    right = [row["zero_shot_prediction_index"] == row["label_index"] for row in expected]
    assert progress.n_zero_shot_right == sum(right)
    assert progress.stream is None
    assert not list(tmp_path.glob("*-wal"))

    assert [row["index"] for row in read_run(tmp_path).rows] == [0, 1, 2, 3, 10]  # looking changes nothing
    assert progress.session == 2
    start_session(tmp_path, progress)
    record = Record(tmp_path, 0)
    record.append(make_samples([4, 10], 6, [4, 4]))
    record.note(session=2, seconds=2.0, n_predicted=1)
    record.close()
    outcome = export(tmp_path)
    whole = write_run(tmp_path / "whole", [[0, 1, 2, 3, 4, 10]], 6)
    assert (tmp_path / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()
    assert outcome.metrics.pop("images_per_second") == 0.5  # of the last session
    assert outcome.metrics == whole.metrics
    assert read_run(tmp_path).complete


def test_a_stream_is_kept_with_its_rows(tmp_path):
    record = Record(tmp_path)
    for index in (9, 10):  # 10 is skipped, and stays so: pictures of a stream come in order
        stream = {"last": torch.tensor([index]), "context": torch.full((1, 2, 3), index, dtype=torch.float64)}
        record.append(make_samples([index], 6, [0]), stream)
    record.close()
    progress = recover(tmp_path)
    start_session(tmp_path, progress)
    assert len(read_run(tmp_path).rows) == 2
    assert list(progress.done) == [9, 10]
    assert progress.stream.keys() == stream.keys()
    for name, value in stream.items():
        assert torch.equal(progress.stream[name], value)
        assert progress.stream[name].dtype == value.dtype


def test_a_run_that_still_writes_is_neither_resumed_nor_read(tmp_path):
    record = Record(tmp_path)
    for use in (recover, read_run):
        with pytest.raises(OSError, match=r"record-rank0\.sqlite is in use: a run is still writing"):
            use(tmp_path)
    record.close()
    assert recover(tmp_path).done == {}


def test_a_full_disk_is_named_and_what_was_written_is_whole(tmp_path):
    record = Record(tmp_path)
    record.append(make_samples([0, 1], 6, [0, 1]))
    pages = record._connection.execute("PRAGMA page_count").fetchone()[0]
    record._connection.execute(f"PRAGMA max_page_count={pages}")  # SQLite's own word for a disk that is full

    def fill():
        for first in range(2, 200, 2):
            record.append(make_samples([first, first + 1], 6, [0, 1]))

    with pytest.raises(OSError, match=r"Cannot write .*record-rank0\.sqlite: .*full.*Rows written before are whole"):
        fill()
    record.close()
    rows = read_run(tmp_path).rows
    assert [row["index"] for row in rows] == list(range(len(rows)))  # whole batches, without a gap
    assert len(rows) % 2 == 0


def test_a_full_disk_at_the_end_leaves_the_record_to_write_from(tmp_path, monkeypatch):
    write_run(tmp_path, [[0, 1]], 6)
    (tmp_path / "predictions.csv").unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"Cannot write .*predictions\.csv: No space left on device.*--resume"):
        export(tmp_path)
    assert not list(tmp_path.glob("predictions*"))
    monkeypatch.undo()
    assert export(tmp_path).metrics["n"] == 2


def test_a_damaged_record_is_named(tmp_path):
    write_run(tmp_path, [list(range(40))], 6)
    file = record_file(tmp_path, 0)
    content = file.read_bytes()
    file.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(OSError, match=r"record-rank0\.sqlite is damaged"):
        read_run(tmp_path)
    file.write_bytes(b"no database at all" * 100)
    with pytest.raises(OSError, match=r"record-rank0\.sqlite is damaged"):
        recover(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"Cannot write .*record-rank0\.sqlite: unable to open"):
        Record(tmp_path)


def test_what_a_new_session_makes_untrue_goes(tmp_path):
    write_run(tmp_path, [[0, 1, 10]], 6)
    (tmp_path / "cost.json").touch()
    start_session(tmp_path, recover(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["record-rank0.sqlite"]
    run = read_run(tmp_path)
    assert [row["index"] for row in run.rows] == [0, 1]
    assert not run.complete


def test_speed_is_that_of_the_last_session_that_did_something(tmp_path):
    for session, (predicted, seconds) in enumerate([(3, 1.0), (2, 4.0)], 1):
        record = Record(tmp_path)
        record.append(make_samples([session], 6, [0]))
        record.note(session=session, n_predicted=predicted, seconds=seconds, n_classes=6)
        record.close()
    other = Record(tmp_path, 1)  # of the first session, which had two processes
    other.note(session=1, n_predicted=100, seconds=9.0)
    other.close()
    assert export(tmp_path).metrics["images_per_second"] == 0.5


def test_a_killed_run_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_record import Record, make_samples
record = Record({str(tmp_path)!r})
record.append(make_samples([0, 1], 6, [0, 1]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    import metatpt.results.record as module

    opened = module._open

    def refuse(file):  # as SQLite does in a read-only folder
        if file.parent == tmp_path:
            raise sqlite3.OperationalError("unable to open database file")
        return opened(file)

    monkeypatch.setattr(module, "_open", refuse)
    before = sorted(tmp_path.iterdir())
    assert [row["index"] for row in read_run(tmp_path).rows] == [0, 1]
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "record-rank0.sqlite-wal").unlink()
    with pytest.raises(OSError, match=r"Cannot read .*record-rank0\.sqlite: unable to open database file\.$"):
        read_run(tmp_path)
