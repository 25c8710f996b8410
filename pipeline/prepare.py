"""Text to token shards: the Ray job and its command line.

    python -m pipeline.prepare CONFIG [key=value ...]

Stages: scan (hash the sources, cut them into units), duplicates, tokenizer, encode (units), write (shards), manifest.
What is finished is never done again; nothing counts before the manifest is there.
"""

import argparse
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pipeline import encode
from pipeline.atomic import hash_file, is_aside, read_json, sync_directory, write_aside, write_json
from pipeline.card import write_card
from pipeline.check import describe_sources, no_document_in, refuse_empty_splits, refuse_missing_mounts
from pipeline.clean import function_file
from pipeline.cluster import ClusterLostError, end_for_lost_cluster, in_sequence, ray_cluster, run_tasks, usable_cpus
from pipeline.config import PrepareConfig
from pipeline.duplicates import Flags, find_duplicates, fingerprint_unit
from pipeline.errors import INTERRUPTED_EXIT, UserError, run_command
from pipeline.locations import SourceFile
from pipeline.manifest import new_manifest
from pipeline.output_directory import Log, config_changes, locked, source_changes
from pipeline.progress import Progress
from pipeline.shards import MANIFEST, TOKENIZER, TRAIN, ShardRecord, TokenDataset, bin_path, idx_path, read_manifest
from pipeline.sources import Survey, cut_units, group_units, list_files
from pipeline.strict_yaml import load_config
from pipeline.tokenizer import Tokenizer

R = TypeVar("R")

