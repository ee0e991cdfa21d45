"""The runner of the GPU benchmarks: what fails or hangs is passed over, and results are on the disk at any time."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import run_all
from entries import ENTRIES, Entry
from records import Record, commit

RECORDING = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[sys.argv.index("--record") + 1])
def put(**facts):
    path.with_suffix(".new").write_text(json.dumps(facts))
    path.with_suffix(".new").replace(path)
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script and makes an entry of it."""

    def make(name: str, text: str, *, seconds: float = 60, correctness: bool = False) -> Entry:
        path = tmp_path / f"{name}.py"
        path.write_text(RECORDING + text)
        return Entry(name=name, proves=f"that {name}", command=(str(path),), seconds=seconds, correctness=correctness)

    return make


def stored(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())["entries"]


def test_what_fails_or_hangs_is_passed_over_and_keeps_its_partial_results(script, tmp_path, capsys):
    entries = [
        script("fails", "put(rows=[1]); print('a reason'); sys.exit(3)", correctness=True),
        script("hangs", "import time; put(rows=[1, 2]); time.sleep(600)", seconds=2),
        script("raises", "raise ValueError('in words')"),
        script("passes", "put(rows=[1, 2, 3])"),
    ]
    rows = run_all.run_all(entries, folder=tmp_path, budget=600, rehearse=False)["entries"]
    assert rows == stored(tmp_path)
    assert {name: row["status"] for name, row in rows.items()} == {
        "fails": "failed",
        "hangs": "timed out",
        "raises": "failed",
        "passes": "passed",
    }
    results = [row["result"] for row in rows.values()]
    assert results == [{"rows": [1]}, {"rows": [1, 2]}, None, {"rows": [1, 2, 3]}]
    assert "a reason" in rows["fails"]["output"]
    assert "ValueError: in words" in rows["raises"]["output"]
    assert 2 <= rows["hangs"]["seconds"] < 60
    log = (tmp_path / "gpu.log").read_text()
    assert log.index("a reason") < log.index("in words")
    printed = capsys.readouterr().out
    assert printed.count("summary: status, seconds, entry") == len(entries), "a summary after each entry"


def test_results_are_on_the_disk_before_an_entry_ends(script, tmp_path):
    waiting = script("waits", "import time; put(rows=[1]); time.sleep(2); put(rows=[1, 2])")
    states = []
    written = run_all.write_json

    def write_json(path, data):
        written(path, data)
        states.append((stored(tmp_path)["waits"]["status"], stored(tmp_path)["waits"]["result"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_all, "write_json", write_json)
        run_all.run_all([waiting], folder=tmp_path, budget=600, rehearse=False)
    assert states[0] == ("not started", None)
    assert states[1] == ("unfinished", {"rows": [1]})
    assert states[-1] == ("passed", {"rows": [1, 2]})


def test_the_processes_that_a_hanging_entry_started_end_with_it(script, tmp_path):
    text = "import subprocess, time; child = subprocess.Popen(['sleep', '600']); put(pid=child.pid); time.sleep(600)"
    rows = run_all.run_all([script("parent", text, seconds=2)], folder=tmp_path, budget=600, rehearse=False)["entries"]
    assert rows["parent"]["status"] == "timed out"
    stat = Path(f"/proc/{rows['parent']['result']['pid']}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child of the entry still runs")


def test_entries_run_in_order_until_the_budget_is_spent_and_a_later_run_keeps_them(script, tmp_path):
    entries = [script(name, f"put(rows={[name]})") for name in ("first", "second")]
    hanging = script("hanging", "import time; time.sleep(600)", seconds=1000)
    late = script("late", "put(rows=[])")
    rows = run_all.run_all([*entries, hanging, late], folder=tmp_path, budget=23, rehearse=False)["entries"]
    assert list(rows) == ["first", "second", "hanging", "late"]
    assert [row["status"] for row in rows.values()] == ["passed", "passed", "timed out", "not started"]
    assert rows["hanging"]["limit"] <= 23
    again = run_all.run_all([late], folder=tmp_path, budget=600, rehearse=False)["entries"]
    assert [row["status"] for row in again.values()] == ["passed", "passed", "timed out", "passed"]
    assert again["first"]["result"] == {"rows": ["first"]}


@pytest.mark.parametrize(("correctness", "code"), [(True, 1), (False, 0)])
def test_the_exit_status_tells_whether_correctness_was_shown(script, tmp_path, monkeypatch, correctness, code):
    entries = [script("fails", "sys.exit(1)", correctness=correctness), script("passes", "put()", correctness=True)]
    monkeypatch.setattr(run_all, "ENTRIES", entries)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(tmp_path)])
    assert run_all.main() == code
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--rehearse"])
    assert run_all.main() == 1, "a rehearsal has to pass as a whole"


def test_results_go_to_the_folder_that_the_environment_names(script, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(run_all, "ENTRIES", [script("passes", "put(rows=[1])")])
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert run_all.main() == 0
    assert stored(tmp_path / "out")["passes"]["result"] == {"rows": [1]}


def test_correctness_comes_before_timing_and_every_entry_is_listed_as_pending():
    checks = [entry.correctness for entry in ENTRIES]
    assert checks == sorted(checks, reverse=True)
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert all(Path(entry.command[0]).exists() for entry in ENTRIES)
    assert sum(entry.seconds for entry in ENTRIES if entry.correctness) < 60 * run_all.MINUTES / 2
    pending = (Path(run_all.__file__).parent / "PENDING.md").read_text()
    assert [name for name in (entry.name for entry in ENTRIES) if f"`{name}`" not in pending] == []


def test_a_record_is_whole_after_every_change(tmp_path):
    record = Record(tmp_path / "record.json")
    record.put(seed=1)
    record.add("rows", {"value": 0.5})
    record.add("rows", {"value": 1.5})
    assert json.loads((tmp_path / "record.json").read_text()) == {"seed": 1, "rows": [{"value": 0.5}, {"value": 1.5}]}
    assert os.listdir(tmp_path) == ["record.json"]


def test_the_commit_comes_from_a_file_where_there_is_no_repository(tmp_path):
    assert commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("abc123\n")
    assert commit(tmp_path) == "abc123"
