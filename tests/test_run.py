"""The run directory: stages run once, outputs are atomic, one process at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pear_ray.config import Job
from pear_ray.errors import ConfigError
from pear_ray.run import (
    KEYS_SAFE_TO_CHANGE,
    LAYOUT,
    RunDir,
    atomic_folder,
    atomic_write,
    check_same_job,
    flatten,
    open_run,
    write_json,
)

DOCUMENT = {
    "run": {"dir": "run", "wait_seconds": 60},
    "model": {"path": "./model"},
    "generator": {"max_new_tokens": 8, "max_model_len": 16},
    "tasks": [{"name": "countdown"}],
}
SECONDS_TO_START = 60

# A process that opens the run directory of a resolved job.
HOLD = """
import logging, sys, time
from pathlib import Path
from pear_ray.config import read_job
from pear_ray.run import atomic_folder, open_run
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with open_run(read_job(Path(sys.argv[1]))) as run:
    if sys.argv[2] == "write":
        with atomic_folder(run.folder / "scored") as folder:
            (folder / "half").write_text("half")
            print("held", flush=True)
            time.sleep(600)
    print("held", flush=True)
    if sys.argv[2] == "hold":
        time.sleep(600)
"""


def job(**sections):
    return Job(**{**DOCUMENT, **sections})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start():
    """Starts another process on the run folder; all of them end with the test."""
    Path("job.json").write_text(job().model_dump_json())
    running = []

    def begin(action):
        words = [sys.executable, "-u", "-c", HOLD, "job.json", action]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def read(name):
    return json.loads(Path("run", name).read_text())


def events():
    return [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]


class Stage:
    """A stage that leaves its output and counts how often it was run."""

    def __init__(self, output="sft/export"):
        self.output, self.times = output, 0

    def __call__(self, job, run):
        self.times += 1
        with atomic_folder(run.folder / self.output) as folder:
            (folder / "model.safetensors").write_text(str(self.times))
        return {"times": self.times}


def run_stage(name, stage):
    with open_run(job()) as run:
        run.run_stage(name, stage)
        return run.is_done(name)


def test_a_finished_stage_is_not_repeated():
    stage = Stage()
    assert run_stage("sft", stage) and run_stage("sft", stage)
    assert stage.times == 1
    entry = read("manifest.json")["stages"]["sft"]
    assert entry["state"] == "done" and entry["facts"] == {"times": 1}
    assert entry["seconds"] >= 0 and not Path("run/events.jsonl").exists()


def grow(made_from, error=None):
    """What the block finds; it leaves one more file each time, and breaks off or ends."""
    with open_run(job()) as run, run.resumable_folder("scored", made_from) as folder:
        found = sorted(path.name for path in folder.glob("done-*"))
        (folder / f"done-{len(found)}").touch()
        if error:
            raise error
        (folder / "scored").mkdir()
        (folder / "scored" / "rows").write_text("rows")
    return found


def test_an_attempt_resumes_the_work_of_an_interrupted_one():
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            grow({"corpus": [1]}, OSError("gone"))
    assert not Path("run/scored").exists()
    assert grow({"corpus": (1,)}) == ["done-0", "done-1"]
    assert Path("run/scored/rows").read_text() == "rows"
    assert not Path("run/scored.partial").exists()
    with open_run(job()) as run:
        assert run.is_made_from("scored", {"corpus": (1,)})
        assert not run.is_made_from("scored", {"corpus": [2]})


def test_work_on_other_inputs_is_discarded_with_an_event():
    with pytest.raises(OSError, match="gone"):
        grow({"corpus": "a", "versions": "1"}, OSError("gone"))
    assert grow({"corpus": "b", "versions": "1"}) == []
    (event,) = events()
    assert event["kind"] == "discarded" and "corpus changed" in event["text"]


def test_refused_input_leaves_nothing():
    with pytest.raises(ConfigError, match="too many"):
        grow({"corpus": "a"}, ConfigError("too many"))
    assert not list(Path("run").glob("scored*"))


def test_a_stage_without_its_output_is_repeated_with_an_event():
    stage = Stage()
    run_stage("sft", stage)
    (Path("run/sft/export") / "model.safetensors").unlink()
    Path("run/sft/export").rmdir()
    assert run_stage("sft", stage) and stage.times == 2
    (event,) = events()
    assert (event["stage"], event["kind"]) == ("sft", "repeated")
    assert "sft/export" in event["text"]


def test_a_failed_stage_is_resumed_with_an_event():
    def breaks(job, run):
        with atomic_folder(run.folder / "sft/export") as folder:
            (folder / "half").write_text("half")
            raise RuntimeError("the network is gone")

    with pytest.raises(RuntimeError, match="the network is gone"):
        run_stage("sft", breaks)
    assert read("manifest.json")["stages"]["sft"]["state"] == "running"
    assert not Path("run/sft/export").exists()
    assert run_stage("sft", Stage())
    assert {p.name for p in Path("run/sft").iterdir()} == {"export"}
    assert {p.name for p in Path("run/sft/export").iterdir()} == {"model.safetensors"}
    (event,) = events()
    assert (event["stage"], event["kind"]) == ("sft", "resumed")


def test_the_seconds_of_failed_attempts_count_up_to_their_last_line():
    def breaks(job, run):
        started = run.manifest["stages"]["sft"]["started"]
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        os.utime(run.folder / "metrics.jsonl", (started + 40, started + 40))
        raise RuntimeError("the network is gone")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            run_stage("sft", breaks)
    os.utime("run/metrics.jsonl", (0, 0))
    os.utime("run/events.jsonl", (0, 0))
    assert run_stage("sft", Stage())
    entry = read("manifest.json")["stages"]["sft"]
    assert entry["seconds_before"] == pytest.approx(40, abs=1)
    assert entry["seconds"] < 5


def test_after_refused_input_a_corrected_job_may_use_the_folder():
    def refuses(job, run):
        raise ConfigError("corpus: no rows")

    with pytest.raises(ConfigError), open_run(job()) as run:
        run.run_stage("score", refuses)
    with open_run(job(sft={"epochs": 3})) as run:
        assert not run.is_done("score")
        run.run_stage("score", Stage("scored"))
    assert read("config.json")["sft"]["epochs"] == 3


def test_facts_of_a_finished_stage():
    run_stage("sft", Stage())
    with open_run(job()) as run:
        assert run.manifest["stages"]["sft"]["facts"] == {"times": 1}
        assert not run.is_done("rl")


def test_the_manifest_records_layout_versions_and_command():
    run_stage("sft", Stage())
    manifest = read("manifest.json")
    assert {"python", "ray", "torch", "deepspeed", "transformers"} <= manifest["versions"].keys()
    assert manifest["command"].startswith("pear-ray") and manifest["layout"] == LAYOUT
    assert Job(**read("config.json")) == job()


def test_a_new_folder_appears_when_it_is_complete():
    with open_run(job()) as run:
        with atomic_folder(run.folder / "a/b") as folder:
            (folder / "file").write_text("1")
            assert not Path("run/a/b").exists()
        assert Path("run/a/b/file").read_text() == "1"
        with atomic_folder(run.folder / "a/b") as folder:
            (folder / "other").write_text("2")
            assert Path("run/a/b/file").exists()
        assert {p.name for p in Path("run/a").iterdir()} == {"b"}
        assert {p.name for p in Path("run/a/b").iterdir()} == {"other"}


def test_a_failed_folder_leaves_the_earlier_one():
    with open_run(job()) as run:
        with atomic_folder(run.folder / "scored") as folder:
            (folder / "file").write_text("1")
        with pytest.raises(RuntimeError), atomic_folder(run.folder / "scored") as folder:
            (folder / "file").write_text("2")
            raise RuntimeError
    assert Path("run/scored/file").read_text() == "1"


def test_a_killed_process_leaves_no_half_written_folder(start):
    process = start("write")
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    assert not Path("run/scored").exists()
    with open_run(job()) as run, atomic_folder(run.folder / "scored") as folder:
        assert list(folder.iterdir()) == []
    assert [p.name for p in Path("run").iterdir() if "scored" in p.name] == ["scored"]


def test_a_failed_atomic_write_leaves_the_earlier_file():
    path = Path("rows")
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in Path().iterdir()] == ["rows"]


def test_json_is_written_atomically():
    path = Path("facts.json")
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with path.open() as opened_before:
        write_json(path, {"a": 3})
        assert json.load(opened_before) == {"a": 1}
    assert json.loads(path.read_text()) == {"a": 3}


def test_a_second_process_waits_until_the_first_is_killed(start):
    first = start("hold")
    assert first.stdout.readline() == "held\n"
    second = start("leave")
    assert "locked by another process" in second.stdout.readline()
    time.sleep(0.5)
    assert second.poll() is None
    first.kill()
    assert second.communicate(timeout=SECONDS_TO_START)[0] == "held\n"
    assert second.returncode == 0


def test_waiting_ends_after_run_wait_seconds(start):
    assert start("hold").stdout.readline() == "held\n"
    impatient = job(run={"dir": "run", "wait_seconds": 0.3})
    with pytest.raises(TimeoutError, match=r"run.wait_seconds"), open_run(impatient):
        pass


def test_an_error_releases_the_lock(start):
    with pytest.raises(RuntimeError), open_run(job()):
        raise RuntimeError
    assert start("leave").communicate(timeout=SECONDS_TO_START)[0] == "held\n"


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"dir": "run", "wait_seconds": 1}},
        {"run": {"dir": "./run", "wait_seconds": 60}},
        {"run": {"dir": "run", "wait_seconds": 60}, "tracking": {"tensorboard": True}},
    ],
)
def test_keys_that_change_no_result_may_change(sections):
    run_stage("sft", Stage())
    with open_run(job(**sections)) as run:
        assert run.is_done("sft")
    assert Job(**read("config.json")) == job(**sections)


@pytest.mark.parametrize(
    ("sections", "differing"),
    [
        ({"sft": {"level": "block"}}, "sft.level: there 'token', here 'block'"),
        ({"model": {"path": "./other"}}, "model.path: there './model', here './other'"),
        ({"behavior": {"teacher_plain": {"path": "./t"}}}, "behavior.teacher_plain.path: there None, here"),
        ({"arms": [{"name": "a"}]}, r"arms: there \[\], here \[\{'name': 'a'"),
        ({"run": {"dir": "run", "seed": 1}}, "run.seed: there 0, here 1"),
    ],
)
def test_another_job_is_refused_with_the_differing_key(sections, differing):
    run_stage("sft", Stage())
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=differing) as refusal, open_run(job(**sections)):
        pass
    (section,) = sections
    assert all(line.strip().startswith(section) for line in str(refusal.value).splitlines()[1:])
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert after == before
    assert run_stage("sft", Stage())


def test_a_new_key_has_its_default_in_an_old_run():
    run_stage("sft", Stage())
    path = Path("run/config.json")
    document = json.loads(path.read_text())
    del document["sft"]["sources"]
    path.write_text(json.dumps(document))
    with open_run(job()) as run:
        assert run.is_done("sft")
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"sft.sources: there \[\], here \['teacher_plain'\]"):
        check_same_job(job(sft={"sources": ["teacher_plain"]}), path)
    path.write_text(json.dumps(document | {"of_old": 1}))
    with pytest.raises(ConfigError, match="of_old: there 1, here None"):
        check_same_job(job(), path)


def test_keys_safe_to_change_exist():
    keys = dict(flatten(json.loads(job().model_dump_json())))
    for free in KEYS_SAFE_TO_CHANGE:
        assert any(key == free or key.startswith(f"{free}.") for key in keys), free


def test_flatten_reaches_every_leaf():
    document = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}], "f": None}
    assert dict(flatten(document)) == {"a.b": 1, "a.c": {}, "d": [{"e": 2}], "f": None}


def test_the_same_job_is_accepted():
    write_json(Path("config.json"), json.loads(job().model_dump_json()))
    check_same_job(job(), Path("config.json"))
    assert RunDir(job()).folder == Path("run").absolute()


def test_a_run_folder_of_an_older_layout_is_refused():
    run_stage("sft", Stage())
    manifest = read("manifest.json")
    assert manifest.pop("layout") == LAYOUT
    Path("run/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError) as refusal, open_run(job()):
        pass
    assert str(refusal.value) == (
        f"{Path('run/manifest.json').absolute()}: expected layout {LAYOUT}, got that of another"
        " version of pear-ray: use another run.dir and run again: sft"
    )
    assert read("manifest.json") == manifest


def test_a_manifest_that_is_cut_is_refused():
    run_stage("sft", Stage())
    Path("run/manifest.json").write_text('{"layout": 2, "sta')
    with pytest.raises(ConfigError, match=r"run/manifest\.json: expected JSON: "), open_run(job()):
        pass
