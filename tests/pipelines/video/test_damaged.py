"""Bad values in the files of a saved pipeline: one sentence that names the file, before weights are read."""

from __future__ import annotations

import json
import shutil

import pytest

from millstream.pipelines.memory import plan_for
from millstream.pipelines.recipes import RECIPES, Recipe, as_config, find_recipe
from millstream.pipelines.video import VideoPipeline
from millstream.ui import cli


@pytest.fixture
def folder(make, tmp_path):
    make("longlive").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edited(path, change):
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def refuses(folder, message, *, planned=True, **settings):
    for load in (VideoPipeline.from_pretrained, plan_for) if planned else (VideoPipeline.from_pretrained,):
        with pytest.raises(ValueError, match=message) as told:
            load(folder, **settings)
        assert "\n" not in str(told.value)


RECIPE = [
    ("timesteps", "abc", "timesteps must be a list of numbers, got 'abc'"),
    ("timesteps", [1000, "x"], r"timesteps must be a list of numbers, got \[1000, 'x'\]"),
    ("timesteps", [1000, None], "timesteps must be a list of numbers"),
    ("timesteps", [], "timesteps must decrease"),
    ("chunk", "3", "chunk must be a whole number from 1 on, got '3'"),
    ("chunk", 2.5, "chunk must be a whole number from 1 on, got 2.5"),
    ("window", None, "window must be a whole number from 1 on, got None"),
    ("sinks", -1, "sinks must be a whole number from 0 on, got -1"),
    ("shift", "a", "shift must be a number from 0 on, got 'a'"),
    ("motion", float("nan"), "motion must be a number from 0 on, got nan"),
    ("warped", "no", "warped must be true or false, got 'no'"),
    ("name", 3, "name must be words, got 3"),
    ("position", "here", "position must be absolute or sink, got 'here'"),
    ("plan", [1], "plan must be staircase, triangle or batch"),
    ("colour", 3, "the recipe holds 'colour'; a recipe has name, timesteps"),
]


@pytest.mark.parametrize(("name", "value", "message"), RECIPE)
def test_a_saved_recipe_that_makes_no_sense_is_named_with_its_file(folder, capsys, name, value, message):
    index = folder / "model_index.json"
    edited(index, lambda stored: stored["recipe"].update({name: value}))
    refuses(folder, f"model_index.json: {message}")
    assert cli.main(["info", "--model", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    VideoPipeline.from_pretrained(folder, recipe="longlive")  # another one is the way out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("krae", "there is no recipe 'krae'"),
        (None, "a recipe is given by its name or by its values, got None"),
        ([], r"a recipe is given by its name or by its values, got \[\]"),
        ({"name": "x"}, "the recipe has no timesteps"),
    ],
)
def test_what_is_no_recipe_at_all_is_refused_too(folder, value, message):
    edited(folder / "model_index.json", lambda stored: stored.update(recipe=value))
    refuses(folder, f"model_index.json: {message}")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_read_back_as_it_was_written(name):
    assert find_recipe(json.loads(json.dumps(as_config(RECIPES[name])))) == RECIPES[name]
    assert Recipe("mine", [1000, 500]).timesteps == (1000.0, 500.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("size", "abc", r"size must be \(height, width\) in pixels, got 'abc'"),
        ("size", [16, "32"], r"size must be \(height, width\) in pixels, got \[16, '32'\]"),
        ("size", None, r"size must be \(height, width\)"),
        ("rate", "x", "rate must be pictures per second, above 0, got 'x'"),
        ("rate", 0, "rate must be pictures per second, above 0, got 0"),
        ("text_length", 0, "text_length must be a whole number of tokens from 1 on, got 0"),
        ("text_length", "x", "text_length must be a whole number of tokens from 1 on, got 'x'"),
    ],
)
def test_saved_settings_that_make_no_sense_are_named(folder, make, name, value, message):
    edited(folder / "model_index.json", lambda stored: stored.update({name: value}))
    refuses(folder, f"model_index.json: {message}")
    with pytest.raises(ValueError, match=message):
        make("longlive", **{name: value})


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("{bad", "is damaged"), ("[1]", "holds a list, not settings by name"), ("\ufffd", "is damaged")],
)
def test_a_damaged_tokenizer_is_named(folder, file, text, message):
    (folder / "tokenizer" / file).write_text(text)
    refuses(folder, f"tokenizer/{file} {message}")


def test_files_that_make_no_tokenizer_or_another_models_are_refused(folder):
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    whole = tokenizer.read_text()
    tokenizer.write_text("{}")
    refuses(folder, r"the files in .*/tokenizer make no tokenizer \(KeyError", planned=False)
    tokenizer.write_text(whole)
    edited(tokenizer, lambda stored: stored["model"]["vocab"].update(whale=5000))
    refuses(folder, "the tokenizer gives words numbers up to 5000, the text encoder knows 13", planned=False)
    shutil.rmtree(tokenizer.parent)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        plan_for(folder)