LOG = "prepare.log"
DROPPED = "dropped.jsonl"
_WORKSPACE = ".work"
_FILES_AT_ONCE = 256


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make the dataset that `config` describes, or finish it, or find it done; returns its manifest.

    Raises:
        UserError: the sources, the configuration or the output directory are not what they should be.
    """
    files = list_files(config.content)
    refuse_empty_splits(config.content, files)
    output = config.execution.output.expanduser().absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = {entry.name for entry in output.iterdir()}
        if held and not held & {_WORKSPACE, MANIFEST, LOG}:
            raise UserError(
                f"execution.output: {output} holds other files ({min(held)}, …); give a directory of its own"
            )
        if MANIFEST not in held:
            (output / _WORKSPACE).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"execution.output: {output}: cannot be written: {error.strerror}") from None
    busy = f"execution.output: another preparation is writing {output}; wait for it to end"
    with locked(output / LOG, busy), Log(output / LOG) as say:
        return _Preparation(config, output, say).run(files)


class _Preparation:
    def __init__(self, config: PrepareConfig, output: Path, say: Callable[[str], None]) -> None:
        self.config, self.content, self.output, self.say = config, config.content, output, say
        self.workspace = output / _WORKSPACE
        self.seconds: dict[str, float] = {}

    def run(self, files: Sequence[SourceFile]) -> dict[str, Any]:
        if (self.output / MANIFEST).exists():
            return self._find_done(files)
        with ray_cluster(self.config.execution) as workers:
            with self._stage("scan"):
                surveys, units = self._scan(files, workers)
            with self._stage("duplicates"):
                flags = self._duplicates(units)
            with self._stage("tokenizer"):
                tokenizer = self._tokenizer(units, flags)
            with self._stage("encode"):
                ledger = self._encode(units, flags, tokenizer)
                self._refuse_changed_inputs(surveys, workers)
            with self._stage("write"):
                shards = self._write(len(units), ledger, tokenizer)
        return self._commit(surveys, tokenizer, ledger, shards)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)

    def _find_done(self, files: Sequence[SourceFile]) -> dict[str, Any]:
        manifest = read_manifest(self.output)
        batches = _batches(files, usable_cpus())
        with ThreadPoolExecutor(usable_cpus()) as pool:
            surveys = [found for batch in pool.map(self._survey, batches) for found in batch]
        self._refuse_changes(manifest, self._inputs(surveys))
        try:
            for split in manifest["splits"]:
                TokenDataset.open(self.output, split)
        except UserError as error:
            raise UserError(f"{error}. To make the dataset again, delete {self.output} first.") from None
        shutil.rmtree(self.workspace, ignore_errors=True)
        self.say(f"nothing to do: {self.output} holds this dataset, digest {manifest['digest']}")
        return manifest

    def _survey(self, files: Sequence[SourceFile]) -> list[Survey]:
        return encode.survey_files(self.content, files)

    def _scan(self, files: Sequence[SourceFile], workers: int) -> tuple[list[Survey], list[encode.Unit]]:
        jobs = [(self.content, batch, self.workspace) for batch in _batches(files, workers)]
        progress = Progress("scan", len(files), "files", self.say)
        surveys: list[Survey] = []
        for batch in self._run(encode.survey_files, jobs):
            surveys += batch
            progress.add(len(batch), n_bytes=sum(found.size or 0 for found in batch))
        surveys.sort(key=lambda found: (found.file.source, found.file.name))
        refuse_missing_mounts(surveys)
        self._bind_workspace(self._inputs(surveys))
        units = cut_units(surveys, self.content)
        n_bytes = sum(piece.n_bytes for unit in units for piece in unit)
        self.say(f"scan: {len(files)} files, {n_bytes / 1e6:.1f} MB of text in {len(units)} units; {workers} workers")
        return surveys, units

    def _inputs(self, surveys: Sequence[Survey]) -> dict[str, Any]:
        names = [source.name for source in self.content.sources]
        record: dict[str, Any] = {
            "content": self.content.record(),
            "sources": [found.record(names) for found in surveys],
        }
        if self.content.clean.function is not None:
            file = function_file(self.content.clean.function)
            record["content"]["clean"]["function_sha256"] = hash_file(file)
        if self.content.tokenizer.path is not None:
            path = Path(self.content.tokenizer.path).expanduser()
            try:
                record["tokenizer"] = {"sha256": hash_file(path)}
            except FileNotFoundError:
                raise UserError(f"content.tokenizer.path: {path}: no such file") from None
            except OSError as error:
                raise UserError(f"content.tokenizer.path: {path}: cannot be read: {error.strerror}") from None
        return record

    def _bind_workspace(self, inputs: dict[str, Any]) -> None:
        """Tie unfinished work to its inputs: what was made from others is never gone on with."""
        state, units = self.workspace / "inputs.json", self.workspace / "units"
        if any(units.glob("*.json")):
            old = json.loads(state.read_bytes())
            # A unit that is finished met no such error: what it holds is the same either way.
            for key in ("on_unreadable_file", "on_bad_row", "on_invalid_utf8"):
                if inputs["content"]["clean"][key] == "skip":
                    old["content"]["clean"][key] = "skip"
            self._refuse_changes(old, inputs)
        elif not state.exists() or json.loads(state.read_bytes()) != inputs:
            for entry in self.workspace.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for folder in (units, self.workspace / "shards"):
            folder.mkdir(exist_ok=True)
        write_json(state, inputs)

    def _refuse_changes(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if changes := _changes(old, new):
            shown = changes[:10] + ([f"and {len(changes) - 10} more"] if len(changes) > 10 else [])
            raise UserError(
                f"execution.output: {self.output} holds a dataset made from something else. What changed:\n  "
                + "\n  ".join(shown)
                + "\nGive a new directory (execution.output=DIR), take the change back, or delete this one."
            )

    def _run(
        self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], name: str | None = None
    ) -> Iterator[Any]:
        execution = self.config.execution
        return run_tasks(function, jobs, execution.workers, execution.task, name)

    def _run_units(
        self,
        function: Callable[..., R],
        todo: Sequence[int],
        job: Callable[[int], tuple[Any, ...]],
        units: Sequence[encode.Unit],
    ) -> Iterator[R]:
        """Run `function(*job(number))` for the units of these numbers; those that are read in sequence are one task."""
        wanted = set(todo)
        groups = ([number for number in group if number in wanted] for group in group_units(units))
        tasks = ((function, [job(number) for number in group]) for group in groups if group)
        for results in self._run(in_sequence, tasks, function.__name__):
            yield from results

    def _duplicates(self, units: Sequence[encode.Unit]) -> Flags | None:
        def run(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
            progress = Progress(f"duplicates ({function.__name__.replace('_', ' ')})", len(jobs), "parts", self.say)
            if function is fingerprint_unit:
                by_unit = {job[1]: job for job in jobs}
                results = self._run_units(function, list(by_unit), by_unit.__getitem__, units)
            else:
                results = self._run(function, jobs)
            for result in results:
                progress.add(1)
                yield result

        return find_duplicates(self.content, units, self.workspace, run)

    def _tokenizer(self, units: Sequence[encode.Unit], flags: Flags | None) -> Tokenizer:
        target = self.output / TOKENIZER
        done = self.workspace / "tokenizer.done"
        if not (done.exists() and target.exists() and done.read_text() == hash_file(target)):
            if self.content.tokenizer.path is not None:
                model = Tokenizer(Path(self.content.tokenizer.path).expanduser()).path.read_bytes()
            else:
                self.say("tokenizer: training")
                (model,) = self._run(encode.make_tokenizer, [(self.content, units, flags)])
            with write_aside(target) as file:
                file.write(model)
            with write_aside(done) as file:
                file.write(hash_file(target).encode())
        tokenizer = Tokenizer(target)
        self.say(f"tokenizer: {tokenizer.vocab_size} pieces")
        return tokenizer

    def _encode(self, units: Sequence[encode.Unit], flags: Flags | None, tokenizer: Tokenizer) -> encode.Ledger:
        total, todo = encode.Ledger(), []
        sha256, samples = hash_file(tokenizer.path), self.config.execution.dropped_samples
        for number in range(len(units)):
            if (entry := encode.read_ledger(self.workspace, number)) is None:
                todo.append(number)
            else:
                total.add(entry, samples)
        if len(todo) < len(units):
            self.say(f"encode: going on; {len(units) - len(todo)} of {len(units)} units are finished")
        progress = Progress("encode", len(units), "units", self.say, done=len(units) - len(todo))

        def job(number: int) -> tuple[Any, ...]:
            marked = flags.of(number) if flags else None
            return self.content, number, units[number], marked, tokenizer.path, sha256, self.workspace, samples

        # Taken from the task: another machine's new file may be invisible here for a while (NFS).
        for number, entry in self._run_units(encode.encode_unit, todo, job, units):
            total.add(entry, samples)
            done = entry.total()
            n_bytes = sum(piece.n_bytes for piece in units[number])
            progress.add(1, documents=done.documents, tokens=done.tokens, n_bytes=n_bytes)
        return total

    def _refuse_changed_inputs(self, surveys: Sequence[Survey], workers: int) -> None:
        """Of a file that was written to while it was read, nobody knows which content the units hold."""
        advice = f"delete {self.workspace}, in which text of both contents may lie, and start again."
        if changes := _changes(read_json(self.workspace / "inputs.json"), self._inputs(surveys)):
            raise UserError(f"{changes[0]}: changed while it was used: {advice}")
        read = [(found.file.url, found.state) for found in surveys if found.state]
        for urls in self._run(encode.changed_files, [(batch,) for batch in _batches(read, workers)]):
            if urls:
                raise UserError(
                    f"{urls[0]}: changed after it was hashed. If only its time did, run the same command again. "
                    f"Otherwise {advice}"
                )

    def _write(self, units: int, ledger: encode.Ledger, tokenizer: Tokenizer) -> dict[str, list[ShardRecord]]:
        shards: dict[str, dict[int, ShardRecord]] = {}
        jobs: list[tuple[Any, ...]] = []
        for split in encode.split_names(self.content):
            if not ledger.total(split).documents:
                raise UserError(self._explain_empty(split, ledger))
            (self.output / split).mkdir(exist_ok=True)
            shards[split] = {}
            plan = encode.plan_shards(self.workspace, units, split, self.content.shard_tokens)
            jobs += [
                (self.workspace, self.output, split, number, parts, tokenizer.vocab_size)
                for number, parts in enumerate(plan)
            ]
        progress = Progress("write", len(jobs), "shards", self.say)
        for split, number, record in self._run(encode.assemble_shard, jobs):
            shards[split][number] = record
            progress.add(1, n_bytes=record.bytes)
        self.say(f"write: {len(jobs)} shards, {sum(r.bytes for s in shards.values() for r in s.values()) / 1e6:.1f} MB")
        return {split: [records[number] for number in sorted(records)] for split, records in shards.items()}

    def _explain_empty(self, split: str, ledger: encode.Ledger) -> str:
        total = ledger.total()
        if not total.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(total.dropped.items()))
            return f"content.sources: no document with text{f' (dropped: {reasons})' if reasons else ''}"
        return f"{no_document_in(split, total.documents)}, in a new execution.output or after deleting {self.output}"

    def _commit(
        self,
        surveys: Sequence[Survey],
        tokenizer: Tokenizer,
        ledger: encode.Ledger,
        shards: dict[str, list[ShardRecord]],
    ) -> dict[str, Any]:
        inputs = self._inputs(surveys)
        splits: dict[str, Any] = {}
        for split, records in shards.items():
            by_source = {source.name: ledger.at(split, source.name) for source in self.content.sources}
            if split == TRAIN:
                for found in surveys:
                    by_source[self.content.sources[found.file.source].name].dropped.update(found.skipped)
            splits[split] = {
                **ledger.total(split).record(),
                "by_source": {source: counts.record() for source, counts in by_source.items()},
                "shards": [asdict(record) for record in records],
            }
            self._remove_others(self.output / split, records)
            sync_directory(self.output / split)
        self._remove_others(self.output, [])
        manifest = new_manifest(
            content=inputs["content"],
            sources=inputs["sources"],
            tokenizer=tokenizer,
            eos_id=tokenizer.eos_id,
            splits=splits,
            execution=self.config.execution.model_dump(mode="json"),
            seconds=self.seconds,
        )
        self._write_samples(ledger)
        write_card(self.output, manifest)
        write_json(self.output / MANIFEST, manifest)
        shutil.rmtree(self.workspace, ignore_errors=True)
        for split, entry in splits.items():
            self.say(
                f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
                f"{entry['utf8_bytes']:,} bytes of text, {len(entry['shards'])} shards"
            )
        for reason, count in manifest["dropped"].items():
            self.say(f"dropped: {count} {reason}")
        self.say(f"done: {self.output}, digest {manifest['digest']}")
        return manifest

    @staticmethod
    def _remove_others(folder: Path, records: Sequence[ShardRecord]) -> None:
        """Remove what killed processes and abandoned attempts left: files half written, shards that are not ours."""
        ours = {path(folder / record.name) for record in records for path in (bin_path, idx_path)}
        for file in folder.iterdir():
            if file.is_file() and (is_aside(file) or (file.name.startswith("shard-") and file not in ours)):
                file.unlink()

    def _write_samples(self, ledger: encode.Ledger) -> None:
        if self.config.execution.dropped_samples:
            with write_aside(self.output / DROPPED) as file:
                for _, samples in sorted(ledger.samples.items()):
                    for sample in samples:
                        line = {name: value for name, value in sample.items() if name != "order"}
                        file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the inputs of two preparations, a line each."""
    changes = config_changes(old["content"], new["content"], "content")
    changes += source_changes(old["sources"], new["sources"])
    if "tokenizer" in new and old["tokenizer"]["sha256"] != new["tokenizer"]["sha256"]:
        changes.append("content.tokenizer.path: another tokenizer")
    return changes


def _batches(files: Sequence[R], workers: int) -> list[list[R]]:
    """Several files a task where there are many, and still several tasks a worker."""
    size = min(max(1, len(files) // (8 * workers)), _FILES_AT_ONCE)
    return [list(files[start : start + size]) for start in range(0, len(files), size)]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.prepare",
        description="Turn text into token shards. A command that was interrupted goes on where it stopped when it is "
        "run again.",
        epilog="Exit status: 0 done, 2 something to mend (said in one message), 130 interrupted, 1 anything else.",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML file such as configs/data/own-text.yaml; its keys are documented in pipeline/config.py, "
        "what they are for in docs/data.md",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="replaces a key of CONFIG: content.sources.0.path=TEXTS, execution.output=DIR",
    )
    parser.add_argument(
        "--check", action="store_true", help="only list files, fields and the first row of each source; make nothing"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = load_config(PrepareConfig, arguments.config, arguments.overrides)
        if arguments.check:
            print("\n".join(describe_sources(config.content)))
        else:
            prepare(config)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", flush=True)
        return INTERRUPTED_EXIT
    except ClusterLostError as error:
        end_for_lost_cluster(error)
    return 0


if __name__ == "__main__":
    run_command(main)
