"""YAML, bases, overrides, and every problem in one message."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import PrepareConfig
from pipeline.errors import UserError
from pipeline.strict_yaml import StrictModel, load_config

ROOT = Path(__file__).parents[2]


class Inner(StrictModel):
    size: int = 1
    rate: float = 0.5
    names: tuple[str, ...] = ()


class Outer(StrictModel):
    inner: Inner = Inner()
    label: str
    limit: int | None = None


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str, model: Any = Outer) -> str:
    with pytest.raises(UserError) as caught:
        load_config(model, path, overrides)
    return str(caught.value)


def test_bases_in_order_then_file_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "a.yaml", "inner: {size: 2, rate: 3}\nlabel: a\n")
    write(tmp_path / "below" / "b.yaml", "base: a.yaml\ninner: {size: 4}\n")
    write(tmp_path / "c.yaml", "label: c\nlimit: 9")
    path = write(tmp_path / "d.yaml", "base: [below/b.yaml, c.yaml]\ninner: {names: [x, '${label}']}\n")
    config = load_config(Outer, path, ["inner.rate=1e-3", "limit=null"])
    assert config == Outer(inner=Inner(size=4, rate=0.001, names=("x", "c")), label="c", limit=None)


def test_an_override_replaces_a_list_or_one_item(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "label: a\ninner: {names: [x, y]}")
    assert load_config(Outer, path, ["inner.names.1=z"]).inner.names == ("x", "z")
    assert load_config(Outer, path, ["inner.names=[q]", "label=a=b"]) == Outer(inner=Inner(names=("q",)), label="a=b")


def test_configs_are_frozen(tmp_path: Path) -> None:
    config = load_config(Outer, write(tmp_path / "a.yaml", "label: a"))
    with pytest.raises(ValueError, match="frozen"):
        config.label = "b"


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = 'inner: {size: "8", rat: 1, names: ["${nowhere}"]}\nlimit: 1.5\nextra: 1'
    message = problems(write(tmp_path / "a.yaml", text), "nonsense", "inner.rate=fast")
    assert f"{tmp_path}/a.yaml: 8 problems" in message
    for part in (
        "override 'nonsense': not of the form key=value",
        "inner.names.0: Interpolation key 'nowhere' not found",
        "inner.size: Input should be a valid integer; found '8'",
        "inner.rat: unknown key; did you mean inner.rate?",
        "inner.rate (command line): Input should be a valid number; found 'fast'",
        "label: missing",
        "limit: Input should be a valid integer; found 1.5",
        "extra: unknown key; known here: inner, label, limit",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("=3", "override '=3': not of the form"),
        ("inner..size=3", "not of the form"),
        ("inner.size=[", "not valid YAML"),
        ("inner.names.5=x", "the list has no such item; give the whole list"),
    ],
)
def test_malformed_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in problems(write(tmp_path / "a.yaml", "label: a\ninner: {names: [x]}"), override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("label: [", "not valid YAML"),
        ("- label", "must be a mapping"),
        ("base: a.yaml", "is its own base"),
        ("base: nowhere.yaml", "nowhere.yaml (base of"),
        ("base: {x: 1}", "one path or a list"),
        ("base: [1]", "one path or a list"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problems(write(tmp_path / "a.yaml", text))


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in problems(tmp_path / "nowhere.yaml")


def test_bases_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", "base: a.yaml")
    assert "b.yaml → " in problems(write(tmp_path / "a.yaml", "base: b.yaml"))


def test_union_members_do_not_show_in_keys(tmp_path: Path) -> None:
    text = """
content:
  sources: [{type: jsonl, path: x, text_feild: y}, {type: tex, path: z}, {type: text}, {type: parquet, path: {a: b}}]
  tokenizer: {train: {vocab_size: 300}, path: a.model}
  splits: {train: 0.1}
sed: 3
execution: {output: out}
"""
    message = problems(write(tmp_path / "a.yaml", text), model=PrepareConfig)
    assert "content.sources.0.text_feild: unknown key; did you mean content.sources.0.text_field?" in message
    assert "content.sources.1: Input tag 'tex'" in message
    assert "content.sources.2.path: missing" in message
    assert "content.tokenizer: give exactly one of" in message
    assert "content.splits: 'train' cannot name a held-out split" in message
    assert message.count("content.sources.3.path: Input should be a valid ") == 2
    assert "8 problems" in message


def test_unknown_key_that_lives_elsewhere(tmp_path: Path) -> None:
    text = "content: {sources: [{type: text, path: x}], tokenizer: {path: m}, vocab_size: 3}\nexecution: {output: o}"
    message = problems(write(tmp_path / "a.yaml", text), model=PrepareConfig)
    assert "content.vocab_size: unknown key; did you mean content.tokenizer.train.vocab_size?" in message


@pytest.mark.parametrize("name", ["a/b", "", "train"])
def test_names_of_splits(name: str) -> None:
    content = {"sources": [{"type": "text", "path": "x"}], "tokenizer": {"path": "m"}, "splits": {name: 0.1}}
    with pytest.raises(ValueError, match="cannot name a held-out split"):
        PrepareConfig.model_validate({"content": content, "execution": {"output": "o"}})


def test_sources_must_not_share_a_name() -> None:
    source = {"type": "text", "path": "x"}
    with pytest.raises(ValueError, match="two sources are named text"):
        PrepareConfig.model_validate(
            {"content": {"sources": [source, source], "tokenizer": {"path": "m"}}, "execution": {"output": "o"}}
        )


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_name_no_absolute_path(path: Path) -> None:
    config = load_config(PrepareConfig, path)
    assert not config.execution.output.is_absolute()
    assert "/" not in str(config.content.record()).replace("refs/convert/parquet", "")  # a branch of the hub


def test_record_leaves_locations_out() -> None:
    def record(path: str) -> Any:
        content = {"sources": [{"type": "text", "path": path}], "tokenizer": {"path": path}}
        return PrepareConfig.model_validate({"content": content, "execution": {"output": "o"}}).content.record()

    assert record("here") == record("there")


def test_record_holds_every_split_whatever_its_name() -> None:
    splits = {"path": 0.1, "download": 0.2}
    content = {"sources": [{"type": "text", "path": "x"}], "tokenizer": {"path": "m"}, "splits": splits}
    config = PrepareConfig.model_validate({"content": content, "execution": {"output": "o"}})
    assert config.content.record()["splits"] == splits
