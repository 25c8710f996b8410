"""What pipeline.inspect says of a dataset is what the dataset holds; damage is named, not drawn."""

import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.atomic import hash_file
from pipeline.errors import UserError
from pipeline.inspect import print_profile
from pipeline.profile import END, Counts, Profile, profile_dataset
from pipeline.profile_figure import draw
from pipeline.shards import FORMAT, MANIFEST, TOKENIZER, VERSION, ShardWriter, dataset_digest
from pipeline.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def write_dataset(folder: Path, model: str, splits: dict[str, Sequence[str]], per_shard: int = 7) -> Path:
    """A dataset of texts, each from the source `even` or `odd` by its number."""
    tokenizer = Tokenizer(model)
    folder.mkdir()
    shutil.copy(model, folder / TOKENIZER)
    entries: dict[str, Any] = {}
    for split, texts in splits.items():
        (folder / split).mkdir()
        encoded = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        shards = []
        for number, start in enumerate(range(0, len(texts), per_shard)):
            with ShardWriter(folder / split / f"shard-{number:05d}", tokenizer.vocab_size) as writer:
                for tokens in encoded[start : start + per_shard]:
                    writer.append(np.array(tokens), np.array([len(tokens)]))
            shards.append(asdict(writer.record))
        by_source: dict[str, dict[str, Any]] = {}
        for number, source in enumerate(("even", "odd")):
            by_source[source] = {
                "documents": len(texts[number::2]),
                "tokens": sum(map(len, encoded[number::2])),
                "utf8_bytes": sum(len(text.encode()) for text in texts[number::2]),
                "dropped": {"too_short": number},
            }
        sizes = "documents", "tokens", "utf8_bytes"
        totals = {size: sum(part[size] for part in by_source.values()) for size in sizes}
        entries[split] = {**totals, "dropped": {"too_short": 1}, "by_source": by_source, "shards": shards}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "content": {"tokenizer": {}},
        "sources": [],
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": hash_file(folder / TOKENIZER),
            **{key: getattr(tokenizer, key) for key in ("vocab_size", "unk_id", "eos_id", "pad_id", "mask_id")},
        },
        "splits": entries,
    }
    manifest["digest"] = dataset_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def dataset(texts: list[str], bpe: str, tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", bpe, {"train": texts[:50], "valid": texts[50:]})


def change_manifest(dataset: Path, change: Any) -> None:
    manifest = json.loads((dataset / MANIFEST).read_text())
    change(manifest)
    (dataset / MANIFEST).write_text(json.dumps(manifest))


def printed(profile: Profile) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_profile(profile, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def drawn(profile: Profile) -> bytes:
    file = io.BytesIO()
    draw(profile, file)
    return file.getvalue()


def test_numbers_are_those_of_the_texts(dataset: Path, texts: list[str], bpe: str) -> None:
    tokenizer = Tokenizer(bpe)
    encoded = [tokenizer.encode(text) for text in texts]
    profile = profile_dataset(dataset)
    lengths = np.array([len(tokens) + 1 for tokens in encoded])
    found = profile.lengths
    assert (found.minimum, found.maximum) == (lengths.min(), lengths.max())
    for q, value in ((50, found.median), (90, found.p90), (99, found.p99)):
        assert value == np.percentile(lengths, q, method="inverted_cdf")
    assert sum(found.counts) == 60
    bins = np.searchsorted(found.edges, lengths, "right") - 1
    assert found.counts == np.bincount(bins, minlength=len(found.edges) - 1).tolist()

    assert profile.counts == Counts(60, int(lengths.sum()), sum(len(text.encode()) for text in texts))
    assert profile.splits["train"].shards == 8
    assert profile.sources is not None
    assert profile.sources["odd"].documents == 30
    assert profile.sources["odd"].tokens == lengths[1::2].sum()
    assert profile.dropped == {"too_short": 2}

    occurrences = Counter(token for tokens in encoded for token in tokens)
    special = {tokenizer.unk_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    vocabulary = profile.vocabulary
    assert (vocabulary.size, vocabulary.special) == (400, 4)
    for times, used in vocabulary.used.items():
        assert used == sum(count >= times for token, count in occurrences.items() if token not in special)
    assert vocabulary.used[1] + vocabulary.unused + vocabulary.special == 400
    # In this text only line ends have no piece of their own.
    line_ends = sum(text.count("\n") for text in texts)
    assert line_ends > 100
    assert vocabulary.byte_fallback_share == pytest.approx(line_ends / int(lengths.sum()))


def test_one_split_alone(dataset: Path, texts: list[str]) -> None:
    profile = profile_dataset(dataset, split="valid", samples=100)
    assert profile.counts.documents == 10
    assert sorted(sample.document for sample in profile.samples) == list(range(10))
    assert "train" not in printed(profile)
    with pytest.raises(UserError, match="no split 'test'; it has: train, valid"):
        profile_dataset(dataset, split="test")


def test_samples_are_the_same_each_time_and_end_visibly(texts: list[str], bpe: str, tmp_path: Path) -> None:
    odd = "bell \x07, escape \x1b[31m, C1 \x9b, NUL \x00, [bold]markup[/bold],\ttab\nline"
    data = write_dataset(tmp_path / "odd", bpe, {"train": [odd, *texts]})
    samples = profile_dataset(data, samples=61).samples
    assert [sample.document for sample in samples] == list(range(61))
    assert samples[0].text == f"bell ␇, escape ␛[31m, C1 \ufffd, NUL ␀, [bold]markup[/bold],\ttab\nline {END}"
    for sample, text in zip(samples[1:], texts, strict=True):
        assert sample.text.endswith(f" {END}")
        head = sample.text.removesuffix(f" {END}").split(" [… ")[0]
        assert text.startswith(head)
        assert (head == text) == (sample.tokens <= 161)
    few = profile_dataset(data, samples=4).samples
    assert len(few) == 4
    assert few == profile_dataset(data, samples=4).samples
    shown = printed(replace(profile_dataset(data), samples=samples[:1]))
    assert "[bold]markup[/bold]" in shown
    assert "\x1b" not in shown


def test_a_sample_of_the_tokens_says_so(dataset: Path) -> None:
    whole = profile_dataset(dataset).vocabulary
    part = profile_dataset(dataset, sample_tokens=5000).vocabulary
    assert part.of_tokens == whole.tokens == whole.of_tokens
    assert 4000 < part.tokens <= 5010
    assert (part.occurrences <= whole.occurrences).all()
    assert f"a sample of {part.tokens:,} of {whole.tokens:,} tokens" in printed(
        profile_dataset(dataset, sample_tokens=5000)
    )
    assert "all" in printed(profile_dataset(dataset))


def test_what_is_not_recorded_is_unknown(dataset: Path) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        for entry in manifest["splits"].values():
            del entry["by_source"], entry["dropped"]
            entry["utf8_bytes"] = None

    change_manifest(dataset, forget)
    profile = profile_dataset(dataset)
    assert profile.sources is None
    assert profile.counts.utf8_bytes is None
    shown = printed(profile)
    assert "Sources: unknown" in shown
    assert "Dropped: nothing" in shown
    assert profile.counts.bytes_per_token is None
    assert json.loads(json.dumps(profile.to_dict()))["splits"]["train"]["counts"]["utf8_bytes"] is None
    assert drawn(profile)


def test_pictures_of_every_kind(dataset: Path) -> None:
    """Taller with more rows, and never an error: many sources and reasons, one document, a name in other letters."""
    import struct

    def height(picture: bytes) -> int:
        assert picture.startswith(b"\x89PNG")
        return int(struct.unpack(">I", picture[20:24])[0])

    profile = profile_dataset(dataset)
    usual = height(drawn(profile))
    reasons = {f"reason_{number}": 1 + number**3 for number in range(40)}
    sources = {f"source $x_{number}$ _{{{number}": Counts(number, 10 + number, number) for number in range(300)}
    tall = height(drawn(replace(profile, dropped=reasons, sources=sources)))
    assert usual < tall < 3 * usual, "rows beyond the limit are added up"
    one = profile_dataset(write_dataset(dataset.parent / "one", str(dataset / TOKENIZER), {"train": ["a"]}))
    assert one.lengths.counts == [1]
    assert height(drawn(replace(one, name="日本語$"))) <= usual


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no manifest", "not a dataset"),
        ("cut", "shard-00001.bin.*bytes instead of"),
        ("lengths", "shard-00001.idx: damaged: its documents have"),
        ("negative length", "shard-00001.idx: damaged: a document of -"),
        ("ids", "holds an id outside the vocabulary of 400 pieces"),
        ("tokenizer", "tokenizer.model"),
    ],
)
def test_damage_is_named(dataset: Path, damage: str, message: str) -> None:
    stem = dataset / "train" / "shard-00001"
    index, tokens = stem.with_suffix(".idx"), stem.with_suffix(".bin")
    if damage == "no manifest":
        (dataset / MANIFEST).unlink()
    elif damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif damage in ("lengths", "negative length"):
        content = bytearray(index.read_bytes())
        content[34:38] = np.array([3 if damage == "lengths" else -3], "<i4").tobytes()
        index.write_bytes(content)
    elif damage == "ids":
        tokens.write_bytes(b"\xff\xff" + tokens.read_bytes()[2:])
    else:
        (dataset / TOKENIZER).write_bytes(b"another")
    with pytest.raises(UserError, match=message):
        profile_dataset(dataset)


def run(*arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.inspect", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding=encoding, env=environment)


def test_command_line(dataset: Path, tmp_path: Path) -> None:
    figure, numbers = tmp_path / "f.png", tmp_path / "n.json"
    done = run(str(dataset), "--samples", "2", "--figure", str(figure), "--json", str(numbers))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count(END) == 2
    assert "\x1b" not in done.stdout, "colours in a pipe"
    assert max(map(len, done.stdout.splitlines())) <= 120 + len(str(tmp_path))
    assert figure.read_bytes().startswith(b"\x89PNG")
    recorded = json.loads(numbers.read_text())
    assert recorded["splits"]["valid"]["counts"]["documents"] == 10
    assert len(recorded["samples"]) == 2
    assert "?</s>" in run(str(dataset), encoding="latin-1").stdout


def test_command_line_refuses(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "empty")], f"error: {tmp_path / 'empty'}: not a dataset"),
        ([str(dataset), "--split", "x"], "no split 'x'"),
        ([str(dataset), "--figure", str(tmp_path / "f.pdf")], "let its name end in .png"),
        ([str(dataset), "--json", str(tmp_path / "no" / "f.json")], "no such directory"),
        ([str(dataset), "--json", str(tmp_path / "empty")], f"{tmp_path / 'empty'}: cannot be written: Is a"),
        ([str(dataset), "--samples", "-1"], "not a number of 0 or more"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*f.*"))
