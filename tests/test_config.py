"""Recipes: every mistake is named by its key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from ctc_drafter.cli import app
from ctc_drafter.config import from_mapping, load_recipe
from ctc_drafter.errors import UserError


@dataclass
class Inner:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size must not be negative")


@dataclass
class Recipe:
    name: str
    rate: float = 0.5
    steps: int = 3
    fast: bool = False
    limit: int | None = None
    kind: Literal["a", "b"] = "a"
    files: list[str] = field(default_factory=list)
    mixture: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(Recipe, path)


def test_all_types(tmp_path: Path) -> None:
    got = recipe(
        tmp_path,
        "name: x\nrate: 1e-3\nsteps: 7\nfast: true\nlimit: 2\nkind: b\nfiles: [p, q]\nmixture: {s: 1}\n"
        "inner: {size: 4}",
    )
    assert got == Recipe("x", 0.001, 7, True, 2, "b", ["p", "q"], {"s": 1.0}, Inner(4))
    assert isinstance(got.mixture["s"], float)


def test_defaults_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nsteps: 7")
    assert load_recipe(Recipe, path, {"steps": 9, "rate": None}) == Recipe("x", steps=9)
    assert load_recipe(Recipe, None, {"name": "y"}) == Recipe("y")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name: x\ncolour: red", "unknown key 'colour'.*known keys are .*steps"),
        ("steps: 3", "key 'name' is missing"),
        ("", "key 'name' is missing"),
        ("name: 3", "name must be of type str, not 3"),
        ("name: x\nsteps: 1.5", "steps must be of type int, not 1.5"),
        ("name: x\nsteps: yes", "steps must be of type int, not True"),
        ("name: x\nsteps: many", "steps must be of type int"),
        ("name: x\nrate: fast", "rate must be of type float"),
        ("name: x\nrate: true", "rate must be of type float"),
        ("name: x\nfast: 1", "fast must be of type bool"),
        ("name: x\nlimit: a", "limit must be of type int"),
        ("name: x\nkind: c", "kind must be one of a, b, not 'c'"),
        ("name: x\nkind: [a]", "kind must be one of a, b"),
        ("name: x\nfiles: p", "files must be a list"),
        ("name: x\nfiles: [1]", r"files\[0\] must be of type str"),
        ("name: x\nmixture: [1]", "mixture must be a mapping"),
        ("name: x\nmixture: {s: a}", "mixture.s must be of type float"),
        ("name: x\ninner: 3", "inner must be a mapping"),
        ("name: x\ninner: {sice: 3}", "inner: unknown key 'sice'"),
        ("name: x\ninner: {size: -3}", "inner: size must not be negative"),
        ("- a", "must be a mapping of keys to values"),
        ("name: [", "cannot be read as YAML"),
        ("name: x\n1: 2", "unknown key '1'"),
        ("name: 2001-99-99", "cannot be read as YAML"),
        ("name: !!bool x", "cannot be read as YAML"),
        ("name: !!timestamp x", "cannot be read as YAML"),
        ("name: x\nsteps: " + "1" * 5000, "cannot be read as YAML"),
        ("name: x\nrate: " + "1" * 400, "rate is too large"),
        ("name: x\nfiles: " + "[" * 5000, "cannot be read as YAML"),
        ("name: 0x" + "f" * 5000, "name must be of type str, not a very large number"),
        ("name: x\n? 0x" + "f" * 5000 + "\n: 1", "unknown key 'a very large number'"),
        ("name: x\n? " + "c" * 5000 + "\n: 1", "unknown key 'c+…"),
        ("name: x\nkind: " + "c" * 5000, "kind must be one of a, b, not 'c+…"),
        ("name: x\nmixture: {? 0x" + "f" * 5000 + " : a}", "mixture.a very large number must be of type float"),
        ("name: x\nmixture: &a {s: *a}", "refers to itself"),
        ("c0: &c0 [1]\n" + "".join(f"c{i + 1}: &c{i + 1} [{f'*c{i},' * 4}]\n" for i in range(12)), "too large"),
    ],
)
def test_mistakes_are_named(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match) as error:
        recipe(tmp_path, text)
    assert "recipe.yaml" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(Recipe, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(Recipe, tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(Recipe, "a\0b")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(Recipe, tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (["steps=9"], {"steps": 9}),
        (["rate=1e-3", "fast=true", "limit=null", "kind=b"], {"rate": 0.001, "fast": True, "kind": "b"}),
        (["files=[p, q]"], {"files": ["p", "q"]}),
        (["mixture.s=2"], {"mixture": {"r": 1.0, "s": 2.0}}),
        (["mixture={s: 1}"], {"mixture": {"s": 1.0}}),
        (["inner.size=4"], {"inner": Inner(4)}),
        (["steps=1", "steps=2"], {"steps": 2}),
        (["name=a=b"], {"name": "a=b"}),
    ],
)
def test_settings_win_over_all_else(settings: list[str], changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nsteps: 7\nmixture: {r: 1}")
    want = {"name": "x", "steps": 8, "mixture": {"r": 1.0}, **changes}
    assert load_recipe(Recipe, path, {"steps": 8}, settings) == Recipe(**want)


def test_a_setting_can_give_a_required_key() -> None:
    assert load_recipe(Recipe, None, {}, ["name=x"]) == Recipe("x")


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("colour=red", "unknown key 'colour'.*known keys are .*steps"),
        ("inner.sice=3", "unknown key 'sice'"),
        ("steps=many", "steps must be of type int"),
        ("steps.x=1", "steps must be of type int"),
        ("name.x=1", "name must be of type str"),
        ("steps", "'steps': expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("inner.=3", "expected KEY=VALUE"),
        ("files=[p", "not YAML"),
    ],
)
def test_settings_that_cannot_be(setting: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_recipe(Recipe, None, {"name": "x"}, [setting])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["train", "distill", "pretrain"])
def test_the_commands_refuse_unknown_settings_before_any_work(command: str) -> None:
    options = ["--set", "output=x", "--set", "data=[]", "--set", "prompts=[]"]
    own = options[:2] + (options[4:] if command == "distill" else options[2:4])
    result = CliRunner().invoke(app, [command, *own, "--set", "colour=red"])
    assert result.exit_code == 2 and result.stdout == "" and "unknown key 'colour'" in result.stderr


def test_the_drafters_own_keys_are_settings_too() -> None:
    given = ["--set", "output=x", "--set", "data=[]", "--set", "target=nowhere"]
    result = CliRunner().invoke(app, ["train", *given, "--dry-run", "--set", "drafter.layrs=2"])
    assert result.exit_code == 2 and result.stdout == "" and "unknown key 'layrs'" in result.stderr


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("recipes/*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_fit_their_commands(path: Path) -> None:
    from ctc_drafter.drafters import CTCConfig
    from ctc_drafter.training.distill import DistillConfig
    from ctc_drafter.training.pretrain import PretrainConfig
    from ctc_drafter.training.trainer import TrainConfig

    kinds: list[Any] = [TrainConfig, DistillConfig, PretrainConfig]
    given = {"data": ["data.jsonl"], "output": "drafter"} if path.name == "ctc.yaml" else {}
    fitting = []
    for kind in kinds:
        try:
            fitting.append(load_recipe(kind, path, given))
        except UserError:
            continue
    assert len(fitting) == 1
    if isinstance(fitting[0], TrainConfig):
        from_mapping(CTCConfig, fitting[0].drafter, "drafter")
